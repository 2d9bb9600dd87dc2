"""What the networks share."""

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._common import check_shape, check_tensor

#: Every network here halves its maps five times.
SMALLEST_IMAGE = 32


def check_images(where: str, x: torch.Tensor, in_chans: int) -> None:
    """Raise unless ``x`` is a batch of images with at least one position left at the deepest map."""
    check_tensor(where, "x", x)
    expected = f"(N, {in_chans}, H, W) with H and W of at least {SMALLEST_IMAGE}"
    check_shape(where, "x", x, expected, x.dim() == 4 and x.shape[1] == in_chans and min(x.shape[2:]) >= SMALLEST_IMAGE)


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def conv_bn_relu(inputs: int, outputs: int, eps: float = 1e-5) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs, eps=eps),
        nn.ReLU(inplace=True),
    ]


class VectorNorm(nn.BatchNorm1d):
    """BatchNorm1d of (N, C) that also trains on a batch of one, which has no statistics: it takes the running ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)
