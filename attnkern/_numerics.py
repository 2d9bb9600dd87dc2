"""Definitions that references, kernels and modules share. Imports torch only."""

import torch

#: The dtypes that features can have.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Lower limit of |σ|. Below it the gradient of σ is zero.
SIGMA_FLOOR = 1e-6


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that features of ``dtype`` are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def double(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float64; on the CPU if its device has no float64, such as Apple's and some of Intel's GPUs."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``. (PyTorch raises if asked about the meta device.)"""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def aspect_factors(height: int, width: int, aspect: bool) -> tuple[float, float]:
    """Factors of the row and the column offset: 1, or (H-1)/L and (W-1)/L with L = max(H, W) - 1."""
    if not aspect:
        return 1.0, 1.0
    # max() compares symbolic sizes, and the exported program would hold for one order only.
    if isinstance(height, torch.Tensor) or isinstance(width, torch.Tensor):  # traced for TorchScript
        longest = torch.maximum(torch.as_tensor(height), torch.as_tensor(width)) - 1
    else:
        longest = (max if isinstance(height, int) and isinstance(width, int) else torch.sym_max)(height, width) - 1
    return ((height - 1) / longest, (width - 1) / longest) if longest > 0 else (1.0, 1.0)


def loss_divisor(a: torch.Tensor, reduction: str) -> int:
    """What Σ (v - a)² is divided by; at least 1, so that an empty batch has loss 0."""
    return max(1, {"mean": a.numel(), "batchmean": a.shape[0], "sum": 1}[reduction])
