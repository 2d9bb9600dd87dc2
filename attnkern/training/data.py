"""A data set as a Lightning data module: images prepared for a network, loaders and the order of batches."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from attnkern._checks import check_choice, check_tensor
from attnkern._extras import needs_extra
from attnkern._spelling import did_you_mean

with needs_extra("attnkern.training.data", "train"):
    from lightning.pytorch import LightningDataModule
    from torchvision.transforms import v2

from attnkern.training.datasets import SPECS, open_torchvision, read_dataset
from attnkern.training.digits import extents
from attnkern.training.images import ImageError, resized
from attnkern.training.normalisation import fit_zca

#: Largest number of values of an image for ``whiten``: the covariance has the square of it.
_MAX_WHITENED = 3072


def data_sets() -> list[str]:
    """The names that :class:`ImageData` accepts."""
    return sorted(SPECS)


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends only on the seed and the epoch.

    A resumed run therefore sees the same batches as an uninterrupted one. Lightning calls ``set_epoch``, even when it
    wraps this sampler for several processes.

    Args:
        length: number of indices.
        seed: random seed of the orders.
    """

    def __init__(self, length: int, seed: int = 0):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the first epoch is 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # The generator takes 32 bits. With a plain sum, seed 1 would repeat the orders of seed 0 one epoch earlier.
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) % 2**32)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class _LazyLoader(DataLoader):
    """A DataLoader that starts its workers when the first batch is requested.

    Lightning creates the first iterator of a run before it sets the epoch and before on_train_epoch_start: workers that
    started then would begin a resumed run with the order and the random seeds of another epoch.
    """

    def __iter__(self):
        try:
            yield from super().__iter__()
        except (FileNotFoundError, ImageError) as error:
            # An error from a worker has its traceback in the message. Only the last part is the original message.
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from error


class _PreparedImages(Dataset):
    """A part of a data set as a network takes it: items (image, label), with ``located`` (image, label, box, mask)."""

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

    def __getitems__(self, items):  # called by DataLoader; whitening a batch is much faster than image by image
        images, labels = zip(*map(self._augmented, items), strict=True)
        images = torch.stack(images)
        if self.normalisation is not None:
            images = self.normalisation(images)
        if not self.located:
            return list(zip(images, labels, strict=True))
        masks = torch.stack([self.part.mask(item, self.size) for item in items])
        return list(zip(images, labels, extents(masks), masks, strict=True))

    def _augmented(self, item):
        image, label = self.part[item]
        image = resized(image, self.size)
        for transform in self.augment:
            image = transform(image)
        return image, label


class ImageData(LightningDataModule):
    """Training and test images of one data set, resized, augmented and normalised.

    After ``setup()``: ``num_classes``, ``class_names``, ``in_chans``, and the data sets ``train`` and ``test``, whose
    items are (image (3, size, size) float32, label). Image files are read as viewers show them, see
    :func:`attnkern.training.images.read_image`.

    The published splits are used where there are any. Without one, 70 % of each class train for Caltech-101 and 80 %
    for a folder of classes. A folder's ``train`` and ``test`` (or ``val``, ``valid``, ``validation``) are read as its
    parts only if they contain folders with images; a warning says so if the folder could be read in two ways.

    Args:
        name: one of :func:`data_sets`.
        root: folder that contains the data sets; for "folder" and "cub" the data set itself.
        batch_size: images per batch.
        size: side that images are resized to, by default 32 for cifar10, cifar100, svhn and the digits, 80 for cub, 96
            for stl10, 300 for pets, 289 for photo-clutter, 224 for the others.
        augment: modules of torchvision.transforms.v2 for training images (3, size, size), float32 in [0, 1]. They use
            PyTorch's global generator.
        whiten: normalise by ZCA of the training images, for sizes up to 32, instead of by the mean and standard
            deviation of the channels, which are the training set's (cifar10, cifar100, digits, stl10, svhn),
            those of EfficientNet-Lite's training (photo-clutter) or ImageNet's (the others).
        ratio: pets only: share for training of a stratified split of all images, instead of the official split.
        split: number of the stratified split, for pets with a ratio, caltech101 and folder.
        count: digits-clutter, digits-pairs and photo-clutter only: number of training images.
        box_crop: cub only: crop images to the bird's box first.
        seed: random seed of the order of batches, and of the clutter of the training images that are drawn.
        download: let ``prepare_data`` download a missing data set.
        workers: number of processes that load images.

    Raises:
        ValueError: an argument out of its range, or one that does not apply to the data set; in ``setup``: too few
            images of a class to split them.
        FileNotFoundError: in ``setup``: the data set is not there, or a class has no images; says where to put it.
        ImageError: when an item is read: its image file is damaged or no image; a ValueError and an OSError.
        ImportError: in ``setup``: scikit-learn is needed and not installed.

    Source: pets at 300 and its ratio: Convolutional Rectangular Attention Module. cub at 80, box_crop, ``whiten``:
    Learn to Pay Attention; box_crop also Information Bottleneck Approach to Spatial Attention Learning.
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
        if name not in SPECS:
            hint = did_you_mean(name, SPECS)
            raise ValueError(f"ImageData: name must be one of {', '.join(data_sets())}, got {name!r}{hint}")
        spec = SPECS[name]
        given = {"ratio": ratio, "count": count}
        given |= {"split": split or None, "box_crop": box_crop or None, "download": download or None}
        for option, value in given.items():
            if value is not None and option not in spec.options:
                raise ValueError(f"ImageData: {option} does not apply to {name}, got {value}")
        if name == "pets" and split and ratio is None:
            raise ValueError(f"ImageData: split applies to pets only with a ratio, got {split}")
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"ImageData: ratio must be between 0 and 1, got {ratio}")
        size = spec.size if size is None else size
        if whiten and 3 * size**2 > _MAX_WHITENED:
            raise ValueError(f"ImageData: whiten needs images of at most {_MAX_WHITENED} values, got 3·{size}·{size}")
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
            raise AttributeError(f"ImageData: call setup() before using {name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def settings(self) -> dict[str, Any]:
        """The arguments that determine the images: ``ImageData(**settings)`` has the same ones."""
        names = ("name", "size", "whiten", "ratio", "split", "count", "box_crop", "seed")
        return {"root": str(self.root)} | {name: getattr(self, name) for name in names}

    def prepare_data(self) -> None:
        """Download the data set if ``download`` is true. Nothing else downloads."""
        if self.download:
            open_torchvision(self.name, self.root, download=True)
        # Lightning calls this first, so a run fails on missing data before it creates files.
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Find the images. All stages share one set-up."""
        if "test" in vars(self):
            return
        options = {name: getattr(self, name) for name in ("size", "seed", "count", "ratio", "split", "box_crop")}
        train, test, self.class_names = read_dataset(self.name, self.root, **options)
        self.num_classes = len(self.class_names)
        moments = SPECS[self.name].moments
        if self.whiten:
            self.normalisation = fit_zca(_PreparedImages(train, self.size))
        elif moments is not None:
            self.normalisation = v2.Normalize(*moments)
        else:
            (images,) = train.images.tensors
            self.normalisation = v2.Normalize(images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist())
        self.train = _PreparedImages(train, self.size, self.augment, self.normalisation)
        self.test = _PreparedImages(test, self.size, None, self.normalisation)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, size, size) or (3, size, size) in [0, 1] as the network takes them."""
        # torchvision's transforms return anything that is not a tensor unchanged.
        check_tensor("ImageData", "images", images)
        return self.normalisation(images)

    def raw(self) -> Dataset:
        """The test set before normalisation: items (image (3, size, size) float32 in [0, 1], label)."""
        return _PreparedImages(self.test.part, self.size)

    def located(self, part: str = "test") -> Dataset | None:
        """Images with the place of the labelled objects, or None if the data set has no boxes or masks.

        The mask is the digit's ink for digits-clutter, the object's ellipse for photo-clutter, everything but the
        trimap's background for pets, and the filled box of the bird for cub (after ``box_crop`` the whole image).
        digits-pairs has two masks (2, size, size) and two boxes (2, 4) in an item.

        Args:
            part: "test" or "train"; training images are not augmented.

        Returns:
            items (image, label, box, mask): the image normalised; mask (size, size) bool; box (4,) float32, the mask's
            first row, first column, last row, last column, where (0, 0) is the centre of the first pixel. The box of an
            empty mask is the whole image.

        Raises:
            ValueError: another part.
        """
        check_choice("ImageData", "part", part, ("test", "train"))
        chosen = getattr(self, part).part
        if chosen.region is None:
            return None
        return _PreparedImages(chosen, self.size, None, self.normalisation, located=True)

    def train_dataloader(self) -> DataLoader:
        """Batches in another order every epoch. An incomplete batch is dropped unless it is the only one."""
        return self._loader(
            self.train,
            sampler=EpochSampler(len(self.train), self.seed),
            drop_last=len(self.train) >= self.batch_size,
            # A persistent worker would keep its random state across epochs, which a resumed run cannot restore.
            persistent_workers=self.workers > 0 and not self.augment,
        )

    def val_dataloader(self) -> DataLoader:
        """The test set, to follow a run only: as in the papers, the last epoch counts and nothing is selected by it."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader:
        """The test set in its own order."""
        return self._loader(self.test, persistent_workers=self.workers > 0)

    def _loader(self, data, **options: Any) -> DataLoader:
        return _LazyLoader(
            data, self.batch_size, num_workers=self.workers, pin_memory=torch.cuda.is_available(), **options
        )
