"""Batches of images, and checks of models, maps and masks, for all protocols."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from attnkern._checks import check_count, check_kind, check_shape, check_tensor, describe

#: Images (N, C, H, W), a tuple of images and tensors with one row per image, or an iterable of batches of either.
Data = torch.Tensor | tuple[torch.Tensor, ...] | Iterable
#: Normalised images (N, C, H, W) to logits (N, K) and a map (N, h, w).
Predict = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Raw images in [0, 1] to the input of the network.
Normalise = Callable[[torch.Tensor], torch.Tensor]


def identity(images: torch.Tensor) -> torch.Tensor:
    """The default for ``normalise``: the images themselves."""
    return images


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in quotes for a sentence: the first ``most``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def batches(where: str, name: str, data: Data, batch_size: int, device=None) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of the argument ``name`` as tuples that begin with the images, moved to ``device`` unless it is None.

    A tensor or a tuple of tensors is split into batches of ``batch_size``; of another iterable each item is a batch.

    Raises:
        ValueError: no image, images that are not (N, C, H, W), tensors of different lengths, or a batch size below 1.
        TypeError: data of another kind, such as NumPy arrays.
    """
    check_count(where, batch_size=batch_size)
    if isinstance(data, torch.Tensor):
        data = (data,)
    if isinstance(data, tuple):
        for index, tensor in enumerate(data):
            check_kind(where, torch.Tensor, **{f"{name}[{index}]": tensor})
            if index == 0:
                check_shape(where, name, tensor, "(N, C, H, W)", tensor.dim() == 4)
            ok = tensor.shape[:1] == data[0].shape[:1]
            check_shape(where, f"{name}[{index}]", tensor, "({}, ...) (as the images)", ok, len(data[0]))
        data = zip(*(tensor.split(batch_size) for tensor in data), strict=True)
    elif hasattr(data, "dtype") or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):  # NumPy arrays
        expected = "a Tensor, a tuple of tensors or an iterable of batches"
        raise TypeError(f"{where}: {name} must be {expected}, got {describe(data)}")
    what, count = f"a batch of {name}", 0
    for batch in data:
        first, *others = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
        check_kind(where, torch.Tensor, **{what: first})
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
        data: raw images (N, C, H, W), a tuple that begins with them, or an iterable of batches of either.
        normalise: applied to the images first.
        batch_size: images per batch of a tensor or a tuple.
        device: device for the batches, or None to leave them where they are.

    Raises:
        ValueError, TypeError: no image, images of another shape or kind, or a batch size below 1.
    """
    found = []
    for raw, *_ in batches("collect", "data", data, batch_size, device):
        found.append(tuple(tensor.detach().cpu() for tensor in predict(normalise(raw))))
    logits, maps = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, maps


def check_evaluating(where: str, model) -> None:
    """Raise ValueError if ``model`` is in training mode: dropout and batch statistics would change the result."""
    if getattr(model, "training", False):
        raise ValueError(f"{where}: model must be in evaluation mode, got one in training mode")


def check_maps(where: str, name: str, maps: torch.Tensor) -> None:
    """Raise unless ``maps`` is floating (N, H, W) with at least one position."""
    check_tensor(where, name, maps)
    ok = maps.dim() == 3 and 0 not in maps.shape[1:]
    check_shape(where, name, maps, "(N, H, W) with H and W of at least 1", ok)


def check_masks(where: str, name: str, masks: torch.Tensor, of: str | None = None, like=None) -> None:
    """Raise unless ``masks`` is bool (N, H, W), or of the shape of the argument ``of``, which is ``like``."""
    if not isinstance(masks, torch.Tensor) or masks.dtype != torch.bool:
        kind = str(masks.dtype).split(".")[-1] if isinstance(masks, torch.Tensor) else type(masks).__name__
        raise TypeError(f"{where}: {name} must be a Tensor of bool, got {kind}")
    if like is None:
        check_shape(where, name, masks, "(N, H, W)", masks.dim() == 3)
    else:
        check_shape(where, name, masks, f"{tuple(like.shape)} (as {of})", masks.shape == like.shape)
