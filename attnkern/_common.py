"""Checks of arguments, for all of attnkern, and the three ops' way to the reference for transforms."""

import numbers
import typing
from collections.abc import Collection

import torch
from torch.fx import Proxy

from attnkern._spelling import did_you_mean
from attnkern._tracing import traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Python's, a compiler's and NumPy's numbers.
_INTEGER = (int, torch.SymInt, numbers.Integral)
_REAL = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)


def came(value) -> str:
    """What a message shows of ``value``: text and numbers as they are, never a tensor's, and else the type."""
    if isinstance(value, (tuple, list)):
        shown = ", ".join(map(came, value[:8]))
        return f"({shown})" if isinstance(value, tuple) else f"[{shown}]"
    plain = isinstance(value, (str, numbers.Number, type(None)))
    return repr(value) if plain else type(value).__name__


def check_tensor(where: str, name: str, tensor) -> None:
    """Raise TypeError unless ``tensor`` is a dense floating tensor of a supported dtype."""
    if not isinstance(tensor, torch.Tensor):
        if isinstance(tensor, Proxy):
            raise TypeError(
                f"{where}: torch.fx cannot trace what looks at shapes: use torch.export.export or forward hooks"
            )
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{where}: {name} must be float32, bfloat16, float16 or float64, got {str(tensor.dtype).split('.')[-1]}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{where}: {name} must be a dense (strided) tensor, got {layout}")


def check_shape(where: str, name: str, tensor: torch.Tensor, expected: str, ok: bool, *sizes: int) -> None:
    """Raise ValueError naming the expected shape unless ``ok``.

    ``expected`` is a format of ``sizes``, filled only then: a size made text is fixed in a compiled graph.
    """
    if not ok:
        raise ValueError(f"{where}: {name} must be {expected.format(*sizes)}, got shape {tuple(tensor.shape)}")


def check_labels(where: str, labels, of: str, features: torch.Tensor) -> None:
    """Raise unless ``labels`` holds an integer for each row of the argument ``of``."""
    check_kind(where, torch.Tensor, labels=labels)
    check_shape(where, "labels", labels, "({},) (N as {})", labels.shape == features.shape[:1], len(features), of)
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integers or labels.layout != torch.strided:
        raise TypeError(f"{where}: labels must be a dense tensor of integers, got {labels.dtype}, {labels.layout}")


def check_positions(where: str, name: str, sizes) -> None:
    """Raise ValueError when a map of these sizes has no position."""
    if 0 in sizes:
        raise ValueError(f"{where}: {name} must have at least one position, got a map of size {tuple(sizes)}")


def check_size(where: str, size) -> tuple[int, int]:
    """``size`` as (H, W), each at least 1, of a map whose bytes can be counted in 64 bits, else this raises."""
    if not (isinstance(size, (tuple, list)) and len(size) == 2):
        raise ValueError(f"{where}: size must be (H, W), got {came(size)}")
    for length in size:
        if not (isinstance(length, _INTEGER) or traced(length)) or length is True or length < 1:
            raise ValueError(f"{where}: size must be two integers of at least 1, got {came(tuple(size))}")
    # NumPy's lengths would overflow; those that a compiler or a tracer follows come from tensors.
    kept = (int, torch.SymInt, torch.Tensor)
    height, width = (length if isinstance(length, kept) else int(length) for length in size)
    if isinstance(height, int) and isinstance(width, int) and height * width >= 2**60:
        raise ValueError(f"{where}: size must have fewer than 2**60 positions, got {came(tuple(size))}")
    return height, width


def check_integer(where: str, **integers) -> None:
    """Raise TypeError unless each of the named values is an integer."""
    for name, value in integers.items():
        if isinstance(value, bool) or not (isinstance(value, numbers.Integral) or traced(value)):
            raise TypeError(f"{where}: {name} must be an integer, got {came(value)}")


def check_count(where: str, **counts) -> None:
    """Raise unless each of the named numbers is an integer of at least 1."""
    check_integer(where, **counts)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {count}")


def check_number(where: str, **values) -> None:
    """Raise unless each of the named values is a real number that a float64 holds."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _REAL):
            raise TypeError(f"{where}: {name} must be a number, got {came(value)}")
        try:
            float_of(value)
        except OverflowError as error:
            raise ValueError(f"{where}: {name} must be a number that a float64 holds, got one larger") from error


def float_of(number):
    """A real number as a float; one that a compiler knows by name only stays that."""
    return number if isinstance(number, (float, torch.SymFloat, torch.SymInt)) else float(number)


def check_flag(where: str, **flags) -> None:
    """Raise TypeError unless each of the named values is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool) and not traced(value):
            raise TypeError(f"{where}: {name} must be True or False, got {came(value)}")


def check_choice(where: str, name: str, value, choices) -> None:
    """Raise ValueError unless ``value`` is one of some texts, or None where that is among them."""
    # Asked of an array, ``in`` would compare element by element.
    if not isinstance(value, (str, type(None))) or value not in choices:
        *others, last = map(repr, choices)
        hint = did_you_mean(value, choices)
        raise ValueError(f"{where}: {name} must be {', '.join(others)} or {last}, got {came(value)}{hint}")


def check_kind(where: str, kind, **values) -> None:
    """Raise TypeError unless each of the named values is an instance of ``kind``, a class or a union of classes."""
    for name, value in values.items():
        if not isinstance(value, kind):
            kinds = [each.__name__ for each in typing.get_args(kind) or (kind,)]
            expected = " or ".join("None" if each == "NoneType" else each for each in kinds)
            article = "an" if expected[0] in "AEIOU" else "a"
            raise TypeError(f"{where}: {name} must be {article} {expected}, got {came(value)}")


def check_items(where: str, kind: type, **collections) -> None:
    """Raise TypeError unless each of the named values is a list or the like of ``kind``; text is no list of letters."""
    for name, items in collections.items():
        ok = isinstance(items, Collection) and not isinstance(items, str)
        if not ok or not all(isinstance(each, kind) for each in items):
            raise TypeError(f"{where}: {name} must be a list of {kind.__name__}, got {came(items)}")


def numbers_of(where: str, name: str, items) -> list[float]:
    """A list or the like of numbers as floats, else this raises TypeError."""
    try:
        return [float(each) for each in items]
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a complex or a sparse tensor
        raise TypeError(f"{where}: {name} must be a list of numbers, got {came(items)}") from error


def double(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float64, on the CPU where its own device has none, as Apple's GPUs and some of Intel's."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


def device_of(where: str, device) -> torch.device:
    """``device`` as a torch.device, else this raises ValueError."""
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: device must be a device such as 'cpu' or 'cuda:0', got {came(device)}") from error


def check_device(where: str, name: str, tensor: torch.Tensor, of: str, features: torch.Tensor) -> None:
    """Raise ValueError unless ``tensor`` lies on the features' device."""
    if tensor.device != features.device:
        raise ValueError(f"{where}: {name} must be on {features.device} (as {of}), got {tensor.device}")


def autocasts(tensor: torch.Tensor) -> bool:
    """Is autocast on where ``tensor`` lies? (PyTorch refuses the question for the meta device.)"""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def companion(where: str, name: str, tensor: torch.Tensor, of: str, features: torch.Tensor) -> torch.Tensor:
    """``tensor`` to go with the features: on their device, in their dtype or float32, else this raises.

    Under autocast a half-precision one beside other features is widened: a layer made it so, not the user.
    """
    check_device(where, name, tensor, of, features)
    if tensor.dtype == features.dtype or tensor.dtype == torch.float32:
        return tensor
    if tensor.dtype != torch.float64 and autocasts(features):
        return tensor.float()
    dtype, allowed = (str(t.dtype).split(".")[-1] for t in (tensor, features))
    allowed = f"{allowed} (as {of})" + ("" if allowed == "float32" else " or float32")
    raise TypeError(f"{where}: {name} must be {allowed}, got {dtype}")


def transformed(*tensors: torch.Tensor) -> bool:
    """True inside functorch transforms and for dual tensors: a classic autograd Function would raise there."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.forward_ad._current_level < 0:
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)


def create_graph(*grads: torch.Tensor | None) -> bool:
    """Inside a backward pass: True when its gradients are to be differentiated again, or ``grads`` carry tangents."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed(*(grad for grad in grads if grad is not None))


def _kinds(tensors):
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def save(ctx, tensors: tuple[torch.Tensor, ...], *private: torch.Tensor) -> None:
    """Keep ``tensors``, which the user can reach, and ``private`` ones for an autograd Function's backward pass."""
    ctx.save_for_backward(*tensors, *private)
    ctx.kinds = _kinds(tensors)


def saved(ctx) -> tuple[torch.Tensor, ...]:
    """What :func:`save` kept.

    Raises RuntimeError when one got other data of another kind since, ``x.data = ...``, on which a kernel would run
    beyond its memory: PyTorch notices only changes in place.
    """
    tensors = ctx.saved_tensors
    kinds = _kinds(tensors[: len(ctx.kinds)])
    if kinds != ctx.kinds:
        then, now = next((then, now) for then, now in zip(ctx.kinds, kinds, strict=True) if then != now)
        then, now = (f"{dtype}, {tuple(shape)} on {device}" for shape, dtype, device in (then, now))
        raise RuntimeError(f"attnkern: a tensor that backward needs was {then} and became {now}")
    return tensors


def differentiable_backward(forward, inputs, grads):
    """Gradients of ``forward(*inputs)`` that can be differentiated again; one per input, None where not needed.

    Args:
        forward: the reference; returns as many tensors as ``grads`` has entries.
        grads: gradient of each output, or None.
    """
    again = torch.is_grad_enabled()  # else only tangents pass through
    with torch.enable_grad():
        # Fresh aliases, so that a rectangle computed from x does not lead the gradient of x through the rectangle, too.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        outputs = forward(*aliases)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    wanted = [alias for alias in aliases if alias.requires_grad]
    found = iter(
        torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs],
                            create_graph=again, allow_unused=True)
    )  # fmt: skip
    return tuple(next(found) if alias.requires_grad else None for alias in aliases)


def is_shape(tensor: torch.Tensor, *shape: int) -> bool:
    """``tensor.shape == shape``, the number of axes first: comparing it element by element with a longer shape would
    tie sizes to each other in an exported program."""
    return tensor.dim() == len(shape) and tensor.shape == shape
