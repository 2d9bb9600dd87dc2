"""What the protocols share: batches of images, and checks of maps and masks."""

from collections.abc import Callable, Iterable, Iterator

import torch

from attnkern._common import check_count, check_shape, check_tensor

#: Images (N, C, H, W), a tuple of tensors that goes with them row by row, or an iterable of batches of either.
Data = torch.Tensor | tuple[torch.Tensor, ...] | Iterable
#: Normalised images (N, C, H, W) to logits (N, K) and a map (N, h, w).
Predict = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Raw images in [0, 1] to what the network takes.
Normalise = Callable[[torch.Tensor], torch.Tensor]


def identity(images: torch.Tensor) -> torch.Tensor:
    return images


def batches(where: str, data: Data, batch_size: int, device=None) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of ``data``, as tuples whose first tensor is the images, on ``device`` (None: where they are).

    A tensor or a tuple of tensors of one length is cut into pieces of ``batch_size``; of anything else every item is a
    batch as it stands.
    """
    check_count(where, batch_size=batch_size)
    if isinstance(data, torch.Tensor):
        data = (data,)
    if isinstance(data, tuple):
        for tensor in data:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{where}: data must be a tuple of Tensors, got one with a {type(tensor).__name__}")
            check_shape(where, "data", tensor, "({0}, ...) (as the images)", len(tensor) == len(data[0]), len(data[0]))
        data = zip(*(tensor.split(batch_size) for tensor in data), strict=True)
    count = 0
    for batch in data:
        batch = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        check_tensor(where, "images", batch[0])
        check_shape(where, "images", batch[0], "(N, C, H, W)", batch[0].dim() == 4)
        count += len(batch[0])
        if len(batch[0]):
            yield batch if device is None else tuple(tensor.to(device) for tensor in batch)
    if not count:
        raise ValueError(f"{where}: data must hold at least one image, got none")


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
    found = []
    for raw, *_ in batches("collect", data, batch_size, device):
        found.append(tuple(tensor.detach().cpu() for tensor in predict(normalise(raw))))
    logits, maps = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, maps


def check_evaluating(where: str, model) -> None:
    """Raise ValueError for a module in training mode, whose dropout and batch statistics would go into the result."""
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


def check_size(where: str, size) -> None:
    """Raise unless ``size`` is (H, W), each at least 1."""
    if not (isinstance(size, (tuple, list, torch.Size)) and len(size) == 2):
        raise ValueError(f"{where}: size must be (H, W), got {size!r}")
    check_count(where, **dict(zip(("height", "width"), size, strict=True)))
