"""The attention of a trained network for one image: what ``attnkern show`` prints and draws."""

import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from attnkern.evaluation.maps import map_of
from attnkern.nn import AnchorQuantizer, WindowAttention
from attnkern.training import images
from attnkern.training.train import load_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Largest resolution of a picture, in pixels per inch: the longer side of the image then has 1200 pixels.
_MAX_DPI = 300


class Explained(NamedTuple):
    """Result of :func:`explain`."""

    image: torch.Tensor  #: (3, H, W) in [0, 1], at the resolution of the file
    attention: torch.Tensor  #: (h, w)
    rectangle: torch.Tensor | None  #: (5,), or (K, 5) of several windows, if the network attends to windows
    map: str  #: name of the attention map
    label: str  #: name of the predicted class
    probability: float  #: of the predicted class
    quantized: bool  #: whether the values of the map are anchors
    shape: str = "rectangle"  #: of the windows


def read_image(path: str | os.PathLike, size: int) -> torch.Tensor:
    """(3, size, size) in [0, 1] of an image file, read and resized as the data sets do it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not an image, is damaged or too large.
    """
    return images.resized(images.read_image(path), size)


def explain(checkpoint: str | os.PathLike, path: str | os.PathLike, map: str | None = None) -> Explained:
    """The prediction of a trained network for an image file, and its attention map.

    Args:
        checkpoint: file written by ``attnkern train``.
        path: of the image.
        map: name of an attention map, or of a module for Grad-CAM. By default all attention maps combined; for a
            network without attention Grad-CAM at its second deepest feature map.

    Raises:
        FileNotFoundError, ValueError: no such file, no checkpoint, no image, or no such map.
    """
    run = load_run(checkpoint)
    original = images.read_image(path)
    network = run.network
    name, predict = map_of(network, map)
    inputs = run.normalise(images.resized(original, run.data["size"])[None])
    with torch.no_grad():
        logits, maps = predict(inputs)
        rectangle, shape = None, "rectangle"
        if isinstance(getattr(network, "attention", None), WindowAttention):
            shape = network.attention.shape
            rectangle = network.attention.rectangle(network.local_features(inputs))[0]
    probabilities = logits.softmax(1)[0]
    best = probabilities.argmax().item()
    quantized = any(isinstance(module, AnchorQuantizer) for module in network.modules())
    quantized = quantized and not name.startswith("Grad-CAM")
    label, probability = run.class_names[best], probabilities[best].item()
    return Explained(original.float() / 255, maps[0], rectangle, name, label, probability, quantized, shape)


def summary(shown: Explained) -> str:
    """One line: predicted class, probability and name of the map, and whether the map is nearly constant."""
    return ", ".join(filter(None, (_prediction(shown), shown.map, _constancy(shown))))


def draw(shown: Explained) -> "Figure":
    """The map over the image at the resolution of its file, up to 1200 pixels for the longer side."""
    from attnkern import viz
    from attnkern.viz.overlays import SIDE

    figure = viz.overlay(
        shown.image,
        shown.attention,
        nearest=shown.quantized,
        rectangle=None if shown.rectangle is None else shown.rectangle[None],
        shape=shown.shape,
        title=_prediction(shown),
        caption=_constancy(shown),
    )
    figure.set_dpi(min(max(figure.dpi, max(shown.image.shape) / SIDE), _MAX_DPI))
    return figure


def _prediction(shown):
    return f"{shown.label} ({shown.probability:.0%})"


def _constancy(shown):
    """A remark on a map that is nearly constant, else None: the network then looks everywhere alike."""
    from attnkern.viz.overlays import nearly_constant

    if not nearly_constant(shown.attention):
        return None
    return f"nearly constant: {shown.attention.min().item():.4g} to {shown.attention.max().item():.4g}"
