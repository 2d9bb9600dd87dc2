"""What the networks share."""

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._common import check_count, check_shape, check_tensor

#: Every network here halves its maps five times.
SMALLEST_IMAGE = 32


def check_images(where: str, x: torch.Tensor, in_chans: int) -> None:
    """Raise unless ``x`` is a batch of images with at least one position left at the deepest map."""
    check_tensor(where, "x", x)
    expected = f"(N, {in_chans}, H, W) with H and W of at least {SMALLEST_IMAGE}"
    check_shape(where, "x", x, expected, x.dim() == 4 and x.shape[1] == in_chans and min(x.shape[2:]) >= SMALLEST_IMAGE)


def check_network(where: str, num_classes: int, width: float, in_chans: int) -> None:
    """Raise unless these describe a network: at least one class and channel, a positive width."""
    check_count(where, num_classes=num_classes, in_chans=in_chans)
    if not width > 0:
        raise ValueError(f"{where}: width must be positive, got {width!r}")


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def conv_bn_relu(inputs: int, outputs: int, eps: float = 1e-5) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        MapNorm(outputs, eps=eps),
        nn.ReLU(inplace=True),
    ]


class _TrainsOnOne:
    """Batch normalisation that also trains on one value a channel, which has no variance: it takes the running ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class VectorNorm(_TrainsOnOne, nn.BatchNorm1d):
    """Of (N, C)."""


class MapNorm(_TrainsOnOne, nn.BatchNorm2d):
    """Of (N, C, H, W)."""
