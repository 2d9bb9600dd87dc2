"""Replacement of public implementations in an existing model by attnkern's."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from attnkern._checks import check_flag, check_items, check_kind
from attnkern._insert import replace, tensors_of
from attnkern._known import KNOWN, learned_queries, multihead, random

#: Attributes that hold the hooks of a module.
_HOOKS = [
    name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
]


class Accelerated(NamedTuple):
    """Result of :func:`accelerate`."""

    replaced: dict[str, str]  #: name of a module -> its new class
    left: dict[str, str]  #: name of a module that was recognised -> why it was not replaced

    def __str__(self):
        lines = [f"{name}: replaced by {kind}" for name, kind in self.replaced.items()]
        lines += [f"{name}: not replaced: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing to replace"


@functools.cache
def _class(ours, theirs):
    """A subclass of ``ours`` and ``theirs``: it has the methods of ``ours`` and all others of ``theirs``.

    Raises TypeError if the arguments of forward differ in kind; their names may differ, and those of ``theirs`` are
    kept.
    """

    def reduce(self, protocol):  # copy and pickle would look up the class by its name
        _, _, *state = theirs.__reduce_ex__(self, protocol)
        return _new, (ours, theirs), *state

    members = {"__module__": ours.__module__, "__reduce_ex__": reduce}
    if issubclass(ours, nn.Module):
        wanted, taken = (list(inspect.signature(kind.forward).parameters.values())[1:] for kind in (ours, theirs))
        if [each.kind for each in taken] != [each.kind for each in wanted]:
            taken, wanted = (", ".join(each.name for each in parameters) for parameters in (taken, wanted))
            raise TypeError(f"its forward takes ({taken}), not ({wanted})")
        wanted, names = ([each.name for each in parameters] for parameters in (wanted, taken))
        if names != wanted:

            def forward(self, *args, **named):
                args += tuple(named.pop(name) for name in names[len(args) :] if name in named)
                return ours.forward(self, *args, **named)

            members["forward"] = forward
    return type(ours.__name__, (ours, theirs), members)


def _new(ours, theirs):
    kind = _class(ours, theirs)
    return kind.__new__(kind)


def _values(module):
    """Tensors of the module by name, for the comparison: in float64, on the module's device.

    They are on the CPU if that device has no float64. Tensors without data (meta or fake) are replaced by random ones.
    """
    values = {}
    for name, tensor in tensors_of(module).items():
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            value = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            values[name] = random(value.double(), *value.shape) if value.is_floating_point() else value
        else:
            tensor = tensor.detach()
            device = tensor.device if tensor.device.type != "mps" else torch.device("cpu")
            dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
            values[name] = tensor.to(device, dtype, copy=True)
    return values


def _step(parameters, grads):
    """``parameters`` after an optimizer step. Weight decay makes a gradient of None and one of zeros differ."""
    moved = [parameter.detach().clone() for parameter in parameters]
    for each, grad in zip(moved, grads, strict=True):
        each.grad = None if grad is None else grad.clone()
    torch.optim.SGD(moved, lr=0.1, momentum=0.9, weight_decay=0.1).step()
    return moved


def _run(kind, module, values, inputs, needed, arguments):
    """Results of ``kind.forward`` with the parts of ``module``, without its own hooks.

    They are outputs and buffers, and for each output alone and for all together, all gradients and the parameters after
    an optimizer step.

    Args:
        needed: whether inputs, and whether parameters, need gradients.
        arguments: makes the arguments of forward of the inputs.
    """
    floating = {name: value.is_floating_point() for name, value in values.items()}
    state = {name: value.clone().requires_grad_(needed[1] and floating[name]) for name, value in values.items()}
    inputs = [tensor.clone().requires_grad_(needed[0]) for tensor in inputs]
    leaves = [tensor for tensor in [*inputs, *state.values()] if tensor.requires_grad]
    stand_in = nn.Module.__new__(kind)
    stand_in.__dict__ = module.__dict__ | {name: type(module.__dict__[name])() for name in _HOOKS}
    outputs = torch.func.functional_call(stand_in, state, arguments(inputs), tie_weights=False)
    found = [type(outputs)]
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    buffers = [state[name] for name, tensor in tensors_of(module).items() if not isinstance(tensor, nn.Parameter)]
    found += [tensor.detach().clone() for tensor in [*outputs, *buffers]]
    differentiable = [output for output in outputs if output.requires_grad]
    found.append([output.requires_grad for output in outputs])
    together = [differentiable] if len(differentiable) != 1 else []
    for used in [*([output] for output in differentiable), *together] if differentiable and leaves else []:
        total = sum((output * output.detach().cos()).sum() for output in used)
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        found += [*grads, *_step(leaves, grads)]
    return found


def _alike(a, b, rounds):
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or (a.dtype != b.dtype and not rounds):
        return False
    return torch.allclose(a.double(), b.double(), *((1e-4, 1e-5) if rounds else (1e-6, 1e-9)))


def _difference(module, known) -> str | None:
    """How ``module`` differs from ``known.ours``, or None if it computes the same."""
    if any(getattr(part, name) for part in module.modules() if part is not module for name in _HOOKS):
        return "its parts carry hooks, which would not be called"
    name = known.ours.__name__
    modes = {part: part.training for part in module.modules()}
    try:
        kinds = _class(known.ours, type(module)), type(module)
        with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad():
            values = _values(module)
            inputs = known.inputs(module, values)
            device = inputs[0].device
            devices = [] if device.type == "cpu" else [device]
            cases = itertools.product((True, False), repeat=3)
            # Attention pools are large, and which gradients are needed does not change what they compute.
            for training, *needed in [(True, True, True), (False, False, False)] if known.folds else cases:
                results = []
                for kind in kinds:
                    for part in modes:
                        part.training = training and not (known.drops and isinstance(part, nn.Dropout))
                    with torch.random.fork_rng(devices, device_type=device.type):
                        results.append(_run(kind, module, values, inputs, needed, known.arguments))
                found, wanted = results
                same = len(found) == len(wanted)
                if not (same and all(_alike(a, b, known.rounds) for a, b in zip(found, wanted, strict=True))):
                    return f"its results differ from those of {name}"
    except Exception as error:  # code of other people can raise any exception
        return f"it could not be compared with {name}: {error}"
    finally:
        for part, training in modes.items():
            part.training = training
    return None


def _shared(model, module) -> str | None:
    """Which other module of ``model`` has a part or a parameter of ``module``, as a reason, or None."""
    inside = set(module.modules())
    parameters, parts = set(module.parameters()), inside - {module}
    for name, other in model.named_modules():
        if other not in inside and (
            not parameters.isdisjoint(other._parameters.values()) or not parts.isdisjoint(other._modules.values())
        ):
            return f"its parameters are shared with {name or 'the model itself'}"
    return None


def _named(model, attention):
    """The modules with the names ``attention``. Raises ValueError if one is not ``nn.MultiheadAttention``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in attention:
        if not isinstance(modules.get(name), nn.MultiheadAttention):
            found = f"got {name!r}, which is {type(modules[name]).__name__ if name in modules else 'no module of it'}"
            raise ValueError(f"accelerate: attention must name nn.MultiheadAttention modules of model, {found}")
    return [modules[name] for name in attention]


def _taken_over(module, new):
    """``new`` with the parameters, mode, device, dtype and hooks of ``module``, whose state_dict has the same keys."""
    old_keys, new_keys = module.state_dict().keys(), new.state_dict().keys()
    if old_keys != new_keys:
        got = f"{sorted(new_keys)} for {sorted(old_keys)}"
        raise ValueError(f"accelerate: a replacement must keep the keys of the state_dict, got {got}")
    like = next(module.parameters(), None)
    if like is not None:
        new.to(like.device, like.dtype)
    new.load_state_dict(module.state_dict())
    kept = dict(module.named_parameters(remove_duplicate=False))
    for name, _ in list(new.named_parameters(remove_duplicate=False)):
        if name in kept:
            owner, _, key = name.rpartition(".")
            setattr(new.get_submodule(owner), key, kept[name])
    for name in _HOOKS:
        getattr(new, name).update(getattr(module, name))
    return new.train(module.training)


def accelerate(
    model: nn.Module,
    mapping: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]] | None = None,
    *,
    allow_rounding: bool = False,
    attention: Sequence[str] = (),
) -> Accelerated:
    """Replace modules of ``model`` by equivalent ones that use attnkern's kernels, in place.

    Modules are recognised by their parts, not by the names of their classes:

    - "Learn to Pay Attention" blocks: ``op``, a 1x1 convolution to one channel without bias, and ``normalize_attn``.
    - Straight-through quantizers of scalars, whose only parameter is ``anchors`` (Q,).
    - The quantizer of the information bottleneck's authors, whose only parameter is ``weight`` (1, Q), and which
      returns values, anchor loss and commitment loss.
    - Attention pools, which then compute neither keys nor values (see :class:`attnkern.nn.AttentionPool`): timm's
      ``AttentionPoolLatent`` and ``AttentionPool2d``; the ``AttentionPool2d`` of OpenAI's CLIP and of open_clip; and
      ``nn.MultiheadAttention`` beside learned queries, as in open_clip's ``AttentionalPooler`` and in the pooling heads
      of SigLIP in Hugging Face's transformers, or where its name is in ``attention``. Their sums are in another order,
      so results differ as those of two BLAS libraries do; the dropout of ``AttentionPool2d`` draws other numbers. What
      cannot be folded is computed by the module's own forward: other sizes of queries and keys, masks that are not one
      bool per position, dropout of attention weights, parts that got hooks or adapters later.
    - With ``allow_rounding``, vector-quantize-pytorch's ``LatentQuantize`` and its ``VectorQuantize`` of dimension 1
      with one head.

    A module is replaced only if its results agree with attnkern's on random numbers in float64 on the module's device,
    in training and in evaluation mode. Compared are outputs, buffers, and for each output alone and for all together,
    all gradients (None and zeros differ) and the parameters after an optimizer step with weight decay. A module on the
    meta device is compared with random parameters on the CPU.

    The module's class becomes a subclass of attnkern's class and its own, so its other methods stay. Parameters stay
    the same objects, so optimizers remain valid; keys of the state_dict, training mode, hooks, devices and dtypes stay.

    Args:
        model: changed in place. Replacements from ``mapping`` apply to its submodules, not to the model itself.
        mapping: a class -> a function that makes the replacement of a module of that class. The replacement's
            state_dict must have the same keys. Its results are not compared.
        allow_rounding: also replace modules that round where attnkern is exact. They may choose another entry if an
            element is nearly halfway between two; LatentQuantize may return the index below; values differ in the last
            digits.
        attention: names of further ``nn.MultiheadAttention`` modules that pool. Calls ``(query, x, x)`` with at most
            half as many queries as positions are folded, with ``key_padding_mask`` as well. An image without any
            position then gets the bias of the output, where ``nn.MultiheadAttention`` may return NaN.

    Returns:
        The replaced modules, and those that were recognised but not replaced, with the reason; prints as text.

    Raises:
        ValueError: a replacement of ``mapping`` has other keys, or ``attention`` names something else; the model is
            then unchanged.
        TypeError: an argument has the wrong type.
    """
    check_kind("accelerate", nn.Module, model=model)
    check_kind("accelerate", Mapping | None, mapping=mapping)
    check_flag("accelerate", allow_rounding=allow_rounding)
    check_items("accelerate", str, attention=attention)
    replaced, left, made, known = {}, {}, {}, {}
    modules = dict(model.named_modules())
    pooling = dict.fromkeys(_named(model, attention)) | learned_queries(model)
    for name, module in modules.items():
        make = (mapping or {}).get(type(module))
        if make is not None and name:
            made[name] = _taken_over(module, make(module))
            replaced[name] = type(made[name]).__name__
            continue
        for each in (*KNOWN, multihead(pooling)):
            if isinstance(module, each.ours) or not each.fits(module):
                continue
            if "forward" in module.__dict__:
                left[name] = "its forward has been replaced"
            elif why := each.refuses(module) or (each.folds and _shared(model, module)) or _difference(module, each):
                left[name] = why
            elif each.rounds and not allow_rounding:
                left[name] = f"it rounds where {each.ours.__name__} is exact: pass allow_rounding=True"
            else:
                known[name] = each.ours
                replaced[name] = each.ours.__name__
                break
    for name, new in made.items():
        replace(model, modules[name], new)
    for name, ours in known.items():
        modules[name].__class__ = _class(ours, type(modules[name]))
    return Accelerated(replaced, left)
