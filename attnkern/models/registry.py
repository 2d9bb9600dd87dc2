"""Networks by name."""

import fnmatch

from torch import nn

_MODELS: dict[str, type[nn.Module]] = {}


def register_model(name: str):
    """Decorator of a network class, or of a function that builds one: ``create_model(name, ...)`` calls it."""

    def register(build):
        _MODELS[name] = build
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted: ``list_models("vgg*")``."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(name: str, num_classes: int, **options) -> nn.Module:
    """The network ``name`` for ``num_classes`` classes.

    In training a network returns what its method ``loss(output, labels)`` takes; in evaluation it returns logits
    (N, num_classes).

    Args:
        options: go to the network's constructor; all take ``width`` (a multiplier of the channels) and ``in_chans``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _MODELS:
        raise ValueError(f"create_model: name must be one of {', '.join(map(repr, list_models()))}, got {name!r}")
    return _MODELS[name](num_classes, **options)
