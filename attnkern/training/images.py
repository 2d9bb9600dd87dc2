"""Image files, read as viewers show them. The data sets and ``attnkern show`` use the same functions."""

import contextlib
import functools
import io
import os
from collections.abc import Iterator

import numpy as np
import torch

from attnkern._extras import needs_extra

with needs_extra("attnkern.training.images", "train"):
    from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
    from torchvision.transforms.v2 import functional as F

#: EXIF orientation: whether to transpose the stored pixels and which axes to flip then, for an upright picture.
_TURNS = {
    1: (False, ()),
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


class ImageError(OSError, ValueError):
    """An image file cannot be read. The message names the file and the reason.

    An OSError, as Pillow's own errors are.
    """


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[ImageFile.ImageFile]:
    """The picture in a file, opened by Pillow. Every error names the file, even one of decoding it in the block.

    Raises:
        FileNotFoundError: no such file.
        ImageError: a file that is not an image, that is damaged, or whose picture is too large.
    """
    name = f"'{os.fsdecode(path)}'"
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image {name}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read") from error
    except Image.DecompressionBombError as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS:,} that Pillow opens (twice PIL.Image.MAX_IMAGE_PIXELS)"
        raise ImageError(f"{name} has more pixels than the {limit}") from error
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name} cannot be read: {reason}") from error


def read_image(path: str | os.PathLike, box: tuple[float, float, float, float] | None = None) -> torch.Tensor:
    """An image file of any mode as sRGB, as a viewer shows it: (3, H, W) uint8.

    - The EXIF orientation is applied.
    - Colours are converted to sRGB with the embedded ICC profile or the gamma of a PNG file. A profile that does not
      fit the picture is ignored.
    - Transparent pixels are blended with white.
    - Grey values of more than 8 bits are scaled. The range is 0 to 65535 for integers of 16 and 32 bits, and 0 to 1 for
      floating point. If a picture has values outside it, the range is from its smallest to its largest value.
    - Of several frames the first one is read.

    Args:
        path: of the file.
        box: (x, y, width, height) of a part to crop, in the pixels as they are stored, before they are rotated.

    Raises:
        FileNotFoundError: no such file.
        ImageError: a file that is not an image, is damaged, or whose picture is too large; an OSError and a ValueError.
    """
    with opened(path) as picture:
        picture.load()
        orientation = _orientation(picture)
        colours = _shown(picture)
        pixels = F.pil_to_tensor(colours if box is None else _cut(colours, box))
    return upright(pixels, orientation)


def stored(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """Width and height of an image file as it is stored, and its EXIF orientation, 1 to 8. Raises as :func:`opened`."""
    with opened(path) as picture:
        return picture.size, _orientation(picture)


def upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Stored pixels (..., H, W) in the orientation in which they are shown."""
    transposed, flipped = _TURNS[orientation]
    return (pixels.mT if transposed else pixels).flip(flipped)


def resized(image: torch.Tensor, size: int) -> torch.Tensor:
    """(3, size, size) float32 in [0, 1] of an image (3, H, W), uint8 or floating in [0, 1]."""
    return F.to_dtype(F.resize(image, [size, size], antialias=True), torch.float32, scale=True)


def _cut(picture, box):
    """The part of a picture in a box. Its edges are rounded to pixels; it has at least one pixel."""
    x, y, width, height = box
    left, top = min(max(round(x), 0), picture.width - 1), min(max(round(y), 0), picture.height - 1)
    right, bottom = min(round(x + width), picture.width), min(round(y + height), picture.height)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _orientation(picture) -> int:
    try:
        found = picture.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged tag, which viewers ignore
        return 1
    return found if found in _TURNS else 1


def _shown(picture) -> Image.Image:
    """The picture in RGB, in the stored orientation."""
    info, alpha = picture.info, None
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        if isinstance(info.get("transparency"), int):
            alpha = Image.fromarray(np.uint8(255) * (np.asarray(picture) != info["transparency"]))
        picture = _eight_bits(picture)
    elif picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = picture.getchannel("A")
    if picture.mode not in ("L", "CMYK", "LAB"):  # modes that a profile may describe, besides RGB
        picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    transform = _to_srgb(profile, picture.mode) if profile else None
    if transform is not None:
        picture = ImageCms.applyTransform(picture, transform)
    picture = picture.convert("RGB")
    # Converted to a display gamma of 2.2, as libpng does; a difference of up to 5 % is ignored.
    if gamma and not profile and "srgb" not in info and abs(2.2 * gamma - 1) > 0.05:
        picture = picture.point([round(255 * (value / 255) ** (1 / (2.2 * gamma))) for value in range(256)] * 3)
    if alpha is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    return picture


@functools.lru_cache(16)
def _to_srgb(profile: bytes, mode: str):
    """The transform from a profile's colours to sRGB, or None if the profile cannot be used or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # damaged, of another colour space, or Pillow was built without LittleCMS
        return None
    if mode != "RGB":
        return transform
    # Most profiles are sRGB. Applying them would take longer than decoding the file.
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, steps.size, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
    return transform if np.abs(moved.astype(int) - cube).max() > 2 else None


def _eight_bits(picture) -> Image.Image:
    """A grey picture of 16 bits, 32 bits or floating point as a picture of mode L."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    full = 1 if picture.mode == "F" else 65535
    if picture.mode == "I" and tags and tags.get(_TIFF_SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow has no mode for unsigned integers of 32 bits
    if picture.mode == "I;16" and tags.get(_TIFF_BITS) == (12,):
        full = 4095
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, full)
    if low >= 0 and high <= full:
        low, high = 0, full
    shares = np.nan_to_num((values - low) / max(high - low, 1e-300), nan=0, posinf=1, neginf=0).clip(0, 1)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is 0; Pillow inverts pictures of 8 bits only
        shares = 1 - shares
    return Image.fromarray((255 * shares).round().astype(np.uint8))
