"""A small network of each paper learns the digits, with native kernels as with the reference.

From the same seed and noise, the losses of the first steps and every gradient from a common state agree to rounding.
Later the trajectories diverge, because training amplifies rounding (by a few digits per hundred steps), but the
accuracies agree within the spread of seeds.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import attnkern
from attnkern import _backend
from attnkern.models import create_model
from attnkern.training.digits import digits_clutter

MISSING = _backend.reason("native", torch.device("cpu"), torch.float32)
needs_native = pytest.mark.skipif(MISSING is not None, reason="the native CPU library is not built")

#: name -> (options, side of the images, batch, learning rate, steps, accuracy to reach; chance is 0.1)
RECIPES = {
    "vgg_att2_concat_pc": ({"width": 1 / 16, "dropout": 0.0, "init": "pytorch"}, 32, 16, 1e-2, 200, 0.7),
    "small_bottleneck_qt": ({}, 48, 32, 4e-3, 200, 0.3),
    "small_window": ({}, 48, 32, 4e-3, 200, 0.5),
}
every_model = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def digits():
    """(images, labels) of the training split, under several clutters, and of the test split."""
    drawn = [digits_clutter("train", seed=seed)[:2] for seed in range(4)]
    return tuple(map(torch.cat, zip(*drawn, strict=True))), digits_clutter("test")[:2]


def build(name, seed=0):
    torch.manual_seed(seed)
    return create_model(name, 10, **RECIPES[name][0])


def enlarged(images, side):
    return F.interpolate(images, size=(side, side), mode="bilinear") if images.shape[-1] != side else images


def batch(data, name, generator, size=None):
    _, side, usual, *_ = RECIPES[name]
    images, labels = data
    chosen = torch.randint(len(images), (size or usual,), generator=generator)
    return enlarged(images[chosen], side), labels[chosen]


@pytest.fixture(scope="module")
def trained(digits):
    """A cached function of name, backend and seed that trains a network and returns it with its last loss."""

    @functools.cache
    def train(name, backend, seed):
        *_, rate, steps, _ = RECIPES[name]
        model, generator = build(name, seed).train(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        with attnkern.use_backend(backend):
            for _ in range(steps):
                images, labels = batch(digits[0], name, generator)
                loss = model.loss(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return model.eval(), loss.item()

    return train


@torch.no_grad()
def accuracy(model, data, side):
    images, labels = data
    return (model(enlarged(images, side)).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
@every_model
def test_learns_the_digits(name, digits, trained, capsys):
    _, side, *_, steps, enough = RECIPES[name]
    first = build(name)
    with torch.no_grad():
        images, labels = batch(digits[0], name, torch.Generator().manual_seed(0))
        before = first.loss(first(images), labels).item()
    model, loss = trained(name, "native" if MISSING is None else "reference", 0)
    found = accuracy(model, digits[1], side)
    with capsys.disabled():
        print(f"\n{name}: {steps} steps, loss {before:.3f} to {loss:.3f}, accuracy {found:.3f} (chance 0.100)")
    assert loss < 0.7 * before
    assert found > enough


#: Learning rates at which five steps in float32 agree to rounding. At larger rates a value crosses the kink of a ReLU,
#: a maximum or the midpoint of two anchors on one backend only, which changes the loss.
RATES = {"vgg_att2_concat_pc": 1e-4, "small_bottleneck_qt": 1e-3, "small_window": 1e-3}


@needs_native
@every_model
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_losses_of_the_first_steps_agree(name, dtype, tolerance, digits):
    images, labels = batch(digits[0], name, torch.Generator().manual_seed(1), size=32)
    losses = {}
    for backend in ("native", "reference"):
        model = build(name).to(dtype)
        rate = RATES[name] if dtype == torch.float32 else 1e-2
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), rate)
        losses[backend] = []
        with attnkern.use_backend(backend):
            for _ in range(5):
                torch.manual_seed(2)
                loss = model.loss(model(images.to(dtype)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["native"] == pytest.approx(losses["reference"], rel=tolerance)
    assert max(losses["native"]) - min(losses["native"]) > 100 * tolerance


@needs_native
@every_model
@pytest.mark.parametrize("dtype, tolerance, counts", [(torch.float32, 1e-3, min), (torch.float64, 1e-9, max)])
def test_every_gradient_from_a_common_state_agrees(name, dtype, tolerance, counts, digits):
    """On four batches, in float32 on the best of them, because rounding may switch a ReLU (1e-2 of a gradient)."""
    model = build(name).to(dtype)
    if name == "small_window":  # its last layer starts at zero, so earlier layers would have no gradient
        torch.nn.init.normal_(model.attention.regressor.weight, std=0.05)
    generator, errors = torch.Generator().manual_seed(3), {}
    for _ in range(4):
        images, labels = batch(digits[0], name, generator, size=32)
        gradients = {}
        for backend in ("native", "reference"):
            model.zero_grad()
            torch.manual_seed(4)
            with attnkern.use_backend(backend):
                model.loss(model(images.to(dtype)), labels).backward()
            gradients[backend] = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
        # The bias of a convolution before BatchNorm has gradient zero, up to rounding of the largest gradient.
        unit = max(gradient.norm() for gradient in gradients["reference"].values())
        for key, expected in gradients["reference"].items():
            error = (gradients["native"][key] - expected).norm() / (expected.norm() + 0.01 * unit)
            errors.setdefault(key, []).append(error.item())
            assert not key.startswith("attention") or expected.norm() > 0, key
    assert any(key.startswith("attention") for key in errors)
    assert {key: found for key, found in errors.items() if counts(found) > tolerance} == {}


@pytest.mark.slow
@needs_native
def test_accuracies_lie_within_the_spread_of_seeds(digits, trained, capsys):
    """Runs on two backends differ no more than runs with two seeds; tested on the cheapest network."""
    name = "vgg_att2_concat_pc"
    found = {}
    for backend in ("native", "reference"):
        with attnkern.use_backend(backend):
            models = [trained(name, backend, seed)[0] for seed in range(3)]
            found[backend] = torch.tensor([accuracy(model, digits[1], RECIPES[name][1]) for model in models])
    with capsys.disabled():
        print("", *(f"{name}, {k}: accuracies {[round(a, 3) for a in v.tolist()]}" for k, v in found.items()), sep="\n")
    spread = max(values.max() - values.min() for values in found.values())
    assert (found["native"].mean() - found["reference"].mean()).abs() <= spread
    assert spread < 0.2
