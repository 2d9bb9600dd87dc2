"""Draw the pictures of the gallery, and write docs/gallery.md: ``make gallery``.

Most of them show the networks that ``make reproduce`` trained. Pictures of networks that it has not trained stay as
they are. ``python docs/make_gallery.py --only equivariance`` draws one picture and leaves the others as they are.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_sample_image
from torch import nn

import attnkern
from attnkern import viz
from attnkern.evaluation import (
    equivariance_distance,
    frequency,
    jaccard,
    occlude,
    pool_attention,
    query_driven,
    transform_images,
    transform_rectangle,
)
from attnkern.evaluation.protocols import Subject
from attnkern.models import attention_maps
from attnkern.nn import WindowAttention
from attnkern.report import correct, side_by_side
from attnkern.training import digits_clutter
from attnkern.training.data import ImageData
from attnkern.training.train import load_run

DOCS = Path(__file__).parent
#: The number of test images in a picture: always the first ones, so that nothing is selected.
SHOWN, IN_A_ROW = 6, 8
#: Recipe: the network's name in the pictures.
NAMES = {
    "vgg": "VGG\n(Grad-CAM)",
    "vgg_gap": "VGG-GAP\n",
    "vgg_pan": "VGG-PAN\n",
    "vgg_att2_concat_dp": "VGG-att2\ndot product",
    "vgg_att2_concat_pc": "VGG-att2\nparametrised",
}
#: Attention map of VGG-att2: its name in the pictures.
LEVELS = {"attention10.map": "level 1:\nafter 10 layers", "attention13.map": "level 2:\nafter 13 layers"}


def subject_of(folder: Path) -> Subject:
    """The network and test images of a run. Grad-CAM is at the feature map that the run's result names."""
    run = load_run(folder / "last.ckpt")
    images = ImageData(**run.data)
    images.setup()
    title = json.loads((folder / "result.json").read_text(encoding="utf-8"))["localisation"]["map"]
    _, gradcam, module = title.rpartition("Grad-CAM ")
    return Subject(run.network, images, run.normalise, run.class_names, map=module if gradcam else None)


def against_none(title: str, folder: Path, baseline: Path) -> list:
    """Pictures of a network with attention and of one without: the first test images, and the first wrong ones."""
    subject = subject_of(folder)
    subjects = {title: subject, "no attention, Grad-CAM": subject_of(baseline)}
    wrong = (~correct(subject)).nonzero().flatten().tolist()
    chosen = {
        f"The first {IN_A_ROW} of {len(subject.raw)} test images": list(range(IN_A_ROW)),
        f"The first {len(wrong[:IN_A_ROW])} of {len(wrong)} test images that the network with attention gets wrong": (
            wrong[:IN_A_ROW]
        ),
    }
    return [side_by_side(subjects, indices, title=text) for text, indices in chosen.items() if indices]


def small_window(runs):
    return against_none("rectangle", runs / "small_window/seed0", runs / "small_none/seed0")


def small_compatibility(runs):
    return against_none("compatibility", runs / "small_compatibility_pc/seed0", runs / "small_none/seed0")


def small_bottleneck(runs):
    return against_none("quantized bottleneck", runs / "small_bottleneck_qt/seed0", runs / "small_none/seed0")


def levels(runs):
    subject = subject_of(runs / "vgg_att2_concat_pc")
    raw = subject.raw[:SHOWN]
    inputs = subject.normalise(raw)
    with torch.no_grad():
        _, maps = attention_maps(subject.network, inputs)
        maps = {LEVELS[name]: map for name, map in maps.items()}
        maps["both,\ncombined"] = subject.predict(inputs)[1]
    return [viz.levels(raw, maps)]


def networks(runs):
    maps = {}
    for name, title in NAMES.items():
        accuracy = json.loads((runs / name / "result.json").read_text(encoding="utf-8"))["accuracy"]
        subject = subject_of(runs / name)
        raw = subject.raw[:SHOWN]
        maps[f"{title}\n{accuracy:.1%} correct"] = subject.predict(subject.normalise(raw))[1].detach()
    return [viz.levels(raw, maps)]


def query(runs):
    subject = subject_of(runs / "vgg_att2_concat_dp")
    attend = pool_attention(subject.network, "attention10", subject.normalise)
    targets, image = subject.raw[1:5], subject.raw[0]
    return [viz.query_pairs(targets, image, query_driven(attend, targets, image))]


def bottleneck(runs):
    subject = subject_of(runs / "vgg_aib_qt")
    raw, generator = subject.raw[:4], torch.Generator().manual_seed(0)
    modified = {
        "8x8 pixels occluded": occlude(raw, 8, generator),
        "low frequencies": frequency(raw, 12, "low"),
        "high frequencies": frequency(raw, 4, "high"),
    }
    return [viz.occlusion_rows(raw, modified, subject.predict, normalise=subject.normalise, nearest=True)]


def anchors(runs):
    subject = subject_of(runs / "vgg_aib_qt")
    values = subject.network.attention.quantizer.anchors.detach()
    chosen = (subject.maps.flatten()[:, None] - values).abs().argmin(1).bincount(minlength=len(values))
    return [viz.anchor_histogram(values, chosen, title="Anchors of VGG-aib-qt")]


class Locator(nn.Module):
    """A small network that finds the rectangle of a digit: convolutions, coordinates, the head of WindowAttention."""

    def __init__(self):
        super().__init__()
        channels = (3, 16, 32, 48)
        layers = []
        for (inputs, outputs), stride in zip(itertools.pairwise(channels), (2, 2, 1), strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.attention = WindowAttention(channels[-1] + 2, hidden=(48, 64))

    def forward(self, images):
        features = self.features(images)
        height, width = features.shape[2:]
        rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
        coordinates = torch.stack((rows.expand(height, width), columns.expand(height, width)))
        coordinates = coordinates.expand(len(features), -1, -1, -1)
        return self.attention.rectangle(torch.cat((features, coordinates), 1))


def rectangles_of_boxes(boxes, size):
    """(N, 5) rectangles that cover boxes in images of size x size pixels."""
    first, last = boxes[:, :2] / (size - 1), boxes[:, 2:] / (size - 1)
    return torch.cat(((first + last) / 2, (last - first) / 2, torch.zeros(len(boxes), 1)), 1)


def trained_locator(size, steps=200, batch=48):
    """A Locator, trained for a few seconds on digits that are rotated, scaled and shifted at random."""
    torch.manual_seed(0)
    locator, generator = Locator(), torch.Generator().manual_seed(0)
    digits = digits_clutter("train", size, count=2 * 1438)
    targets = rectangles_of_boxes(digits.boxes, size)
    optimizer = torch.optim.AdamW(locator.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(targets), (batch,), generator=generator)
        angle, scale, row, column = 2 * torch.rand(4, batch, generator=generator) - 1
        change = {
            "angle": math.pi / 5 * angle,
            "scale": 1 + 0.25 * scale,
            "shift": 0.12 * torch.stack((row, column), 1),
        }
        found = locator(transform_images(digits.images[chosen], **change))
        loss = equivariance_distance(found, transform_rectangle(targets[chosen], **change)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return locator.eval()


def equivariance(_runs):
    size = 32
    locator = trained_locator(size)
    image = digits_clutter("test", size).images[0]
    with torch.no_grad():
        cells = tuple(locator.features(image[None]).shape[2:])
    return [viz.equivariance_sequence(image, locator, cells)]


def rectangle(_runs):
    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    found = torch.tensor([[0.5, 0.4, 0.14, 0.3, 0.5]])
    pictures = []
    for aspect, caption in ((False, "aspect=False"), (True, "aspect=True")):
        map = attnkern.window_map(found, (27, 41), aspect=aspect)[0]
        pictures.append(viz.overlay(photograph, map, alpha=0.45, rectangle=found[0], aspect=aspect, caption=caption))
    return pictures


def fitted(target, count, shape, steps=300):
    """Windows (1, K, 5) whose union is fitted to a mask (h, w) by gradient descent."""
    rectangle = WindowAttention(1, (1,), num_windows=count).rectangle(target[None, None]).detach().view(1, count, 5)
    optimizer = torch.optim.Adam([rectangle.requires_grad_()], 0.02)
    for _ in range(steps):
        found = attnkern.window_map(rectangle, target.shape, rescale=False, aspect=True, shape=shape)
        loss = nn.functional.binary_cross_entropy(found[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rectangle.detach()


def windows(_runs):
    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    size = (54, 82)
    dark = (nn.functional.interpolate(photograph[None], size, mode="area")[0].mean(0) < 0.5).float()
    pictures = []
    for count, shape in ((1, "rectangle"), (4, "rectangle"), (16, "ellipse")):
        found = fitted(dark, count, shape)
        map = attnkern.window_map(found, size, rescale=False, aspect=True, shape=shape)[0]
        share = jaccard(map[None] > 0.5, dark[None] > 0.5).item()
        caption = f"{count} {shape}{'s' * (count > 1)}, IoU {share:.2f}"
        pictures.append(
            viz.overlay(photograph, map, alpha=0.45, rectangle=found, aspect=True, shape=shape, caption=caption)
        )
    return pictures


class Entry(NamedTuple):
    title: str
    text: str
    draw: Callable[[Path], list]
    runs: tuple[str, ...] = ()  #: the recipes whose runs are drawn


#: What the pictures of :func:`against_none` show.
ROWS = (
    "Above each map are the predicted class and its probability. Grad-CAM is that of the predicted class, at the "
    "feature map where pointing and IoU are best on the test images; the tables of small networks in "
    "[Reproduction](reproduction.md) use the last one. The first picture has the first test images, the second the "
    "first test images that the network with attention gets wrong. Both networks are of seed 0."
)
ENTRIES = (
    Entry(
        "A rectangle",
        f"The small network with a rectangle, and below the same network without attention. {ROWS}",
        small_window,
        ("small_window/seed0", "small_none/seed0"),
    ),
    Entry(
        "Compatibility with the global vector",
        f"The small network with the parametrised score, and below the same network without attention. {ROWS}",
        small_compatibility,
        ("small_compatibility_pc/seed0", "small_none/seed0"),
    ),
    Entry(
        "A quantized bottleneck",
        "The small network with a quantized bottlenecked map, and below the same network without attention. High "
        f"values of this map need not mark the object. {ROWS}",
        small_bottleneck,
        ("small_bottleneck_qt/seed0", "small_none/seed0"),
    ),
    Entry(
        "Two levels of attention",
        "The maps of VGG-att2 with the parametrised score, at its two levels, and their combination.",
        levels,
        ("vgg_att2_concat_pc",),
    ),
    Entry(
        "Networks with and without attention",
        "VGG has no attention, so its map is Grad-CAM of the predicted class. The others show their attention, the two "
        "levels of VGG-PAN and VGG-att2 combined. Below each name is the accuracy on the test images. After a few "
        "minutes of training, VGG-att2 with the dot product attends to single positions, which lie on the digit in "
        "some runs and beside it in others.",
        networks,
        tuple(NAMES),
    ),
    Entry(
        "Attention to the query of another image",
        "VGG-att2 with the dot product: the attention of each image with its own global vector, the attention with the "
        "global vector of the query image, and the relative change (red: more, blue: less).",
        query,
        ("vgg_att2_concat_dp",),
    ),
    Entry(
        "Quantized attention of modified images",
        "The quantized map of VGG-aib-qt for images that are partly occluded or have lost their high or low "
        "frequencies. On these images low values mark the digit: nothing in x + v·x before a batch normalisation "
        "determines whether attended positions have high or low values.",
        bottleneck,
        ("vgg_aib_qt",),
    ),
    Entry(
        "Anchors in use",
        "The anchors of VGG-aib-qt and how often each of them is chosen on the test images.",
        anchors,
        ("vgg_aib_qt",),
    ),
    Entry(
        "Rectangles of a rotated, scaled and shifted image",
        "Solid lines are the rectangles that the network finds in each image; dashed lines are the rectangle of the "
        "original image, transformed like the image. A small network with the head of `WindowAttention` was trained "
        "for this picture on training digits with their boxes; the image is the first test image. The networks of "
        "`make reproduce` are trained with class labels only.",
        equivariance,
    ),
    Entry(
        "A rectangle on an image that is not square",
        "The same rectangle as the formula draws it, and with `aspect=True`, which keeps its angles.",
        rectangle,
    ),
    Entry(
        "Many windows on a photograph",
        "The map is the union of all windows, fitted by gradient descent to the dark parts of the photograph. The "
        "windows start on a ring, as those of `WindowAttention` do, and move apart by themselves.",
        windows,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/reproduce"), help="folder of the trained runs")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[entry.draw.__name__ for entry in ENTRIES], help="pictures to draw"
    )
    options = parser.parse_args()
    folder = DOCS / "gallery"
    folder.mkdir(exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "Attention maps, most of them of networks that `make reproduce FULL=1` trains on handwritten digits in "
        "clutter. `make gallery` draws the pictures; [Reproduction](reproduction.md) has the accuracy of the networks.",
    ]
    for entry in ENTRIES:
        name = entry.draw.__name__
        chosen = options.only is None or name in options.only
        missing = [run for run in entry.runs if not (options.runs / run / "result.json").is_file()]
        if chosen and missing:
            text = f"there is no run of {', '.join(missing)} in {options.runs}"
            if options.only is not None:
                parser.error(f"{name}: {text}")
            print(f"{name} stays as it is: {text}")
        elif chosen:
            for old in folder.glob(f"{name}*.png"):
                old.unlink()
            for index, figure in enumerate(entry.draw(options.runs)):
                viz.save(figure, folder / f"{name}{index or ''}.png", dpi=80)
        pictures = [f"![{entry.title}](gallery/{path.name})" for path in sorted(folder.glob(f"{name}*.png"))]
        lines += ["", f"## {entry.title}", "", entry.text, "", *pictures] if pictures else []
    (DOCS / "gallery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
