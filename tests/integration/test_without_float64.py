"""On a device without float64: functions, modules, decompositions and evaluation, forward and backward."""

import functools

import pytest
import torch
from cases import MAPS, call, check, doubles, make, run, upstream
from conftest import every_function
from test_nn import MODULES, build, inputs
from test_nn import run as run_module
from test_transforms import operator_calls
from torch.utils import _pytree
from without_float64 import DEVICE, without_float64

from attnkern import evaluation
from attnkern._operators import OPERATORS


def moved(tree, device):
    return _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def test_the_stand_in_refuses_float64():
    with without_float64():
        x = torch.rand(3).to(DEVICE)
        assert x.add(1).cpu().sum() > 3
        for refused in (
            x.double,
            lambda: torch.rand(3).double().to(DEVICE),
            lambda: torch.ones(3, device=DEVICE).double(),
        ):
            with pytest.raises(TypeError, match="float64"):
                refused()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_functions(function, dtype):
    options = {"size": (4, 6)} if function in MAPS else {}
    tensors = make(function, dtype=dtype)
    results = call(function, tensors, backend="reference", **options)
    grads = {name: grad.to(results[name].dtype) for name, grad in upstream(results).items()}
    expected = run(function, doubles(tensors), grads=doubles(grads), backend="reference", **options)
    with without_float64():
        found = run(function, moved(tensors, DEVICE), grads=moved(grads, DEVICE), **options)
        check(moved(found, "cpu"), expected)


#: Left out: modules that draw noise, and F.linear of a vector, whose shape PyTorch changes inside the call.
UNFIT = "bottleneck", "bottleneck-anchors", "pool-parametrised-local"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in UNFIT])
def test_modules(name):
    module, tensors = build(name), inputs(name)
    expected = run_module(module, tensors)
    with without_float64():
        parameters = {key: tensor.to(DEVICE) for key, tensor in module.state_dict().items()}
        buffers = {key: tensor.to(DEVICE) for key, tensor in module.named_buffers()}
        found = run_module(
            functools.partial(torch.func.functional_call, module, parameters | buffers), [tuple(moved(tensors, DEVICE))]
        )
        torch.testing.assert_close(moved(found, "cpu"), expected, rtol=1e-4, atol=1e-5)


def test_decompositions():
    for name, arguments in operator_calls("cpu", "native", torch.float32, "contiguous"):
        decomposed = OPERATORS[name].decomposition
        expected = decomposed(*arguments)
        with without_float64():
            found = moved(decomposed(*moved(arguments, DEVICE)), "cpu")
        torch.testing.assert_close(found, expected, equal_nan=True)


def evaluations():
    """Functions of tensors, and the tensors, by name, whose results are the same on every device."""
    g = torch.Generator().manual_seed(0)
    images, maps = torch.rand(4, 3, 8, 8, generator=g), torch.rand(4, 4, 4, generator=g)
    masks = torch.rand(4, 8, 8, generator=g) > 0.5
    boxes = torch.tensor([[1.0, 2.0, 5.0, 6.0]]).expand(4, 4)
    rectangles = torch.rand(4, 5, generator=g)
    counts = torch.tensor([3, 0, 1])

    def predict(x):
        return x.mean((2, 3)), x.mean(1)

    def occluded(x, fill="colour"):
        return evaluation.occlude(x, 3, torch.Generator().manual_seed(0), fill)

    yield "upsample", evaluation.upsample, (maps, (8, 8))
    yield "pointing_game", evaluation.pointing_game, (maps, boxes, (8, 8))
    yield "jaccard", evaluation.jaccard, (masks, ~masks)
    yield "localisation", evaluation.localisation, (maps, boxes, (8, 8), masks)
    yield "occlude", occluded, (images,)
    yield "occlude with images", occluded, (images, images.flip(0))
    yield "frequency", evaluation.frequency, (images, 2, "high")
    yield "interpretability", functools.partial(evaluation.interpretability_score, predict), (images, occluded)
    yield "rectangle_mask", evaluation.rectangle_mask, (rectangles, (8, 8))
    yield "catching_rate", evaluation.catching_rate, (masks, ~masks)
    yield "missing_rate", evaluation.missing_rate, (masks, ~masks)
    yield "fitting_rate", evaluation.fitting_rate, (masks, masks)
    yield "equivariance", evaluation.equivariance_errors, (lambda x: x.mean((1, 2))[:, :5], torch.rand(2, 3, 8, 8))
    yield "zca", evaluation.zca, (images,)
    yield "linear_svm", functools.partial(evaluation.linear_svm, folds=2), (rectangles, torch.tensor([0, 1, 0, 1]))
    yield "segmentation", evaluation.weak_segmentation, (maps, masks, torch.tensor([0, 1, 0, 1]))
    yield "usage", evaluation.usage, (counts,)
    yield "perplexity", evaluation.perplexity, (counts,)
    yield "fooling", functools.partial(evaluation.fooling_rate, lambda x: x.mean((2, 3))), (images,)


@pytest.mark.parametrize("function, arguments", [pytest.param(*rest, id=name) for name, *rest in evaluations()])
def test_evaluation(function, arguments):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    expected = function(*arguments)
    with without_float64():
        found = moved(function(*moved(arguments, DEVICE)), "cpu")
    torch.testing.assert_close(found, expected, equal_nan=True)
