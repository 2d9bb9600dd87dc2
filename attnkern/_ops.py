"""Operators: schemas in both namespaces, fake kernels, loading of the compiled libraries. Imports torch only.

``attnkern::*`` holds the compiled kernels, ``attnkern_triton::*`` the Triton ones, so that both can be compared in one
process and a missing binary never looks like a missing operator.
"""

import importlib
import mmap
import os
from pathlib import Path

import torch

from attnkern._layout import in_layout
from attnkern._schemas import HASH, SCHEMAS


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that features of ``dtype`` are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- fake kernels: shapes, dtypes and strides without data ---------------------------------------------------------


def _stats(rectangle, dtype, rescale):
    return rectangle.new_empty((rectangle.shape[0], 7 if rescale else 0), dtype=dtype)


def _window_map_fwd(rectangle, height, width, scale, rescale, aspect):
    dtype = wide(rectangle.dtype)
    return rectangle.new_empty((rectangle.shape[0], height, width), dtype=dtype), _stats(rectangle, dtype, rescale)


def _window_map_bwd(grad_map, rectangle, stats, scale, rescale, aspect):
    return torch.empty_like(rectangle)


def _window_fwd(x, rectangle, scale, rescale, residual, aspect):
    n, _, height, width = x.shape
    dtype = wide(x.dtype)
    return torch.empty_like(x), x.new_empty((n, height, width), dtype=dtype), _stats(rectangle, dtype, rescale)


def _features_grad(x, needed):
    return torch.empty_like(x) if needed else x.new_empty((0,))


def _window_bwd(grad_output, grad_map, x, rectangle, stats, scale, rescale, residual, aspect, need_grad_x):
    return _features_grad(x, need_grad_x), torch.empty_like(rectangle)


def _quantized(a, anchors, dtype):
    return (
        torch.empty_like(a),
        torch.empty_like(a, dtype=torch.int64),
        a.new_empty((), dtype=dtype),
        a.new_empty((), dtype=dtype),
        torch.empty_like(anchors, dtype=torch.int64),
        torch.empty_like(anchors, dtype=dtype),
    )


def _quantize_fwd(a, anchors, divisor):
    return _quantized(a, anchors, wide(a.dtype))


def _quantize_bwd(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals, divisor):
    return torch.empty_like(a), torch.empty_like(anchors)


def _anchor_fwd(x, a, anchors, residual, divisor):
    return (torch.empty_like(x), *_quantized(a, anchors, wide(x.dtype)))


def _anchor_bwd(
    grad_output, grad_values, grad_anchor_loss, grad_commitment_loss, x, a, anchors, indices, residuals,
    residual, divisor, need_grad_x,
):  # fmt: skip
    return _features_grad(x, need_grad_x), torch.empty_like(a), torch.empty_like(anchors)


def _pool_fwd(local, query):
    n, c, *positions = local.shape
    dtype = wide(local.dtype)
    attention = local.new_empty((n, *positions), dtype=dtype)
    pooled_wide = local.new_empty((0,) if local.dtype == dtype else (n, c), dtype=dtype)
    return local.new_empty((n, c)), attention, torch.empty_like(attention), pooled_wide


def _pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, need_grad_local):
    return _features_grad(local, need_grad_local), torch.empty_like(query)


# --- definition ------------------------------------------------------------------------------------------------------


def _triton_kernel(name):
    """The Triton launcher of an operator, imported on first use: importing Triton costs 0.4 s."""
    stem = name.split("_")[0]
    module = f"attnkern._triton.{'quantize' if stem == 'anchor' else stem}"
    launch = None

    def kernel(*args):
        nonlocal launch
        if launch is None:
            launch = in_layout(name, getattr(importlib.import_module(module), name))
        return launch(*args)

    return kernel


#: Triton runs on CPU tensors only when it interprets; the variable is Triton's own, read when a kernel is defined.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def define(namespace: str, kernel=None, keys: tuple[str, ...] = ()) -> torch.library.Library:
    """The operators in a namespace, with their fake kernels, and ``kernel(name)`` for each of some dispatch keys.

    An operator lives as long as its library, and a namespace can be defined once. The library is therefore kept in the
    namespace, where a second import of attnkern, after ``sys.modules`` was cleared, finds it.

    Raises:
        ImportError: the operators of another version of attnkern have been defined in this process.
    """
    packets = getattr(torch.ops, namespace)
    library, version = getattr(packets, "_library", (None, HASH))
    if version != HASH:
        raise ImportError("attnkern: another version of it was imported in this process before: restart the process")
    if library is None:
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", in_layout(name, globals()[f"_{name}"]), lib=library)
            for key in keys:
                library.impl(name, kernel(name), key)
        packets._library = library, HASH
    return library


define("attnkern")
define("attnkern_triton", _triton_kernel, ("CUDA", "CPU") if TRITON_INTERPRETS else ("CUDA",))


class _Handles:
    """One attribute per operator: its default overload in ``namespace``."""

    def __init__(self, namespace):
        packets = getattr(torch.ops, namespace)
        for name in SCHEMAS:
            setattr(self, name, getattr(packets, name).default)


#: Operator handles by backend.
BACKENDS = {"native": _Handles("attnkern"), "triton": _Handles("attnkern_triton")}


# --- compiled libraries ----------------------------------------------------------------------------------------------


def _load(stem: str) -> str | None:
    """Load ``attnkern/<stem>.*.so``. Returns why it cannot be used, or None when it is loaded."""
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
    except (OSError, ValueError) as error:  # ValueError: an empty file has no map
        return f"{path.name} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    """Load the CUDA library where PyTorch is built for CUDA. Returns as :func:`_load` does."""
    if torch.version.cuda:
        return _load("_C_cuda")
    if torch.version.hip:
        return "its CUDA kernels are for NVIDIA GPUs and this PyTorch is built for ROCm: Triton runs there"
    return "this PyTorch is a CPU build: install one built for CUDA"


#: Why the compiled kernels cannot be used on a device type; None when they can.
NATIVE_REASON = {"cpu": _load("_C"), "cuda": _load_cuda()}
