"""Which backends are available, why one is not, and which one is chosen. No other module decides this.

The backend is chosen by the argument ``backend=``, else by :func:`use_backend`, else by the environment variable
``ATTNKERN_BACKEND`` (read at import), else automatically. An explicit choice never falls back to another backend. The
automatic choice skips Triton if its first kernel fails.
"""

import functools
import importlib.util
import os
import warnings
from typing import Self

import torch

from attnkern import _ops
from attnkern._checks import describe
from attnkern._tracing import recording

NAMES = ("triton", "native", "reference")

#: Lowest compute capability of each backend's kernels on NVIDIA GPUs.
_LOWEST_CAPABILITY = {"triton": (8, 0), "native": (7, 5)}

_TRITON_FOUND = importlib.util.find_spec("triton") is not None


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run here, or None if it can."""
    from importlib import metadata

    def version(package):
        try:
            return tuple(map(int, metadata.version(package).split(".")[:2]))
        except metadata.PackageNotFoundError:  # Triton is also distributed under other names
            return None

    numpy, triton = version("numpy"), version("triton")
    if numpy is None:
        return "its interpreter needs NumPy: pip install numpy"
    if numpy >= (2, 4) and triton is not None and triton < (3, 7):
        return "its interpreter before Triton 3.7 needs a NumPy before 2.4: pip install 'numpy<2.4'"
    return None


#: Determined at import, because code that torch.compile traces must not look for packages.
_INTERPRETER_FAULT = _interpreter_fault() if _TRITON_FOUND and _ops.TRITON_INTERPRETS else None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _validated(name, source):
    # The type is checked first, because ``in`` would compare an array element by element.
    if name is not None and not (isinstance(name, str) and name in NAMES):
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, NAMES))} or None, got {describe(name)}")
    return name


# A plain module global: torch.compile guards on it and recompiles when it changes; a ContextVar would break the graph.
_current = _validated(os.environ.get("ATTNKERN_BACKEND") or None, "ATTNKERN_BACKEND")


class use_backend:
    """Choose the backend of every attnkern function in this process, until changed or until the ``with`` block ends.

    ``attnkern.use_backend("reference")`` sets it; ``with attnkern.use_backend("native"): ...`` restores the previous
    choice at the end. ``None`` means automatic. The state is process-wide, not per thread. A backward pass uses the
    backend that its forward used. If two objects are created before the first is entered (``context_fn`` of a
    checkpoint does this), the second one's choice is in effect until then; use the argument ``backend=`` there.

    Raises:
        ValueError: ``name`` is not "triton", "native", "reference" or None.
    """

    def __init__(self, name: str | None):
        global _current
        self._name = _validated(name, "use_backend: name")
        self._before = [_current]  # the choices to restore at the end of each block, the innermost last
        self._fresh = True
        _current = name

    def __enter__(self) -> Self:
        global _current
        if not self._fresh or _current != self._name:  # entered again, or changed since it was created
            self._before.append(_current)
            _current = self._name
        self._fresh = False
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._before.pop()


def current() -> str | None:
    """The backend that :func:`use_backend` or the environment chose; or None for the automatic choice."""
    return _current


def reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot run tensors of ``dtype`` on ``device``; or None if it can."""
    if name == "reference":
        return None
    kind = device.type
    if recording():
        missing = "a TorchScript or ONNX program has only PyTorch's own operators; torch.export keeps these kernels"
    elif name == "native":
        known = kind in _ops.NATIVE_REASON
        missing = _ops.NATIVE_REASON[kind] if known else f"it has kernels for cpu and cuda, not for {kind}"
    elif not _TRITON_FOUND:
        package = "pytorch-triton-rocm (installed with PyTorch's ROCm wheels)" if torch.version.hip else "triton"
        missing = f"Triton is not installed: pip install {package}"
    elif dtype == torch.float64:
        missing = "its kernels compute in float32 and do not take float64"
    elif kind == "cpu" and not _ops.TRITON_INTERPRETS:
        missing = "it needs CUDA tensors (on a CPU it runs only if TRITON_INTERPRET=1 is set before Python starts)"
    elif kind == "cpu":
        missing = _INTERPRETER_FAULT
    elif kind != "cuda":
        missing = f"it has kernels for cuda, not for {kind}"
    else:
        missing = None
    # AMD GPUs also have the type cuda, but other capability numbers. While compiling, the capability is not queried,
    # because a traced program must not depend on the machine that traces it.
    nvidia = kind == "cuda" and not torch.version.hip
    if missing is None and nvidia and not torch.compiler.is_compiling():
        capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
        if capability < _LOWEST_CAPABILITY[name]:
            missing = "it needs compute capability {}.{}, {} has {}.{}".format(
                *_LOWEST_CAPABILITY[name], device, *capability
            )
    return missing


@functools.cache
def _first_kernel_fails(device: torch.device) -> bool:
    """Whether Triton fails to compile and launch a kernel on a device. Tried once; warns if it fails."""
    try:
        _ops.BACKENDS["triton"].window_map_fwd(torch.full((1, 5), 0.5, device=device), 1, 1, 6.0, True, False, False)
    except torch.OutOfMemoryError:  # does not concern the compiler
        raise
    except Exception as error:  # compilers, linkers and drivers raise errors of any type
        warnings.warn(
            f"attnkern does not use Triton on {device}: its first kernel failed: {type(error).__name__}: {error}. "
            "backend='triton' raises this error. Native kernels are faster: `attnkern info` says what they need",
            RuntimeWarning,
            stacklevel=6,  # the user's call of the public function
        )
        return True
    return False


def choose(backend: str | None, x: torch.Tensor, many: bool = False) -> str:
    """The backend for features ``x``: an explicit choice if there is one, else the first backend that can run them.

    The automatic choice depends on device, dtype and ``many`` only. It does not depend on sizes, so that it adds no
    guards to compiled code and an image's result does not depend on the batch. Native comes before Triton: by the
    estimates in docs/gpu.md, a rule on sizes would gain less on average than the uncertainty of the estimates. By the
    same estimates Triton takes a fifth to two thirds of the time for pooling with many queries or a mask, and 0.56 to
    0.96 of the time for several windows (``many``).

    Raises:
        ValueError: ``backend`` is unknown, or cannot run here; the message says why.
    """
    name = _current if backend is None else _validated(backend, "backend")
    if name is not None:
        missing = reason(name, x.device, x.dtype)
        if missing is not None:
            raise ValueError(f"backend: {name!r} cannot run {x.dtype} on {x.device}: {missing}")
        return name
    first = many and x.device.type == "cuda" and _triton_runs(x)
    if not first and reason("native", x.device, x.dtype) is None:
        return "native"
    return "triton" if first or _triton_runs(x) else "reference"


def _triton_runs(x: torch.Tensor) -> bool:
    # While tracing, Triton's compiler is not tried, for the same reason as the capability.
    return reason("triton", x.device, x.dtype) is None and (
        torch.compiler.is_compiling() or not _first_kernel_fails(x.device)
    )


def status() -> list[tuple[str, str, str | None]]:
    """(backend, device, why it cannot run or None) for each backend and each device of this machine."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cuda")]
    rows = []
    for name in NAMES:
        for device in devices:
            if device.type == "cuda" and not torch.cuda.is_available():
                missing = _ops.NATIVE_REASON["cuda"] if name == "native" else None
                missing = missing or "no CUDA device is visible"
            else:
                missing = reason(name, device, torch.float32)
            rows.append((name, str(device), missing))
    return rows
