"""What the protocols share: batches of images, and checks of maps and masks."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from attnkern._checks import check_count, check_kind, check_shape, check_tensor, describe, device_of

#: Images (N, C, H, W), a tuple of tensors that goes with them row by row, or an iterable of batches of either.
Data = torch.Tensor | tuple[torch.Tensor, ...] | Iterable
#: Normalised images (N, C, H, W) to logits (N, K) and a map (N, h, w).
Predict = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Raw images in [0, 1] to what the network takes.
Normalise = Callable[[torch.Tensor], torch.Tensor]


def identity(images: torch.Tensor) -> torch.Tensor:
    return images


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names as they are written, in quotes, for a sentence; of many the first ones and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def batches(where: str, name: str, data: Data, batch_size: int, device=None) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of the argument ``name``, as tuples whose first tensor is the images, on ``device`` (None: as they are).

    A tensor or a tuple of tensors of one length is cut into pieces of ``batch_size``; of anything else every item is a
    batch as it stands.
    """
    check_count(where, batch_size=batch_size)
    device = None if device is None else device_of(where, device)
    if isinstance(data, torch.Tensor):
        data = (data,)
    what = name if isinstance(data, tuple) else f"a batch of {name}"
    if isinstance(data, tuple):
        if not all(isinstance(tensor, torch.Tensor) for tensor in data):
            raise TypeError(f"{where}: {name} must be a Tensor or a tuple of Tensors, got {describe(data)}")
        check_tensor(where, name, *data[:1])
        for tensor in data:
            check_shape(where, name, tensor, "({0}, ...) (as the images)", len(tensor) == len(data[0]), len(data[0]))
        data = zip(*(tensor.split(batch_size) for tensor in data), strict=True)
    check_kind(where, Iterable, **{name: data})
    count = 0
    for batch in data:
        first, *others = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
        check_tensor(where, what, first)
        check_shape(where, what, first, "(N, C, H, W)", first.dim() == 4)
        count += len(first)
        if len(first):
            both = (first, *others)
            yield both if device is None else tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in both)
    if not count:
        raise ValueError(f"{where}: {name} must hold at least one image, got none")


@torch.no_grad()
def collect(
    predict: Predict, data: Data, *, normalise: Normalise = identity, batch_size: int = 128, device=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) and maps (N, h, w) of all images, on the CPU.

    Args:
        predict: from normalised images to logits and a map.
        data: raw images (N, C, H, W), a tuple that starts with them, or an iterable of batches of either.
        normalise: applied to the images first.
        batch_size: images at a time, where ``data`` is a tensor or a tuple.
        device: where batches are moved, or None.

    Raises:
        ValueError, TypeError: no image, or images of another shape.
    """
    check_kind("collect", Callable, predict=predict, normalise=normalise)
    found = []
    for raw, *_ in batches("collect", "data", data, batch_size, device):
        found.append(tuple(tensor.detach().cpu() for tensor in predict(normalise(raw))))
    logits, maps = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, maps


def check_evaluating(where: str, model) -> None:
    """Raise unless ``model`` can be called and, if it is a module, is in evaluation mode.

    In training mode dropout and batch statistics would go into the result.
    """
    check_kind(where, Callable, model=model)
    if getattr(model, "training", False):
        raise ValueError(f"{where}: model must be in evaluation mode, got one in training mode")


def check_maps(where: str, name: str, maps: torch.Tensor) -> None:
    """Raise unless ``maps`` is floating (N, H, W) with at least one position."""
    check_tensor(where, name, maps)
    ok = maps.dim() == 3 and 0 not in maps.shape[1:]
    check_shape(where, name, maps, "(N, H, W) with H and W of at least 1", ok)


def check_masks(where: str, name: str, masks: torch.Tensor, of: str | None = None, like=None) -> None:
    """Raise unless ``masks`` is bool (N, H, W), of the shape of ``like`` where that is given."""
    if not isinstance(masks, torch.Tensor) or masks.dtype != torch.bool:
        came = str(masks.dtype).split(".")[-1] if isinstance(masks, torch.Tensor) else type(masks).__name__
        raise TypeError(f"{where}: {name} must be a Tensor of bool, got {came}")
    if like is None:
        check_shape(where, name, masks, "(N, H, W)", masks.dim() == 3)
    else:
        check_shape(where, name, masks, f"{tuple(like.shape)} (as {of})", masks.shape == like.shape)
