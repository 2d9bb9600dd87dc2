"""One map an image from a network: its attention, or Grad-CAM where it has none."""

from collections.abc import Iterable

import torch
from torch import nn

from attnkern._checks import check_items, check_kind
from attnkern.evaluation.inputs import Predict
from attnkern.evaluation.segmentation import combine
from attnkern.models.registry import attention_maps, map_names
from attnkern.nn import ProgressiveAttention


def attention_of(network: nn.Module, names: Iterable[str] | None = None) -> Predict:
    """A function from normalised images to logits and one attention map, for every protocol here.

    Args:
        network: with attnkern's modules in it.
        names: of the maps, fine to coarse, by default all. Of several the last two are combined, see
            :func:`attnkern.evaluation.combine`, without the root where the finer one filters what the coarser sees.

    Raises:
        ValueError, TypeError: a network without attention maps, a name that is none of them, or no Module.
    """
    check_kind("attention_of", nn.Module, network=network)
    known = map_names(network)
    if names is not None:
        check_items("attention_of", str, names=names)
    names = known if names is None else list(names)
    if not names or not set(names) <= set(known):
        choice = ", ".join(map(repr, known)) or "none, it has no attention map"
        raise ValueError(f"attention_of: names must be of {choice}, got {names}")
    progressive = any(isinstance(module, ProgressiveAttention) for module in network.modules())

    def predict(images):
        logits, maps = attention_maps(network, images, names)
        levels = [maps[name] for name in names]
        return logits, levels[0] if len(levels) == 1 else combine(levels, root=not progressive)

    return predict


def gradcam_of(network: nn.Module, name: str) -> Predict:
    """As :func:`attention_of`, with Grad-CAM of the predicted class at the output of the module ``name`` as the map.

    map = ReLU(Σ_k w_k f_k), w_k the average over positions of the logit's derivative by f_k.

    Raises:
        ValueError, TypeError: no module of that name, a network that is no Module.
        ImportError: captum is not installed.

    Source: Selvaraju et al., Grad-CAM, Eqs. 1-2; the implementation is Captum's.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ImportError("gradcam_of needs captum: pip install captum") from error
    check_kind("gradcam_of", nn.Module, network=network)
    check_kind("gradcam_of", str, name=name)
    modules = dict(network.named_modules())
    if name not in modules:
        raise ValueError(f"gradcam_of: name must be that of a module of the network, got {name!r}")
    explain = LayerGradCam(network, modules[name])

    def predict(images):
        with torch.no_grad():
            logits = network(images)
        with torch.enable_grad():
            inputs = images.detach().clone().requires_grad_()
            map = explain.attribute(inputs, logits.argmax(1), relu_attributions=True)
        return logits, map[:, 0].detach()

    return predict


def map_of(network: nn.Module, name: str | None = None) -> tuple[str, Predict]:
    """The map that a network is looked at by, its title and a function as :func:`attention_of` gives.

    Args:
        name: of an attention map, or of a module for Grad-CAM; by default all attention maps combined, or Grad-CAM at
            the deepest but one of the feature maps of a network without attention.

    Raises:
        ValueError, TypeError: a name that is neither, or no Module.
    """
    check_kind("map_of", nn.Module, network=network)
    check_kind("map_of", str | None, map=name)
    names = map_names(network)
    if names and (name is None or name in names):
        return name or " x ".join(names[-2:]), attention_of(network, None if name is None else [name])
    chosen = network.feature_modules[-2] if name is None else name
    if chosen not in dict(network.named_modules()):
        choice = ", ".join(map(repr, names)) or "none here"
        raise ValueError(f"map must be an attention map ({choice}) or a module of the network, got {name!r}")
    return f"Grad-CAM {chosen}", gradcam_of(network, chosen)
