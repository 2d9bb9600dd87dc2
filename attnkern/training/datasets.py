"""The data sets: their images, labels, classes, splits, and where the labelled objects are.

:func:`read_dataset` opens one of them. :class:`attnkern.training.data.ImageData` prepares its images for a network.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, TensorDataset

from attnkern._extras import needs_extra
from attnkern.evaluation.inputs import listed
from attnkern.training.digits import digits_clutter, digits_pairs
from attnkern.training.photographs import OBJECTS, photo_clutter

with needs_extra("attnkern.training.data", "train"):
    from lightning.pytorch.utilities import rank_zero_warn
    from torchvision import datasets, tv_tensors
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

from attnkern.training.images import opened, read_image, stored, upright

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SPLIT_ARGUMENTS = ({"split": "train"}, {"split": "test"})
_TRAIN_ARGUMENTS = ({"train": True}, {"train": False})


class Spec(NamedTuple):
    """What distinguishes a data set from the others."""

    size: int  #: default side of the images
    options: tuple[str, ...]  #: those of ImageData's arguments that apply to some data sets only, and to this one
    moments: tuple | None = _IMAGENET  #: mean and standard deviation of the channels; None: of the training images
    torchvision: str = ""  #: the class in torchvision.datasets
    parts: tuple[dict, ...] = ({},)  #: arguments of that class, for each part
    paths: tuple[str, ...] = ()  #: the files or folders under the root that this class reads


SPECS = {
    "caltech101": Spec(
        224, ("download", "split"), torchvision="Caltech101", paths=("caltech101/101_ObjectCategories",)
    ),
    "cifar10": Spec(
        32, ("download",), ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "CIFAR10", _TRAIN_ARGUMENTS, ("cifar-10-batches-py",),
    ),
    "cifar100": Spec(
        32, ("download",), ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "CIFAR100", _TRAIN_ARGUMENTS, ("cifar-100-python",),
    ),
    "cub": Spec(80, ("box_crop",)),
    "digits-clutter": Spec(32, ("count",), None),
    "digits-pairs": Spec(32, ("count",), None),
    "folder": Spec(224, ("split",)),
    "pets": Spec(
        300, ("download", "ratio", "split"),
        torchvision="OxfordIIITPet", parts=({"split": "trainval"}, {"split": "test"}), paths=("oxford-iiit-pet",),
    ),
    "photo-clutter": Spec(289, ("count",), ((127 / 255,) * 3, (128 / 255,) * 3)),  # as EfficientNet-Lite was trained
    "stl10": Spec(
        96, ("download",), ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
        "STL10", _SPLIT_ARGUMENTS, ("stl10_binary",),
    ),
    "svhn": Spec(
        32, ("download",), ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        "SVHN", _SPLIT_ARGUMENTS, ("train_32x32.mat", "test_32x32.mat"),
    ),
}  # fmt: skip

#: The tables of CUB-200-2011. Each line begins with the number of an image, in classes.txt of a class.
_CUB_TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt")

#: Suffixes of the image files that are read from a folder of images.
_SUFFIXES = (*datasets.folder.IMG_EXTENSIONS, ".avif", ".gif", ".jfif", ".jp2")

#: Suffixes of image files that Pillow cannot read without plugins. A warning says how many are skipped.
_UNSUPPORTED = (".heic", ".heif", ".jxl", ".svg")

#: Names of the parts of a folder of images, in lower case. The first part trains; the first of the others tests.
_PART_NAMES = ("train", "test", "val", "valid", "validation")

#: Folders that tools and operating systems create. Those that begin with a dot are skipped, too.
_SYSTEM_FOLDERS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "__pycache__", "lost+found")


class Part(Dataset):
    """The training or the test images of a data set: items (image as an RGB tensor, label).

    Args:
        images: items are tuples that begin with the image, a tensor or one of Pillow's.
        labels: of all ``images``.
        indices: the images that belong to this part, by default all.
        region: from an index to the region of the labelled object, in stored pixels: a mask (H, W), masks (B, H, W) of
            several objects, or BoundingBoxes with one box. None where the data set has neither boxes nor masks.
    """

    def __init__(
        self,
        images: Dataset,
        labels: Sequence[int],
        indices: Sequence[int] | None = None,
        region: Callable[[int], torch.Tensor] | None = None,
    ):
        self.images = images
        self.labels = [int(label) for label in labels]
        self.indices = range(len(self.labels)) if indices is None else indices
        self.region = region

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, item):
        index = self.indices[item]
        image = self.images[index][0]
        if not isinstance(image, torch.Tensor):
            image = F.pil_to_tensor(image.convert("RGB"))
        return image, self.labels[index]

    def mask(self, item, size):
        """(size, size) bool: the region of the object in the resized image; (B, size, size) of several objects."""
        index = self.indices[item]
        region = self.region(index)
        if isinstance(region, tv_tensors.BoundingBoxes):
            region = F.convert_bounding_box_format(region, new_format=tv_tensors.BoundingBoxFormat.XYXY)
            x0, y0, x1, y1 = F.resize(region, [size, size])[0].tolist()
            mask = torch.zeros(size, size, dtype=torch.bool)
            mask[_covered(y0, y1, size), _covered(x0, x1, size)] = True
        else:
            # torchvision resizes masks with "nearest", which shifts them by up to half a pixel against the image.
            mask = F.resize_image(region[None], [size, size], interpolation=InterpolationMode.NEAREST_EXACT)[0]
        return upright(mask, stored(self.images.paths[index])[1]) if isinstance(self.images, ImageFiles) else mask


def _covered(start, end, size):
    """The slice of ``size`` pixels whose centres lie between two edges; at least one pixel."""
    first = min(max(math.ceil(start - 0.5), 0), size - 1)
    return slice(first, min(max(math.ceil(end - 0.5), first + 1), size))


class ImageFiles(Dataset):
    """Images in files, cropped to boxes (x, y, width, height) if these are given."""

    def __init__(self, paths, boxes=None):
        self.paths = paths
        self.boxes = boxes

    def __getitem__(self, index):
        return (read_image(self.paths[index], self.boxes and self.boxes[index]),)


def read_dataset(
    name: str,
    root: Path,
    *,
    size: int,
    seed: int = 0,
    count: int | None = None,
    ratio: float | None = None,
    split: int = 0,
    box_crop: bool = False,
) -> tuple[Part, Part, list[str]]:
    """Training images, test images and class names of a data set.

    Args: those of :class:`attnkern.training.data.ImageData`. ``size``, ``seed`` and ``count`` are of drawn images.

    Raises:
        FileNotFoundError: the data set is not there, or a class has no images.
        ValueError: too few images of a class to split them.
        ImportError: scikit-learn is needed and not installed.
    """
    if name == "cub":
        train, test, classes = _cub(root, box_crop)
    elif name == "folder":
        train, test, classes = _folder(root, split)
    elif name == "pets":
        train, test, classes = _pets(root, ratio, split)
    elif name == "caltech101":
        train, test, classes = _caltech101(root, split)
    elif name == "digits-clutter":
        train, test, classes = *_drawn(digits_clutter, size, seed, count), range(10)
    elif name == "digits-pairs":
        train, test, classes = *_drawn(digits_pairs, size, seed, count), ("odd", "even")
    elif name == "photo-clutter":
        train, test, classes = *_drawn(photo_clutter, size, seed, count), OBJECTS
    else:
        train, test, classes = _torchvision(name, root)
    return train, test, list(map(str, classes))


def open_torchvision(name, root, **options):
    """The data sets of torchvision, one for each part. ``download=True`` downloads what is missing."""
    spec = SPECS[name]
    return [getattr(datasets, spec.torchvision)(root, **part, **options) for part in spec.parts]


def _stratified(name, labels, classes, share, split):
    """Indices for training, which are ``share`` of each class, and for testing."""
    with needs_extra("a split of the images", "train"):
        from sklearn.model_selection import train_test_split
    counts = Counter(labels)
    single = [classes[label] for label, count in sorted(counts.items()) if count == 1]
    if single:
        raise ValueError(f"{name}: a split needs at least two images of each class, got one of {listed(single)}")
    training = math.floor(share * len(labels))
    for part, count in (("training", training), ("test", len(labels) - training)):
        if count < len(counts):
            raise ValueError(
                f"{name}: a split of {len(labels)} images with {share:g} for training has {count} {part} images, fewer "
                f"than the {len(counts)} classes"
            )
    # The split depends on its number alone, not on the seed of a run: no run trains on test images of another run.
    parts = train_test_split(range(len(labels)), train_size=share, stratify=labels, random_state=split)
    return tuple(map(sorted, parts))


def _open_existing(name, root):
    """As :func:`open_torchvision`, without a download."""
    paths = SPECS[name].paths
    missing = [path for path in paths if not (root / path).exists()]
    remedy = "there or pass --data.download true"
    if missing:  # checked before torchvision is called, since its Caltech101 creates the missing folder
        raise FileNotFoundError(f"{name}: no data under {root}; put {' and '.join(missing)} {remedy}")
    try:
        return open_torchvision(name, root)
    except RuntimeError as error:
        damaged = f"{name}: {' or '.join(paths)} under {root} is damaged or incomplete"
        raise FileNotFoundError(f"{damaged}; put the complete data set {remedy}") from error


def _torchvision(name, root):
    """A data set of torchvision's with a training and a test part."""
    found = _open_existing(name, root)
    parts = [Part(part, part.targets if hasattr(part, "targets") else part.labels) for part in found]
    return *parts, getattr(found[0], "classes", range(10))


def _trimap(paths, index):
    """The animal, 1, and its outline, 3; the background is 2."""
    with opened(paths[index]) as trimap:
        return F.pil_to_tensor(trimap)[0] != 2


def _pets(root, ratio, split):
    trainval, test = _open_existing("pets", root)
    paths, trimaps, labels = (getattr(trainval, name) + getattr(test, name) for name in ("_images", "_segs", "_labels"))
    parts = range(len(trainval)), range(len(trainval), len(paths))
    if ratio is not None:
        parts = _stratified("pets", labels, trainval.classes, ratio, split)
    region = functools.partial(_trimap, trimaps)
    return *(Part(ImageFiles(paths), labels, part, region) for part in parts), trainval.classes


def _caltech101(root, split):
    (found,) = _open_existing("caltech101", root)
    folders = [Path(found.root, "101_ObjectCategories", found.categories[label]) for label in found.y]
    paths = [folder / f"image_{number:04d}.jpg" for folder, number in zip(folders, found.index, strict=True)]
    parts = _stratified("caltech101", found.y, found.categories, 0.7, split)
    return *(Part(ImageFiles(paths), found.y, part) for part in parts), found.categories


def _box(paths, boxes, index):
    """The box of an image; without ``boxes`` the whole image."""
    width, height = stored(paths[index])[0]
    box = torch.tensor([boxes[index] if boxes else (0, 0, width, height)], dtype=torch.float64)
    return tv_tensors.BoundingBoxes(box, format="XYWH", canvas_size=(height, width))


def _cub(root, crop):
    missing = [name for name in ("images", *_CUB_TABLES) if not (root / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"cub: no {', '.join(missing)} under {root}; root must be the unpacked folder CUB_200_2011, which contains "
            f"images/, {', '.join(_CUB_TABLES)}"
        )
    tables = []
    for name in _CUB_TABLES:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        tables.append(dict(line.strip().split(maxsplit=1) for line in lines if line.strip()))
    files, classes_of, training, boxes, classes = tables
    paths = [root / "images" / file for file in files.values()]
    boxes = [tuple(map(float, boxes[bird].split())) for bird in files]
    images = ImageFiles(paths, boxes if crop else None)
    region = functools.partial(_box, paths, None if crop else boxes)
    numbers = {number: label for label, number in enumerate(classes)}
    labels = [numbers[classes_of[bird]] for bird in files]
    parts = [[i for i, bird in enumerate(files) if training[bird] == flag] for flag in "10"]
    return *(Part(images, labels, part, region) for part in parts), classes.values()


def _drawn(make, size, seed, count):
    parts = make("train", size, seed, count), make("test", size)
    return [Part(TensorDataset(part.images), part.labels, region=part.masks.__getitem__) for part in parts]


# --- a folder of images ----------------------------------------------------------------------------------------------


def _entries(folder, kind):
    """Sorted names of the files or the folders in a folder, without those that tools create."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if kind(entry)]
    return sorted(name for name in names if not name.startswith(".") and name not in _SYSTEM_FOLDERS)


def _subfolders(folder) -> list[str]:
    return _entries(folder, os.DirEntry.is_dir)


def _image_files(folder, suffixes=_SUFFIXES) -> list[str]:
    return [name for name in _entries(folder, os.DirEntry.is_file) if name.lower().endswith(suffixes)]


def _all_images(folder, suffixes=_SUFFIXES) -> Iterator[Path]:
    """The image files in a folder and its subfolders, in the order of torchvision's ImageFolder."""

    def walk(folder):
        yield folder
        for name in _subfolders(folder):
            yield from walk(folder / name)

    for place in sorted(walk(folder), key=str):
        yield from (place / name for name in _image_files(place, suffixes))


def _read_classes(root, layout):
    """Paths and labels of the images in a folder of classes, and the names of the classes."""
    classes = _subfolders(root)
    paths = [list(_all_images(root / name, _SUFFIXES + _UNSUPPORTED)) for name in classes]
    readable = [[path for path in of_class if path.suffix.lower() not in _UNSUPPORTED] for of_class in paths]
    skipped = sum(map(len, paths)) - sum(map(len, readable))
    if skipped:
        rank_zero_warn(
            f"folder: skipping {skipped} files in {root}: files that end in {', '.join(_UNSUPPORTED)} cannot be read"
        )
    empty = [name for name, of_class in zip(classes, readable, strict=True) if not of_class]
    if not classes:
        raise FileNotFoundError(f"folder: {root} contains no folders of images; {layout}")
    if empty:
        raise FileNotFoundError(f"folder: no images of {listed(empty)} in {root}; {layout}")
    labels = [label for label, of_class in enumerate(readable) for _ in of_class]
    return [path for of_class in readable for path in of_class], labels, classes


def _find_parts(root, layout):
    """Names of the training and the test folder in a folder of images, or None if it contains classes only."""
    folders = _subfolders(root)
    spelled = {name.lower(): name for name in folders}
    named = [spelled[part] for part in _PART_NAMES if part in spelled]
    parts = [name for name in named if any(any(_all_images(root / name / inner)) for inner in _subfolders(root / name))]
    if parts and (parts[0].lower() != "train" or len(parts) == 1):
        raise FileNotFoundError(
            f"folder: {root} must have folders of images for training and for testing, got only {listed(parts)}; "
            f"{layout}"
        )
    if parts:
        unused = [name for name in folders if name not in parts[:2]]
        if unused:
            rank_zero_warn(
                f"folder: training on '{parts[0]}' and testing on '{parts[1]}' in {root}, ignoring {listed(unused)}"
            )
        return parts[:2]
    if named and len(named) == len(folders):
        raise FileNotFoundError(f"folder: {listed(named)} in {root} contain no folders of images; {layout}")
    if named:
        rank_zero_warn(
            f"folder: reading {root} as a folder of classes; {listed(named)} are classes, too, since they contain no "
            "folders of images"
        )
    elif folders and not any(_image_files(root / name) for name in folders):
        rank_zero_warn(f"folder: reading {root} as the classes {listed(folders)}, whose images are in subfolders")
    return None


def _folder(root, split):
    layout = "expected train/CLASS/IMAGE and test/CLASS/IMAGE (or val), or CLASS/IMAGE, which is split"
    if not root.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {root}; {layout}")
    parts = _find_parts(root, layout)
    if parts is None:
        paths, labels, classes = _read_classes(root, layout)
        indices = _stratified("folder", labels, classes, 0.8, split)
        return *(Part(ImageFiles(paths), labels, part) for part in indices), classes
    if split:
        raise ValueError(f"ImageData: split does not apply to a folder with {' and '.join(parts)}, got {split}")
    (paths, labels, classes), (test_paths, test_labels, test_classes) = (
        _read_classes(root / name, layout) for name in parts
    )
    unknown = [name for name in test_classes if name not in classes]
    if unknown:
        raise ValueError(f"folder: classes in {root / parts[1]} that are not in {root / parts[0]}: [{listed(unknown)}]")
    # The test folder may lack classes, so its labels are renumbered.
    number = {name: label for label, name in enumerate(classes)}
    test_labels = [number[test_classes[label]] for label in test_labels]
    return Part(ImageFiles(paths), labels), Part(ImageFiles(test_paths), test_labels), classes
