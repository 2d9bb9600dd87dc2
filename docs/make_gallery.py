"""The gallery: pictures of the runs that ``make reproduce`` left, and of a photograph. ``make gallery`` writes them."""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image

import attnkern
from attnkern import viz
from attnkern.evaluation import frequency, map_of, occlude, pool_attention, query_driven, usage
from attnkern.evaluation.protocols import Subject
from attnkern.models import attention_maps
from attnkern.training.data import ImageData
from attnkern.training.train import load_run

DOCS = Path(__file__).parent
#: Test images that are shown, chosen by nothing but their order.
SHOWN = 6


def subject_of(runs: Path, name: str) -> Subject:
    run = load_run(runs / name / "last.ckpt")
    images = ImageData(**run.data)
    images.setup()
    return Subject(run.network, images, run.normalise)


def levels(runs):
    """Where VGG-att2 looks at its two levels, and the two combined."""
    subject = subject_of(runs, "vgg_att2_concat_pc")
    raw = subject.raw[:SHOWN]
    inputs = subject.normalise(raw)
    with torch.no_grad():
        _, maps = attention_maps(subject.network, inputs)
        maps["combined"] = subject.predict(inputs)[1]
    return viz.levels(raw, maps)


def networks(runs):
    """Networks with attention beside those without, which are given Grad-CAM."""
    names = ("vgg", "vgg_gap", "vgg_pan", "vgg_att2_concat_dp", "vgg_att2_concat_pc")
    maps = {}
    for name in names:
        subject = subject_of(runs, name)
        raw = subject.raw[:SHOWN]
        shown = "block3" if name == "vgg" else None
        maps[name] = map_of(subject.network, shown)[1](subject.normalise(raw))[1].detach()
    return viz.levels(raw, maps)


def bottleneck(runs):
    """The quantized map of VGG-aib-qt under occlusion and without its high or low frequencies. On these images it marks
    the digit by low values: nothing in x + v·x before a batch normalisation tells which way is up."""
    subject = subject_of(runs, "vgg_aib_qt")
    raw, generator = subject.raw[:4], torch.Generator().manual_seed(0)
    modified = {
        "occluded, p = 8": occlude(raw, 8, generator),
        "low frequencies": frequency(raw, 12, "low"),
        "high frequencies": frequency(raw, 4, "high"),
    }
    return viz.occlusion_rows(raw, modified, subject.predict, normalise=subject.normalise, nearest=True)


def anchors(runs):
    """The anchors of VGG-aib-qt and how often each is chosen on the test images."""
    subject = subject_of(runs, "vgg_aib_qt")
    values = subject.network.attention.quantizer.anchors.detach()
    chosen = (subject.maps.flatten()[:, None] - values).abs().argmin(1).bincount(minlength=len(values))
    found = usage(chosen)
    return viz.anchor_histogram(values, chosen, title=f"{found.used} of {found.anchors} anchors in use")


def query(runs):
    """Attention of the dot product under the global vector of another image."""
    subject = subject_of(runs, "vgg_att2_concat_dp")
    attend = pool_attention(subject.network, "attention10", subject.normalise)
    targets, image = subject.raw[1:5], subject.raw[0]
    return viz.query_pairs(targets, image, query_driven(attend, targets, image))


def equivariance(runs):
    """Rectangles of one image turned, scaled and shifted, beside where equivariance wants them."""
    subject = subject_of(runs, "efficientnet_b0_window_equivariance")
    image = subject.raw[0]
    with torch.no_grad():
        size = tuple(subject.network.local_features(subject.normalise(image[None])).shape[2:])
    return viz.equivariance_sequence(image, subject.rectangles_of, size, normalise=subject.normalise)


def rectangle(_runs):
    """One rectangle on a photograph that is not square: as the formula has it, and rigid (``aspect=True``)."""
    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    found = torch.tensor([[0.45, 0.4, 0.18, 0.35, 0.5]])
    size = (27, 41)
    pictures = []
    for aspect in (False, True):
        map = attnkern.window_map(found, size, aspect=aspect)[0]
        pictures.append(viz.overlay(photograph, map, alpha=0.45, rectangle=found[0], aspect=aspect))
    return pictures


PICTURES = (levels, networks, query, bottleneck, anchors, equivariance, rectangle)


def main() -> int:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reproduce")
    folder = DOCS / "gallery"
    folder.mkdir(exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "Pictures of the networks that `make reproduce` trains, of their first test images; `make gallery` draws them. "
        "What the networks reach is in [reproduction.md](reproduction.md).",
    ]
    for draw in PICTURES:
        figures = draw(runs)
        title, _, rest = " ".join(draw.__doc__.split()).partition(". ")
        lines += ["", f"## {title.rstrip('.')}", ""] + ([rest, ""] if rest else [])
        for index, figure in enumerate(figures if isinstance(figures, list) else [figures]):
            name = f"{draw.__name__}{index or ''}.png"
            viz.save(figure, folder / name, dpi=80)
            lines.append(f"![{title.rstrip('.')}](gallery/{name})")
    (DOCS / "gallery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
