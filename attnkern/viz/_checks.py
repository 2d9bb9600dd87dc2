"""Argument checks that all figures share."""

from attnkern._checks import check_shape, check_tensor


def check_finite(where, name, tensor):
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")


def check_image(where, name, image):
    check_tensor(where, name, image)
    ok = image.dim() == 3 and image.shape[0] in (1, 3) and 0 not in image.shape
    check_shape(where, name, image, "(3, H, W) or (1, H, W) with H and W of at least 1", ok)
    low, high = image.min().item(), image.max().item()
    # Interpolation and half precision may round a little beyond.
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"{where}: {name} must lie in [0, 1], not normalised, got {low:.3g} to {high:.3g}")


def check_images(where, name, images):
    check_tensor(where, name, images)
    ok = images.dim() == 4 and len(images) > 0
    check_shape(where, name, images, "(N, C, H, W) with N of at least 1", ok)


def check_one_per_image(where, name, tensor, images, expected, rest=None):
    """Raise unless ``tensor`` holds one entry, of shape ``rest`` where that is given, for each of the images."""
    check_tensor(where, name, tensor)
    ok = tensor.dim() > 0 and len(tensor) == len(images) and (rest is None or tensor.shape[1:] == rest)
    check_shape(where, name, tensor, expected, ok, len(images))
