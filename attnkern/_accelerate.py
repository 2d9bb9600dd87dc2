"""Public implementations in an existing model replaced by ours."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from attnkern import compat
from attnkern._common import check_kind
from attnkern._insert import replace, tensors_of

#: Attributes that hold the hooks of a module.
_HOOKS = [
    name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
]


class Accelerated(NamedTuple):
    """What :func:`accelerate` did."""

    replaced: dict[str, str]  #: name of a module -> the class that it is now
    left: dict[str, str]  #: name of a module that looked like ours -> why it was left alone

    def __str__(self):
        lines = [f"{name}: now {kind}" for name, kind in self.replaced.items()]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing to replace"


def _attention_inputs(module):
    weight = module.op.weight
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    return torch.randn(2, weight.shape[1], 3, 4, **options), torch.randn(2, weight.shape[1], 1, 1, **options)


def _is_attention(module):
    op = getattr(module, "op", None)
    return (
        isinstance(op, nn.Conv2d) and op.out_channels == 1 and op.kernel_size == (1, 1) and op.bias is None
        and isinstance(getattr(module, "normalize_attn", None), bool)
    )  # fmt: skip


def _is_quantizer(module):
    parameters = dict(module.named_parameters())
    return list(parameters) == ["anchors"] and parameters["anchors"].dim() == 1 and not list(module.children())


def _quantizer_inputs(module):
    generator = torch.Generator().manual_seed(0)
    low, high = module.anchors.detach().aminmax()
    return ((low - 0.3 + (high - low + 0.6) * torch.rand(2, 1, 5, 7, generator=generator)).double(),)


#: (how to tell by its parts, our class, inputs to compare on)
_KNOWN = [
    (_is_attention, compat.LinearAttentionBlock, _attention_inputs),
    (_is_quantizer, compat.StraightThroughQuantizer, _quantizer_inputs),
]


def _run(kind, module, inputs):
    """Outputs, gradients and then the buffers of ``kind.forward`` on the parts of ``module``, its own hooks left out.

    In float64.
    """
    state = {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value.clone()
        for name, value in tensors_of(module).items()
    }
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    leaves = [tensor for tensor in [*inputs, *state.values()] if tensor.requires_grad]
    stand_in = nn.Module.__new__(kind)
    stand_in.__dict__ = module.__dict__ | {name: type(module.__dict__[name])() for name in _HOOKS}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = torch.func.functional_call(stand_in, state, tuple(inputs), tie_weights=False)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        total = sum((output * output.detach().cos()).sum() for output in outputs)
        buffers = [state[name] for name, tensor in tensors_of(module).items() if not isinstance(tensor, nn.Parameter)]
        return [*outputs, *torch.autograd.grad(total, leaves, allow_unused=True), *buffers]


def _alike(a, b):
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, 1e-6, 1e-9)


def _difference(module, ours, inputs) -> str | None:
    """Why ``module`` is no ``ours``; None where it computes the same."""
    if any(getattr(part, name) for part in module.modules() if part is not module for name in _HOOKS):
        return "its parts carry hooks, which would not be called"
    try:
        found, wanted = (_run(kind, module, inputs) for kind in (ours, type(module)))
    except Exception as error:  # someone else's code may raise anything
        return f"it could not be compared with {ours.__name__}: {error}"
    if len(found) != len(wanted) or not all(map(_alike, found, wanted)):
        return f"it computes something else than {ours.__name__}"
    return None


def _taken_over(module, new):
    """``new`` in the place of ``module``, with its parameters, mode, device, dtype and hooks; the names must agree."""
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
    model: nn.Module, mapping: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]] | None = None
) -> Accelerated:
    """Replace what people already have by what computes the same through attnkern's kernels, in place.

    A module of ``model`` is known by its parts, whatever its class is called: "Learn to Pay Attention" blocks (``op``,
    a 1x1 convolution to one channel without bias, and ``normalize_attn``) and straight-through quantizers of scalars
    (one parameter, ``anchors`` (Q,)). It is replaced only if outputs and all gradients agree with ours on random
    numbers in float64. Parameters stay the same objects, so optimizers go on; keys of the state_dict, training mode,
    hooks, devices and dtypes stay as well.

    Args:
        model: changed in place; itself replaced only inside, so pass a model that holds the modules.
        mapping: a class of your own -> what makes its replacement from the module; its state_dict must have the same
            keys. It is taken at its word.

    Returns:
        What was replaced, and what was left and why. Printed, it says so in lines.

    Raises:
        ValueError: a replacement of ``mapping`` with other keys; nothing is changed then.
        TypeError: a model that is no Module, a mapping that is none.
    """
    check_kind("accelerate", nn.Module, model=model)
    check_kind("accelerate", Mapping | None, mapping=mapping)
    replaced, left, made = {}, {}, {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        make = (mapping or {}).get(type(module))
        if make is not None and name:
            made[name] = _taken_over(module, make(module))
            continue
        for fits, ours, inputs in _KNOWN:
            if type(module) is ours or not fits(module):
                continue
            if "forward" in module.__dict__:
                left[name] = "its forward has been replaced"
            elif getattr(module, "normalize_attn", True) is False:
                left[name] = "sigmoid weights are not softmax pooling: plain PyTorch does them"
            elif why := _difference(module, ours, inputs(module)):
                left[name] = why
            else:
                replaced[name] = ours.__name__
                break
    for name, new in made.items():
        replace(model, modules[name], new)
        replaced[name] = type(new).__name__
    for name, kind in replaced.items():
        if name not in made:
            modules[name].__class__ = getattr(compat, kind)
    return Accelerated(replaced, left)
