"""Checks of arguments. Each raises an error that names the function, the argument, what was expected and what came."""

import numbers
import typing
from collections.abc import Collection

import torch
from torch.fx import Proxy

from attnkern._numerics import DTYPES, autocasts
from attnkern._spelling import did_you_mean
from attnkern._tracing import traced

#: Numbers of Python, of PyTorch's compiler and of NumPy.
_INTEGER = (int, torch.SymInt, numbers.Integral)
_REAL = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)


def describe(value) -> str:
    """``value`` as error messages show it: strings and numbers in full, everything else by its type."""
    if isinstance(value, (tuple, list)):
        shown = ", ".join(map(describe, value[:8]))
        return f"({shown}{',' * (len(value) == 1)})" if isinstance(value, tuple) else f"[{shown}]"
    plain = isinstance(value, (str, numbers.Number, type(None)))
    return repr(value) if plain else type(value).__name__


# --- tensors ---------------------------------------------------------------------------------------------------------


def check_tensor(where: str, name: str, tensor, dtypes: Collection[torch.dtype] = DTYPES) -> None:
    """Raise TypeError unless ``tensor`` is a dense tensor of one of these dtypes."""
    if not isinstance(tensor, torch.Tensor):
        if isinstance(tensor, Proxy):
            raise TypeError(
                f"{where}: torch.fx cannot trace code that reads shapes: use torch.export.export or forward hooks"
            )
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        *others, last, got = (str(dtype).split(".")[-1] for dtype in (*dtypes, tensor.dtype))
        expected = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{where}: {name} must be {expected}, got {got}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{where}: {name} must be a dense (strided) tensor, got {layout}")


def is_shape(tensor: torch.Tensor, *shape: int) -> bool:
    """``tensor.shape == shape``, but compares the number of axes first.

    In an exported program, comparing a longer shape element by element would add constraints between sizes.
    """
    return tensor.dim() == len(shape) and tensor.shape == shape


def check_shape(where: str, name: str, tensor: torch.Tensor, expected: str, ok: bool, *sizes: int) -> None:
    """Raise ValueError with the expected shape unless ``ok``.

    ``expected`` is a format string for ``sizes``. It is formatted only on failure, because converting a symbolic size
    to text makes it a constant of the compiled graph.
    """
    if not ok:
        raise ValueError(f"{where}: {name} must be {expected.format(*sizes)}, got shape {tuple(tensor.shape)}")


def check_channels(where: str, x: torch.Tensor, channels: int, name: str = "x", sequences: bool = False) -> None:
    """Raise unless ``x`` is (N, channels, H, W), or with ``sequences`` (N, channels, L), with at least one position."""
    check_tensor(where, name, x)
    shape = f"(N, {channels}, H, W)" + (f" or (N, {channels}, L)" if sequences else "")
    ok = x.dim() == 4 or (x.dim() == 3 and sequences)
    check_shape(where, name, x, shape, ok and x.shape[1] == channels)
    check_positions(where, name, x.shape[2:])


def check_positions(where: str, name: str, sizes) -> None:
    """Raise ValueError when a map of these sizes has no position."""
    if 0 in sizes:
        raise ValueError(f"{where}: {name} must have at least one position, got a map of size {tuple(sizes)}")


def check_device(where: str, name: str, tensor: torch.Tensor, of: str, features: torch.Tensor) -> None:
    """Raise ValueError unless ``tensor`` is on the device of the features."""
    if tensor.device != features.device:
        raise ValueError(f"{where}: {name} must be on {features.device} (as {of}), got {tensor.device}")


def companion(where: str, name: str, tensor: torch.Tensor, of: str, features: torch.Tensor) -> torch.Tensor:
    """``tensor`` if it is on the device of the features and has their dtype or float32; otherwise this raises.

    Under autocast a half-precision tensor may accompany features of another dtype; it is converted to float32. A layer
    chose its dtype, not the user.
    """
    check_device(where, name, tensor, of, features)
    if tensor.dtype == features.dtype or tensor.dtype == torch.float32:
        return tensor
    if tensor.dtype != torch.float64 and autocasts(features):
        return tensor.float()
    dtype, allowed = (str(t.dtype).split(".")[-1] for t in (tensor, features))
    allowed = f"{allowed} (as {of})" + ("" if allowed == "float32" else " or float32")
    raise TypeError(f"{where}: {name} must be {allowed}, got {dtype}")


def check_labels(where: str, labels, of: str, features: torch.Tensor) -> None:
    """Raise unless ``labels`` holds one integer for each row of ``features``, the argument named ``of``."""
    check_kind(where, torch.Tensor, labels=labels)
    check_shape(where, "labels", labels, "({},) (N as {})", labels.shape == features.shape[:1], len(features), of)
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integers or labels.layout != torch.strided:
        raise TypeError(f"{where}: labels must be a dense tensor of integers, got {labels.dtype}, {labels.layout}")


# --- numbers and options ---------------------------------------------------------------------------------------------


def check_size(where: str, size) -> tuple[int, int]:
    """``size`` as (H, W). Raises ValueError unless both are at least 1 and a map has fewer than 2**60 positions.

    The upper limit keeps the number of bytes within 64 bits.
    """
    if not (isinstance(size, (tuple, list)) and len(size) == 2):
        raise ValueError(f"{where}: size must be (H, W), got {describe(size)}")
    for length in size:
        if not (isinstance(length, _INTEGER) or traced(length)) or length is True or length < 1:
            raise ValueError(f"{where}: size must be two integers of at least 1, got {describe(tuple(size))}")
    # NumPy's integers could overflow. Symbolic and traced lengths stay as they are.
    kept = (int, torch.SymInt, torch.Tensor)
    height, width = (length if isinstance(length, kept) else int(length) for length in size)
    if isinstance(height, int) and isinstance(width, int) and height * width >= 2**60:
        raise ValueError(f"{where}: size must have fewer than 2**60 positions, got {describe(tuple(size))}")
    return height, width


def check_integer(where: str, **integers) -> None:
    """Raise TypeError unless each of the named values is an integer."""
    for name, value in integers.items():
        if isinstance(value, bool) or not (isinstance(value, numbers.Integral) or traced(value)):
            raise TypeError(f"{where}: {name} must be an integer, got {describe(value)}")


def check_count(where: str, **counts) -> None:
    """Raise unless each of the named values is an integer of at least 1."""
    check_integer(where, **counts)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {count}")


def check_number(where: str, **values) -> None:
    """Raise unless each of the named values is a real number that fits into float64."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _REAL):
            raise TypeError(f"{where}: {name} must be a number, got {describe(value)}")
        try:
            float_of(value)
        except OverflowError as error:
            raise ValueError(f"{where}: {name} must be a number that a float64 holds, got one larger") from error


def float_of(number):
    """A real number as a float. Symbolic numbers of a compiler are returned unchanged."""
    return number if isinstance(number, (float, torch.SymFloat, torch.SymInt)) else float(number)


def check_flag(where: str, **flags) -> None:
    """Raise TypeError unless each of the named values is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool) and not traced(value):
            raise TypeError(f"{where}: {name} must be True or False, got {describe(value)}")


def check_choice(where: str, name: str, value, choices) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``, which are strings or None."""
    # The type is checked first, because ``in`` would compare an array element by element.
    if not isinstance(value, (str, type(None))) or value not in choices:
        *others, last = map(repr, choices)
        hint = did_you_mean(value, choices)
        raise ValueError(f"{where}: {name} must be {', '.join(others)} or {last}, got {describe(value)}{hint}")


def check_kind(where: str, kind, **values) -> None:
    """Raise TypeError unless each of the named values is an instance of ``kind``, a class or a union of classes."""
    for name, value in values.items():
        if not isinstance(value, kind):
            kinds = [each.__name__ for each in typing.get_args(kind) or (kind,)]
            expected = " or ".join("None" if each == "NoneType" else each for each in kinds)
            article = "an" if expected[0] in "AEIOU" else "a"
            raise TypeError(f"{where}: {name} must be {article} {expected}, got {describe(value)}")


def check_items(where: str, kind: type, **collections) -> None:
    """Raise TypeError unless each of the named values is a collection of ``kind``, and not a string."""
    for name, items in collections.items():
        ok = isinstance(items, Collection) and not isinstance(items, str)
        if not ok or not all(isinstance(each, kind) for each in items):
            raise TypeError(f"{where}: {name} must be a list of {kind.__name__}, got {describe(items)}")


def _float(number) -> float:
    if isinstance(number, (str, bytes, bool)):  # float would convert them
        raise TypeError
    return float(number)


def numbers_of(where: str, name: str, items) -> list[float]:
    """An iterable of numbers as a list of floats.

    Raises TypeError if it is something else, and ValueError if a float64 does not hold one of the numbers.
    """
    try:
        return [_float(each) for each in items]
    except OverflowError as error:
        raise ValueError(f"{where}: {name} must be numbers that a float64 holds, got one larger") from error
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a complex or a sparse tensor
        raise TypeError(f"{where}: {name} must be a list of numbers, got {describe(items)}") from error


def device_of(where: str, device) -> torch.device:
    """``device`` as a torch.device. Raises ValueError if it is not one."""
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{where}: device must be a device such as 'cpu' or 'cuda:0', got {describe(device)}"
        ) from error
