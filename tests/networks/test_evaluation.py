"""The papers' evaluation protocols, compared with values computed by hand."""

import functools
import json
import math

import pytest
import torch
from torch import nn

from attnkern import evaluation
from attnkern.evaluation import (
    attention_of,
    binarise,
    box_masks,
    collect,
    combine,
    direct_transfer,
    features_at,
    fgsm,
    fooling_rate,
    frequency,
    gradcam_of,
    interpretability_score,
    jaccard,
    linear_svm,
    localisation,
    mcnemar,
    occlude,
    perplexity,
    pointing_game,
    pool_attention,
    query_driven,
    rescale,
    tight_boxes,
    top1,
    upsample,
    usage,
    weak_segmentation,
    zca,
)
from attnkern.models import attention_maps, create_model
from attnkern.nn import CompatibilityPool

GAP = float("nan")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed))


class Linear(nn.Module):
    """A linear classifier on the flattened image, with a fixed weight."""

    def __init__(self, weight):
        super().__init__()
        self.classifier = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.classifier.weight.data = weight
        self.eval()

    def forward(self, images):
        return self.classifier(images.flatten(1))


# --- localisation ---


def test_upsample_aligns_cell_centres():
    ramp = torch.tensor([[[0.0, 4.0]]])
    # The cell centres lie at pixels 0.5 and 2.5. Pixels 0 and 3 are clamped; pixels 1 and 2 are at 1/4 and 3/4 between.
    assert upsample(ramp, (1, 4)).tolist() == [[[0.0, 1.0, 3.0, 4.0]]]
    assert upsample(ramp.half(), (3, 2)).shape == (1, 3, 2)
    assert upsample(ramp.half(), (3, 2)).dtype == torch.float32


def test_box_masks_include_edges():
    masks = box_masks(torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.5, 0.0, 2.4, 0.4]]), (3, 4))
    assert masks.int().tolist() == [
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
    ]


def test_several_boxes_of_an_image():
    """Their union is filled, and a map may point into any of them."""
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [2.0, 3.0, 3.0, 5.0]], [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]])
    single = [box_masks(boxes[:, k], (4, 6)) for k in range(2)]
    assert torch.equal(box_masks(boxes, (4, 6)), single[0] | single[1])
    maps = torch.zeros(2, 4, 6)
    maps[0, 3, 4] = maps[1, 3, 4] = 1
    assert pointing_game(maps, boxes, (4, 6)) == 0.5


def test_pointing_game_uses_maximum():
    maps = torch.zeros(4, 2, 2)
    maps[0, 1, 0] = maps[1, 1, 0] = maps[2, 0, 1] = 1
    # At 4 x 6 pixels the maxima are in the lower left corner (twice) and the upper right one. The last map is constant.
    boxes = torch.tensor([[3.0, 0.0, 3.0, 0.0], [0.0, 1.0, 3.0, 5.0], [0.0, 4.0, 1.0, 5.0], [0.0, 0.0, 3.0, 5.0]])
    hits = [pointing_game(maps[i : i + 1], boxes[i : i + 1], (4, 6)) for i in range(4)]
    assert hits == [1.0, 0.0, 1.0, 0.0]
    assert pointing_game(maps, boxes, (4, 6)) == 0.5


def test_binarise_uses_otsu_threshold():
    maps = torch.tensor([[[1.0, 2.0, 1.0], [8.0, 9.0, 2.0]], [[3.0] * 3] * 2, [[-5.0, -5.0, -5.0], [-5.0, -5.0, -1.0]]])
    assert binarise(maps).int().tolist() == [[[0, 0, 0], [1, 1, 0]], [[0] * 3] * 2, [[0, 0, 0], [0, 0, 1]]]
    assert binarise(maps[1:2]).dtype == torch.bool


def test_rescale_to_zero_one():
    maps = torch.tensor([[[2.0, 4.0], [6.0, 3.0]], [[7.0, 7.0], [7.0, 7.0]]])
    assert rescale(maps).tolist() == [[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [0.0, 0.0]]]


def test_jaccard_counts_pixels():
    predicted = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 1], [1, 1]]]).bool()
    target = torch.tensor([[[0, 1], [1, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]).bool()
    assert jaccard(predicted, target).tolist() == [1 / 3, 1, 0, 1]
    assert jaccard(predicted, target, empty=GAP).nanmean().item() == pytest.approx((1 / 3 + 0 + 1) / 3)


def test_localisation_with_boxes_and_masks():
    maps = torch.zeros(3, 4, 4)
    maps[0, 1:3, 1:3] = 5  # equal to the box and to half of the mask
    maps[1, 0, :] = 2  # overlaps the box in 2 of 4 + 6 - 2 pixels; the mask is empty
    boxes = torch.tensor([[1.0, 1.0, 2.0, 2.0], [0.0, 1.0, 2.0, 2.0], [0.0, 0.0, 3.0, 3.0]])
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, 1:3, :] = True
    for batch_size in (256, 1):
        found = localisation(maps, boxes, (4, 4), masks, batch_size=batch_size)
        # The first maximum of the second map is in column 0, outside the box. The third map is constant: a miss.
        assert found.pointing == pytest.approx(1 / 3)
        assert found.iou_box == pytest.approx((1 + 2 / 8 + 0) / 3)
        assert found.iou_mask == pytest.approx((4 / 8 + 0 + 1) / 3)
        assert (found.iou_present, found.images, found.present) == (0.5, 3, 1)
    assert localisation(maps, boxes, (4, 4))[3:] == (None, None, 3, None)
    json.dumps(found._asdict())


def test_means_over_no_map_are_undefined():
    none = torch.zeros(0, 4, 4)
    found = localisation(none, torch.zeros(0, 4), (4, 4), none.bool())
    assert all(math.isnan(value) for value in found[:5])
    assert found[5:] == (0, 0)
    assert localisation(none, torch.zeros(0, 2, 4), (4, 4))[3:] == (None, None, 0, None)
    assert weak_segmentation(none, none.bool(), torch.zeros(0).long()) == {}


# --- interpretability ---


def test_occlusion_covers_one_square_with_one_colour():
    images = torch.full((40, 3, 6, 9), 2.0)
    covered = occlude(images, 4, seeded())
    corners = set()
    for image in covered:
        inside = image[0] != 2
        rows, columns = inside.nonzero().unbind(1)
        corners.add((rows.min().item(), columns.min().item()))
        assert inside.sum() == 16
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (3, 3)
        assert (image[:, inside] == image[:, inside][:, :1]).all()
        assert ((image != 2) == inside).all()
    assert {row for row, _ in corners} == set(range(3))
    assert {column for _, column in corners} == set(range(6))
    assert covered[covered != 2].min() >= 0
    assert covered[covered != 2].max() <= 1
    assert (images == 2).all()


def test_occlusion_with_fill_images():
    images = torch.full((30, 3, 8, 8), 2.0)
    fill = torch.stack([torch.arange(12.0).view(3, 2, 2) / 12, torch.full((3, 2, 2), 1.5)])
    covered = occlude(images, 2, seeded(), fill)
    patches = []
    for image in covered:
        rows, columns = (image[0] != 2).nonzero().unbind(1)
        patches.append(image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    kinds = [next(i for i in range(2) if torch.allclose(patch, fill[i])) for patch in patches]
    assert set(kinds) == {0, 1}
    # The positions do not depend on the fill.
    assert torch.equal(covered != 2, occlude(images, 2, seeded()) != 2)
    # The fill image is resized, so a constant fill stays constant.
    assert (occlude(images[:1], 5, seeded(), fill[1:]) == 1.5).sum() == 3 * 25


def test_occlusion_is_reproducible_and_independent_of_batch_size():
    images = uniform(5, 3, 8, 8)
    whole = occlude(images, 3, seeded(1))
    torch.manual_seed(7)
    assert torch.equal(whole, occlude(images, 3, seeded(1)))
    generator = seeded(1)
    assert torch.equal(whole, torch.cat([occlude(part, 3, generator) for part in images.split(2)]))
    assert not torch.equal(whole, occlude(images, 3, seeded(2)))
    assert (occlude(images[:1], 8, seeded()) != images[:1]).all()


def wave(cycles, length=32, other=16):
    angles = 2 * math.pi * cycles * torch.arange(length, dtype=torch.float64) / length
    return torch.cos(angles)[:, None].expand(length, other)


@pytest.mark.parametrize("length", [32, 33])
def test_frequency_splits_at_radius(length):
    slow, limit, fast = (wave(cycles, length) for cycles in (3, 4, 9))
    image = (slow + fast)[None, None].repeat(1, 3, 1, 1)

    def pictured(channel):
        low, high = channel.min(), channel.max()
        return ((channel - low) / (high - low) * 255).round() / 255

    step = 1.001 / 255  # one level of difference where the rounding is a tie
    for radius, keep, rest in ((4, "low", slow), (4, "high", fast), (3, "high", slow + fast), (12, "low", slow + fast)):
        found = frequency(image, radius, keep)
        assert (found - pictured(rest)).abs().max() <= step, (radius, keep)
    # A frequency exactly at the radius counts as high.
    assert (frequency(limit[None, None], 4, "low") == 0).all()
    assert (frequency(limit[None, None], 4, "high") - pictured(limit)).abs().max() <= step
    # The distance is Euclidean: the frequency (3, 3) is at 4.24.
    product = wave(3, length) * wave(3, 16, length).T
    assert (frequency(product[None, None], 4, "low") == 0).all()
    assert frequency(product[None, None], 4.3, "low").max() == 1


def test_frequency_of_constant_channel_is_zero():
    flat = torch.full((1, 3, 8, 6), 0.3)
    assert (frequency(flat, 4, "high") == 0).all()
    assert (frequency(flat, 12, "low") == 0).all()
    # Keeping all frequencies returns the rescaled image.
    image = torch.arange(48.0).view(1, 1, 6, 8)
    assert (frequency(image, 100, "low") - image / 47).abs().max() <= 0.5 / 255 + 1e-6


def test_interpretability_score_uses_unchanged_predictions():
    # The four pixels of an image are two logits and two values of the map.
    def predict(images):
        values = images[:, 0, 0]
        return values[:, :2], values[:, None, 2:]

    before = [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 3, 4], [0, 1, 1, 1]]
    # In order: changed prediction; cosine 1; cosine 0.6; cosine 24/25; constant map before and after.
    after = [[0, 1, 1, 0], [1, 0, 2, 0], [1, 0, 3, 4], [0, 1, 4, 3], [0, 1, 5, 5]]
    images = torch.tensor(before).float()[:, None, None] - 1
    changed = torch.tensor(after).float()[:, None, None] - 1
    position = iter(changed)

    def modify(batch):
        return torch.stack([next(position) for _ in batch])

    found = interpretability_score(predict, images, modify, batch_size=2, normalise=lambda raw: raw + 1)
    assert (found.images, found.consistent, found.share) == (5, 4, 0.8)
    assert found.counts == {0.85: 3, 0.9: 3, 0.95: 3}
    assert found.scores == {0.85: 0.75, 0.9: 0.75, 0.95: 0.75}
    assert found.cosine == pytest.approx((1 + 0.6 + 0.96 + 1) / 4)
    # After subtracting the means, the cosines are 1, -1 and -1. The constant map counts as 0.
    assert found.centred_counts == {0.85: 1, 0.9: 1, 0.95: 1}
    assert found.centred_scores[0.9] == 0.25
    assert found.centred_cosine == pytest.approx((1 - 1 - 1 + 0) / 4)
    json.dumps(found._asdict())


def test_interpretability_score_thresholds_and_no_consistent_image():
    def predict(images):
        values = images[:, 0, 0]
        return values[:, :2], values[:, None, 2:]

    image = torch.tensor([1.0, 0, 1, 0]).view(1, 1, 1, 4)
    slanted = torch.tensor([1.0, 0, 0.92, math.sqrt(1 - 0.92**2)]).view(1, 1, 1, 4)
    found = interpretability_score(predict, [image, (image, torch.tensor([3]))], lambda raw: slanted)
    assert found.counts == {0.85: 2, 0.9: 2, 0.95: 0}
    rounding = torch.tensor([1.0, 0, 1, 1 + 2**-23]).view(1, 1, 1, 4)
    assert interpretability_score(predict, rounding, lambda raw: raw).centred_cosine == 0
    none = interpretability_score(predict, image, lambda raw: raw.flip(3), thresholds=[0.5])
    assert (none.images, none.consistent, none.counts) == (1, 0, {0.5: 0})
    assert math.isnan(none.scores[0.5])


# --- robustness ---


def test_fgsm_increases_loss_of_predicted_class():
    model = Linear(torch.tensor([[1.0, -1, 0], [0, 0, 1]]))
    images = torch.tensor([[0.5, 0.1, 0.2], [0.25, 0.995, 0.9]]).view(2, 3, 1, 1)
    # The predictions are 0 and 1. The gradient of (other logit - predicted logit) is (-1, 1, 1) and (1, -1, -1).
    found = fgsm(model, images, 0.01)
    expected = [[0.49, 0.11, 0.21], [0.26, 0.985, 0.89]]
    torch.testing.assert_close(found.flatten(1), torch.tensor(expected))
    assert model.classifier.weight.grad is None
    with torch.no_grad():
        assert torch.equal(fgsm(model, images, 0.01), found)
    assert fgsm(model, images, 0.9)[0].flatten().tolist() == [0, 1, 1]
    # The step must not vanish where the softmax saturates at 1 and its gradient is 0.
    sure = fgsm(Linear(1000 * model.classifier.weight.data), images, 0.01)
    torch.testing.assert_close(sure, found)
    # The gradient is taken through the normalisation.
    torch.testing.assert_close(fgsm(model, images, 0.01, lambda x: 0.5 - x)[0].flatten()[0], torch.tensor(0.49))


def test_fooling_rate_counts_changed_predictions():
    model = Linear(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    margins = torch.tensor([0.01, 0.03, 0.1, 0.3])
    images = torch.full((4, 3, 1, 1), 0.4)
    images[:, 0, 0, 0] += margins
    # A step of ε reduces the margin by 2ε.
    for data in (images, [images[:3], (images[3:], torch.zeros(1))]):
        found = fooling_rate(model, data, [0.01, 0.02, 0.1, 0.2, 0], batch_size=3)
        assert found.rates == [0.25, 0.5, 0.75, 1.0, 0.0]
        assert (found.images, found.eps[2]) == (4, 0.1)
    # The prediction would change at a pixel value above 1.005, but pixels are clamped to 1.
    bright = fooling_rate(lambda x: torch.cat((0 * x[:, 0, 0] + 1.005, x[:, 1, 0]), 1), images, [0.7])
    assert bright.rates == [0]
    assert fooling_rate(model, images).eps == [1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255]


# --- cross-domain ---


def test_features_at_returns_module_input():
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    images = uniform(5, 3, 2, 2)
    expected = body[2](body[1](2 * images.flatten(1)))
    for data in (images, [images[:4], (images[4:], torch.zeros(1))]):
        found = features_at(body, "3", data, normalise=lambda x: 2 * x, batch_size=2)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    assert not body[3]._forward_pre_hooks


def test_zca_gives_identity_covariance():
    mixing = torch.tensor([[2.0, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 0.5]])
    samples = torch.randn(400, 3, generator=seeded()) @ mixing + 4
    whiten = zca(samples, floor=0)
    found = whiten(samples)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.T @ found / 400, torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(whiten.matrix, whiten.matrix.T)
    # The variances are 4 and 1. The floor adds 0.4 times their mean, 2.5, to both, so the scales are 1/√5 and 1/√2.
    cross = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]]) * math.sqrt(2)
    torch.testing.assert_close(zca(cross, floor=0.4).matrix, torch.diag(torch.tensor([5.0, 2]).rsqrt()))
    images = uniform(2, 3, 2, 2)
    assert zca(images)(images[:1]).shape == (1, 3, 2, 2)


def test_linear_svm_cross_validation():
    noise = torch.randn(60, 2, generator=seeded())
    labels = torch.arange(60) % 3
    centres = torch.tensor([[0.0, 9], [9, 0], [-9, -9]])
    parted = linear_svm(noise + centres[labels], labels)
    assert (parted.accuracy, parted.deviation, parted.folds) == (1, 0, [1.0] * 5)
    mixed = linear_svm(noise + centres[labels] / 9, labels, folds=4, seed=1)
    assert len(mixed.folds) == 4
    assert 0.4 < mixed.accuracy < 1
    assert mixed.accuracy == pytest.approx(sum(mixed.folds) / 4)
    assert mixed == linear_svm(noise + centres[labels] / 9, labels, folds=4, seed=1)
    assert mixed != linear_svm(noise + centres[labels] / 9, labels, folds=4, seed=2)


def test_direct_transfer_matches_class_names():
    model = Linear(torch.eye(3))
    images = torch.eye(3)[[0, 0, 1, 2, 1]].view(5, 3, 1, 1)  # airplane, airplane, automobile, frog, automobile
    classes, target = ["airplane", "automobile", "frog"], ["car", "monkey", "airplane"]
    labels = torch.tensor([2, 0, 0, 1, 1])  # correct, wrong, correct, two of a class that the model lacks
    run = functools.partial(direct_transfer, model, classes=classes, target_classes=target)
    for data in ((images, labels), [(images[:2], labels[:2]), [images[2:], labels[2:]]]):
        assert run(data, size=None, batch_size=2) == (2 / 5, 2 / 3, 5, 3)
    assert run((images, labels), size=None, synonyms={}) == (1 / 5, 1.0, 5, 1)
    # Images are resized to the network's input size. At 1 x 1 this is the mean of each channel.
    assert run((images.repeat(1, 1, 4, 6), labels), size=(1, 1)).accuracy == 2 / 5
    monkeys = run((images[3:], labels[3:]), size=None)
    assert monkeys.accuracy == 0
    assert math.isnan(monkeys.accuracy_shared)


# --- segmentation ---


def test_combine_is_rescaled_geometric_mean():
    unused, fine = torch.full((1, 5, 5), -1.0), torch.tensor([[[1.0, 4.0], [9.0, 16.0]]])
    coarse = torch.tensor([[[4.0]]])
    # Only the last two maps count. Their products are 4, 16, 36, 64, with the roots 2, 4, 6, 8.
    torch.testing.assert_close(combine([unused, fine, coarse]), torch.tensor([[[0.0, 2], [4, 6]]]) / 6)
    torch.testing.assert_close(combine([coarse, fine]), torch.tensor([[[0.0, 2], [4, 6]]]) / 6)
    torch.testing.assert_close(combine([fine, coarse], root=False), torch.tensor([[[0.0, 12], [32, 60]]]) / 60)
    torch.testing.assert_close(combine([-fine]), torch.tensor([[[15.0, 12], [7, 0]]]) / 15)


def test_weak_segmentation_per_class_with_empty_ground_truth():
    maps, masks = torch.zeros(4, 2, 4), torch.zeros(4, 2, 4, dtype=torch.bool)
    maps[0, 0, :2] = maps[1, 0, :] = maps[3, 1, 1] = 1
    masks[0, 0, 1:3] = masks[3, 1, 1] = True
    # Jaccard per image: 1/3; 0, as only the ground truth is empty; 1, as both are empty; 1, an exact match.
    labels = torch.tensor([2, 2, 2, 0])
    expected = {0: (1, 1, 1, 1), 2: (pytest.approx(4 / 9), pytest.approx(1 / 3), 3, 1)}
    assert weak_segmentation(maps, masks, labels) == expected
    named = weak_segmentation(maps, masks, labels, ["car", "dog", "horse"], batch_size=1)
    assert named == {"car": expected[0], "horse": expected[2]}
    assert math.isnan(weak_segmentation(maps[1:2], masks[1:2], labels[1:2])[2].jaccard_present)
    json.dumps(named)


# --- query-driven attention ---


def test_query_driven_change_is_relative():
    def attend(images, queries):
        return images[:, 0] * queries[:, 1]

    targets = torch.tensor([[[[0.5, 0.25, 0.0]], [[1.0, 2.0, 1.0]]], [[[0.2, 0.8, 0.0]], [[4.0, 1.0, 1.0]]]])
    query = torch.tensor([[[7.0, 7.0, 7.0]], [[1.0, 1.0, 5.0]]])
    found = query_driven(attend, targets, query)
    torch.testing.assert_close(found.own, torch.tensor([[[0.5, 0.5, 0]], [[0.8, 0.8, 0]]]))
    torch.testing.assert_close(found.queried, torch.tensor([[[0.5, 0.25, 0]], [[0.2, 0.8, 0]]]))
    torch.testing.assert_close(found.change, torch.tensor([[[0, -0.5, 0]], [[-0.75, 0, 0]]]))
    assert torch.equal(query_driven(attend, [targets], query[None]).change, found.change)


class Pooled(nn.Module):
    """Attention pooling with the image as local features and its mean as the query."""

    def __init__(self, compatibility):
        super().__init__()
        self.attention = CompatibilityPool(3, 3, compatibility)
        self.keyword = False
        self.eval()

    def forward(self, images):
        query = images.mean((2, 3))
        return self.attention(images, query=query) if self.keyword else self.attention(images, query)


@pytest.mark.parametrize("keyword", [False, True])
def test_pool_attention_with_query_of_another_image(keyword):
    model = Pooled("dot")
    model.keyword = keyword
    targets, query = uniform(3, 3, 2, 5), uniform(3, 4, 4, seed=1)
    attend = pool_attention(model, "attention", lambda x: 2 * x)

    def softmax(vectors):
        return torch.einsum("nchw,nc->nhw", 2 * targets, 2 * vectors).flatten(1).softmax(1).view(3, 2, 5)

    for batch_size in (1, 128):
        found = query_driven(attend, targets, query, batch_size=batch_size)
        own, queried = softmax(targets.mean((2, 3))), softmax(query.mean((1, 2)).expand(3, 3))
        torch.testing.assert_close(found.own, own)
        torch.testing.assert_close(found.queried, queried)
        torch.testing.assert_close(found.change, (queried - own) / own)
    assert not model.attention._forward_pre_hooks
    assert not model.attention.map._forward_hooks


def test_parametrised_compatibility_ignores_query():
    found = query_driven(pool_attention(Pooled("parametrised"), "attention"), uniform(2, 3, 4, 4), uniform(3, 4, 4))
    assert found.own.std() > 0
    assert (found.change == 0).all()


# --- anchors, accuracy, batches ---


def test_anchor_usage():
    found = usage(torch.tensor([4, 0, 4, 0]))
    assert found == (4, 2, 0.5, pytest.approx(2), [0.5, 0, 0.5, 0])
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(4 / 3**0.75)
    assert perplexity(torch.tensor([0, 9])) == 1
    assert math.isnan(perplexity(torch.tensor([0, 0])))


def test_mcnemar_counts_and_agrees_with_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    for count, share in ((1, 0.5), (40, 0.5), (40, 0.9), (3000, 0.4)):
        first, second = torch.rand(count) < share, torch.rand(count) < 0.5
        found = mcnemar(first, second)
        pairs = list(zip(first.tolist(), second.tolist(), strict=True))
        cases = [(True, True), (True, False), (False, True), (False, False)]
        assert list(found[:4]) == [pairs.count(case) for case in cases]
        differ = found.only_first + found.only_second
        expected = stats.binomtest(found.only_first, differ, 0.5).pvalue if differ else 1.0
        assert found.p_value == pytest.approx(expected, rel=1e-9)
        assert mcnemar(second, first).p_value == found.p_value
    assert mcnemar(torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)).p_value == 2 / 32
    assert mcnemar(first, first).p_value == 1
    with pytest.raises(TypeError, match=r"^mcnemar: first must be bool, got float32$"):
        mcnemar(first.float(), second)
    with pytest.raises(ValueError, match=r"^mcnemar: second must be \(3000,\) \(N as first\), got shape \(2,\)$"):
        mcnemar(first, second[:2])


def test_top1_counts_correct_predictions():
    model = Linear(torch.eye(3))
    images, labels = torch.eye(3)[[0, 1, 2, 0]].view(4, 3, 1, 1), torch.tensor([0, 1, 0, 0])
    for data in ((images, labels), iter([[images[:1], labels[:1]], (images[1:], labels[1:])])):
        assert top1(model, data, batch_size=3) == (0.75, 3, 4)
    assert top1(model, (images, labels), normalise=lambda x: x.roll(1, 1)).accuracy == 0.25  # only the third is correct


def test_collect_concatenates_batches():
    images = uniform(5, 3, 2, 4)
    weight = torch.ones((), requires_grad=True)

    def predict(batch):
        assert len(batch) <= 3
        return weight * batch.mean((2, 3)), weight * batch.mean(1)

    for data in (images, (images, torch.arange(5)), list(images.split(3)), [(images[:3], 0), (images[3:], 0)]):
        logits, maps = collect(predict, data, normalise=lambda x: x - 1, batch_size=2)
        torch.testing.assert_close(logits, images.mean((2, 3)) - 1)
        torch.testing.assert_close(maps, images.mean(1) - 1)
        assert not maps.requires_grad


def test_public_names_have_docstrings():
    for name in evaluation.__all__:
        assert getattr(evaluation, name).__doc__, name


# --- error messages ---

maps, images = torch.ones(2, 3, 4), torch.ones(2, 3, 4, 5)
boxes, masks = torch.ones(2, 4), torch.ones(2, 3, 4, dtype=torch.bool)
linear = Linear(torch.eye(3))


def predict(images):
    return images.mean((2, 3)), images.mean(1)


def wrong(error, message, function, *args, **kwargs):
    message = f"{function.__name__}: {message}"
    return pytest.param(lambda: function(*args, **kwargs), error, message, id=message)


WRONG = [
    wrong(TypeError, "maps must be a Tensor, got list", upsample, [[1.0]], (2, 2)),
    wrong(ValueError, "maps must be (N, H, W) with H and W of at least 1, got shape (2, 3, 4, 5)",
          upsample, images, (2, 2)),
    wrong(ValueError, "size must be (H, W), got 4", upsample, maps, 4),
    wrong(ValueError, "size must be two integers of at least 1, got (2, 0)", upsample, maps, (2, 0)),
    wrong(ValueError, "boxes must be (N, 4) or (N, B, 4), got shape (2, 5)", box_masks, torch.ones(2, 5), (3, 4)),
    wrong(ValueError, "boxes must be (2, 4) or (2, B, 4) (N as maps), got shape (1, 4)",
          pointing_game, maps, boxes[:1], (3, 4)),
    wrong(TypeError, "predicted must be a Tensor of bool, got float32", jaccard, maps, masks),
    wrong(TypeError, "target must be a Tensor of bool, got ndarray", jaccard, masks, masks.numpy()),
    wrong(ValueError, "target must be (2, 3, 4) (as predicted), got shape (1, 3, 4)", jaccard, masks, masks[:1]),
    wrong(ValueError, "masks must be (2, 3, 3) (N as maps, size), got shape (2, 3, 4)",
          localisation, maps, boxes, (3, 3), masks),
    wrong(ValueError, "batch_size must be at least 1, got 0", localisation, maps, boxes, (3, 4), batch_size=0),
    wrong(TypeError, "share must be a number, got '0.2'", tight_boxes, maps, "0.2"),
    wrong(ValueError, "size must be at most 4 (the images' shorter side), got 5", occlude, images, 5, seeded()),
    wrong(ValueError, "fill must be 'colour' or a Tensor of images, got 'black'",
          occlude, images, 2, seeded(), "black"),
    wrong(ValueError, "fill must be (M, 3, h, w) (C as images), none of them 0, got shape (2, 3, 4)",
          occlude, images, 2, seeded(), maps),
    wrong(ValueError, "size must be at least 1, got 0", occlude, images, 0, seeded()),
    wrong(ValueError, "size must be at least 1, got -3", occlude, images, -3, seeded()),
    wrong(TypeError, "size must be an integer, got 2.5", occlude, images, 2.5, seeded()),
    wrong(TypeError, "size must be an integer, got '4'", occlude, images, "4", seeded()),
    wrong(TypeError, "generator must be a Generator, got None", occlude, images, 2, None),
    wrong(ValueError, "keep must be 'low' or 'high', got 'middle'", frequency, images, 4, "middle"),
    wrong(ValueError, "radius must be positive, got 0", frequency, images, 0, "low"),
    wrong(TypeError, "radius must be a number, got '4'", frequency, images, "4", "low"),
    wrong(ValueError, "images must be (N, C, H, W) with H and W of at least 1, got shape (2, 3, 4)",
          frequency, maps, 4, "low"),
    wrong(ValueError, "predict's map must be (N, H, W) with H and W of at least 1, got shape (2, 3, 4, 5)",
          interpretability_score, lambda x: (x.mean((2, 3)), x), images, lambda x: x),
    wrong(ValueError, "images must hold at least one image, got none",
          interpretability_score, lambda x: (x, x), [], lambda x: x),
    wrong(ValueError, "eps must be a finite number of at least 0, got -1", fgsm, linear, images, -1),
    wrong(TypeError, "eps must be a number, got '0.1'", fgsm, linear, images, "0.1"),
    wrong(ValueError, "images must be (N, C, H, W), got shape (2, 3, 4)", fgsm, linear, maps, 0.1),
    wrong(ValueError, "model must be in evaluation mode, got one in training mode",
          fooling_rate, nn.Linear(3, 3), images),
    wrong(ValueError, "eps must be a finite number of at least 0, got inf",
          fooling_rate, linear, images, [0.1, math.inf]),
    wrong(ValueError, "logits must be (N, K) with K of at least 2, got shape (2, 1)",
          fgsm, lambda x: x.flatten(1).sum(1, keepdim=True), images, 0.1),
    wrong(ValueError, "module_name must name a submodule of the model, got 'head'",
          features_at, linear, "head", images),
    wrong(ValueError, "samples must be (N, ...) with N of at least 2, got shape (1, 3, 4)", zca, maps[:1]),
    wrong(ValueError, "floor must be at least 0, got -1", zca, maps, -1),
    wrong(TypeError, "floor must be a number, got None", zca, maps, None),
    wrong(ValueError, "labels must be (2,) (N as features), got shape (3,)",
          linear_svm, torch.ones(2, 3), torch.arange(3)),
    wrong(ValueError, "folds must be at least 2 and at most 3 (images of the smallest class), got 5",
          linear_svm, uniform(23, 2), torch.tensor([0, 1] * 10 + [2] * 3)),
    wrong(ValueError, "folds must be at least 2 and at most 2 (images of the smallest class), got 1",
          linear_svm, uniform(4, 2), torch.tensor([0, 0, 1, 1]), folds=1),
    wrong(TypeError, "folds must be an integer, got 2.0",
          linear_svm, uniform(4, 2), torch.tensor([0, 0, 1, 1]), folds=2.0),
    wrong(ValueError, "target_classes must share a class with classes, got ['a']",
          direct_transfer, linear, images, ["b"], ["a"]),
    wrong(TypeError, "classes must be a list of str, got 'abc'", direct_transfer, linear, images, "abc", ["a"]),
    wrong(ValueError, "data must hold images and labels, got images only",
          direct_transfer, linear, images, ["a"], ["a"]),
    wrong(ValueError, "labels must lie in 0 to 0 (target_classes), got 0 to 1",
          direct_transfer, linear, (images, torch.arange(2)), ["a"], ["a"]),
    wrong(ValueError, "logits must be (N, 1) (classes), got shape (2, 3)",
          direct_transfer, linear, (images[:, :, :1, :1], torch.zeros(2).long()), ["a"], ["a"], size=None),
    wrong(ValueError, "maps must hold at least one level, got none", combine, []),
    wrong(TypeError, "root must be True or False, got 'no'", combine, [maps], root="no"),
    wrong(ValueError, "maps must be (2, h, w) (N as the level before), got shape (1, 3, 4)", combine, [maps, maps[:1]]),
    wrong(ValueError, "maps must not be negative with root=True, got a product of -1", combine, [maps, -maps]),
    wrong(ValueError, "masks must be (2, H, W) (N as maps), got shape (1, 3, 4)",
          weak_segmentation, maps, masks[:1], torch.zeros(2).long()),
    wrong(ValueError, "labels must lie in 0 to 0 (classes), got 0 to 1",
          weak_segmentation, maps, masks, torch.arange(2), ["a"]),
    wrong(TypeError, "classes must be a list of str, got 'ab'", weak_segmentation, maps, masks, torch.arange(2), "ab"),
    wrong(ValueError, "batch_size must be at least 1, got 0",
          weak_segmentation, maps, masks, torch.arange(2), batch_size=0),
    wrong(ValueError, "name must be the name of a CompatibilityPool, got 'classifier'",
          pool_attention, linear, "classifier"),
    wrong(ValueError, "query must be (C, H, W) or (1, C, H, W), got shape (2, 3, 4, 5)",
          query_driven, lambda a, b: a, images, images),
    wrong(TypeError, "query must be a Tensor, got ndarray", query_driven, lambda a, b: a, images, images[0].numpy()),
    wrong(ValueError, "counts must be (Q,) with Q of at least 1, got shape (2, 4)", usage, boxes),
    wrong(ValueError, "counts must not be negative, got -1", perplexity, torch.tensor([1, -1])),
    wrong(TypeError, "counts must be a Tensor, got [1, 2]", perplexity, [1, 2]),
    wrong(TypeError, "counts must be a Tensor, got [1, 2]", usage, [1, 2]),
    wrong(ValueError, "labels must be (2,) (N as images), got shape (2, 1)", top1, linear, (images, torch.ones(2, 1))),
    wrong(TypeError, "data must be a Tensor, a tuple of tensors or an iterable of batches, got None",
          collect, predict, None),
    wrong(TypeError, "data must be a Tensor, a tuple of tensors or an iterable of batches, got ndarray",
          collect, predict, images.numpy()),
    wrong(TypeError, "a batch of data must be a Tensor, got ndarray", collect, predict, [images.numpy()]),
    wrong(TypeError, "data[0] must be a Tensor, got ndarray", top1, linear, (images.numpy(), torch.arange(2))),
    wrong(TypeError, "data[1] must be a Tensor, got [0, 1]", top1, linear, (images, [0, 1])),
    wrong(ValueError, "data[1] must be (2, ...) (as the images), got shape (3,)",
          top1, linear, (images, torch.arange(3))),
    wrong(ValueError, "data[1] must be (2, ...) (as the images), got shape ()",
          top1, linear, (images, torch.tensor(1))),
    wrong(ValueError, "data must be (N, C, H, W), got shape ()", collect, predict, torch.tensor(1.0)),
    wrong(ValueError, "data must hold at least one image, got none", collect, predict, ()),
    wrong(ValueError, "batch_size must be at least 1, got 0", collect, predict, images, batch_size=0),
    wrong(TypeError, "batch_size must be an integer, got 2.0", collect, predict, images, batch_size=2.0),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", WRONG)
def test_error_messages(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_features_at_rejects_module_called_twice():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Flatten(), shared, shared).eval()
    with pytest.raises(ValueError, match="features_at: '1' must be called once per forward pass, got 2 calls"):
        features_at(model, "1", torch.ones(2, 1, 2, 2))


def test_linear_svm_takes_as_many_folds_as_the_smallest_class_has_images():
    labels = torch.tensor([0, 1] * 5 + [2] * 3)
    assert len(linear_svm(uniform(13, 2), labels, folds=3).folds) == 3
    with pytest.raises(ValueError, match="labels must hold at least 2 images of each class, got 0"):
        linear_svm(uniform(0, 2), labels[:0])


def test_tight_boxes():
    maps = torch.zeros(4, 5, 6)
    maps[0, 1, 2], maps[0, 2, 3], maps[0, 4, 5] = 1.0, 0.5, 0.9  # two that touch at a corner and a separate one
    maps[1, 3, 1:4] = 0.3
    maps[1, 0, 0] = 1.0
    maps[2] = 7.0
    maps[3, :, 0] = -torch.arange(5.0)  # only the minimum, -4, lies below the threshold
    expected = [[1, 2, 2, 3], [3, 1, 3, 3], [0, 0, -1, -1], [0, 0, 4, 5]]
    assert tight_boxes(maps).tolist() == expected
    assert tight_boxes(maps, 0.6)[:2].tolist() == [[1, 2, 1, 2], [0, 0, 0, 0]]
    assert tight_boxes(maps[:0]).shape == (0, 4)
    boxes = torch.tensor([[1.0, 2, 2, 4], [3, 1, 3, 3], [0, 0, 4, 5], [0, 0, 4, 5]])
    found = localisation(maps, boxes, (5, 6))
    assert found.iou_tight == pytest.approx((4 / 6 + 1 + 0 + 1) / 4)
    with pytest.raises(ValueError, match="share must be at least 0 and below 1, got 1"):
        tight_boxes(maps, 1)


# --- attention and Grad-CAM of networks ---


def test_attention_of_networks():
    images = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    network = create_model("vgg_att2_concat_pc", 4, width=0.0625).eval()
    with torch.no_grad():
        logits, maps = attention_maps(network, images)
        found, map = attention_of(network)(images)
        _, single = attention_of(network, ["attention13.map"])(images)
        assert torch.equal(attention_of(network, "attention13.map")(images)[1], single)
        torch.testing.assert_close(found, logits)
        torch.testing.assert_close(map, combine([maps["attention10.map"], maps["attention13.map"]]))
        torch.testing.assert_close(single, maps["attention13.map"])
        progressive = create_model("vgg_pan", 4, width=0.0625).eval()
        _, levels = attention_maps(progressive, images)
        _, map = attention_of(progressive)(images)
        torch.testing.assert_close(map, combine(levels.values(), root=False))
    with pytest.raises(ValueError, match=r"names must be among the network's attention maps \[\], got \[\]"):
        attention_of(create_model("vgg", 4, width=0.0625))
    with pytest.raises(ValueError, match=r"attention maps \['attention10\.map', 'attention13\.map'\], got \['map'\]"):
        attention_of(network, ["map"])
    with pytest.raises(ValueError, match=r"got \['map'\]"):
        attention_of(network, "map")


def test_gradcam_with_linear_classifier():
    pytest.importorskip("captum")
    torch.manual_seed(0)
    features, classifier = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Linear(5, 4)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features
            self.classifier = classifier

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    images = torch.rand(2, 3, 6, 4)
    logits, map = gradcam_of(Network(), "features")(images)
    assert not images.requires_grad
    # The logit is linear in the mean of the features: the weights are the classifier's, divided by 24 positions.
    weights = classifier.weight[logits.argmax(1)] / 24
    expected = torch.einsum("nk,nkhw->nhw", weights, features(images)).relu()
    torch.testing.assert_close(map, expected.detach())
    assert map.max() > 0
