"""Data sets, tested on small fake files in the real formats. torchvision's checksum verification is disabled."""

import importlib
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch

for package in ("lightning", "torchvision", "sklearn", "scipy"):
    pytest.importorskip(package)

import scipy.io  # noqa: E402
import torchvision.datasets as sets  # noqa: E402
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from attnkern.training import photographs, show  # noqa: E402
from attnkern.training.data import EpochSampler, ImageData, data_sets  # noqa: E402
from attnkern.training.datasets import SPECS  # noqa: E402
from attnkern.training.digits import digits_clutter, digits_pairs, extents  # noqa: E402
from attnkern.training.normalisation import ZCA  # noqa: E402

RANDOM = np.random.default_rng(0)


def noise(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if path.suffix == ".jpg":
        options |= {"quality": 100, "subsampling": 0} if image.mode == "RGB" else {"quality": 100}
    image.save(path, **options)


def loaded(**options):
    data = ImageData(**options)
    data.setup()
    return data


# Each function writes a fake data set under root. CIFAR, SVHN and STL-10 store raw pixels, so these functions
# also return (images, labels) of the training and the test part, with images as (N, 3, H, W) uint8.


def write_cifar(root, folder, files, key, meta, meta_key, classes):
    (root / folder).mkdir(parents=True)
    written = []
    for count, name in enumerate(files, 2):
        entry = {"data": noise(count, 3072), key: [(3 * count + i) % classes for i in range(count)]}
        (root / folder / name).write_bytes(pickle.dumps(entry))
        written.append(entry)
    (root / folder / meta).write_bytes(pickle.dumps({meta_key: [f"class{i}" for i in range(classes)]}))
    joined = np.concatenate([entry["data"] for entry in written[:-1]]), written[-1]["data"]
    labels = [label for entry in written[:-1] for label in entry[key]], written[-1][key]
    return [(pixels.reshape(-1, 3, 32, 32), found) for pixels, found in zip(joined, labels, strict=True)]


def write_cifar10(root):
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return write_cifar(root, "cifar-10-batches-py", files, "labels", "batches.meta", "label_names", 10)


def write_cifar100(root):
    return write_cifar(root, "cifar-100-python", ["train", "test"], "fine_labels", "meta", "fine_label_names", 100)


def write_svhn(root):
    written = []
    for part, labels in (("train", [1, 10, 9]), ("test", [10, 2])):
        pixels = noise(32, 32, 3, len(labels))
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
        written.append((pixels.transpose(3, 2, 0, 1), [label % 10 for label in labels]))
    return written


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    written = []
    for part, labels in (("train", [1, 10, 3]), ("test", [2, 9])):
        pixels = noise(len(labels), 3, 96, 96)
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # STL-10 stores images column by column
        np.array(labels, np.uint8).tofile(folder / f"{part}_y.bin")
        written.append((pixels, [label - 1 for label in labels]))
    noise(1, 3, 96, 96).tofile(folder / "unlabeled_X.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n", encoding="utf-8")
    return written


#: Mask of the animal in an image 60 pixels wide and 20 high: columns 13 to 26, rows 4 to 15.
ANIMAL = np.zeros((20, 60), bool)
ANIMAL[4:16, 13:27] = True


def write_pets(root, each=2):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    trimap = np.where(ANIMAL, 3, 2).astype(np.uint8)
    trimap[6:14, 15:25] = 1  # 1: animal, 2: background, 3: outline
    for part in ("trainval", "test"):
        lines = []
        for label, breed in enumerate(("Abyssinian", "american_bulldog"), 1):
            for number in range(each):
                name = f"{breed}_{part}{number}"
                lines.append(f"{name} {label} {label} {label}\n")
                save(folder / "images" / f"{name}.jpg", np.uint8(255 * ANIMAL)[..., None].repeat(3, 2))
                save(folder / "annotations" / "trimaps" / f"{name}.png", trimap)
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines), encoding="utf-8")


def write_caltech101(root, each=10):
    folder = root / "caltech101" / "101_ObjectCategories"
    save(folder / "BACKGROUND_Google" / "image_0001.jpg", noise(9, 9, 3))
    for number in range(1, each + 1):
        save(folder / "Faces" / f"image_{number:04}.jpg", noise(9, 13, 3))
        save(folder / "airplanes" / f"image_{number:04}.jpg", np.full((9, 13), 51, np.uint8))  # grey


def write_cub(root):
    #: file: (class, 1 for training, box x, box y, box width, box height, image width, image height)
    birds = {
        "002.Laysan/a.jpg": (2, 1, 5.0, 10.0, 10.0, 5.0, 40, 20),
        "001.Black/b.jpg": (1, 0, 5.0, 10.0, 10.0, 5.0, 40, 20),
        "002.Laysan/c.jpg": (2, 0, 10.0, 4.0, 20.0, 32.0, 80, 80),
        "001.Black/d.jpg": (1, 0, 38.6, 0.0, 9.0, 3.0, 40, 20),  # extends past the right edge
    }
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    for number, (file, (label, training, x, y, width, height, w, h)) in enumerate(birds.items(), 1):
        pixels = np.zeros((h, w, 3), np.uint8)
        pixels[int(y) : int(y + height), int(x) : int(x + width)] = 255
        save(root / "images" / file, pixels)
        values = file, label, training, f"{x} {y} {width} {height}"
        for lines, value in zip(tables.values(), values, strict=True):
            lines.append(f"{number} {value}\n")
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    (root / "classes.txt").write_text("1 001.Black\n2 002.Laysan\n", encoding="utf-8")


def palette():
    image = Image.new("P", (7, 5), 1)
    image.putpalette([0, 0, 0, 255, 0, 51])
    return image


def write_folder(root, parts=("train", "test"), each=1):
    for part in parts:
        for number in range(each):
            save(root / part / "ant" / f"{number}.png", np.full((6, 11), 51, np.uint8))
            save(root / part / "bee" / f"{number}.png", palette())


FAKES = {
    "caltech101": write_caltech101,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "cub": write_cub,
    "digits-clutter": lambda root: None,
    "digits-pairs": lambda root: None,
    "folder": write_folder,
    "pets": write_pets,
    "photo-clutter": lambda root: None,
    "stl10": write_stl10,
    "svhn": write_svhn,
}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    for module in (sets.cifar, sets.svhn, sets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def test_data_set_names():
    assert data_sets() == sorted(FAKES)


@pytest.mark.parametrize(
    "name, classes, counts, side",
    [
        ("caltech101", 2, (14, 6), 224),
        ("cifar10", 10, (20, 7), 32),
        ("cifar100", 100, (2, 3), 32),
        ("cub", 2, (1, 3), 80),
        ("digits-clutter", 10, (1438, 359), 32),
        ("digits-pairs", 2, (1438, 359), 32),
        ("folder", 2, (2, 2), 224),
        ("pets", 2, (4, 4), 300),
        ("stl10", 10, (3, 2), 96),
        ("svhn", 10, (3, 2), 32),
    ],
)
def test_every_data_set(name, classes, counts, side, tmp_path):
    FAKES[name](tmp_path)
    data = loaded(name=name, root=tmp_path, batch_size=2)
    assert (data.num_classes, len(data.class_names), data.in_chans) == (classes, classes, 3)
    assert all(type(found) is str for found in data.class_names)
    assert (len(data.train), len(data.test)) == counts
    for part in (data.train, data.test):
        images, labels = zip(*(part[i] for i in range(min(4, len(part)))), strict=True)
        assert all(image.shape == (3, side, side) and image.dtype == torch.float32 for image in images)
        assert all(type(label) is int and 0 <= label < classes for label in labels)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, side, side)
    assert labels.tolist() == [data.test[0][1], data.test[1][1]]
    raw, _ = default_collate([data.raw()[0], data.raw()[1]])
    assert raw.min() >= 0
    assert raw.max() <= 1
    assert raw.max() > 0.1  # not divided by 255 twice
    torch.testing.assert_close(data.normalise(raw), images)
    assert not torch.equal(raw, images)
    small = loaded(name=name, root=tmp_path, size=20)
    assert small.train[0][0].shape == small.raw()[0][0].shape == (3, 20, 20)
    if name not in ("cub", "digits-clutter", "digits-pairs", "pets"):
        assert data.located() is None


@pytest.mark.parametrize(
    "name, mean, deviation",
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ("stl10", (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
        ("svhn", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ],
)
def test_pixels_labels_and_published_mean_and_std(name, mean, deviation, tmp_path):
    (train, train_labels), (test, test_labels) = FAKES[name](tmp_path)
    data = loaded(name=name, root=tmp_path)
    assert [data.train[i][1] for i in range(len(train))] == train_labels
    assert [data.test[i][1] for i in range(len(test))] == test_labels
    for i, pixels in enumerate(test):
        torch.testing.assert_close(data.raw()[i][0], torch.from_numpy(pixels.copy()).float() / 255)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
    expected = (torch.from_numpy(train[1].copy()).float() / 255 - mean) / deviation
    torch.testing.assert_close(data.train[1][0], expected)


def test_non_rgb_images(tmp_path):
    write_folder(tmp_path / "folder")
    data = loaded(name="folder", root=tmp_path / "folder", size=8)
    assert data.class_names == ["ant", "bee"]
    for item, (colours, label) in enumerate([((0.2, 0.2, 0.2), 0), ((1.0, 0.0, 0.2), 1)]):
        image, found = data.raw()[item]
        torch.testing.assert_close(image, torch.tensor(colours)[:, None, None].expand(3, 8, 8), atol=1e-3, rtol=0)
        assert found == label
    write_caltech101(tmp_path)
    data = loaded(name="caltech101", root=tmp_path, size=8)
    assert data.class_names == ["Faces", "airplanes"]
    for image, label in data.raw():
        assert image.shape == (3, 8, 8)
        assert label == 0 or torch.equal(image[0], image[2])
    image = data.raw()[5][0]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
    torch.testing.assert_close(data.test[5][0], (image - mean[:, None, None]) / deviation[:, None, None])


def test_folder_layouts(tmp_path):
    write_folder(tmp_path / "val", ("train", "val"), each=2)
    (tmp_path / "val/val/ant/0.png").rename(tmp_path / "val/val/bee/9.png")
    (tmp_path / "val/val/ant/1.png").unlink()
    (tmp_path / "val/val/ant").rmdir()
    data = loaded(name="folder", root=tmp_path / "val", size=8)
    assert [data.test[i][1] for i in range(len(data.test))] == [1, 1, 1]  # the training folder defines the classes
    write_folder(tmp_path / "tree", [""], each=10)
    data = loaded(name="folder", root=tmp_path / "tree", size=8)
    assert sorted(label for _, label in data.train) == [0] * 8 + [1] * 8
    assert sorted(label for _, label in data.test) == [0] * 2 + [1] * 2


@pytest.mark.parametrize(
    "tree, classes, told",
    [
        # folders that contain images, expected classes, expected warning or None
        ("bus car train", ["bus", "car", "train"], "as a folder of classes; 'train' are classes, too"),
        ("bus test train val", ["bus", "test", "train", "val"], "'train', 'test', 'val' are classes, too"),
        ("train/a train/b test/a test/b", ["a", "b"], None),
        ("Train/a Train/b Validation/a", ["a", "b"], None),
        ("train/a test/a val/a", ["a"], "training on 'train' and testing on 'test' in {root}, ignoring 'val'"),
        (
            "train/a valid/a test",
            ["a"],
            "training on 'train' and testing on 'valid' in {root}, ignoring 'test'",
        ),
        ("train/a test/a bus", ["a"], "training on 'train' and testing on 'test' in {root}, ignoring 'bus'"),
        ("learn/a learn/b exam/a", ["exam", "learn"], "as the classes 'exam', 'learn', whose images are in subfolders"),
        ("bus bus/small car", ["bus", "car"], None),
    ],
)
def test_folder_split_detection(tree, classes, told, tmp_path, recwarn):
    for folder in tree.split():
        for number in range(9):
            save(tmp_path / folder / f"{number}.png", noise(3, 3))
    data = loaded(name="folder", root=tmp_path, size=8)
    assert data.class_names == classes
    messages = [str(warning.message) for warning in recwarn]
    assert [message for message in messages if told is None or told.format(root=tmp_path) not in message] == []
    assert len(messages) == (told is not None)
    parts = "train/" in tree.lower()
    assert len(data.train) == (9 * tree.lower().count("train/") if parts else len(data.train))
    assert parts or len(data.train) + len(data.test) == 9 * len(tree.split())


@pytest.mark.parametrize(
    "tree, message",
    [
        ("train test", "folder: 'train', 'test' in {root} contain no folders of images; "),
        (
            "test/a test/b",
            "folder: {root} must have folders of images for training and for testing, got only 'test'; ",
        ),
        (
            "train/a test",
            "folder: {root} must have folders of images for training and for testing, got only 'train'; ",
        ),
    ],
)
def test_missing_train_or_test_folder(tree, message, tmp_path):
    for folder in tree.split():
        save(tmp_path / folder / "1.png", noise(3, 3))
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message.format(root=tmp_path))}"):
        loaded(name="folder", root=tmp_path)


def test_hidden_and_tool_generated_files_are_ignored(tmp_path, recwarn):
    write_folder(tmp_path)
    for part in ("train", "test"):
        for folder in (".ipynb_checkpoints", ".git/x", "__MACOSX", "ant/.ipynb_checkpoints", "ant/@eaDir"):
            save(tmp_path / part / folder / "0-checkpoint.png", noise(3, 3))
        (tmp_path / part / "ant" / "._0.png").write_bytes(b"no image")
        (tmp_path / part / "ant" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / ".cache").mkdir()
    data = loaded(name="folder", root=tmp_path, size=8)
    assert data.class_names == ["ant", "bee"]
    assert [path.name for path in data.train.part.images.paths] == ["0.png", "0.png"]
    assert len(list(data.train)) == len(list(data.test)) == 2
    assert not list(recwarn)


def test_warning_counts_unsupported_image_files(tmp_path):
    write_folder(tmp_path)
    for name in ("1.HEIC", "2.svg", "3.txt"):
        (tmp_path / "train" / "ant" / name).touch()
    message = (
        f"folder: skipping 2 files in {tmp_path / 'train'}: files that end in .heic, .heif, .jxl, .svg cannot be read"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        data = loaded(name="folder", root=tmp_path, size=8)
    assert len(data.train) == 2


def test_error_names_classes_without_images(tmp_path):
    write_folder(tmp_path)
    for name in ("$none", "cat_ & <dog>"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "$none" / "notes.txt").touch()
    message = f"folder: no images of '$none', 'cat_ & <dog>' in {tmp_path / 'train'}; "
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}"):
        loaded(name="folder", root=tmp_path)


def test_classes_too_small_to_split(tmp_path):
    write_folder(tmp_path, [""], each=3)
    save(tmp_path / "wasp$" / "1.png", noise(3, 3))
    message = "folder: a split needs at least two images of each class, got one of 'wasp$'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loaded(name="folder", root=tmp_path)
    save(tmp_path / "wasp$" / "2.png", noise(3, 3))
    message = "folder: a split of 8 images with 0.8 for training has 2 test images, fewer than the 3 classes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loaded(name="folder", root=tmp_path)
    write_pets(tmp_path)
    with pytest.raises(ValueError, match=r"^pets: a split of 8 images with 0\.1 for training has 0 training images"):
        loaded(name="pets", root=tmp_path, ratio=0.1)


def test_class_names_with_special_characters(tmp_path):
    names = sorted(["$x^2$", "_hidden", "a\nb", "a b  c", "a|b", "b\\c", "cat&<dog>", "é 猫 🐈", "{x}%s"])
    for name in names:
        for part in ("train", "test"):
            save(tmp_path / part / name / "1.png", noise(3, 3))
    assert loaded(name="folder", root=tmp_path, size=8).class_names == names


def test_data_sets_and_show_read_images_identically(tmp_path):
    """Both must handle 16-bit, transparent, rotated and GIF images in the same way."""
    ramp = np.linspace(0, 65535, 24).astype(np.uint16)[None].repeat(16, 0)
    exif = Image.Exif()
    exif[0x112] = 6
    for part in ("train", "test"):
        save(tmp_path / part / "deep" / "1.png", ramp)
        save(tmp_path / part / "turned" / "1.jpg", Image.fromarray(noise(16, 24, 3)), exif=exif.tobytes())
        save(tmp_path / part / "clear" / "1.png", noise(16, 24, 4))
        save(tmp_path / part / "moving" / "1.gif", noise(16, 24))
    data = loaded(name="folder", root=tmp_path, size=12)
    assert len(data.test) == 4
    for index, path in enumerate(data.test.part.images.paths):
        assert torch.equal(data.raw()[index][0], show.read_image(path, 12))
    assert data.raw()[1][0].mean().item() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_names_damaged_image(workers, tmp_path):
    write_folder(tmp_path)
    damaged = tmp_path / "test" / "bee" / "0 $ & <x>.jpg"
    (tmp_path / "test" / "bee" / "0.png").unlink()
    save(damaged, noise(99, 99))
    damaged.write_bytes(damaged.read_bytes()[:4000])
    data = loaded(name="folder", root=tmp_path, size=8, workers=workers)
    with pytest.raises(ValueError, match=f"^'{re.escape(str(damaged))}' cannot be read: [^\n]*$"):
        list(data.test_dataloader())
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=f"^there is no image '{re.escape(str(damaged))}'$"):
        list(data.test_dataloader())


# Boxes and masks


@pytest.mark.parametrize("size", [16, 33])
def test_digits_masks_cover_the_digit(size):
    digits = digits_clutter("test", size)
    assert digits._fields == ("images", "labels", "boxes", "masks")
    assert digits.masks.shape == (359, size, size)
    assert digits.masks.dtype == torch.bool
    assert torch.equal(extents(digits.masks), digits.boxes)
    assert (digits.boxes[:, 2:] > digits.boxes[:, :2]).all()
    bright = digits.images.mean(1)
    inside, outside = ((bright * where).sum((1, 2)) / where.sum((1, 2)) for where in (digits.masks, ~digits.masks))
    assert (inside > outside + 0.15).all()
    data = loaded(size=size)
    image, label, box, mask = data.located()[5]
    torch.testing.assert_close(image, data.test[5][0])
    assert label == digits.labels[5]
    assert torch.equal(box, digits.boxes[5])
    assert torch.equal(mask, digits.masks[5])


@pytest.mark.parametrize("size", [16, 33])
def test_pairs_have_two_digits_apart(size):
    """Each has a mask and a box; they are brighter than the rest, and in different halves of the image."""
    pairs = digits_pairs("test", size)
    assert pairs.masks.shape == (359, 2, size, size)
    assert torch.equal(extents(pairs.masks), pairs.boxes)
    assert (pairs.boxes[..., 2:] > pairs.boxes[..., :2]).all()
    bright, ink = pairs.images.mean(1), pairs.masks.any(1)
    inside, outside = ((bright * where).sum((1, 2)) / where.sum((1, 2)) for where in (ink, ~ink))
    assert (inside > outside + 0.1).all()
    centres = (pairs.boxes[..., :2] + pairs.boxes[..., 2:]) / 2 - (size - 1) / 2
    apart = (centres[:, 0] * centres[:, 1] < 0).any(1)
    assert apart.float().mean() > 0.98  # ink is not exactly in the middle of its patch
    first = centres[:, 0].sign()
    assert all(0.3 < (first[:, axis] > 0).float().mean() < 0.7 for axis in range(2))
    image, label, box, mask = (data := loaded(name="digits-pairs", size=size)).located()[5]
    torch.testing.assert_close(image, data.test[5][0])
    assert label == pairs.labels[5]
    assert torch.equal(box, pairs.boxes[5])
    assert torch.equal(mask, pairs.masks[5])
    assert data.class_names == ["odd", "even"]


def test_pairs_are_labelled_by_the_parity_of_their_sum(monkeypatch):
    """The digits are told apart by their ink: sources are replaced by squares whose size is the digit."""
    values = torch.arange(10).repeat(3)
    sources = torch.zeros(30, 1, 8, 8)
    for source, value in zip(sources, values, strict=True):
        source[0].view(-1)[: 6 * (value + 1)] = 1.0
    monkeypatch.setattr("attnkern.training.digits._sources", lambda split: (sources, values))
    drawn = []
    draw = sys.modules["attnkern.training.digits"].draw

    def watched(patches, *arguments):
        if len(arguments) == 5:  # of a digit, which has a side
            drawn.append((patches.flatten(1).sum(1) / 6 - 1).round().long())
        return draw(patches, *arguments)

    monkeypatch.setattr("attnkern.training.digits.draw", watched)
    labels = digits_pairs("train", count=60).labels
    first, second = drawn
    assert torch.equal(first, values.repeat(2))
    assert len(second.unique()) > 5
    assert torch.equal(labels, ((first + second) % 2 == 0).long())
    assert 0.2 < labels.float().mean() < 0.8


def test_pairs_do_not_change_and_depend_on_the_seed():
    same, other = digits_pairs("train", 16, 1, 20), digits_pairs("train", 16, 2, 20)
    assert all(map(torch.equal, digits_pairs("train", 16, 1, 20), same))
    assert not torch.equal(same.images, other.images)
    with pytest.raises(ValueError, match=r"^digits_pairs: size must be at least 16, got 15$"):
        digits_pairs("train", 15)


def test_centres_of_photographs_are_no_guess():
    """The share that the page on the reproduction compares windows with."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    boxes = photographs.photo_clutter("test").boxes
    inside = (boxes[:, :2] <= 144) & (boxes[:, 2:] >= 144)
    assert inside.all(1).double().mean() == pytest.approx(0.145)


def test_photographs(monkeypatch):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(photographs, "_PER_CLASS", {"train": 4, "test": 2})
    data = loaded(name="photo-clutter", size=48, seed=1)
    assert (len(data.train), len(data.test), data.class_names) == (32, 16, list(photographs.OBJECTS))
    assert [data.train[i][1] for i in range(9)] == [*range(8), 0]
    image, label, box, mask = data.located()[3]
    assert (image.shape, label, box.shape, mask.shape) == ((3, 48, 48), 3, (4,), (48, 48))
    height, width = (box[2:] - box[:2] + 1).tolist()
    assert 0.1 * 48 < min(height, width) <= max(height, width) < 0.6 * 48
    assert 0.4 < mask.sum() / (height * width) <= 1  # an ellipse, which may be tilted
    torch.testing.assert_close(data.raw()[3][0], photographs.photo_clutter("test", 48).images[3] / 255)


def test_the_object_of_a_photograph_is_where_its_mask_says(monkeypatch):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    cut_out = photographs._cut_out

    def red(photo):
        patch = cut_out(photo)
        patch[:3] = torch.tensor([1.0, 0, 0])[:, None, None]
        return patch

    monkeypatch.setattr(photographs, "_cut_out", red)
    images, _, _, masks = photographs.photo_clutter("train", 64, count=16)
    reds = images.movedim(1, 3)[masks].float()
    assert (reds[:, 0] > 2 * reds[:, 1:].amax(1)).float().mean() > 0.85


def test_photographs_do_not_change_and_depend_on_the_seed():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    make = photographs.photo_clutter
    assert all(map(torch.equal, make("train", 32, 1, 9), make("train", 32, 1, 9)))
    assert not torch.equal(make("train", 32, 1, 9).images, make("train", 32, 2, 9).images)
    assert not set(photographs.BACKGROUNDS["train"]) & set(photographs.BACKGROUNDS["test"])
    with pytest.raises(ValueError, match=r"^photo_clutter: size must be at least 16, got 15$"):
        make("train", 15)
    with pytest.raises(ValueError, match=r"^photo_clutter: split must be 'train' or 'test', got 'val'$"):
        make("val")


def test_extents():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1, 2] = masks[0, 3, 4] = True
    masks[1, 0] = True
    assert extents(masks).tolist() == [[1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 3, 5]]


def test_cub_boxes_are_resized_with_the_image(tmp_path):
    write_cub(tmp_path)
    data = loaded(name="cub", root=tmp_path, size=16)
    assert data.class_names == ["001.Black", "002.Laysan"]
    assert [data.train[0][1]] == [1]
    items = [data.located()[i] for i in range(3)]
    assert [label for _, label, _, _ in items] == [0, 1, 0]
    # 40x20 resized to 16x16: x is scaled by 0.4, so edges 5 and 15 become 2 and 6. y is scaled by 0.8: edges 10 and 15
    # become 8 and 12.
    # 80x80 resized to 16x16: x edges 10 and 30 become 2 and 6. y edges 4 and 36 become 0.8 and 7.2, which covers the
    # centres of rows 1 to 6.
    # The box past the edge starts at x = 15.44 and covers the last column. y edges 0 and 2.4 cover rows 0 and 1.
    assert [box.tolist() for _, _, box, _ in items] == [[8, 2, 11, 5], [1, 2, 6, 5], [0, 15, 1, 15]]
    assert all(box.dtype == torch.float32 and mask.dtype == torch.bool for _, _, box, mask in items)
    for _, _, box, mask in items:
        row0, col0, row1, col1 = box.int().tolist()
        expected = torch.zeros(16, 16, dtype=torch.bool)
        expected[row0 : row1 + 1, col0 : col1 + 1] = True
        assert torch.equal(mask, expected)
    for item in range(2):
        assert torch.equal(data.raw()[item][0].mean(0) > 0.5, items[item][3])
        torch.testing.assert_close(items[item][0], data.test[item][0])


def test_cub_box_crop(tmp_path):
    write_cub(tmp_path)
    data = loaded(name="cub", root=tmp_path, size=16, box_crop=True)
    for part, count in ((data.raw(), 2), (data.train, 1)):
        for item in range(count):
            image = part[item][0]
            floor = 0.95 if part is not data.train else data.normalise(torch.full((3, 1, 1), 0.95))
            assert (image > floor).all()  # only the bird is white
    assert data.raw()[2][0].shape == (3, 16, 16)
    _, _, box, mask = data.located()[0]
    assert box.tolist() == [0, 0, 15, 15]
    assert mask.all()


def test_pets_trimaps_are_resized_with_the_image(tmp_path):
    write_pets(tmp_path)
    data = loaded(name="pets", root=tmp_path, size=20)
    assert data.class_names == ["Abyssinian", "American Bulldog"]
    image, label, box, mask = data.located()[2]
    assert label == 1
    # 60x20 resized to 20x20: x is scaled by 1/3. Centres of columns 4 to 8 (x = 13.5 to 25.5 in the original) lie on
    # the animal.
    assert box.tolist() == [4, 4, 15, 8]
    assert mask.sum() == 12 * 5
    assert torch.equal(mask, data.raw()[2][0].mean(0) > 0.5)
    torch.testing.assert_close(image, data.test[2][0])


def test_boxes_and_masks_follow_exif_orientation(tmp_path):
    """Annotations refer to the pixels as stored. EXIF orientation 6 rotates the image by 90 degrees clockwise."""
    write_cub(tmp_path)
    write_pets(tmp_path)
    exif = Image.Exif()
    exif[0x112] = 6
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as picture:
            picture.load()
        picture.save(path, quality=100, subsampling=0, exif=exif.tobytes())
    for name, size, item in (("cub", 16, 0), ("cub", 16, 1), ("pets", 20, 2)):
        data = loaded(name=name, root=tmp_path, size=size)
        image, _, box, mask = data.located()[item]
        assert torch.equal(mask, data.raw()[item][0].mean(0) > 0.5)
        assert torch.equal(extents(mask[None])[0], box)
        torch.testing.assert_close(image, data.test[item][0])
    # The stored box covers rows 8 to 11 and columns 2 to 5. Rotation turns columns into rows and the last row into the
    # first column.
    assert loaded(name="cub", root=tmp_path, size=16).located()[0][2].tolist() == [2, 4, 5, 7]
    image, _ = loaded(name="cub", root=tmp_path, size=16, box_crop=True).raw()[1]
    assert (image > 0.95).all()


# Splits


def paths(view):
    return [str(view.part.images.paths[i]) for i in view.part.indices]


def test_stratified_splits(tmp_path):
    write_pets(tmp_path, each=20)  # 20 images for each of two classes and two parts
    splits = {}
    for split, seed in ((0, 0), (0, 1), (1, 0)):
        data = loaded(name="pets", root=tmp_path, ratio=0.6, split=split, seed=seed, size=16)
        train, test = paths(data.train), paths(data.test)
        assert not set(train) & set(test)
        assert len(set(train) | set(test)) == 80
        assert [sum("bulldog" in path for path in part) for part in (train, test)] == [24, 16]
        labels = [data.train[i][1] for i in range(48)]
        assert labels == ["bulldog" in path for path in train]
        splits[split, seed] = train
    assert splits[0, 0] == splits[0, 1] != splits[1, 0]
    official = loaded(name="pets", root=tmp_path, size=16)
    assert all("trainval" in path for path in paths(official.train))
    assert not any("trainval" in path for path in paths(official.test))


def test_caltech101_is_split_70_30(tmp_path):
    write_caltech101(tmp_path)
    one, other = (loaded(name="caltech101", root=tmp_path, split=split, size=8) for split in (0, 1))
    for data in (one, other):
        assert sorted([*data.train.part.indices, *data.test.part.indices]) == list(range(20))
        assert [sum(data.train[i][1] == label for i in range(14)) for label in (0, 1)] == [7, 7]
    assert one.train.part.indices != other.train.part.indices


# Normalisation and augmentation


def test_digits_are_normalised_with_their_own_mean_and_std():
    data = loaded(size=16, count=300, seed=3)
    images = torch.stack([image for image, _ in data.train])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert len(data.train) == 300
    torch.testing.assert_close(data.raw()[7][0], digits_clutter("test", 16).images[7])  # test images ignore the seed
    expected = data.normalise(digits_clutter("train", 16, seed=3, count=300).images[9])
    torch.testing.assert_close(data.train[9][0], expected)


def test_whitening():
    data = loaded(size=16, count=3000, whiten=True)
    assert isinstance(data.normalisation, ZCA)
    images = torch.stack([image for image, _ in data.train.__getitems__(range(3000))])
    assert images.shape == (3000, 3, 16, 16)
    flat = images.flatten(1).double()
    covariance = flat.T.cov()
    torch.testing.assert_close(flat.mean(0), torch.zeros(768).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(covariance, torch.eye(768).double(), atol=0.08, rtol=0)
    variances = torch.linalg.eigvalsh(covariance)
    assert 0.85 < variances[0] <= variances[-1] < 1.01
    matrix = data.normalisation.matrix
    torch.testing.assert_close(matrix, matrix.T)  # symmetric: ZCA keeps images recognisable, unlike PCA whitening
    torch.testing.assert_close(data.train[4][0], images[4], atol=1e-4, rtol=1e-4)
    raw = torch.stack([image for image, _ in data.raw()])
    torch.testing.assert_close(data.normalise(raw)[8], data.test[8][0], atol=1e-4, rtol=1e-4)


def test_augmentation_applies_to_training_images_before_normalisation():
    seen = []

    def record(image):
        seen.append(image)
        return torch.zeros_like(image)

    plain = loaded(size=16, count=10)
    data = loaded(size=16, count=10, augment=[v2.RandomHorizontalFlip(1.0), v2.Lambda(record)])
    image, _ = data.train[3]
    (found,) = seen
    torch.testing.assert_close(found, digits_clutter("train", 16, count=10).images[3].flip(2))
    torch.testing.assert_close(image, data.normalise(torch.zeros(3, 16, 16)))
    torch.testing.assert_close(data.test[3][0], plain.test[3][0])
    assert len(seen) == 1


# Sampling order


def test_order_depends_only_on_seed_and_epoch():
    sampler = EpochSampler(50, seed=1)
    orders = {}
    for epoch in (0, 1, 1, 0):
        torch.manual_seed(len(orders))
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert orders.setdefault(epoch, order) == order
        assert list(sampler) == order
        assert sorted(order) == list(range(50))
    assert len(sampler) == 50
    state = torch.random.get_rng_state()
    list(sampler)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = EpochSampler(50, seed=0)
    other.set_epoch(2)  # seeding with seed + epoch would repeat the orders of seed 1
    found = list(other)
    other.set_epoch(1)
    assert len({*map(tuple, (*orders.values(), found, list(other)))}) == 4


def test_order_in_several_processes():
    samplers = [DistributedSamplerWrapper(EpochSampler(10), num_replicas=2, rank=rank) for rank in range(2)]
    orders = []
    for epoch in (0, 1, 0):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert sorted(parts[0] + parts[1]) == list(range(10))
        orders.append(parts)
    assert orders[0] == orders[2] != orders[1]


class Recorder(LightningModule):
    """Records the training batches of every epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def on_train_epoch_start(self):
        torch.manual_seed(self.current_epoch)

    def training_step(self, batch, index):
        self.seen.setdefault(self.current_epoch, []).append(batch)
        return self.weight**2

    def validation_step(self, batch, index):
        torch.rand(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("saved", ["after validation", "at the end of the epoch", "after the run"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore")  # Lightning warns about small runs
def test_resumed_run_sees_same_batches_as_uninterrupted_run(workers, saved, tmp_path):
    def fit(epochs, resumed=None):
        keeper = ModelCheckpoint(tmp_path, "kept", save_on_train_epoch_end=saved == "at the end of the epoch")
        data = ImageData(
            size=16, count=20, batch_size=8, workers=workers, augment=[v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)]
        )
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=keeper, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0,
        )  # fmt: skip
        model = Recorder()
        trainer.fit(model, data, ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        kept.append(tmp_path / "last.ckpt" if saved == "after the run" else keeper.best_model_path)
        return model.seen

    kept = []
    torch.manual_seed(1)
    unbroken = fit(2)
    torch.manual_seed(2)
    first = fit(1)
    torch.manual_seed(3)
    second = fit(2, kept[1])
    assert list(unbroken) == [0, 1]
    assert (list(first), list(second)) == ([0], [1])
    for epoch, seen in ((0, first[0]), (1, second[1])):
        assert len(seen) == 2  # the last 4 of 20 images do not fill a batch of 8 and are dropped
        for (images, labels), (expected, expected_labels) in zip(seen, unbroken[epoch], strict=True):
            assert torch.equal(labels, expected_labels)
            assert torch.equal(images, expected)
    assert not torch.equal(unbroken[0][0][0], unbroken[1][0][0])


def test_loaders():
    data = loaded(size=16, count=20, batch_size=8)
    assert [len(labels) for _, labels in data.train_dataloader()] == [8, 8]
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 359
    data = loaded(size=16, count=5, batch_size=8)
    assert [len(labels) for _, labels in data.train_dataloader()] == [5]
    data = loaded(size=16, count=5, workers=1)
    assert data.train_dataloader().persistent_workers
    assert data.val_dataloader().persistent_workers
    assert data.train_dataloader().pin_memory == torch.cuda.is_available()


def test_located_items_can_be_batched(tmp_path):
    write_cub(tmp_path)
    for data in (loaded(name="cub", root=tmp_path, size=16), loaded(size=16)):
        located = pickle.loads(pickle.dumps(data.located()))  # spawned workers receive it pickled
        images, labels, boxes, masks = next(iter(torch.utils.data.DataLoader(located, 3)))
        assert (images.shape, labels.shape, boxes.shape) == ((3, 3, 16, 16), (3,), (3, 4))
        assert torch.equal(extents(masks), boxes)


# Downloads and errors


@pytest.mark.parametrize("name", sorted(name for name, kind in SPECS.items() if kind.torchvision))
def test_only_prepare_data_downloads(name, tmp_path, monkeypatch):
    asked = []

    class Spy:
        def __init__(self, root, **options):
            asked.append(options)

    with monkeypatch.context() as context:
        context.setattr(sets, SPECS[name].torchvision, Spy)
        # The spy writes no files. prepare_data checks for the data with and without a download, so it raises.
        with pytest.raises(FileNotFoundError):
            ImageData(name=name, root=tmp_path).prepare_data()
        assert asked == []
        with pytest.raises(FileNotFoundError):
            ImageData(name=name, root=tmp_path, download=True).prepare_data()
    parts = {frozenset(options.items()) for options in asked}
    assert len(parts) == len(asked) == (1 if name == "caltech101" else 2)
    assert all(options["download"] for options in asked)
    asked.clear()
    for base in (sets.cifar, sets.svhn, sets.stl10, sets.caltech, sets.oxford_iiit_pet):
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(base, function, lambda *args, **kwargs: asked.append(args), raising=False)
    with pytest.raises(FileNotFoundError):
        loaded(name=name, root=tmp_path, download=True)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, what",
    [
        ("caltech101", "caltech101/101_ObjectCategories"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("pets", "oxford-iiit-pet"),
        ("stl10", "stl10_binary"),
        ("svhn", "train_32x32.mat and test_32x32.mat"),
    ],
)
def test_missing_data(name, what, tmp_path):
    message = f"{name}: no data under {tmp_path}; put {what} there or pass --data.download true"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        loaded(name=name, root=tmp_path)


@pytest.mark.parametrize(
    "name, lost",
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("pets", "oxford-iiit-pet/images"),
        ("stl10", "stl10_binary/test_y.bin"),
    ],
)
def test_incomplete_data(name, lost, tmp_path):
    FAKES[name](tmp_path)
    (tmp_path / lost).rename(tmp_path / "lost")
    place = lost.split("/")[0]
    message = f"{name}: {place} under {tmp_path} is damaged or incomplete; put the complete data set there or pass"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        loaded(name=name, root=tmp_path)


def test_missing_cub(tmp_path):
    tables = "images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt, classes.txt"
    root = tmp_path / "none"
    with pytest.raises(FileNotFoundError) as caught:
        loaded(name="cub", root=root)
    assert str(caught.value) == (
        f"cub: no images, {tables} under {root}; root must be the unpacked folder CUB_200_2011, which contains "
        f"images/, {tables}"
    )
    write_cub(tmp_path)
    (tmp_path / "bounding_boxes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"cub: no bounding_boxes.txt under {tmp_path}; ")):
        loaded(name="cub", root=tmp_path)


def test_missing_folder(tmp_path):
    root = tmp_path / "root"
    layout = "expected train/CLASS/IMAGE and test/CLASS/IMAGE (or val), or CLASS/IMAGE, which is split"

    def fails(error, message):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            loaded(name="folder", root=root)

    fails(FileNotFoundError, f"folder: there is no folder {root}; {layout}")
    root.mkdir()
    fails(FileNotFoundError, f"folder: {root} contains no folders of images; {layout}")
    write_folder(root, ["train"])
    both = f"folder: {root} must have folders of images for training and for testing"
    only = f"{both}, got only 'train'; {layout}"
    fails(FileNotFoundError, only)
    (root / "val" / "ant").mkdir(parents=True)
    fails(FileNotFoundError, only)
    save(root / "val" / "wasp" / "1.png", noise(3, 3))
    fails(FileNotFoundError, f"folder: no images of 'ant' in {root / 'val'}; {layout}")
    (root / "val" / "ant").rmdir()
    fails(ValueError, f"folder: classes in {root / 'val'} that are not in {root / 'train'}: ['wasp']")
    with pytest.raises(ValueError, match="split does not apply to a folder with train and val, got 2"):
        loaded(name="folder", root=root, split=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "mnist"}, f"ImageData: name must be one of {', '.join(sorted(FAKES))}, got 'mnist'"),
        ({"name": "cifar10", "ratio": 0.6}, "ImageData: ratio does not apply to cifar10, got 0.6"),
        ({"name": "pets", "box_crop": True}, "ImageData: box_crop does not apply to pets, got True"),
        ({"name": "cifar100", "count": 5}, "ImageData: count does not apply to cifar100, got 5"),
        ({"name": "svhn", "split": 1}, "ImageData: split does not apply to svhn, got 1"),
        ({"name": "cub", "download": True}, "ImageData: download does not apply to cub, got True"),
        ({"name": "folder", "download": True}, "ImageData: download does not apply to folder, got True"),
        ({"download": True}, "ImageData: download does not apply to digits-clutter, got True"),
        ({"name": "pets", "split": 1}, "ImageData: split applies to pets only with a ratio, got 1"),
        ({"name": "pets", "ratio": 1.0}, "ImageData: ratio must be between 0 and 1, got 1.0"),
        ({"name": "pets", "ratio": 0.0}, "ImageData: ratio must be between 0 and 1, got 0.0"),
        ({"size": 33, "whiten": True}, "ImageData: whiten needs images of at most 3072 values, got 3·33·33"),
        ({"name": "stl10", "whiten": True}, "ImageData: whiten needs images of at most 3072 values, got 3·96·96"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageData(**options)


INSTALL = "run `pip install --no-build-isolation '.[train]'` in attnkern's source tree"


@pytest.mark.parametrize("package", ["lightning.pytorch", "torchvision"])
def test_missing_packages(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("data", "datasets"):
        monkeypatch.delitem(sys.modules, f"attnkern.training.{module}")
    sentence = f"attnkern.training.data needs {package.partition('.')[0]}, which is not installed: {INSTALL}"
    with pytest.raises(ImportError, match=f"^{re.escape(sentence)}$"):
        importlib.import_module("attnkern.training.data")


def test_missing_scikit_learn(tmp_path, monkeypatch):
    write_pets(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    sentence = f"a split of the images needs scikit-learn, which is not installed: {INSTALL}"
    with pytest.raises(ImportError, match=f"^{re.escape(sentence)}$"):
        loaded(name="pets", root=tmp_path, ratio=0.5)
    assert len(loaded(name="pets", root=tmp_path).train) == 4


def test_jsonargparse_parses_arguments():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageData, "data")
    flip = {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.25}}
    found = parser.parse_object({"data": {"name": "pets", "root": "there", "ratio": 0.7, "augment": [flip]}}).data
    assert (found.name, found.root, found.ratio, found.size) == ("pets", "there", 0.7, None)
    assert found.augment[0].init_args.p == 0.25
    with pytest.raises(jsonargparse.ArgumentError, match="batch_size"):
        parser.parse_object({"data": {"batch_size": "many"}})
