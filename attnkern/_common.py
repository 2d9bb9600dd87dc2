"""What the three ops share: argument checks, and the way to the reference for transforms."""

import numbers

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(where: str, name: str, tensor) -> None:
    """Raise TypeError unless ``tensor`` is a dense floating tensor of a supported dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{where}: {name} must be float32, bfloat16, float16 or float64, got {str(tensor.dtype).split('.')[-1]}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{where}: {name} must be a dense (strided) tensor, got layout {tensor.layout}")


def check_shape(where: str, name: str, tensor: torch.Tensor, expected: str, ok: bool, *sizes: int) -> None:
    """Raise ValueError naming the expected shape unless ``ok``.

    ``expected`` is a format of ``sizes``, filled only then: a size made text is fixed in a compiled graph.
    """
    if not ok:
        raise ValueError(f"{where}: {name} must be {expected.format(*sizes)}, got shape {tuple(tensor.shape)}")


def check_positions(where: str, name: str, sizes) -> None:
    """Raise ValueError when a map of these sizes has no position."""
    if 0 in sizes:
        raise ValueError(f"{where}: {name} must have at least one position, got a map of size {tuple(sizes)}")


def check_count(where: str, **counts) -> None:
    """Raise unless each of the named numbers is an integer of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral):
            raise TypeError(f"{where}: {name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {count}")


def check_flag(where: str, name: str, value) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}")


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
