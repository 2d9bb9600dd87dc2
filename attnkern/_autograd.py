"""What the operators' autograd Functions share: saved tensors, function transforms and double backward."""

import torch


def transformed(*tensors: torch.Tensor) -> bool:
    """Whether a functorch transform is active or a tensor is dual: a classic autograd Function would raise there."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.forward_ad._current_level < 0:
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)


def create_graph(*grads: torch.Tensor | None) -> bool:
    """Whether the backward pass that runs now must itself be differentiable, or ``grads`` carry tangents."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed(*(grad for grad in grads if grad is not None))


def _meta(tensors):
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def save(ctx, tensors: tuple[torch.Tensor, ...], *private: torch.Tensor) -> None:
    """Save tensors for backward: ``tensors``, which the user holds as well, and ``private`` ones."""
    ctx.save_for_backward(*tensors, *private)
    ctx.saved_meta = _meta(tensors)


def saved(ctx) -> tuple[torch.Tensor, ...]:
    """The tensors that :func:`save` saved.

    Raises:
        RuntimeError: the user replaced the data of one by data of another shape, dtype or device (``x.data = ...``). A
            kernel would read outside its memory; PyTorch itself notices only changes in place.
    """
    tensors = ctx.saved_tensors
    meta = _meta(tensors[: len(ctx.saved_meta)])
    if meta != ctx.saved_meta:
        then, now = next((then, now) for then, now in zip(ctx.saved_meta, meta, strict=True) if then != now)
        then, now = (f"{dtype}, {tuple(shape)} on {device}" for shape, dtype, device in (then, now))
        raise RuntimeError(f"attnkern: a tensor that backward needs was {then} and became {now}")
    return tensors


def differentiable_backward(forward, inputs, grads):
    """Gradients of ``forward(*inputs)`` that can be differentiated again: one per input, None if it needs none.

    Args:
        forward: the reference; returns as many tensors as ``grads`` has entries.
        grads: the gradient of each output, or None.
    """
    differentiable = torch.is_grad_enabled()  # False if only tangents pass through
    with torch.enable_grad():
        # Aliases: if a rectangle is computed from x, the gradient of x must not include the path through the rectangle.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        outputs = forward(*aliases)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    wanted = [alias for alias in aliases if alias.requires_grad]
    found = iter(
        torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs],
                            create_graph=differentiable, allow_unused=True)
    )  # fmt: skip
    return tuple(next(found) if alias.requires_grad else None for alias in aliases)
