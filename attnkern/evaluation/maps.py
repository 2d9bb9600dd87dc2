"""One map per image from a network: its attention, or Grad-CAM."""

from collections.abc import Iterable

import torch
from torch import nn

from attnkern.evaluation.inputs import Predict
from attnkern.evaluation.segmentation import combine
from attnkern.models.registry import attention_maps, map_names
from attnkern.nn import ProgressiveAttention


def attention_of(network: nn.Module, names: str | Iterable[str] | None = None) -> Predict:
    """A function from normalised images to logits and one attention map, for every protocol here.

    Args:
        network: a network that contains attnkern's modules.
        names: a name, or names of the maps from fine to coarse, by default all. The last two of several are combined by
            :func:`attnkern.evaluation.combine`, without the square root in a network with progressive attention.

    Raises:
        ValueError: a network without attention maps, or an unknown name.
    """
    known = map_names(network)
    if isinstance(names, str):
        names = [names]
    names = known if names is None else list(names)
    if not names or not set(names) <= set(known):
        raise ValueError(f"attention_of: names must be among the network's attention maps {known}, got {names}")
    progressive = any(isinstance(module, ProgressiveAttention) for module in network.modules())

    def predict(images):
        logits, maps = attention_maps(network, images, names)
        levels = [maps[name] for name in names]
        return logits, levels[0] if len(levels) == 1 else combine(levels, root=not progressive)

    return predict


def gradcam_of(network: nn.Module, name: str) -> Predict:
    """Like :func:`attention_of`; the map is Grad-CAM of the predicted class at the output of the module ``name``.

    map = ReLU(Σ_k w_k f_k), w_k the average over positions of the derivative of the logit with respect to f_k.

    Raises:
        ValueError: no module of that name.
        ImportError: captum is not installed.

    Source: Selvaraju et al., Grad-CAM, Eqs. 1-2; the implementation is Captum's.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ImportError("gradcam_of needs captum: pip install captum") from error
    modules = dict(network.named_modules())
    if name not in modules:
        raise ValueError(f"gradcam_of: name must be the name of a module of the network, got {name!r}")
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
    """The title of a network's map and a function like that of :func:`attention_of`.

    Args:
        network: with or without attention.
        name: name of an attention map, or of a module for Grad-CAM. None: the combined attention maps, or Grad-CAM at
            the second deepest feature map of a network without attention.

    Raises:
        ValueError: a name that is neither.
    """
    names = map_names(network)
    if names and (name is None or name in names):
        return name or " x ".join(names[-2:]), attention_of(network, None if name is None else [name])
    chosen = network.feature_modules[-2] if name is None else name
    if chosen not in dict(network.named_modules()):
        choice = ", ".join(map(repr, names)) or "this network has none"
        raise ValueError(f"map must be an attention map ({choice}) or a module of the network, got {name!r}")
    return f"Grad-CAM {chosen}", gradcam_of(network, chosen)
