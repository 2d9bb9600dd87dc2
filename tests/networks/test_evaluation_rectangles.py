"""Equivariance of rectangles: transformed rectangles match the transformed images."""

import math

import pytest
import torch

import attnkern
from attnkern.evaluation import (
    catching_rate,
    descriptive_order,
    equivariance_distance,
    equivariance_errors,
    fitting_rate,
    jaccard,
    missing_rate,
    rectangle_mask,
    transform_images,
    transform_rectangle,
)

#: Off centre, elongated and rotated, so that any wrong sign is detected.
RECTANGLE = [0.42, 0.56, 0.2, 0.09, 0.4]


def drawn(rectangle, size, aspect=False):
    return attnkern.window_map(rectangle, size, rescale=False, aspect=aspect, backend="reference")[:, None]


TRANSFORMATIONS = [
    {"angle": 2.0},
    {"scale": 0.8},
    {"shift": (0.1, -0.05)},
    {"angle": -0.7, "scale": 1.2, "shift": (-0.06, 0.12)},
]


@pytest.mark.parametrize("size, aspect", [((151, 151), False), ((121, 181), True),
                                          ((181, 121), True), ((121, 181), False)])  # fmt: skip
@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=str)
def test_a_transformed_image_shows_the_transformed_rectangle(transformation, size, aspect):
    rectangle = torch.tensor([RECTANGLE, [0.55, 0.5, 0.08, 0.15, -1.0]], dtype=torch.float64)
    moved = transform_rectangle(rectangle, **transformation, size=size if aspect else None)
    found = transform_images(drawn(rectangle, size, aspect), **transformation, aspect=aspect)
    expected = drawn(moved, size, aspect)
    # Bilinear interpolation of edges some five pixels wide.
    assert (found - expected).abs().max() < 0.03
    assert (drawn(rectangle, size, aspect) - expected).abs().max() > 0.5


def test_the_parts_follow_in_order():
    """A rotation, scaling and shift in sequence equal one combined transformation."""
    rectangle = torch.tensor([RECTANGLE], dtype=torch.float64)
    for size in (None, (7, 12)):
        steps = rectangle
        for step in ({"angle": 0.7}, {"scale": 1.3}, {"shift": (0.2, -0.1)}):
            steps = transform_rectangle(steps, **step, size=size)
        torch.testing.assert_close(steps, transform_rectangle(rectangle, 0.7, 1.3, (0.2, -0.1), size=size))


def test_quarter_turns_and_whole_pixels_are_exact():
    image = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for quarters in (1, 2, 3):
        turned = transform_images(image, quarters * math.pi / 2)
        torch.testing.assert_close(turned, image.rot90(quarters, (2, 3)))  # counter-clockwise on the screen
    wide = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    shifted = transform_images(wide, shift=(1 / 2, -1 / 3))  # a row down, a column to the left
    expected = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]], dtype=torch.float64)
    torch.testing.assert_close(shifted[0, 0], expected)
    border = transform_images(wide, shift=(0, -1 / 3), padding="border")
    torch.testing.assert_close(border[0, 0, 0], torch.tensor([1.0, 2, 3, 3], dtype=torch.float64))
    # Twice as large about the centre of five.
    enlarged = transform_images(torch.arange(5.0).expand(1, 1, 5, 5), scale=2.0)
    assert enlarged[0, 0, 2].tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_rectangles_turn_scale_and_move_about_the_centre():
    rectangle = torch.tensor([[0.5, 0.7, 0.1, 0.3, 0.2]], dtype=torch.float64)
    quarter = transform_rectangle(rectangle, math.pi / 2)  # what is on the right comes to the top
    torch.testing.assert_close(quarter[0].tolist(), [0.3, 0.5, 0.1, 0.3, 0.2 + math.pi / 2])
    scaled = transform_rectangle(rectangle, scale=1.5, shift=(0.1, -0.2))
    torch.testing.assert_close(scaled[0].tolist(), [0.6, 0.6, 0.15, 0.45, 0.2])
    # On 11 x 21 pixels, 0.2 of the width is four pixels, and so 0.4 of the height.
    pixels = transform_rectangle(rectangle, math.pi / 2, size=(11, 21))
    torch.testing.assert_close(pixels[0].tolist(), [0.1, 0.5, 0.1, 0.3, 0.2 + math.pi / 2])


def test_each_image_may_have_its_own_transformation():
    rectangles = torch.tensor([RECTANGLE, RECTANGLE])
    angle, scale, shift = torch.tensor([0.3, -0.2]), torch.tensor([0.9, 1.1]), torch.tensor([[0.1, 0], [0, -0.1]])
    images = drawn(rectangles, (9, 9))
    moved, shown = transform_rectangle(rectangles, angle, scale, shift), transform_images(images, angle, scale, shift)
    for i in range(2):
        one = {"angle": angle[i].item(), "scale": scale[i].item(), "shift": shift[i].tolist()}
        torch.testing.assert_close(transform_rectangle(rectangles[i : i + 1], **one), moved[i : i + 1])
        torch.testing.assert_close(transform_images(images[i : i + 1], **one), shown[i : i + 1])
    lists = transform_rectangle(rectangles, angle.tolist(), scale.tolist(), shift.tolist())
    torch.testing.assert_close(lists, moved)
    torch.testing.assert_close(transform_rectangle(rectangles, angle.numpy(), scale.numpy(), shift.numpy()), moved)
    larger = transform_rectangle(rectangles, scale=1.2)
    torch.testing.assert_close(transform_rectangle(rectangles, scale=torch.tensor(1.2).double().numpy()), larger)


def test_an_axis_of_length_one_stays():
    line = torch.arange(5.0).view(1, 1, 1, 5)
    assert transform_images(line, shift=(0.0, 0.25), aspect=True).flatten().tolist() == [0, 0, 1, 2, 3]
    moved = transform_rectangle(torch.tensor([RECTANGLE]), 0.5, size=(1, 5))
    assert moved.isfinite().all()
    assert transform_images(line, 0.5, aspect=True).isfinite().all()


def test_half_precision_images_and_rectangles():
    rectangle = torch.tensor([RECTANGLE])
    image = drawn(rectangle, (33, 33))
    found = transform_images(image.half(), 0.4, 1.1, (0.1, 0.0))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), transform_images(image, 0.4, 1.1, (0.1, 0.0)), atol=2e-3, rtol=0)
    assert transform_rectangle(rectangle.half(), 0.4).dtype == torch.float32


def test_the_transformation_and_the_distance_are_differentiable():
    rectangle = torch.tensor([RECTANGLE], dtype=torch.float64, requires_grad=True)
    angle = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.3, 0.4, 0.1, 0.2, -0.5]], dtype=torch.float64, requires_grad=True)

    def loss(rectangle, angle, other):
        return equivariance_distance(transform_rectangle(rectangle, angle, 1.2, (0.1, 0.2), size=(4, 7)), other)

    assert torch.autograd.gradcheck(loss, (rectangle, angle, other))
    images = torch.rand(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: transform_images(x, 0.3, 0.9), images)


def test_distances_know_the_period_of_the_angle():
    first = torch.tensor([[0.1, 0.2, 0.3, 0.4, 1.5]] * 3, dtype=torch.float64)
    second = first + torch.tensor([[0.1, 0.2, 0, 0.2, 0], [0, 0, 0, 0, math.pi], [0, 0, 0, 0, -math.pi / 3]])
    torch.testing.assert_close(equivariance_distance(first, second).tolist(), [0.09, 0.0, 1.5])
    literal = equivariance_distance(first, second, literal=True)
    torch.testing.assert_close(literal.tolist(), [0.09, math.pi**2, (math.pi / 3) ** 2], atol=1e-6, rtol=1e-6)


def brightness(images):
    """A rectangle of fixed size around the mean of the bright part; exact if it stays on the image."""
    n, _, height, width = images.shape
    mass = images.mean(1)
    mass = mass / mass.sum((1, 2), keepdim=True)
    rows, columns = (torch.arange(length) / (length - 1) for length in (height, width))
    row, column = (mass.sum(2) * rows).sum(1), (mass.sum(1) * columns).sum(1)
    fixed = torch.tensor([0.2, 0.1, 0.4]).expand(n, 3)
    return torch.cat((row[:, None], column[:, None], fixed), 1)


def test_errors_by_transformation():
    rectangles = torch.tensor([[0.45, 0.55, 0.1, 0.1, 0.0], [0.5, 0.6, 0.1, 0.1, 0.0]])
    images = drawn(rectangles, (41, 41)).expand(-1, 3, -1, -1)
    for data in (images, [images[:1], (images[1:], torch.zeros(1))]):
        found = equivariance_errors(brightness, data, angles=(0.3, -0.5), scales=(0.8,), shifts=((0.1, -0.1),))
        assert list(found) == ["rotation", "scale", "translation"]
        for error in found.values():
            assert error.centre < 2e-3
        # The sizes do not follow: (0.2, 0.1) against 0.8 times that; nor does the angle.
        assert found["scale"].extent == pytest.approx(math.hypot(0.04, 0.02), rel=1e-4)
        assert found["rotation"].extent == pytest.approx(0, abs=1e-6)
        assert found["rotation"].angle == pytest.approx(0.4, rel=1e-4)
        assert found["scale"].angle == pytest.approx(0, abs=1e-6)
        expected = (2 - math.cos(0.6) - math.cos(1.0)) / 2
        assert found["rotation"].distance == pytest.approx(expected, abs=1e-4)
    assert list(equivariance_errors(brightness, images, angles=(), scales=())) == ["translation"]


def test_errors_in_pixels_of_dark_objects():
    dark = 1 - drawn(torch.tensor([[0.45, 0.65, 0.1, 0.1, 0.0]]), (41, 61), aspect=True).expand(-1, 3, -1, -1)
    options = {"angles": (0.8,), "aspect": True, "padding": "border", "normalise": lambda raw: 1 - raw}
    found = equivariance_errors(brightness, dark, **options)
    assert all(error.centre < 3e-3 for error in found.values())


def test_errors_of_rectangles_that_follow_are_nothing_else_than_zero():
    """A network that measures the rectangle in the image has no error; a constant one has a known error."""
    fixed = torch.tensor([[0.5, 0.5, 0.2, 0.1, 0.0]])
    images = torch.ones(3, 1, 9, 17)
    still = equivariance_errors(lambda x: fixed.expand(len(x), 5), images, aspect=True, normalise=lambda x: x - 1)
    assert still["translation"].centre == pytest.approx(0.1)
    assert still["translation"].distance == pytest.approx(0.01)
    assert still["rotation"].centre == pytest.approx(0)
    assert still["rotation"].angle == pytest.approx((math.pi / 6 + math.pi / 12) / 2)
    assert still["scale"].extent == pytest.approx(math.hypot(0.2, 0.1) * 0.15, rel=1e-4)
    off = torch.tensor([[0.5, 0.7, 0.2, 0.1, 0.0]])
    # 0.2 of sixteen columns are 3.2 pixels: a quarter turn brings them to 0.4 of eight rows.
    turned = equivariance_errors(lambda x: off.expand(len(x), 5), images, angles=(math.pi / 2,), aspect=True)
    assert turned["rotation"].centre == pytest.approx(math.hypot(0.4, 0.2))
    assert turned["rotation"].angle == pytest.approx(math.pi / 2, rel=1e-4)


def test_masks_of_rectangles():
    upright = rectangle_mask(torch.tensor([[0.5, 0.25, 0.25, 0.25, 0.0]]), (5, 5))
    assert upright[0].int().tolist() == [[0] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0] * 5]
    # σ₁ runs along rows, and turned by a quarter along columns.
    rows = torch.tensor([[0.5, 0.5, 0.5, 0.1, 0.0], [0.5, 0.5, -0.51, 0.1, math.pi / 2]])
    column, row = rectangle_mask(rows, (5, 5))
    assert column.nonzero().tolist() == [[i, 2] for i in range(5)]
    assert row.nonzero().tolist() == [[2, i] for i in range(5)]
    # Half a longer side is all of the shorter one and more.
    wide = torch.tensor([[0.5, 0.5, 0.26, 0.01, 0.0]])
    assert rectangle_mask(wide, (3, 5)).sum() == 1
    assert rectangle_mask(wide, (3, 5), aspect=True).sum() == 3


@pytest.mark.parametrize("size, aspect", [((9, 9), False), ((9, 14), False), ((9, 14), True), ((1, 5), True)])
def test_masks_are_where_the_steep_window_is_high(size, aspect):
    rectangles = torch.tensor([RECTANGLE, [0.3, 0.8, 0.1, 0.33, -1.2]])
    steep = attnkern.window_map(rectangles, size, scale=1e4, rescale=False, aspect=aspect, backend="reference")
    assert torch.equal(rectangle_mask(rectangles, size, aspect), steep > 0.1)
    assert rectangle_mask(rectangles, size, aspect).any()


def test_rates_of_masks():
    predicted = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[0] * 3] * 2]).bool()
    target = torch.tensor([[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[0] * 3] * 2]).bool()
    ones = [2 * mask.double() - 1 for mask in (predicted, target)]
    torch.testing.assert_close(catching_rate(predicted, target), (ones[0] * ones[1]).mean((1, 2)))
    torch.testing.assert_close(catching_rate(predicted, target).tolist(), [1 / 3, -1.0, 1.0])
    torch.testing.assert_close(missing_rate(predicted, target).tolist(), [1 / 3, 1.0, 0.0])
    torch.testing.assert_close(fitting_rate(predicted, target).tolist(), [1 / 3, 0.0, 1.0])


def test_the_fitting_rate_is_the_papers_quotient():
    masks = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    a, b = (2 * mask.double() - 1 for mask in masks)

    def psi(a, b):
        return (a * b).mean((1, 2))

    quotient = psi((a + 1) / 2, (b + 1) / 2) / (1 - psi((1 - a) / 2, (1 - b) / 2))
    torch.testing.assert_close(fitting_rate(*masks), quotient)


@pytest.mark.parametrize("by, order", [("row", [2, 1, 0]), ("column", [1, 0, 2]), ("both", [1, 2, 0]),
                                       ("height", [1, 0, 2]), ("width", [0, 1, 2]), ("angle", [2, 0, 1])])  # fmt: skip
def test_images_in_the_order_of_their_rectangles(by, order):
    rectangles = torch.tensor([
        [0.9, 0.5, -0.3, 0.2, 0.1],
        [0.5, 0.1, 0.1, 0.2, 0.2],
        [0.05, 0.6, 0.4, 0.5, 3.0],  # 3 is 3 - π
    ])  # fmt: skip
    assert descriptive_order(rectangles, by).tolist() == order
    if by != "width":
        assert descriptive_order(rectangles, by, descending=True).tolist() == order[::-1]


# --- several windows and ellipses ------------------------------------------------------------------------------------

TWO = torch.tensor([[RECTANGLE, [0.55, 0.5, 0.08, 0.15, -1.0]], [[0.3, 0.7, 0.1, 0.2, 0.0], [0.7, 0.3, 0.2, 0.1, 1.0]]])


@pytest.mark.parametrize("shape", ["rectangle", "ellipse"])
@pytest.mark.parametrize("size, aspect", [((9, 9), False), ((9, 14), True), ((1, 5), True)])
def test_masks_of_several_windows_are_their_union(size, aspect, shape):
    single = [rectangle_mask(TWO[:, k], size, aspect, shape) for k in range(2)]
    assert torch.equal(rectangle_mask(TWO, size, aspect, shape), single[0] | single[1])
    steep = {"scale": 1e4, "rescale": False, "aspect": aspect, "shape": shape, "backend": "reference"}
    assert torch.equal(rectangle_mask(TWO, size, aspect, shape), attnkern.window_map(TWO, size, **steep) > 0.1)


def test_an_ellipse_lies_inside_its_rectangle():
    inside = rectangle_mask(TWO, (40, 40), shape="ellipse")
    assert not (inside & ~rectangle_mask(TWO, (40, 40))).any()
    one = torch.tensor([[0.5, 0.5, 0.4, 0.3, 0.7]])
    share = rectangle_mask(one, (400, 400), shape="ellipse").sum() / rectangle_mask(one, (400, 400)).sum()
    assert share.item() == pytest.approx(math.pi / 4, abs=2e-3)


@pytest.mark.parametrize("size", [None, (7, 12)])
def test_windows_are_transformed_and_compared_one_by_one(size):
    angle, scale, shift = torch.tensor([0.3, -0.2]), torch.tensor([0.9, 1.1]), torch.tensor([[0.1, 0], [0, -0.1]])
    moved = transform_rectangle(TWO, angle, scale, shift, size=size)
    parts = [transform_rectangle(TWO[:, k], angle, scale, shift, size=size) for k in range(2)]
    torch.testing.assert_close(moved, torch.stack(parts, 1))
    for literal in (False, True):
        distances = [equivariance_distance(TWO[:, k], parts[k], literal) for k in range(2)]
        torch.testing.assert_close(equivariance_distance(TWO, moved, literal), torch.stack(distances).mean(0))
    assert equivariance_distance(TWO, TWO.flip(1)).min() > 0.01  # exchanged windows are not the same


def test_errors_of_several_windows_are_means_over_them():
    images = torch.ones(3, 1, 9, 17)

    def of(windows):
        return lambda x: windows.expand(len(x), *windows.shape[1:])

    found = equivariance_errors(of(TWO[:1]), images)
    single = [equivariance_errors(of(TWO[:1, k]), images) for k in range(2)]
    for kind, error in found.items():
        expected = [(a + b) / 2 for a, b in zip(*(one[kind] for one in single), strict=True)]
        assert list(error) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_images_in_the_order_of_their_windows():
    """By the means over the windows; the directions of angles near π/2 and -π/2 are close."""
    rectangles = torch.tensor([
        [[0.1, 0.9, 0.1, 0.1, 1.5], [0.2, 0.9, -0.3, 0.1, -1.5]],  # about π/2
        [[0.9, 0.3, 0.3, 0.1, 0.1], [0.2, 0.1, 0.3, 0.2, 0.3]],
        [[0.3, 0.5, 0.1, 0.4, -0.1], [0.3, 0.5, 0.1, 0.4, -0.2]],
    ])  # fmt: skip
    orders = {"row": [0, 2, 1], "column": [1, 2, 0], "both": [1, 2, 0], "height": [2, 0, 1], "width": [0, 1, 2]}
    assert {by: descriptive_order(rectangles, by).tolist() for by in orders} == orders
    assert descriptive_order(rectangles, "angle").tolist()[-2:] in ([1, 0], [2, 1])
    for by in (*orders, "angle"):
        assert torch.equal(descriptive_order(rectangles[:, :1], by), descriptive_order(rectangles[:, 0], by))


rectangle, images, masks = torch.full((2, 5), 0.5), torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, dtype=torch.bool)


def wrong(error, message, function, *args, **kwargs):
    message = f"{function.__name__}: {message}"
    return pytest.param(lambda: function(*args, **kwargs), error, message, id=message)


WRONG = [
    wrong(ValueError, "rectangles must be (N, 5), or (N, K, 5) with K of at least 1, got shape (2, 4)",
          descriptive_order, rectangle[:, :4], "row"),
    wrong(ValueError, "by must be 'column', 'row', 'both', 'height', 'width' or 'angle', got 'area'",
          descriptive_order, rectangle, "area"),
    wrong(TypeError, "rectangle must be float32, bfloat16, float16 or float64, got int64",
          rectangle_mask, rectangle.long(), (2, 2)),
    wrong(ValueError, "size must be (H, W), got (2, 2, 2)", rectangle_mask, rectangle, (2, 2, 2)),
    wrong(TypeError, "predicted must be a Tensor of bool, got int64", catching_rate, masks.long(), masks),
    wrong(ValueError, "target must be (2, 3, 4) (as predicted), got shape (2, 3, 3)",
          catching_rate, masks, masks[:, :, :3]),
    wrong(ValueError, "predicted must be (N, H, W), got shape (3, 4)", jaccard, masks[0], masks[0]),
    wrong(ValueError, "angle must be () or (2,), got shape (3,)", transform_rectangle, rectangle, torch.ones(3)),
    wrong(ValueError, "scale must be positive and finite, got 0", transform_rectangle, rectangle, 0.1, 0),
    wrong(ValueError, "scale must be positive and finite, got [0.8, -1.0]",
          transform_rectangle, rectangle, 0.1, [0.8, -1.0]),
    wrong(TypeError, "scale must be a number, a list of numbers or a Tensor, got '2'",
          transform_rectangle, rectangle, 0.1, "2"),
    wrong(TypeError, "angle must be a number, a list of numbers or a Tensor, got None",
          transform_images, images, None),
    wrong(TypeError, "shift must be two numbers, a list of pairs or a Tensor, got 'ab'",
          transform_images, images, shift="ab"),
    wrong(ValueError, "shift must be (2,) or (2, 2), got shape (3,)", transform_images, images, shift=(0, 0, 0)),
    wrong(ValueError, "padding must be 'zeros', 'border' or 'reflection', got 'mirror'",
          transform_images, images, padding="mirror"),
    wrong(ValueError, "images must be (N, C, H, W) with H and W of at least 1, got shape (2, 5)",
          transform_images, rectangle),
    wrong(ValueError, "shape must be 'rectangle' or 'ellipse', got 'circle'",
          rectangle_mask, rectangle, (2, 2), shape="circle"),
    wrong(ValueError, "second must be (2, 5) (as first), got shape (1, 5)",
          equivariance_distance, rectangle, rectangle[:1]),
    wrong(ValueError, "second must be (2, 5) (as first), got shape (2, 1, 5)",
          equivariance_distance, rectangle, rectangle[:, None]),
    wrong(ValueError, "rectangles_of's result must be (N, 5), or (N, K, 5) with K of at least 1, got shape (2, 3)",
          equivariance_errors, lambda x: x.mean((2, 3)), images),
    wrong(ValueError, "rectangles_of's result must be (2, 5) or (2, K, 5), got shape (1, 5)",
          equivariance_errors, lambda x: rectangle[:1], images),
    wrong(TypeError, "shifts must be a list of pairs (row, column), got (0.1, 0.0)",
          equivariance_errors, lambda x: rectangle, images, shifts=(0.1, 0.0)),
    wrong(ValueError, "shifts must be a list of pairs (row, column), got [(0.1, 0.0, 0.2)]",
          equivariance_errors, lambda x: rectangle, images, shifts=[(0.1, 0.0, 0.2)]),
    wrong(TypeError, "literal must be True or False, got 'no'", equivariance_distance, rectangle, rectangle, "no"),
    wrong(TypeError, "descending must be True or False, got 'no'", descriptive_order, rectangle, "row", "no"),
    wrong(TypeError, "aspect must be True or False, got None", rectangle_mask, rectangle, (2, 2), None),
    wrong(TypeError, "aspect must be True or False, got 1", transform_images, images, aspect=1),
    wrong(TypeError, "aspect must be True or False, got 'no'",
          equivariance_errors, lambda x: rectangle, images, aspect="no"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_calls_say_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
