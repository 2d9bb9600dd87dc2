"""Rectangular attention: the window module and the positionwise baseline that the paper compares it with."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from attnkern._checks import check_channels, check_choice, check_count, check_flag, check_kind, check_number
from attnkern._numerics import wide
from attnkern._tracing import Module
from attnkern.nn._hooks import untouched
from attnkern.nn._precision import full_precision, input_for, widened
from attnkern.reference import modulate
from attnkern.window import SHAPES, check_features, window_attention, window_map


def _start(windows):
    """The biases of the last layer, (K, 5): windows on a ring around the centre, smaller if there are more of them."""
    turn = 2 * math.pi * (torch.arange(windows, dtype=torch.float64) + 0.5) / windows
    radius = 0.25 if windows > 1 else 0.0
    extent = torch.full_like(turn, 2 / 3 / math.sqrt(windows))
    parts = 0.5 + radius * turn.sin(), 0.5 + radius * turn.cos(), extent, extent
    return torch.stack((*(part.logit() for part in parts), torch.zeros_like(turn)), 1)


class WindowAttention(Module):
    """Attention to rotated rectangles or ellipses, which a small head predicts: output = x + f̃·x.

    The head has 3x3 convolutions with ReLU, 2x2 max pooling between them, global average pooling, and a Linear to five
    numbers b for each of the K windows. Then μ = Λ(b), σ = lo + (0.75 - lo)·Λ(b) with lo half a grid step of the axis,
    α = (π/2)·tanh b. The map f̃ is that of the union of the windows; see :func:`attnkern.window_map`. The numbers are
    float32 under autocast. Maps down to 1x1 work.

    The last layer is initialised with zero weights, so that the windows start from its biases: a single one at the
    centre with σ of about one half; K of them evenly on a ring, at μ = ½ + ¼·(sin θ, cos θ) with θ = 2π(k + ½)/K, and
    with σ of about 1/(2√K). They start at different positions because identical windows would receive identical
    gradients and stay identical. Their order has no meaning: another run may find the same union with other indices.

    Args:
        channels: C of the features.
        hidden: output channels of the convolutions.
        scale, rescale, residual: as in :func:`attnkern.window_attention`.
        num_windows: K, how many windows an image has.
        shape: "rectangle" or "ellipse".

    Raises:
        ValueError, TypeError: an option out of its range, or features with another number of channels.

    Source: Convolutional Rectangular Attention Module, Eqs. 1-7 and Appendix G (which leaves open the ranges of
    μ, σ and α); several windows and other shapes are its Section on future work.
    """

    def __init__(
        self,
        channels: int,
        hidden: tuple[int, ...] = (64, 128, 256),
        scale: float = 6.0,
        rescale: bool = True,
        residual: bool = True,
        num_windows: int = 1,
        shape: str = "rectangle",
    ):
        super().__init__()
        check_count("WindowAttention", channels=channels, num_windows=num_windows)
        check_kind("WindowAttention", Sequence, hidden=hidden)
        if not hidden:
            raise ValueError("WindowAttention: hidden must name at least one convolution's channels, got none")
        for outputs in hidden:
            check_count("WindowAttention", hidden=outputs)
        check_number("WindowAttention", scale=scale)
        check_flag("WindowAttention", rescale=rescale, residual=residual)
        check_choice("WindowAttention", "shape", shape, SHAPES)
        self.channels = channels
        self.scale = scale
        self.rescale = rescale
        self.residual = residual
        self.num_windows = num_windows
        self.shape = shape
        layers = []
        for inputs, outputs in itertools.pairwise((channels, *hidden)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(*layers, nn.Flatten())
        self.regressor = nn.Linear(hidden[-1], 5 * num_windows)
        self.map = nn.Identity()
        nn.init.zeros_(self.regressor.weight)
        with torch.no_grad():
            self.regressor.bias.copy_(_start(num_windows).flatten())

    def rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """Windows of features (N, C, H, W): (N, 5), or (N, K, 5) for K > 1, as in :func:`attnkern.window_map`."""
        check_channels("WindowAttention", x, self.channels)
        summary = input_for(self.regressor, self.head(x))
        with full_precision(x):
            numbers = widened(self.regressor(summary))
            if self.num_windows > 1:
                numbers = numbers.unflatten(1, (self.num_windows, 5))
            row, column, half_height, half_width, angle = numbers.unbind(-1)
            sigmas = []
            for length, raw in zip(x.shape[2:], (half_height, half_width), strict=True):
                low = 0.5 / max(length - 1, 1)
                sigmas.append(low + (0.75 - low) * raw.sigmoid())
            return torch.stack((row.sigmoid(), column.sigmoid(), *sigmas, math.pi / 2 * angle.tanh()), -1)

    def forward(
        self, x: torch.Tensor, return_map: bool = False, rectangle: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) to the same shape; with ``return_map`` also the map (N, H, W).

        Args:
            rectangle: (N, 5) or, with any number of windows, (N, K, 5), used instead of the output of
                :meth:`rectangle`.
        """
        check_flag("WindowAttention", return_map=return_map)
        if rectangle is None:
            rectangle = self.rectangle(x)
        options = {"scale": self.scale, "rescale": self.rescale, "shape": self.shape}
        if untouched(self.map):
            output, map = window_attention(x, rectangle, residual=self.residual, **options)
        else:
            rectangle = check_features("window_attention", x, rectangle).to(wide(x.dtype))
            map = self.map(window_map(rectangle, x.shape[2:], **options))
            output = modulate(x, map[:, None], self.residual)
        return (output, map) if return_map else output


class PositionwiseAttention(Module):
    """Attention with a map predicted at each position: output = x + f·x, f = Λ(convolutions of x).

    A 1x1 convolution to ``hidden`` channels, then three 3x3 ones with dilation, the last to one channel: the baseline
    of rectangular attention.

    Args:
        channels: C of the features.
        hidden: channels of the first three convolutions.
        dilation: of the 3x3 convolutions, and their padding.
        norm: batch normalisation after each of the first three convolutions. The paper does not mention it, but follows
            the design of BAM, which has it. Without it the map of a network that is trained from random weights tends
            to saturate and to become constant.

    Raises:
        ValueError, TypeError: a number below 1, or features with another number of channels.

    Source: Convolutional Rectangular Attention Module, Appendix G; BAM: Bottleneck Attention Module, Section 3.
    """

    def __init__(self, channels: int, hidden: int = 80, dilation: int = 4, norm: bool = False):
        super().__init__()
        check_count("PositionwiseAttention", channels=channels, hidden=hidden, dilation=dilation)
        check_flag("PositionwiseAttention", norm=norm)
        self.channels = channels
        dilated = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        layers = []
        for inputs, options in ((channels, {"kernel_size": 1}), (hidden, dilated), (hidden, dilated)):
            normalisation = [nn.BatchNorm2d(hidden)] if norm else []
            layers += [nn.Conv2d(inputs, hidden, **options), *normalisation, nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Conv2d(hidden, 1, **dilated))
        self.map = nn.Identity()

    def forward(self, x: torch.Tensor, return_map: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) to the same shape; with ``return_map`` also the map (N, H, W)."""
        check_channels("PositionwiseAttention", x, self.channels)
        check_flag("PositionwiseAttention", return_map=return_map)
        map = self.map(widened(self.head(x)).squeeze(1).sigmoid())
        output = modulate(x, map[:, None], residual=True)
        return (output, map) if return_map else output
