"""Networks by name, their pretrained weights, feature maps and attention maps."""

import copy
import fnmatch
import functools
import inspect
import os
from collections.abc import Callable, Iterable

import torch
from torch import nn

from attnkern._checks import check_choice, check_flag, check_items, check_kind
from attnkern._spelling import did_you_mean
from attnkern.models.weights import load_weights

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str, **options):
    """Decorator that makes a network class, or a function that builds a network, known to :func:`create_model`.

    Args:
        name: as :func:`create_model` takes it.
        options: passed to the class or function; options given to :func:`create_model` take precedence.
    """

    def register(build):
        _MODELS[name] = functools.partial(build, **options) if options else build
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted: ``list_models("vgg*")``."""
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

    In training a network returns the argument of its method ``loss(output, labels)``; in evaluation it returns logits
    (N, num_classes). Images may have any size, and a batch may hold one image.

    Args:
        name: one of :func:`list_models`.
        num_classes: number of logits.
        pretrained: a file with weights of this network: a state_dict (PyTorch's format or safetensors), a checkpoint
            that holds one, such as those of ``attnkern train``, or a published checkpoint of the bottleneck paper's
            authors or of SaoYan's AttnVGG, whose names are converted (a warning lists them). No code in the file is
            run. Prefixes of DDP, FSDP and ``torch.compile`` are removed. Layers whose number of classes differs keep
            their initialisation.
        features_only: return :class:`FeatureMaps` of the network, which returns feature maps instead of logits.
        out_indices: indices of the feature maps to return, by default all.
        options: go to the network's constructor; all take ``width`` (a multiplier of the channels) and ``in_chans``.

    Raises:
        ValueError, TypeError: an unknown name; weights of another network; a file that is damaged or holds more than
            weights; out_indices out of range, of another type or without features_only; an option that the network's
            constructor refuses.
        FileNotFoundError: ``pretrained`` is not a file.
    """
    check_choice("create_model", "name", name, list_models())
    check_flag("create_model", features_only=features_only)
    if out_indices is not None:
        check_items("create_model", int, out_indices=out_indices)
        if not features_only:
            given = f"{tuple(out_indices)} with features_only=False"
            raise ValueError(f"create_model: out_indices needs features_only=True, got {given}")
    known = inspect.signature(_MODELS[name]).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for option in options:
            if option not in known:
                raise TypeError(f"create_model: {name} has no option {option!r}{did_you_mean(option, known)}")
    network = _MODELS[name](num_classes, **options)
    if pretrained is not None:
        load_weights(network, pretrained)
    return FeatureMaps(network, out_indices) if features_only else network


class FeatureMaps(nn.Module):
    """Returns a network's feature maps [(N, C, H, W), ...], fine to coarse, instead of its logits.

    ``feature_info`` describes each as in timm: ``module``, ``num_chs`` and ``reduction``.

    Raises:
        ValueError: a network without feature maps, or out_indices out of range.
        TypeError: out_indices is not a list of integers.
    """

    def __init__(self, network: nn.Module, out_indices: tuple[int, ...] | None = None):
        super().__init__()
        names = getattr(network, "feature_modules", ())
        if not names:
            raise ValueError(
                f"create_model: features_only needs a network with feature_modules, got {type(network).__name__}"
            )
        chosen = range(len(names)) if out_indices is None else out_indices
        check_items("create_model", int, out_indices=chosen)
        if any(not -len(names) <= index < len(names) for index in chosen):
            raise ValueError(f"create_model: out_indices must lie in 0 to {len(names) - 1}, got {tuple(out_indices)}")
        self.network = network
        self.modules_kept = tuple(names[index] for index in chosen)
        # Channels and reductions follow from shapes alone: run on the meta device.
        side = 320  # a multiple of 32 and of the first pooling of CUB's networks
        probe = torch.empty(1, network.in_chans, side, side, device="meta")
        maps = _observed(copy.deepcopy(network).to("meta").eval(), self.modules_kept, probe)[1]
        self.feature_info = [
            {"module": name, "num_chs": map.shape[1], "reduction": side // map.shape[2]} for name, map in maps.items()
        ]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(_observed(self.network, self.modules_kept, x)[1].values())


def _observed(network, names, images):
    """The network's output, and the outputs of the named modules by name."""
    outputs, handles = {}, []
    for name in names:

        def keep(_module, _inputs, output, name=name):
            outputs[name] = output

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        output = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return output, {name: outputs[name] for name in names}


def map_names(model: nn.Module) -> list[str]:
    """Names of the attention maps of any model that contains attnkern's modules: ``["attention.map"]``.

    Each names an ``nn.Identity`` that the map passes through, so that hooks can observe and change it.
    """
    owners = [name.rpartition("map")[0] for name, _ in model.named_modules() if name.split(".")[-1] == "map"]
    # A module inside a module that has a map, such as the quantizer of an attention, has the same map again.
    return [f"{o}map" for o in owners if not any(o != other and o.startswith(other) and other for other in owners)]


def attention_maps(
    model: nn.Module, images: torch.Tensor, names: str | Iterable[str] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The model's output for ``images`` (N, C, H, W), and its attention maps {name: (N, h, w)}.

    Args:
        names: which maps, by default all of :func:`map_names`; one name or several.

    Raises:
        ValueError: a name that is not an attention map of the model.
        TypeError: names is neither a name nor a list of names.
    """
    known = map_names(model)
    check_kind("attention_maps", Iterable | None, names=names)
    names = known if names is None else [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"attention_maps: names must be among the model's attention maps {known}, got {name!r}")
    return _observed(model, names, images)
