"""Handwritten digits on cluttered backgrounds: real images to train on without a download."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnkern._checks import check_choice, check_count, check_integer

#: The number of fragments of other digits in an image.
_FRAGMENTS = 6


class Digits(NamedTuple):
    """Result of :func:`digits_clutter`, and of :func:`digits_pairs` with a box and a mask for each of two digits."""

    images: torch.Tensor  #: (N, 3, S, S) float32 in [0, 1]
    labels: torch.Tensor  #: (N,) int64, 0 to 9; of pairs 1 where the sum is even
    boxes: torch.Tensor  #: (N, 4) or (N, 2, 4) float32: first row, first column, last row, last column, in pixels
    masks: torch.Tensor  #: (N, S, S) or (N, 2, S, S) bool: a digit's ink


def _sources(split):
    """The 8x8 digits (M, 1, 8, 8) in [0, 1] of a split, and their labels. One digit in five is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits_clutter needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    # The permutation does not depend on the seed: no run trains on a digit that another run tests on.
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    tests = len(order) // 5
    chosen = order[:tests] if split == "test" else order[tests:]
    images = torch.from_numpy(digits.images)[chosen, None].float() / 16
    return images, torch.from_numpy(digits.target)[chosen].long()


def draw(patches, size, extent, degrees, generator, sides=None):
    """Patches of ink at random places in images: (N, 1, size, size).

    Args:
        extent: smallest and largest side of a patch, as a fraction of the image's side.
        degrees: largest angle that a patch is rotated by, in either direction.
        sides: (N, 2), for x and y: -1 and 1 keep a patch in one half of the image, 0 anywhere.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(len(patches), generator=generator)

    half = uniform(*extent)  # half the side, in coordinates from -1 to 1
    room = 1 - half
    x, y = uniform(-1, 1) * room, uniform(-1, 1) * room
    if sides is not None:  # from 0 to 1 in place of -1 to 1
        x, y = (
            torch.where(side == 0, at, side * (half + (at / room + 1) / 2 * (1 - 2 * half)))
            for at, side in zip((x, y), sides.unbind(1), strict=True)
        )
    angle = uniform(-degrees, degrees) * math.pi / 180
    cos, sin = torch.cos(angle) / half, torch.sin(angle) / half
    # From the image to the patch: the inverse of scaling, rotation and shift.
    theta = torch.stack((cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y), 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(patches), 1, size, size), align_corners=False)
    return F.grid_sample(patches, grid, align_corners=False)


def extents(masks: torch.Tensor) -> torch.Tensor:
    """Boxes of masks (..., H, W) bool, (..., 4) float32: first row, first column, last row, last column.

    The box of an empty mask is the whole image.
    """
    ends = []
    for covered in (masks.any(-1), masks.any(-2)):
        first = covered.int().argmax(-1)
        ends.append((first, covered.shape[-1] - 1 - covered.flip(-1).int().argmax(-1)))
    (row0, row1), (col0, col1) = ends
    return torch.stack((row0, col0, row1, col1), -1).float()


def _prepared(where, split, size, seed, count):
    """The checked arguments as sources, their labels, a generator and the number of images."""
    check_choice(where, "split", split, ("train", "test"))
    check_integer(where, size=size, seed=seed)
    if size < 16:
        raise ValueError(f"{where}: size must be at least 16, got {size}")
    if count is not None:
        check_count(where, count=count)
    sources, labels = _sources(split)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    return sources, labels, generator, len(sources) if count is None else count


def _colours(low, high, n, generator):
    return low + (high - low) * torch.rand(n, 3, 1, 1, generator=generator)


def _clutter(sources, n, size, generator):
    """Images (n, 3, size, size): gradients between two dark colours and fragments of digits."""
    direction = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    axis = torch.linspace(-0.5, 0.5, size)
    ramp = (torch.cos(direction) * axis[:, None] + torch.sin(direction) * axis)[:, None] / math.sqrt(2) + 0.5
    images = torch.lerp(_colours(0.0, 0.4, n, generator), _colours(0.0, 0.4, n, generator), ramp)
    for _ in range(_FRAGMENTS):
        others = torch.randint(len(sources), (n,), generator=generator)
        corners = torch.randint(5, (2, n, 1), generator=generator)
        rows, columns = corners + torch.arange(4)
        fragments = sources[others[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
        ink = draw(fragments, size, (0.12, 0.22), 180, generator)
        images = torch.lerp(images, _colours(0.2, 0.8, n, generator), ink)
    return images


def _painted(images, ink, generator):
    return torch.lerp(images, _colours(0.7, 1.0, len(images), generator), (1.6 * ink).clamp(max=1))


def _noisy(images, generator):
    return (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp_(0, 1)


def digits_clutter(split: str, size: int = 32, seed: int = 0, count: int | None = None) -> Digits:
    """scikit-learn's 1,797 handwritten digits, each at a random place, angle and size in an image with clutter.

    The clutter consists of a gradient between two dark colours, six fragments of other digits, and noise. The digit is
    the largest and brightest object. The two splits never share a handwritten digit. The same arguments give the same
    images.

    Args:
        split: "train" (1,438 handwritten digits) or "test" (359).
        size: side S of the square images in pixels, at least 16.
        seed: random seed of places, colours and clutter.
        count: number of images, by default one for each handwritten digit of the split. With a larger number the digits
            repeat in front of other clutter.

    Returns:
        images (N, 3, S, S) float32 in [0, 1]; labels (N,) int64; boxes (N, 4) float32 of the digit's ink: first row,
        first column, last row, last column, where (0, 0) is the centre of the first pixel; masks (N, S, S) bool of the
        ink.

    Raises:
        ValueError, TypeError: an unknown split, a size or count that is too small, or an argument of another kind.
        ImportError: scikit-learn is not installed.
    """
    sources, labels, generator, n = _prepared("digits_clutter", split, size, seed, count)
    chosen = torch.arange(n) % len(sources)
    images = _clutter(sources, n, size, generator)
    ink = draw(sources[chosen], size, (0.4, 0.65), 20, generator)
    images = _noisy(_painted(images, ink, generator), generator)
    masks = ink[:, 0] > 0.3
    return Digits(images, labels[chosen], extents(masks), masks)


def digits_pairs(split: str, size: int = 32, seed: int = 0, count: int | None = None) -> Digits:
    """Two digits in the clutter of :func:`digits_clutter`, and whether their sum is even: both have to be found.

    The digits lie side by side or one above the other, each in a half of the image and somewhat smaller than there. The
    first digits are those of the split in their order, the second ones are drawn from it.

    Args:
        split, size, seed, count: as in :func:`digits_clutter`.

    Returns:
        images (N, 3, S, S) float32 in [0, 1]; labels (N,) int64, 1 where the sum of the two digits is even, else 0;
        boxes (N, 2, 4) float32 and masks (N, 2, S, S) bool of the two digits.

    Raises:
        ValueError, TypeError, ImportError: as :func:`digits_clutter`.
    """
    sources, labels, generator, n = _prepared("digits_pairs", split, size, seed, count)
    chosen = torch.stack((torch.arange(n) % len(sources), torch.randint(len(sources), (n,), generator=generator)))
    images = _clutter(sources, n, size, generator)
    # The axis that separates the digits, and on which side of the other one the first digit is.
    axis, side = torch.randint(2, (n,), generator=generator), 1 - 2 * torch.randint(2, (n,), generator=generator)
    sides = F.one_hot(axis, 2) * side[:, None]
    placed = zip(chosen, (sides, -sides), strict=True)
    inks = [draw(sources[of], size, (0.3, 0.48), 20, generator, at) for of, at in placed]
    for ink in inks:
        images = _painted(images, ink, generator)
    images = _noisy(images, generator)
    masks = torch.cat(inks, 1) > 0.3
    even = (labels[chosen].sum(0) % 2 == 0).long()
    return Digits(images, even, extents(masks), masks)
