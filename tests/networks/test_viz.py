"""Pictures: maps and rectangles at their places, every figure drawn and saved."""

import io
import math
import warnings

import pytest
import torch

pytest.importorskip("matplotlib")

import matplotlib
import numpy
from matplotlib import font_manager
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import attnkern
from attnkern import viz, window_map
from attnkern.evaluation import QueryDriven, rectangle_mask


def pixels(figure):
    """The pixels of the axes in a rendered figure, (height, width, 3)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    whole = numpy.asarray(Image.open(buffer).convert("RGB")).astype(float)
    box = figure.axes[0].get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    top, bottom = (round((figure.get_figheight() - y) * 100) for y in (box.y1, box.y0))
    return whole[top:bottom, round(box.x0 * 100) : round(box.x1 * 100)]


@pytest.mark.parametrize("place", [(0, 0), (2, 5), (3, 1)])
@pytest.mark.parametrize("nearest", [True, False])
def test_the_maximum_is_where_it_is_drawn(place, nearest):
    map = torch.zeros(4, 6)
    map[place] = 1
    seen = pixels(viz.overlay(torch.zeros(3, 40, 60), map, alpha=1.0, nearest=nearest))
    # viridis ends in yellow, which has the most red.
    row, column = (numpy.median(found) for found in numpy.where(seen[:, :, 0] > 0.9 * seen[:, :, 0].max()))
    assert int(row / seen.shape[0] * 4) == place[0]
    assert int(column / seen.shape[1] * 6) == place[1]


def test_quantized_maps_keep_their_values_apart():
    map = torch.tensor([0.1, 0.4, 0.8]).repeat(8).view(4, 6)
    seen = pixels(viz.overlay(torch.zeros(3, 40, 60), map, alpha=1.0, nearest=True))
    centres = seen[seen.shape[0] // 8, [int((i + 0.5) * seen.shape[1] / 6) for i in range(6)]]
    assert len({tuple(colour) for colour in centres}) == 3


def test_each_map_is_rescaled():
    image = torch.rand(3, 20, 20)
    map = torch.rand(5, 5)
    assert numpy.array_equal(pixels(viz.overlay(image, map)), pixels(viz.overlay(image, 3 * map + 7)))


def test_a_nearly_constant_map_is_not_stretched():
    image, map = torch.zeros(3, 20, 20), torch.full((5, 5), 0.5)
    map[2, 2] += 0.001
    flat, varied = (pixels(viz.overlay(image, each, alpha=1.0, nearest=True)) for each in (map, torch.rand(5, 5)))
    assert numpy.ptp(flat[2:-2, 2:-2], (0, 1)).max() <= 5
    assert numpy.ptp(varied[2:-2, 2:-2], (0, 1)).max() > 100


@pytest.mark.parametrize("title", [None, "a title of many words that does not fit into one line of any figure " * 3])
def test_no_text_runs_out_of_the_picture(title):
    image, map = torch.rand(3, 4, 4), torch.rand(2, 2)
    rows = [{"epoch": str(e), "val_accuracy": str(e / 4), "val_loss": "1"} for e in range(3)]
    for figure in (
        viz.overlay(image, map, title=title, caption=title),
        viz.grid([[{"image": image, "caption": title}]], row_titles=["first row"], column_titles=["one"], title=title),
        viz.levels(image[None], {"a long name of\na map": map[None], "another": map[None]}, title=title),
        viz.anchor_histogram(torch.rand(3), torch.ones(3), title=title),
        viz.rectangle_histograms(torch.rand(2, 5), title=title),
        viz.training_curves({"a run": rows}, title=title),
    ):
        figure.draw_without_rendering()
        page = figure.bbox.padded(1)
        # matplotlib also has labels of ticks beyond the axes, which it does not draw.
        ticks = {label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels()}
        for text in set(texts(figure)) - ticks:
            extent = text.get_window_extent()
            assert page.x0 <= extent.x0 <= extent.x1 <= page.x1, text.get_text()
            assert page.y0 <= extent.y0 <= extent.y1 <= page.y1, text.get_text()


@pytest.mark.parametrize("aspect", [False, True])
def test_rectangles_are_where_their_maps_are(aspect):
    """Corners by hand on an image that is not square, and the drawn polygon around the mask of the rectangle."""
    rectangle, cells, size = torch.tensor([0.4, 0.6, 0.2, 0.3, 0.5]), (9, 13), (90, 260)
    drawn = window_map(rectangle[None], cells, aspect=aspect)[0]
    figure = viz.overlay(torch.zeros(3, *size), drawn, rectangle=rectangle, aspect=aspect)
    (polygon,) = figure.axes[0].patches
    corners = polygon.get_xy()[:4]
    mu1, mu2, sigma1, sigma2, alpha = rectangle.tolist()
    longest = max(cells) - 1
    expected = []
    for a, b in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        u, v = a * sigma1, b * sigma2
        d1, d2 = u * math.cos(alpha) - v * math.sin(alpha), u * math.sin(alpha) + v * math.cos(alpha)
        if aspect:
            d1, d2 = d1 * longest / (cells[0] - 1), d2 * longest / (cells[1] - 1)
        row, column = ((mu1 + d1) * (cells[0] - 1) + 0.5) / cells[0], ((mu2 + d2) * (cells[1] - 1) + 0.5) / cells[1]
        expected.append((column * size[1] - 0.5, row * size[0] - 0.5))
    found = sorted(tuple(corner) for corner in corners.tolist())
    for corner, wanted in zip(found, sorted(expected), strict=True):
        assert corner == pytest.approx(wanted, abs=1e-3)
    inside = polygon.get_path().contains_points(
        [((j + 0.5) * 20 - 0.5, (i + 0.5) * 10 - 0.5) for i in range(9) for j in range(13)]
    )
    mask = rectangle_mask(rectangle[None], cells, aspect=aspect)[0].flatten().numpy()
    assert (inside != mask).sum() <= 2  # cells whose centres lie on an edge
    assert mask.sum() > 5


@pytest.mark.parametrize("shape, points", [("rectangle", 4), ("ellipse", 64)])
def test_several_windows_are_drawn_alike(shape, points):
    """The windows of a map are solid; those of another set to compare are dashed. f is one half on an outline."""
    rectangles, cells = torch.tensor([[[0.3, 0.3, 0.1, 0.15, 0.5], [0.7, 0.6, 0.2, 0.1, 0.0]]]), (9, 13)
    drawn = window_map(rectangles, cells, shape=shape)[0]
    both = torch.cat((rectangles, rectangles + 0.02))
    figure = viz.overlay(torch.zeros(3, 90, 130), drawn, rectangle=both, shape=shape)
    patches = figure.axes[0].patches
    assert len(patches) == 4
    assert [patch.get_linestyle() == "-" for patch in patches] == [True, True, False, False]
    assert [len(patch.get_xy()) for patch in patches] == [points + 1] * 4
    for patch, window in zip(patches[:2], rectangles[0], strict=True):
        centre = patch.get_xy()[:-1].mean(0)
        # A cell is ten pixels wide.
        wanted = [(t * (length - 1) + 0.5) * 10 - 0.5 for t, length in zip(window[:2].tolist(), cells, strict=True)]
        assert centre[::-1] == pytest.approx(wanted, abs=1e-3)
    if shape == "ellipse":
        outline = attnkern.ellipse_outline(rectangles[:, 0], (301, 301))[0]
        values = window_map(rectangles[:, 0], (301, 301), shape=shape, rescale=False)[0]
        for row, column in outline.round().long().tolist():
            assert values[row, column].item() == pytest.approx(0.5, abs=0.1)


def test_pictures_of_several_windows():
    """Grids, sequences and histograms take (N, K, 5)."""
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 16, 24), torch.rand(5, 4, 6)
    rectangles = torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1], [0.7, 0.6, 0.1, 0.2, 0.0]]) + 0.05 * torch.rand(5, 2, 5)

    def find(images):
        return rectangles[:1].expand(len(images), -1, -1)

    def outlines(figure):
        return [len(ax.patches) for ax in figure.axes]

    options = {"angles": (0.3,), "scales": (0.9,), "shifts": ()}
    sequence = viz.equivariance_sequence(images[0], find, (4, 6), shape="ellipse", **options)
    assert outlines(sequence) == [2, 4, 2, 4]
    assert outlines(viz.sorted_corners(images, maps, rectangles, "angle", count=2, shape="ellipse")) == [2] * 4
    histograms = viz.rectangle_histograms(rectangles)
    assert histograms.axes[0].get_ylabel() == "windows"
    assert sum(patch.get_height() for patch in histograms.axes[0].patches) == 10
    transposed = viz.rectangle_histograms(rectangles.transpose(0, 1).contiguous().transpose(0, 1))
    assert sum(patch.get_height() for patch in transposed.axes[0].patches) == 10
    with pytest.raises(ValueError, match=r"^overlay: shape must be 'rectangle' or 'ellipse', got 'circle'$"):
        viz.overlay(images[0], rectangle=rectangles[0], shape="circle")


def figures(theme):
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 16, 24), torch.rand(5, 4, 6)
    rectangles = torch.tensor([[0.5, 0.5, 0.2, 0.3, 0.1]]) + 0.05 * torch.rand(5, 5)

    def predict(images):
        return images.mean((2, 3)), images.mean(1)[:, ::4, ::4]

    def find(images):
        return rectangles[:1].expand(len(images), -1)

    query = QueryDriven(maps + 0.1, maps + 0.2, 0.1 / (maps + 0.1))
    rows = [{"epoch": str(e), "val_accuracy": str(e / 4), "train_loss": str(1 - e / 4)} for e in range(4)]
    return {
        "overlay": viz.overlay(images[0], maps[0], title="title", caption="caption", theme=theme),
        "grid": viz.grid([[images[0], (images[1], maps[1])], [None, images[2]]], theme=theme),
        "levels": viz.levels(images[:2], {"a": maps[:2], "b": maps[:2, :2]}, theme=theme),
        "occlusion_rows": viz.occlusion_rows(images[:2], {"x": images[:2].flip(3)}, predict, theme=theme),
        "equivariance_sequence": viz.equivariance_sequence(images[0], find, (4, 6), theme=theme),
        "query_pairs": viz.query_pairs(images, images[0], query, theme=theme),
        "sorted_corners": viz.sorted_corners(images, maps, rectangles, "row", count=2, theme=theme),
        "anchor_histogram": viz.anchor_histogram(torch.linspace(0, 1, 5), torch.tensor([3, 0, 2, 9, 0]), theme=theme),
        "rectangle_histograms": viz.rectangle_histograms(rectangles, theme=theme),
        "training_curves": viz.training_curves({"run": rows}, theme=theme),
    }


@pytest.mark.parametrize("theme, page", [("light", "#ffffff"), ("dark", "#17181c")])
def test_every_figure_is_drawn_and_saved(theme, page, tmp_path):
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    drawn = figures(theme)
    assert set(drawn) == set(viz.__all__) - {"save"}
    for name, figure in drawn.items():
        assert to_hex(figure.get_facecolor()) == page
        viz.save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert numpy.asarray(image.convert("L")).std() > 5
    viz.save(drawn["overlay"], tmp_path / "overlay.svg")
    assert (tmp_path / "overlay.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_captions_say_cosine_and_prediction():
    figure = figures("light")["occlusion_rows"]
    texts = [ax.get_xlabel() for ax in figure.axes]
    assert any("cosine" in text and "prediction" in text for text in texts)


#: Names that matplotlib would read as mathematics, leave out of a legend or could not draw.
NAMES = ["$x^2$", "$\\frac{", "_ant", "a_b^c", "50% & <b>", "a|b\\c", "{x}", "é \u2900", "two\nlines", "byte \udce9"]


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", NAMES)
def test_names_appear_as_they_are_written(name, tmp_path):
    image, map = torch.rand(3, 4, 4), torch.rand(2, 2)
    rows = [{"epoch": str(e), "val_accuracy": str(e / 4)} for e in range(3)]
    with matplotlib.rc_context({"text.usetex": name == NAMES[0]}):
        drawn = {
            "overlay": viz.overlay(image, map, title=name, caption=name),
            "grid": viz.grid(
                [[{"image": image, "caption": name}]], row_titles=[name], column_titles=[name], title=name
            ),
            "levels": viz.levels(image[None], {name: map[None]}),
            "anchors": viz.anchor_histogram(torch.rand(3), torch.ones(3), title=name),
            "rectangles": viz.rectangle_histograms(torch.rand(2, 5), title=name),
            "curves": viz.training_curves({name: rows}, title=name),
        }
        given = Figure().add_subplot()
        viz.overlay(image, title=name, ax=given)
        drawn["on given axes"] = given.figure
    shown = name.replace("\udce9", "\\udce9")
    counts = {"overlay": 2, "grid": 4, "levels": 1, "anchors": 1, "rectangles": 1, "curves": 2, "on given axes": 1}
    for kind, figure in drawn.items():
        written = [text for text in texts(figure) if text.get_text() in (shown, f"{shown} val")]
        assert len(written) == counts[kind], kind
        assert not any(text.get_parse_math() or text.get_usetex() for text in written)
    viz.save(drawn["overlay"], tmp_path / "overlay.svg")
    viz.save(drawn["on given axes"], tmp_path / "given.png")


def test_characters_come_from_a_font_that_has_them():
    """Matplotlib brings STIX, whose arrow with a double stroke its default font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(viz.overlay(torch.rand(3, 4, 4), title="\u2900"))
    (title,) = texts(viz.overlay(torch.rand(3, 4, 4), title="\u2900"))
    with matplotlib.rc_context({"font.family": ["DejaVu Sans"]}):
        (other,) = texts(viz.overlay(torch.rand(3, 4, 4), title="\u2900"))
    for family in (title.get_fontfamily()[-1], other.get_fontfamily()[-1]):
        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[family])))
        assert font.get_char_index(0x2900)
    assert other.get_fontfamily()[0] == "DejaVu Sans"
    (plain,) = texts(viz.overlay(torch.rand(3, 4, 4), title="plain"))
    assert plain.get_fontfamily() == matplotlib.rcParams["font.family"]


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: viz.overlay(torch.rand(2, 4, 4)), ValueError, r"image must be \(3, H, W\) or \(1, H, W\)"),
        (lambda: viz.overlay(torch.randn(3, 4, 4) * 9), ValueError, r"image must be in \[0, 1\], not normalised"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.rand(1, 2, 2)), ValueError, r"map must be \(h, w\)"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.full((2, 2), torch.nan)), ValueError, "map must be finite"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), rectangle=torch.rand(4)), ValueError, r"rectangle must be \(5,\)"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), theme="grey"), ValueError, "theme must be 'light' or 'dark'"),
        (lambda: viz.grid([["text"]]), TypeError, "must be an image"),
        (lambda: viz.sorted_corners(torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2), torch.rand(2, 5), "size"), ValueError,
         "by must be"),
        (lambda: viz.sorted_corners(torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2), torch.rand(2, 5), "row", count=0),
         ValueError, r"^sorted_corners: count must be at least 1, got 0$"),
        (lambda: viz.sorted_corners(torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2), torch.rand(2, 5), "row", count=-1),
         ValueError, r"^sorted_corners: count must be at least 1, got -1$"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.rand(2, 2), limit=-1), ValueError,
         r"^overlay: limit must be positive and finite, got -1$"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.rand(2, 2), limit=0), ValueError,
         r"^overlay: limit must be positive and finite, got 0$"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.rand(2, 2), limit=math.inf), ValueError,
         r"^overlay: limit must be positive and finite, got inf$"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.rand(2, 2), limit="1"), TypeError, "limit must be a number"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), torch.rand(2, 2), nearest="no"), TypeError,
         "nearest must be True or False, got 'no'"),
        (lambda: viz.overlay(torch.rand(3, 4, 4), aspect=1), TypeError, "aspect must be True or False, got 1"),
        (lambda: viz.grid([[torch.rand(3, 4, 4)]], inches=0), ValueError, "inches must be positive and finite, got 0"),
        (lambda: viz.grid([[torch.rand(3, 4, 4)]], row_titles="a"), ValueError,
         "row_titles must be 1 titles, got 'a'"),
        (lambda: viz.levels(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 2)), TypeError,
         r"^levels: maps must be a Mapping, got Tensor$"),
        (lambda: viz.occlusion_rows(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), None), TypeError,
         r"^occlusion_rows: modified must be a Mapping, got Tensor$"),
        (lambda: viz.anchor_histogram(torch.rand(2), [1, 2]), TypeError,
         r"^anchor_histogram: counts must be a Tensor, got \[1, 2\]$"),
        (lambda: viz.rectangle_histograms(torch.rand(2, 5), bins=0), ValueError, "bins must be at least 1, got 0"),
        (lambda: viz.rectangle_histograms(torch.rand(2, 5), aspect="no"), TypeError,
         "aspect must be True or False, got 'no'"),
        (lambda: viz.equivariance_sequence(torch.rand(3, 4, 4), None, (2, 2), shifts=(0.1, 0.0)), TypeError,
         r"^equivariance_sequence: shifts must be a list of pairs \(row, column\), got \(0\.1, 0\.0\)$"),
    ],
)  # fmt: skip
def test_wrong_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_nothing_is_left_of_a_failed_save(tmp_path):
    figure = viz.overlay(torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match=r"\.png or \.svg.*, got"):
        viz.save(figure, tmp_path / "picture.jpg")
    with pytest.raises(OSError, match="nowhere"):
        viz.save(figure, tmp_path / "nowhere" / "picture.png")
    assert list(tmp_path.iterdir()) == []
