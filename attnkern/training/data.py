"""The papers' image data sets, the digits and folders of images, as one Lightning data module."""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from attnkern._checks import check_count, check_flag, check_integer, check_items, check_kind, check_number, check_tensor
from attnkern.evaluation._inputs import listed
from attnkern.evaluation.crossdomain import inverse_root
from attnkern.training.digits import digits_clutter, extents

try:
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.utilities import rank_zero_warn
    from torchvision import datasets, tv_tensors
    from torchvision.transforms import InterpolationMode, v2
    from torchvision.transforms.v2 import functional as F
except ImportError as error:
    raise ImportError("attnkern.training.data needs lightning and torchvision: pip install attnkern[train]") from error

from attnkern.training.images import ImageError, opened, read_image, resized, stored, upright

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SPLITS = ({"split": "train"}, {"split": "test"})
_TRAIN = ({"train": True}, {"train": False})


class _Kind(NamedTuple):
    """What is particular to a data set."""

    size: int  #: of its images, where the user names none
    options: tuple[str, ...]  #: that apply to it, of those that do not apply to all
    moments: tuple | None = _IMAGENET  #: mean and standard deviation of the channels; None: of the training images
    torchvision: str = ""  #: the class in torchvision.datasets
    parts: tuple[dict, ...] = ({},)  #: that class's arguments for each part
    places: tuple[str, ...] = ()  #: what it looks for under the root


_KINDS = {
    "caltech101": _Kind(
        224, ("download", "split"), torchvision="Caltech101", places=("caltech101/101_ObjectCategories",)
    ),
    "cifar10": _Kind(
        32, ("download",), ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "CIFAR10", _TRAIN, ("cifar-10-batches-py",),
    ),
    "cifar100": _Kind(
        32, ("download",), ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "CIFAR100", _TRAIN, ("cifar-100-python",),
    ),
    "cub": _Kind(80, ("box_crop",)),
    "digits-clutter": _Kind(32, ("count",), None),
    "folder": _Kind(224, ("split",)),
    "pets": _Kind(
        300, ("download", "ratio", "split"),
        torchvision="OxfordIIITPet", parts=({"split": "trainval"}, {"split": "test"}), places=("oxford-iiit-pet",),
    ),
    "stl10": _Kind(
        96, ("download",), ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)), "STL10", _SPLITS, ("stl10_binary",)
    ),
    "svhn": _Kind(
        32, ("download",), ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        "SVHN", _SPLITS, ("train_32x32.mat", "test_32x32.mat"),
    ),
}  # fmt: skip

#: CUB-200-2011's tables; each line starts with the number of an image, in the last one of a class.
_CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt")

#: Suffixes of the image files in a folder of images.
_SUFFIXES = (*datasets.folder.IMG_EXTENSIONS, ".avif", ".gif", ".jfif", ".jp2")

#: Suffixes of pictures that Pillow does not read by itself; a warning says that they are passed over.
_UNREAD = (".heic", ".heif", ".jxl", ".svg")

#: Names of a folder's parts, in any case: training images are in the first, test images in the first of the others.
_PARTS = ("train", "test", "val", "valid", "validation")

#: Folders that tools and operating systems leave, beside those that begin with a dot.
_LEFTOVERS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "__pycache__", "lost+found")

#: Above this many values an image, their covariance is too large to invert.
_WHITENED = 3072


def data_sets() -> list[str]:
    """The names that :class:`ImageData` takes."""
    return sorted(_KINDS)


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends on the seed and the epoch alone.

    A resumed run so sees what an unbroken one sees. Lightning calls ``set_epoch``, also where it wraps this sampler for
    several processes.

    Args:
        length: number of indices.
        seed: of the orders.
    """

    def __init__(self, length: int, seed: int = 0):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, the first being 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # The generator takes 32 bits. A plain sum would give seed 1 the orders of seed 0, one epoch later.
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) % 2**32)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class _Late(DataLoader):
    """Starts its workers when the first batch is asked for, not before.

    Lightning makes the first iterator of a run before it sets the epoch and before on_train_epoch_start: workers would
    begin a resumed run with the first epoch's order, and with seeds that are not this epoch's.
    """

    def __iter__(self):
        try:
            yield from super().__iter__()
        except (FileNotFoundError, ImageError) as error:
            # The message of a worker's error holds its traceback, too; what is wrong stands behind it.
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from error


class ZCA(nn.Module):
    """C^(-1/2)·(image − mean), C the covariance of pixels and channels: the whitening closest to the images.

    To every variance along an eigenvector of C a thousandth of their mean is added, so that what is mostly noise is not
    blown up.

    Args:
        mean: (D,) of the images, D = C·H·W.
        covariance: (D, D).

    Source: Bell and Sejnowski, The "independent components" of natural scenes are edge filters, 1997.
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("matrix", inverse_root(covariance).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (..., C, H, W), on whatever device they are."""
        flat = images.flatten(-3) - self.mean.to(images)
        return (flat @ self.matrix.to(images)).view(images.shape)


def normalisation_state(normalisation: nn.Module) -> dict[str, torch.Tensor]:
    """The numbers of a normalisation, to be kept with a network that was trained under it."""
    if isinstance(normalisation, ZCA):
        return dict(normalisation.state_dict())
    return {"mean": torch.tensor(normalisation.mean), "std": torch.tensor(normalisation.std)}


def normalisation_from(state: dict[str, torch.Tensor]) -> nn.Module:
    """The inverse of :func:`normalisation_state`."""
    if "std" in state:
        return v2.Normalize(state["mean"].tolist(), state["std"].tolist())
    whitening = ZCA(state["mean"], torch.eye(len(state["mean"])))
    whitening.load_state_dict(state)
    return whitening


class _Part(Dataset):
    """The training or the test images: items (picture as RGB tensor, label).

    ``pictures`` yields tuples that start with the picture, ``chosen`` are the indices that belong to the part, and
    ``region`` finds what is to be located, where the data set says: a mask (H, W) or BoundingBoxes with one box, in the
    pixels as they are stored.
    """

    def __init__(
        self,
        pictures: Dataset,
        labels: Sequence[int],
        chosen: Sequence[int] | None = None,
        region: Callable[[int], torch.Tensor] | None = None,
    ):
        self.pictures = pictures
        self.labels = [int(label) for label in labels]
        self.chosen = range(len(self.labels)) if chosen is None else chosen
        self.region = region

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, item):
        index = self.chosen[item]
        picture = self.pictures[index][0]
        if not isinstance(picture, torch.Tensor):
            picture = F.pil_to_tensor(picture.convert("RGB"))
        return picture, self.labels[index]

    def mask(self, item, size):
        """(size, size) bool: the region on the resized image."""
        index = self.chosen[item]
        region = self.region(index)
        if isinstance(region, tv_tensors.BoundingBoxes):
            region = F.convert_bounding_box_format(region, new_format=tv_tensors.BoundingBoxFormat.XYXY)
            x0, y0, x1, y1 = F.resize(region, [size, size])[0].tolist()
            mask = torch.zeros(size, size, dtype=torch.bool)
            mask[_covered(y0, y1, size), _covered(x0, x1, size)] = True
        else:
            # For masks torchvision's resize takes "nearest", which is off by up to half a pixel from the image.
            mask = F.resize_image(region[None], [size, size], interpolation=InterpolationMode.NEAREST_EXACT)[0]
        return upright(mask, stored(self.pictures.paths[index])[1]) if isinstance(self.pictures, _Files) else mask


def _covered(start, end, size):
    """The pixels of ``size`` whose centre lies between two edges, at least one."""
    first = min(max(math.ceil(start - 0.5), 0), size - 1)
    return slice(first, min(max(math.ceil(end - 0.5), first + 1), size))


class _View(Dataset):
    """A part as networks see it: items (image, label), and (box, mask) behind them where ``located``."""

    def __init__(self, part, size, augment=None, normalisation=None, located=False):
        self.part = part
        self.size = size
        self.augment = augment or []
        self.normalisation = normalisation
        self.located = located

    def __len__(self):
        return len(self.part)

    def __getitem__(self, item):
        return self.__getitems__([item])[0]

    def __getitems__(self, items):  # what a DataLoader asks for: whitening one image at a time takes far longer
        images, labels = zip(*map(self._drawn, items), strict=True)
        images = torch.stack(images)
        if self.normalisation is not None:
            images = self.normalisation(images)
        if not self.located:
            return list(zip(images, labels, strict=True))
        masks = torch.stack([self.part.mask(item, self.size) for item in items])
        return list(zip(images, labels, extents(masks), masks, strict=True))

    def _drawn(self, item):
        image, label = self.part[item]
        image = resized(image, self.size)
        for transform in self.augment:
            image = transform(image)
        return image, label


def _whitening(view):
    """ZCA of a view's images."""
    total, products = 0, 0
    for start in range(0, len(view), 512):
        items = view.__getitems__(range(start, min(start + 512, len(view))))
        images = torch.stack([image for image, _ in items]).flatten(1).double()
        total, products = total + images.sum(0), products + images.T @ images
    mean = total / len(view)
    return ZCA(mean, products / len(view) - mean.outer(mean))


def _stratified(name, labels, classes, share, split):
    """Indices for training, ``share`` of each class, and for testing."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("attnkern.training.data needs scikit-learn to split: pip install attnkern[train]") from error
    counts = Counter(labels)
    alone = [classes[label] for label, count in sorted(counts.items()) if count == 1]
    if alone:
        raise ValueError(f"{name}: a split needs at least two images of each class, got one of {listed(alone)}")
    training = math.floor(share * len(labels))
    for part, count in (("training", training), ("test", len(labels) - training)):
        if count < len(counts):
            raise ValueError(
                f"{name}: a split of {len(labels)} images with {share:g} for training has {count} {part} images, fewer "
                f"than the {len(counts)} classes"
            )
    # By the number of the split alone: runs of other seeds never train on the images that this one tests on.
    parts = train_test_split(range(len(labels)), train_size=share, stratify=labels, random_state=split)
    return tuple(map(sorted, parts))


def _opened(name, root, **options):
    """torchvision's data sets, one for each part."""
    kind = _KINDS[name]
    return [getattr(datasets, kind.torchvision)(root, **part, **options) for part in kind.parts]


def _present(name, root, **options):
    """As ``_opened``, for what is already there."""
    places = _KINDS[name].places
    missing = [place for place in places if not (root / place).exists()]
    remedy = "there or pass --data.download true"
    if missing:  # before torchvision looks: Caltech101 makes the folder that it misses
        raise FileNotFoundError(f"{name}: no data under {root}; put {' and '.join(missing)} {remedy}")
    try:
        return _opened(name, root, **options)
    except RuntimeError as error:
        whole = f"{name}: {' or '.join(places)} under {root} is damaged or lacks files"
        raise FileNotFoundError(f"{whole}; put the whole data set {remedy}") from error


def _torchvision(name, root):
    """Train, test and names of the classes of a data set that comes in two parts."""
    found = _present(name, root)
    parts = [_Part(part, part.targets if hasattr(part, "targets") else part.labels) for part in found]
    return *parts, getattr(found[0], "classes", range(10))


class _Files(Dataset):
    """Pictures in image files, cut to boxes (x, y, width, height) where these are given."""

    def __init__(self, paths, boxes=None):
        self.paths = paths
        self.boxes = boxes

    def __getitem__(self, index):
        return (read_image(self.paths[index], self.boxes and self.boxes[index]),)


def _trimap(paths, index):
    """Everything but the background, which is 2: the animal, 1, and its outline, 3."""
    with opened(paths[index]) as trimap:
        return F.pil_to_tensor(trimap)[0] != 2


def _pets(root, ratio, split):
    trainval, test = _present("pets", root)
    paths, trimaps, labels = (getattr(trainval, name) + getattr(test, name) for name in ("_images", "_segs", "_labels"))
    chosen = range(len(trainval)), range(len(trainval), len(paths))
    if ratio is not None:
        chosen = _stratified("pets", labels, trainval.classes, ratio, split)
    region = functools.partial(_trimap, trimaps)
    return *(_Part(_Files(paths), labels, part, region) for part in chosen), trainval.classes


def _caltech101(root, split):
    (found,) = _present("caltech101", root)
    folders = [Path(found.root, "101_ObjectCategories", found.categories[label]) for label in found.y]
    paths = [folder / f"image_{number:04d}.jpg" for folder, number in zip(folders, found.index, strict=True)]
    parts = _stratified("caltech101", found.y, found.categories, 0.7, split)
    return *(_Part(_Files(paths), found.y, part) for part in parts), found.categories


def _box(paths, boxes, index):
    """A box, or without boxes the whole picture."""
    width, height = stored(paths[index])[0]
    box = torch.tensor([boxes[index] if boxes else (0, 0, width, height)], dtype=torch.float64)
    return tv_tensors.BoundingBoxes(box, format="XYWH", canvas_size=(height, width))


def _cub(root, crop):
    missing = [name for name in ("images", *_CUB) if not (root / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"cub: no {', '.join(missing)} under {root}; name as root the unpacked folder CUB_200_2011, which holds "
            f"images/, {', '.join(_CUB)}"
        )
    tables = []
    for name in _CUB:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        tables.append(dict(line.strip().split(maxsplit=1) for line in lines if line.strip()))
    files, classes_of, training, boxes, classes = tables
    paths = [root / "images" / file for file in files.values()]
    boxes = [tuple(map(float, boxes[bird].split())) for bird in files]
    birds = _Files(paths, boxes if crop else None)
    region = functools.partial(_box, paths, None if crop else boxes)
    numbers = {number: label for label, number in enumerate(classes)}
    labels = [numbers[classes_of[bird]] for bird in files]
    chosen = [[i for i, bird in enumerate(files) if training[bird] == wanted] for wanted in "10"]
    return *(_Part(birds, labels, part, region) for part in chosen), classes.values()


def _entries(folder, kind):
    """Sorted names of what is in a folder, files or folders, without what tools leave there."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if kind(entry)]
    return sorted(name for name in names if not name.startswith(".") and name not in _LEFTOVERS)


def _subfolders(folder) -> list[str]:
    return _entries(folder, os.DirEntry.is_dir)


def _own_images(folder, suffixes=_SUFFIXES) -> list[str]:
    return [name for name in _entries(folder, os.DirEntry.is_file) if name.lower().endswith(suffixes)]


def _images(folder, suffixes=_SUFFIXES) -> Iterator[Path]:
    """The image files in a folder and in the folders within it, in the order of torchvision's ImageFolder."""

    def walk(folder):
        yield folder
        for name in _subfolders(folder):
            yield from walk(folder / name)

    for place in sorted(walk(folder), key=str):
        yield from (place / name for name in _own_images(place, suffixes))


def _tree(root, layout):
    """Paths and labels of the images under a folder of classes, and the names of the classes."""
    classes = _subfolders(root)
    pictures = [list(_images(root / name, _SUFFIXES + _UNREAD)) for name in classes]
    found = [[path for path in paths if path.suffix.lower() not in _UNREAD] for paths in pictures]
    unread = sum(map(len, pictures)) - sum(map(len, found))
    if unread:
        rank_zero_warn(f"folder: {unread} files in {root} that end in {', '.join(_UNREAD)} are passed over")
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if not classes:
        raise FileNotFoundError(f"folder: no folder of images is there; {layout}")
    if empty:
        raise FileNotFoundError(f"folder: no images of {listed(empty)} in {root}; {layout}")
    labels = [label for label, paths in enumerate(found) for _ in paths]
    return [path for paths in found for path in paths], labels, classes


def _parts(root, layout):
    """Names of the folders for training and for testing under a folder of images, None where it has only classes."""
    folders = _subfolders(root)
    spelled = {name.lower(): name for name in folders}
    named = [spelled[part] for part in _PARTS if part in spelled]
    parts = [name for name in named if any(any(_images(root / name / inner)) for inner in _subfolders(root / name))]
    if parts and (parts[0].lower() != "train" or len(parts) == 1):
        raise FileNotFoundError(f"folder: of train and test only {listed(parts)} holds folders of images; {layout}")
    if parts:
        unused = [name for name in folders if name not in parts[:2]]
        if unused:
            rank_zero_warn(
                f"folder: {root} is read by its parts '{parts[0]}' and '{parts[1]}', without {listed(unused)}"
            )
        return parts[:2]
    if named and len(named) == len(folders):
        raise FileNotFoundError(f"folder: {listed(named)} in {root} hold no folders of images; {layout}")
    if named:
        rank_zero_warn(f"folder: {root} is read as a folder of classes, {listed(named)} among them")
    elif folders and not any(_own_images(root / name) for name in folders):
        rank_zero_warn(f"folder: {root} is read as the classes {listed(folders)}, whose images lie in folders within")
    return None


def _folder(root, split):
    layout = f"{root} must hold train/CLASS/IMAGE and test/CLASS/IMAGE (or val), or CLASS/IMAGE to be split"
    if not root.is_dir():
        raise FileNotFoundError(f"folder: no data; {layout}")
    parts = _parts(root, layout)
    if parts is None:
        paths, labels, classes = _tree(root, layout)
        chosen = _stratified("folder", labels, classes, 0.8, split)
        return *(_Part(_Files(paths), labels, part) for part in chosen), classes
    if split:
        raise ValueError(f"ImageData: split does not apply to a folder with {' and '.join(parts)}, got {split}")
    (paths, labels, classes), (test_paths, test_labels, test_classes) = (_tree(root / name, layout) for name in parts)
    unknown = [name for name in test_classes if name not in classes]
    if unknown:
        raise ValueError(f"folder: classes in {root / parts[1]} that are not in {root / parts[0]}: [{listed(unknown)}]")
    # Each tree numbers its classes by itself.
    number = {name: label for label, name in enumerate(classes)}
    test_labels = [number[test_classes[label]] for label in test_labels]
    return _Part(_Files(paths), labels), _Part(_Files(test_paths), test_labels), classes


def _digits(size, seed, count):
    drawn = digits_clutter("train", size, seed, count), digits_clutter("test", size)
    parts = [_Part(TensorDataset(each.images), each.labels, region=each.masks.__getitem__) for each in drawn]
    return *parts, range(10)


class ImageData(LightningDataModule):
    """Training and test images of one data set, resized, augmented and normalised.

    After ``setup()``: ``num_classes``, ``class_names``, ``in_chans``, and the data sets ``train`` and ``test``, whose
    items are (image (3, size, size) float32, label). Image files are read as viewers show them, see
    :func:`attnkern.training.images.read_image`.

    Splits: those that the data sets come with. Caltech-101 has none: 70 % of each class train; nor has a folder of
    classes without train and test: 80 %. A folder's ``train`` and ``test`` (or ``val``, ``valid``, ``validation``) are
    its parts only where they hold folders with images in them; a warning says where a choice was made.

    Args:
        name: one of :func:`data_sets`.
        root: folder that data sets lie in; for "folder" and "cub" the data set itself.
        batch_size: images a batch.
        size: side that images are resized to, by default 32 for cifar10, cifar100, svhn and digits-clutter, 80 for cub,
            96 for stl10, 300 for pets, 224 for the others.
        augment: modules of torchvision.transforms.v2 for training images (3, size, size), float32 in [0, 1]. They draw
            from PyTorch's global generator.
        whiten: ZCA by the training images, for sizes up to 32, instead of the channels' means and deviations, which are
            the training set's (cifar10, cifar100, digits-clutter, stl10, svhn) or else ImageNet's.
        ratio: pets only: share for training of a stratified split of all images, instead of the official split.
        split: pets with a ratio, caltech101, folder: which one of the stratified splits.
        count: digits-clutter only: number of training images.
        box_crop: cub only: cut images to the bird's box first.
        seed: of the order of batches, and of the clutter of the training digits.
        download: let ``prepare_data`` download what is missing.
        workers: processes that load images.

    Raises:
        ValueError, TypeError: an argument out of its range, or one that does not apply to the data set; in ``setup``:
            too few images of a class to split them.
        FileNotFoundError: in ``setup``: the data set is not there, or a class has no images; says where to put it.
        ImageError: an item's image file is damaged or no image; a ValueError and an OSError that names the file.
        ImportError: in ``setup``: scikit-learn is not installed and needed.

    Source: pets at 300 and their ratio: Convolutional Rectangular Attention Module. cub at 80, box_crop,
    ``whiten``: Learn to Pay Attention; box_crop also Information Bottleneck Approach to Spatial Attention
    Learning.
    """

    in_chans: int = 3
    num_classes: int
    class_names: list[str]
    train: Dataset
    test: Dataset
    normalisation: nn.Module

    def __init__(
        self,
        *,
        name: str = "digits-clutter",
        root: str | os.PathLike = "data",
        batch_size: int = 128,
        size: int | None = None,
        augment: list[nn.Module] | None = None,
        whiten: bool = False,
        ratio: float | None = None,
        split: int = 0,
        count: int | None = None,
        box_crop: bool = False,
        seed: int = 0,
        download: bool = False,
        workers: int = 0,
    ):
        super().__init__()
        check_kind("ImageData", str, name=name)
        check_kind("ImageData", str | os.PathLike, root=root)
        check_integer("ImageData", split=split, seed=seed, workers=workers)
        if augment is not None:
            check_items("ImageData", nn.Module, augment=augment)
        if ratio is not None:
            check_number("ImageData", ratio=ratio)
        if name not in _KINDS:
            raise ValueError(f"ImageData: name must be one of {', '.join(data_sets())}, got {name!r}")
        kind = _KINDS[name]
        check_flag("ImageData", whiten=whiten, box_crop=box_crop, download=download)
        switches = {"split": split, "box_crop": box_crop, "download": download}
        given = {"ratio": ratio, "count": count, **{option: value or None for option, value in switches.items()}}
        for option, value in given.items():
            if value is not None and option not in kind.options:
                raise ValueError(f"ImageData: {option} does not apply to {name}, got {value}")
        if name == "pets" and split and ratio is None:
            raise ValueError(f"ImageData: split applies to pets only with a ratio, got {split}")
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"ImageData: ratio must lie between 0 and 1, got {ratio}")
        size = kind.size if size is None else size
        check_count("ImageData", batch_size=batch_size, size=size, count=1 if count is None else count)
        for option, value in {"split": split, "workers": workers}.items():
            if value < 0:
                raise ValueError(f"ImageData: {option} must be at least 0, got {value}")
        if whiten and 3 * size**2 > _WHITENED:
            raise ValueError(f"ImageData: whiten needs images of at most {_WHITENED} values, got 3·{size}·{size}")
        self.name = name
        self.root = Path(root)
        self.batch_size = batch_size
        self.size = size
        self.augment = augment
        self.whiten = whiten
        self.ratio = ratio
        self.split = split
        self.count = count
        self.box_crop = box_crop
        self.seed = seed
        self.download = download
        self.workers = workers

    def __getattr__(self, name: str):
        if name in ("class_names", "normalisation", "num_classes", "test", "train"):
            raise AttributeError(f"ImageData: setup() must be called before {name} is there")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def settings(self) -> dict[str, Any]:
        """The arguments that say which images these are: ``ImageData(**settings)`` gives them again."""
        names = ("name", "size", "whiten", "ratio", "split", "count", "box_crop", "seed")
        return {"root": str(self.root)} | {name: getattr(self, name) for name in names}

    def prepare_data(self) -> None:
        """Download, where ``download`` says so; nothing else does."""
        if self.download:
            _opened(self.name, self.root, download=True)
        # Lightning calls this first: what is missing is missed before a run leaves anything behind.
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Find the images. All stages share one set-up."""
        if "test" in vars(self):
            return
        if self.name == "cub":
            train, test, names = _cub(self.root, self.box_crop)
        elif self.name == "folder":
            train, test, names = _folder(self.root, self.split)
        elif self.name == "pets":
            train, test, names = _pets(self.root, self.ratio, self.split)
        elif self.name == "caltech101":
            train, test, names = _caltech101(self.root, self.split)
        elif self.name == "digits-clutter":
            train, test, names = _digits(self.size, self.seed, self.count)
        else:
            train, test, names = _torchvision(self.name, self.root)
        self.class_names = list(map(str, names))
        self.num_classes = len(self.class_names)
        moments = _KINDS[self.name].moments
        if self.whiten:
            self.normalisation = _whitening(_View(train, self.size))
        elif moments is not None:
            self.normalisation = v2.Normalize(*moments)
        else:
            (images,) = train.pictures.tensors
            self.normalisation = v2.Normalize(images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist())
        self.train = _View(train, self.size, self.augment, self.normalisation)
        self.test = _View(test, self.size, None, self.normalisation)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, size, size) or (3, size, size) in [0, 1] as the network takes them."""
        check_tensor("ImageData", "images", images)
        return self.normalisation(images)

    def raw(self) -> Dataset:
        """The test set before normalisation: items (image (3, size, size) float32 in [0, 1], label)."""
        return _View(self.test.part, self.size)

    def located(self) -> Dataset | None:
        """The test set with what its labels name located, where the data set says where it is, else None.

        For digits-clutter the digit's ink, for pets all that the trimap does not call background, for cub the bird's
        box (after ``box_crop`` all of the image).

        Returns:
            items (image, label, box, mask): the image normalised; mask (size, size) bool, the box filled for cub; box
            (4,) float32, the mask's first row, first column, last row, last column, where (0, 0) is the centre of the
            first pixel. The box of an empty mask is the whole image.
        """
        test = self.test.part
        return None if test.region is None else _View(test, self.size, None, self.normalisation, located=True)

    def train_dataloader(self) -> DataLoader:
        """Batches in an order of its own every epoch. An incomplete one is dropped, unless it is the only one."""
        return self._loader(
            self.train,
            sampler=EpochSampler(len(self.train), self.seed),
            drop_last=len(self.train) >= self.batch_size,
            # A worker that persists would keep its random state from one epoch to the next; no resumed run has that.
            persistent_workers=self.workers > 0 and not self.augment,
        )

    def val_dataloader(self) -> DataLoader:
        """The test set, for watching a run only: nothing is selected by it, the last epoch counts, as in the papers."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader:
        """The test set in its order."""
        return self._loader(self.test, persistent_workers=self.workers > 0)

    def _loader(self, data, **options: Any) -> DataLoader:
        return _Late(data, self.batch_size, num_workers=self.workers, pin_memory=torch.cuda.is_available(), **options)
