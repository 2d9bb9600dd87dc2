"""Every public function and class, found by introspection, with each argument of a wrong kind in turn.

What an ``__all__`` or docs/api.md names is walked without being asked. The test fails for an argument that it knows no
right value of; what it leaves out stands below, with the reason.
"""

import collections.abc
import functools
import importlib
import inspect
import os
import re
import traceback
import types
import typing
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import attnkern
from attnkern import _ops
from attnkern.evaluation.protocols import Subject

matplotlib = pytest.importorskip("matplotlib")
for package in ("captum", "lightning", "skimage", "sklearn", "torchvision"):
    pytest.importorskip(package)

PACKAGE = Path(attnkern.__file__).parent
API = (PACKAGE.parent / "docs" / "api.md").read_text(encoding="utf-8")
MODULES = ("compat", "evaluation", "models", "nn", "testing", "training", "viz")

#: Public names that are not checked.
LEFT_OUT = {
    r"(evaluation|models)\..*": "they check what would give a wrong number or an error that is hard to read, not kinds",
    r"report\.(correct|side_by_side)": "their errors are those of the run's network and of viz.grid",
    r"training\.data\.ImageData\.(prepare_data|setup|\w+_dataloader)": "called by Lightning",
    r"training\.data\.ImageData": "made by Lightning's command line, which checks arguments by their annotations",
    r"training\.images\.read_image": "Python's and Pillow's errors name the argument",
    r"training\.modules\..*": "made by Lightning's command line, which checks arguments by their annotations",
    r"viz\..*": "checks what would give a wrong picture; matplotlib's errors name the rest",
}


def resolved(name):
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"attnkern.{module}".rstrip(".")), attribute)
    except ModuleNotFoundError:
        return getattr(resolved(module), attribute)


def public():
    """The public names without "attnkern."."""
    names = {*attnkern.__all__, *attnkern._LATE}
    for module in MODULES:
        names |= {f"{module}.{name}" for name in resolved(module).__all__}
    names |= set(re.findall(r"^::: attnkern\.([\w.]+)$", API, re.MULTILINE)) - set(MODULES)
    return {name: resolved(name) for name in sorted(names)}


def methods(kind):
    for key in dir(kind):
        method = inspect.getattr_static(kind, key)
        method = method.__func__ if isinstance(method, staticmethod) else method
        ours = inspect.isfunction(method) and method.__module__.startswith("attnkern.")
        if ours and (key == "__call__" or not key.startswith("_")):
            yield key, method


def callables():
    """Functions, methods and classes by name, without the classes of results."""
    for name, thing in PUBLIC.items():
        if callable(thing) and not (isinstance(thing, type) and issubclass(thing, tuple)):
            yield name, thing
        if isinstance(thing, type):
            yield from ((f"{name}.{key}", method) for key, method in methods(thing))


PUBLIC = public()
CALLABLES = {name: thing for name, thing in callables() if not re.fullmatch("|".join(LEFT_OUT), name)}

# --- right arguments -------------------------------------------------------------------------------------------------

images, maps, masks = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
network = attnkern.models.create_model("vgg_att2_concat_dp", 4, width=0.03).eval()

#: A valid value of each argument without a default, by name.
GIVEN = {
    "a": torch.rand(2, 1, 4, 4),
    "anchors": torch.rand(4),
    "attend": lambda images, queries: images.mean(1),
    "backend": "reference",
    "boxes": torch.ones(2, 4),
    "by": "row",
    "channels": 3,
    "checkpoint": "none.ckpt",
    "classes": ["cat", "dog"],
    "counts": torch.tensor([1, 2, 0, 4]),
    "data": (images, torch.tensor([0, 1])),
    "dtype": torch.float32,
    "embedding_dim": 1,
    "eps": 0.1,
    "features": torch.rand(2, 3, 4, 4),
    "figure": matplotlib.figure.Figure(),
    "first": torch.rand(2, 5),
    "g": torch.rand(2, 3, 1, 1),
    "generator": torch.Generator(),
    "image": images[0],
    "images": images,
    "in_chans": 3,
    "in_features": 3,
    "input": torch.rand(2, 9),
    "inputs": torch.rand(2, 3, 4, 4),
    "keep": "low",
    "l": torch.rand(2, 3, 4, 4),
    "labels": torch.tensor([0, 1]),
    "local": torch.rand(2, 3, 4, 4),
    "local_channels": 3,
    "maps": maps,
    "masks": masks,
    "model": network,
    "modified": {"same": images},
    "modify": lambda images: images,
    "module": nn.Identity(),
    "module_name": "classifier",
    "name": "reference",
    "network": network,
    "num_anchors": 4,
    "num_classes": 4,
    "num_embeddings": 4,
    "out_features": 4,
    "output": torch.rand(2, 4),
    "path": "figure.png",
    "predict": lambda images: (images.mean((2, 3)), images.mean(1)),
    "predicted": masks,
    "query": torch.rand(2, 3),
    "query_channels": 3,
    "radius": 4,
    "rectangle": torch.rand(2, 5),
    "rectangles": torch.rand(2, 5),
    "rectangles_of": lambda images: torch.rand(len(images), 5),
    "result": attnkern.evaluation.QueryDriven(maps, maps, maps),
    "rows": [[images[0]]],
    "run": "runs/vgg",
    "runs": [{"epoch": 0, "val_loss": 1.0}],
    "samples": torch.rand(4, 3),
    "second": torch.rand(2, 5),
    "size": (4, 4),
    "split": "test",
    "subject": Subject(network, None, lambda images: images, ["cat"]),
    "target": masks,
    "target_classes": ["cat", "bird"],
    "targets": images,
    "tokens": torch.rand(2, 17, 3),
    "width": 0.03,
    "x": torch.rand(2, 3, 4, 4),
}
#: Valid values that apply to one function only.
GIVEN_TO = {
    "insert": {"name": "local7"},
    "nn.AttentionPool": {"num_heads": 3},
    "testing.accuracy": {"name": "window_attention"},
    "testing.check_accuracy": {"name": "window_attention"},
    "training.recipes.read_recipe": {"name": "vgg"},
    "training.train.train": {"name": "vgg"},
    "_insert.OnTokens.grid": {"tokens": 17},
    "_insert.OnTokens": {"module": nn.Identity()},
    "_insert.OnChannelsLast": {"module": nn.Identity()},
    "_insert.Attended": {"layer": nn.Identity(), "attention": nn.Identity()},
}

# --- wrong arguments -------------------------------------------------------------------------------------------------

VALUES = {
    "None": None,
    "str": "text",
    "int": 3,
    "bool": True,
    "float": 2.5,
    "list": [object()],
    "dict": {object(): object()},
    "object": object(),
    "array": numpy.ones(2),
    "function": lambda: None,
    "module": nn.Identity(),
    "float tensor": torch.rand(2, 3),
    "integer tensor": torch.tensor([[1, 2, 3], [4, 5, 6]]),
    "bool tensor": torch.tensor([True, False]),
    "complex tensor": torch.tensor([1j, 2.0]),
    "sparse tensor": torch.rand(2, 3).to_sparse(),
}
TENSORS = tuple(kind for kind in VALUES if kind.endswith("tensor"))
#: Further kinds that are valid for an argument of this name; for a Tensor, instead of floating point.
RIGHT = {
    "angles": ("bool tensor",),
    "counts": ("float tensor", "integer tensor"),
    "device": ("int",),
    "eps": ("bool tensor",),
    "example": TENSORS,
    "labels": ("integer tensor",),
    "mapping": ("dict",),
    "masks": ("bool tensor",),
    "predicted": ("bool tensor",),
    "report.report.results": ("dict",),
    "scales": ("bool tensor",),
    "synonyms": ("dict",),
    "target": ("bool tensor",),
    "thresholds": ("bool tensor",),
}
#: The name of an argument in messages, by its name on the command line.
CALLED = {
    "training.recipes.read_recipe.name": "recipe",
    "training.train.train.name": "recipe",
}


def fits(kind, value, hint, right):
    """Whether the value is valid for the annotation; a Tensor must be one of the kinds ``right``."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(kind, value, part, right) for part in parts)
    if hint is torch.Tensor:
        return kind in right
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        dense = isinstance(value, numpy.ndarray) or (isinstance(value, torch.Tensor) and not value.is_sparse)
        items = value.tolist() if dense else value
        return isinstance(items, (tuple, list)) and all(fits("", item, parts[0], right) for item in items)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    # Compare the items of an Iterable and the values of a Mapping.
    return origin is None and hint is not collections.abc.Iterable and isinstance(value, hint or types.NoneType)


def required(name, function):
    """Valid values of the arguments that have no default."""
    parameters = inspect.signature(function).parameters.values()
    wanted = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    table = GIVEN | GIVEN_TO.get(name, {})
    unknown = wanted - table.keys() - {"self"}
    assert not unknown, f"{name}: put a right value of {', '.join(sorted(unknown))} into GIVEN"
    return {argument: table[argument] for argument in (wanted | GIVEN_TO.get(name, {}).keys()) - {"self"}}


def bound(name):
    """The function of this name, or the bound method of an object."""
    owner, _, key = name.rpartition(".")
    if name in PUBLIC:
        return PUBLIC[name]
    kind = PUBLIC[owner]
    options = {"width": 0.03} if "width" in inspect.signature(kind).parameters else {}
    return getattr(kind(**required(owner, kind) | options), key)


class Unreachable:
    """Replaces the operators of a backend."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was reached")


def refusal(call, argument):
    """None if attnkern's error names the argument; otherwise what happens."""
    try:
        call()
    except Exception as error:
        last = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        said = re.search(rf"\b{argument}\b.* (must be|expected) .*[,;] got ", str(error), re.DOTALL)
        if isinstance(error, (TypeError, ValueError)) and said and Path(last).is_relative_to(PACKAGE):
            return None
        return f"{type(error).__name__} in {os.path.basename(last)}: {str(error)[:200]}"
    return "accepted"


@pytest.mark.parametrize("name", CALLABLES)
def test_an_argument_of_a_wrong_kind_is_named_and_no_operator_reached(name, monkeypatch, tmp_path):
    for backend in _ops.BACKENDS:
        monkeypatch.setitem(_ops.BACKENDS, backend, Unreachable())
    monkeypatch.chdir(tmp_path)
    function, call = CALLABLES[name], bound(name)
    given, found = required(name, function), []
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        right = RIGHT.get(f"{name}.{argument}", RIGHT.get(argument, ()))
        called = CALLED.get(f"{name}.{argument}", argument)
        for kind, value in VALUES.items():
            if kind not in right and not fits(kind, value, hints.get(argument), right or ("float tensor",)):
                happens = refusal(functools.partial(call, **given | {argument: value}), called)
                found += [] if happens is None else [f"{argument} of kind {kind}: {happens}"]
    assert not found, "\n".join(["", *found])
