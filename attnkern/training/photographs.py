"""Photographed objects in front of photographs: images for pretrained features, without a download."""

from importlib import resources
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnkern._checks import check_choice, check_count, check_integer
from attnkern._extras import needs_extra
from attnkern.training.digits import draw, extents

#: The classes: a photograph, and the first and last row and column (exclusive) of the object in it.
OBJECTS = {
    "astronaut": ("astronaut.png", 0, 190, 140, 310),
    "cat": ("chelsea.png", 0, 300, 95, 395),
    "cup": ("coffee.png", 10, 345, 65, 500),
    "flower": ("flower.jpg", 80, 365, 165, 450),
    "motorcycle": ("motorcycle_left.png", 100, 470, 90, 700),
    "pagoda": ("china.jpg", 20, 400, 60, 360),
    "rocket": ("rocket.jpg", 115, 410, 270, 375),
    "shuttle": ("astronaut.png", 5, 295, 365, 475),
}
#: Photographs without these objects. The splits share none of them.
BACKGROUNDS = {
    "train": ("brick.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "page.png"),
    "test": ("grass.png", "moon.png", "retina.jpg", "text.png"),
}
_IN_SKLEARN = ("china.jpg", "flower.jpg")
#: Number of images of each class.
_PER_CLASS = {"train": 40, "test": 25}
_DISTRACTORS = 4
#: Side of a cut-out before it is scaled to its size in the image.
_PATCH = 128
#: Smallest and largest side of a cut-out, as a fraction of the image's side, and its largest angle in degrees.
_EXTENT, _DEGREES = (0.2, 0.4), 20
#: Images that are drawn at a time.
_CHUNK = 32


class Photographs(NamedTuple):
    """Result of :func:`photo_clutter`."""

    images: torch.Tensor  #: (N, 3, S, S) uint8
    labels: torch.Tensor  #: (N,) int64, the class
    boxes: torch.Tensor  #: (N, 4) float32: first row, first column, last row, last column, in pixels
    masks: torch.Tensor  #: (N, S, S) bool: the object


def _photograph(name):
    """(3, H, W) float32 in [0, 1] from a file that scikit-image or scikit-learn ships."""
    with needs_extra("photo_clutter", "train"):
        from attnkern.training.images import read_image

        package = resources.files("sklearn" if name in _IN_SKLEARN else "skimage")
    folder = package / "datasets" / "images" if name in _IN_SKLEARN else package / "data"
    with resources.as_file(folder / name) as path:
        return read_image(path).float() / 255


def _resized(photo, height, width):
    return F.interpolate(photo[None], (height, width), mode="bilinear", antialias=True)


def _cut_out(photo):
    """The ellipse that touches the edges of a photograph: (4, _PATCH, _PATCH), colours and opacity."""
    height, width = (round(_PATCH * length / max(photo.shape[1:])) for length in photo.shape[1:])
    rows, columns = (torch.linspace(-1, 1, length) for length in (height, width))
    radius = (rows[:, None].square() + columns.square()).sqrt()
    opacity = ((1 - radius) / 0.1).clamp(0, 1)  # falls off over a tenth of the radius
    patch = torch.cat((_resized(photo, height, width)[0], opacity[None]))
    left, top = (_PATCH - width) // 2, (_PATCH - height) // 2
    return F.pad(patch, (left, _PATCH - width - left, top, _PATCH - height - top))


def _uniform(low, high, shape, generator):
    return low + (high - low) * torch.rand(shape, generator=generator)


def _tinted(images, generator):
    """Images with each channel brightened or darkened at random."""
    return (images * _uniform(0.7, 1.3, (len(images), 3, 1, 1), generator)).clamp(max=1)


def _parts(photos, n, size, generator):
    """Random square parts of photographs: (n, 3, size, size)."""
    parts = []
    for photo in (photos[index] for index in torch.randint(len(photos), (n,), generator=generator).tolist()):
        share, down, right = torch.rand(3, generator=generator).tolist()
        side = round((0.4 + 0.6 * share) * min(photo.shape[1:]))
        top, left = round(down * (photo.shape[1] - side)), round(right * (photo.shape[2] - side))
        parts.append(_resized(photo[:, top : top + side, left : left + side], size, size))
    return torch.cat(parts)


def _pasted(images, patches, generator):
    """Images with a patch at a random place in each, and the patches' opacity (n, S, S) there."""
    mirrored = torch.rand(len(patches), 1, 1, 1, generator=generator) < 0.5
    patches = draw(torch.where(mirrored, patches.flip(3), patches), images.shape[3], _EXTENT, _DEGREES, generator)
    colours, opacity = _tinted(patches[:, :3], generator), patches[:, 3:]
    return torch.lerp(images, colours, opacity), opacity[:, 0]


def photo_clutter(split: str, size: int = 289, seed: int = 0, count: int | None = None) -> Photographs:
    """Eight photographed objects, each at a random place, angle and size in a photograph that shows none of them.

    The photographs ship with scikit-image and scikit-learn. Each image is a random part of a background with four
    distractors, which are parts of the split's backgrounds with the objects' outlines, and then the object, whose
    longer side is 0.2 to 0.4 of the image's side before a rotation by at most 20°. Outlines are ellipses with soft
    edges; colours are changed at random. The splits share no background.

    There is one photograph of each object, and both splits show it: test images change place, size, angle, colours and
    background, but do not show other objects of the same class.

    Args:
        split: "train" or "test".
        size: side S of the square images in pixels, at least 16. The default gives maps of 10x10 at 1/32 of it.
        seed: random seed of everything but the classes, which take turns.
        count: number of images, by default 320 for training and 200 for testing.

    Returns:
        images (N, 3, S, S) uint8; labels (N,) int64, the index in ``attnkern.training.photographs.OBJECTS``; boxes
        (N, 4) float32 of the object: first row, first column, last row, last column, where (0, 0) is the centre of the
        first pixel; masks (N, S, S) bool of the object.

    Raises:
        ValueError, TypeError: an unknown split, a size or count that is too small, or an argument of another kind.
        ImportError: scikit-image, scikit-learn, torchvision or Pillow is not installed.
    """
    where = "photo_clutter"
    check_choice(where, "split", split, tuple(BACKGROUNDS))
    check_integer(where, size=size, seed=seed)
    if size < 16:
        raise ValueError(f"{where}: size must be at least 16, got {size}")
    if count is not None:
        check_count(where, count=count)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    photos = [_photograph(name) for name in BACKGROUNDS[split]]
    objects = torch.stack(
        [_cut_out(_photograph(name)[:, top:bottom, left:right]) for name, top, bottom, left, right in OBJECTS.values()]
    )
    labels = torch.arange(_PER_CLASS[split] * len(objects) if count is None else count) % len(objects)
    images, masks = [], []
    for chosen in labels.split(_CHUNK):
        n = len(chosen)
        drawn = _tinted(_parts(photos, n, size, generator), generator)
        for _ in range(_DISTRACTORS):
            outlines = objects[torch.randint(len(objects), (n,), generator=generator), 3:]
            patches = torch.cat((_parts(photos, n, _PATCH, generator), outlines), 1)
            drawn, _ = _pasted(drawn, patches, generator)
        drawn, opacity = _pasted(drawn, objects[chosen], generator)
        images.append((255 * drawn).round().byte())
        masks.append(opacity > 0.5)
    masks = torch.cat(masks)
    return Photographs(torch.cat(images), labels, extents(masks), masks)
