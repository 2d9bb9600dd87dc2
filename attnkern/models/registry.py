"""Networks by name, their weights from files, their feature and attention maps."""

import copy
import fnmatch
import functools
import inspect
import os
from collections.abc import Callable, Iterable

import torch
from torch import nn

from attnkern._common import check_choice, check_flag, check_items, check_kind, check_tensor
from attnkern._spelling import did_you_mean
from attnkern.models.weights import load_weights

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str, **options):
    """Decorator of a network class, or of a function that builds one: ``create_model(name, ...)`` calls it.

    Args:
        options: bound to it under this name; the caller's own options win.
    """

    check_kind("register_model", str, name=name)

    def register(build):
        _MODELS[name] = functools.partial(build, **options) if options else build
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted: ``list_models("vgg*")``."""
    check_kind("list_models", str, pattern=pattern)
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    pretrained: str | os.PathLike | None = None,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    **options,
) -> nn.Module:
    """The network ``name`` for ``num_classes`` classes; the arguments are timm's.

    In training a network returns what its method ``loss(output, labels)`` takes; in evaluation it returns logits
    (N, num_classes). Images may have any size, batches may hold one.

    Args:
        pretrained: a file of weights of this network: a state_dict (PyTorch's format or safetensors), a checkpoint that
            holds one, such as those of ``attnkern train``, or a published checkpoint of the bottleneck paper's authors
            or of SaoYan's AttnVGG, whose names are mapped (a warning says how). No code in the file is run. The
            prefixes of DDP, FSDP and ``torch.compile`` are removed. Layers for another number of classes stay as
            initialised.
        features_only: return :class:`FeatureMaps` of the network, which gives its feature maps instead of logits.
        out_indices: which of them, by default all.
        options: go to the network's constructor; all take ``width`` (a multiplier of the channels) and ``in_chans``.

    Raises:
        ValueError, TypeError: an unknown name; weights of another network, or a file that is damaged or holds more than
            weights; out_indices that are no feature map's; an option that the network's constructor refuses.
        FileNotFoundError: no file of weights.
    """
    check_choice("create_model", "name", name, list_models())
    check_flag("create_model", features_only=features_only)
    if out_indices is not None:
        check_items("create_model", int, out_indices=out_indices)
    known = inspect.signature(_MODELS[name]).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for option in options:
            if option not in known:
                raise TypeError(f"create_model: {name} has no option {option!r}{did_you_mean(option, known)}")
    network = _MODELS[name](num_classes, **options)
    if pretrained is not None:
        load_weights(network, pretrained)
    if out_indices is not None and not features_only:
        raise ValueError("create_model: out_indices needs features_only=True")
    return FeatureMaps(network, out_indices) if features_only else network


class FeatureMaps(nn.Module):
    """A network's feature maps [(N, C, H, W), ...], fine to coarse, instead of its logits.

    ``feature_info`` says of each, as in timm: ``module``, ``num_chs`` and ``reduction``.

    Raises:
        ValueError, TypeError: a network without feature maps, or out_indices that are none of theirs.
    """

    def __init__(self, network: nn.Module, out_indices: tuple[int, ...] | None = None):
        super().__init__()
        check_kind("FeatureMaps", nn.Module, network=network)
        names = getattr(network, "feature_modules", ())
        if not names:
            raise ValueError(f"create_model: features_only: {type(network).__name__} names no feature maps")
        chosen = range(len(names)) if out_indices is None else out_indices
        check_items("create_model", int, out_indices=chosen)
        if any(not -len(names) <= index < len(names) for index in chosen):
            raise ValueError(f"create_model: out_indices must lie in 0 to {len(names) - 1}, got {tuple(out_indices)}")
        self.network = network
        self.modules_kept = tuple(names[index] for index in chosen)
        # Shapes alone tell channels and reduction: no image is computed.
        side = 320  # divides by 32 and by the first pooling of CUB's networks
        probe = torch.empty(1, network.in_chans, side, side, device="meta")
        maps = _observed(copy.deepcopy(network).to("meta").eval(), self.modules_kept, probe)[1]
        self.feature_info = [
            {"module": name, "num_chs": map.shape[1], "reduction": side // map.shape[2]} for name, map in maps.items()
        ]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(_observed(self.network, self.modules_kept, x)[1].values())


def _observed(network, names, images):
    """The network's output, and by name what the named modules returned."""
    seen, handles = {}, []
    for name in names:

        def keep(_module, _inputs, output, name=name):
            seen[name] = output

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        output = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return output, {name: seen[name] for name in names}


def map_names(model: nn.Module) -> list[str]:
    """Names of the attention maps of any model that holds attnkern's modules: ``["attention.map"]``.

    Each is an ``nn.Identity`` that the map passes through, so that hooks see it and may change it.
    """
    check_kind("map_names", nn.Module, model=model)
    owners = [name.rpartition("map")[0] for name, _ in model.named_modules() if name.split(".")[-1] == "map"]
    # A module within a module with a map (the quantizer of an attention) shows the same map again.
    return [f"{o}map" for o in owners if not any(o != other and o.startswith(other) and other for other in owners)]


def attention_maps(
    model: nn.Module, images: torch.Tensor, names: Iterable[str] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The model's output for ``images`` (N, C, H, W), and its attention maps {name: (N, h, w)}.

    Args:
        names: which maps, by default all of :func:`map_names`.

    Raises:
        ValueError, TypeError: a name that is no map of the model, or a model or images of another kind.
    """
    check_kind("attention_maps", nn.Module, model=model)
    check_tensor("attention_maps", "images", images)
    if names is not None:
        check_items("attention_maps", str, names=names)
    known = map_names(model)
    names = known if names is None else list(names)
    for name in names:
        if name not in known:
            choice = ", ".join(map(repr, known)) or "none, it has no attention map"
            raise ValueError(f"attention_maps: names must be of {choice}, got {name!r}")
    return _observed(model, names, images)
