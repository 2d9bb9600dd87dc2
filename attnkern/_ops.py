"""The operators in both namespaces, and loading of the compiled libraries. Imports torch only.

``attnkern::*`` holds the compiled kernels, ``attnkern_triton::*`` the Triton ones, so that both can be compared in one
process and a missing library does not surface as a missing operator.
"""

import importlib
import mmap
import os
from pathlib import Path

import torch

from attnkern._layout import in_layout
from attnkern._operators import OPERATORS
from attnkern._schemas import HASH, SCHEMAS

# --- definition ------------------------------------------------------------------------------------------------------


def _triton_kernel(name: str):
    """The Triton launcher of an operator, imported on first use: importing Triton costs 0.4 s."""
    operator, launch = OPERATORS[name], None

    def kernel(*args):
        nonlocal launch
        if launch is None:
            module = importlib.import_module(f"attnkern._triton.{operator.triton}")
            launch = in_layout(operator.features, getattr(module, name))
        return launch(*args)

    return kernel


#: Whether Triton interprets kernels, which lets them run on CPU tensors. Triton reads the variable at their definition.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def define(namespace: str, kernel=None, keys: tuple[str, ...] = ()) -> torch.library.Library:
    """Define the operators in a namespace, with fake kernels, and with ``kernel(name)`` for each of the dispatch keys.

    An operator exists as long as its library, and a namespace can be defined only once. The library is therefore stored
    in the namespace, where a second import of attnkern (after ``sys.modules`` was cleared) finds it.

    Raises:
        ImportError: another version of attnkern has defined its operators in this process.
    """
    packets = getattr(torch.ops, namespace)
    library, version = getattr(packets, "_library", (None, HASH))
    if version != HASH:
        raise ImportError("attnkern: another version was imported earlier in this process: restart the process")
    if library is None:
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            operator = OPERATORS[name]
            fake = in_layout(operator.features, operator.fake)
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
            for key in keys:
                library.impl(name, kernel(name), key)
        packets._library = library, HASH
    return library


define("attnkern")
define("attnkern_triton", _triton_kernel, ("CUDA", "CPU") if TRITON_INTERPRETS else ("CUDA",))


class Handles:
    """The operators of a namespace: one attribute per operator, its default overload."""

    def __init__(self, namespace):
        packets = getattr(torch.ops, namespace)
        for name in SCHEMAS:
            setattr(self, name, getattr(packets, name).default)


#: The operators of each backend.
BACKENDS = {"native": Handles("attnkern"), "triton": Handles("attnkern_triton")}


# --- compiled libraries ----------------------------------------------------------------------------------------------


def _load(stem: str) -> str | None:
    """Load ``attnkern/<stem>.*.so``. Returns why it cannot be used, or None if it is loaded."""
    found = sorted(Path(__file__).parent.glob(f"{stem}.*so"))
    if not found:
        needed = " where nvcc is found (else set CUDA_HOME)" if stem == "_C_cuda" else ""
        return f"attnkern/{stem} is not built: run `pip install --no-build-isolation .` in the source tree{needed}"
    path = found[0]
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            if image.find(f"attnkern-schema:{HASH}".encode()) < 0:
                return f"{path.name} was built for another version of attnkern: rebuild it"
        torch.ops.load_library(path)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        return f"{path.name} does not load: {error}"
    key = "CUDA" if stem == "_C_cuda" else "CPU"
    missing = [name for name in SCHEMAS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"attnkern::{name}", key)]
    if missing:
        return f"{path.name} has no kernels for {', '.join(missing)}: their sources may be missing in csrc/sources.txt"
    return None


def _load_cuda() -> str | None:
    """Load the CUDA library if PyTorch is built for CUDA. Returns the same as :func:`_load`."""
    if torch.version.cuda:
        return _load("_C_cuda")
    if torch.version.hip:
        return "its CUDA kernels are for NVIDIA GPUs and this PyTorch is built for ROCm: Triton runs there"
    return "this PyTorch is a CPU build: install one built for CUDA"


#: Why the compiled kernels cannot be used on each device type, or None if they can.
NATIVE_REASON = {"cpu": _load("_C"), "cuda": _load_cuda()}
