"""Argument checks that several figures share."""

import math

from attnkern._checks import check_number, check_shape, check_tensor


def check_finite(where, name, tensor):
    # matplotlib leaves NaN blank.
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")


def check_positive(where, **values):
    """Raise unless each of the named values is a finite number above 0."""
    check_number(where, **values)
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{where}: {name} must be positive and finite, got {value}")


def check_image(where, name, image):
    check_tensor(where, name, image)
    ok = image.dim() == 3 and image.shape[0] in (1, 3) and 0 not in image.shape
    check_shape(where, name, image, "(3, H, W) or (1, H, W) with H and W of at least 1", ok)
    low, high = image.min().item(), image.max().item()
    # Interpolation and half precision may exceed the range by rounding.
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"{where}: {name} must be in [0, 1], not normalised, got {low:.3g} to {high:.3g}")


def check_one_per_image(where, name, tensor, images, expected):
    """Raise ValueError unless ``tensor`` has one entry for each image."""
    check_tensor(where, name, tensor)
    check_shape(where, name, tensor, expected, tensor.dim() > 0 and len(tensor) == len(images), len(images))
