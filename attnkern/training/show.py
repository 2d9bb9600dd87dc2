"""The attention of one image: what ``attnkern show`` draws."""

import os
from typing import NamedTuple

import torch

from attnkern.evaluation.maps import map_of
from attnkern.nn import AnchorQuantizer, WindowAttention
from attnkern.training import images
from attnkern.training.train import load_run


class Explained(NamedTuple):
    """Result of :func:`explain`."""

    image: torch.Tensor  #: (3, size, size) in [0, 1]
    attention: torch.Tensor  #: (h, w)
    rectangle: torch.Tensor | None  #: (5,) where attention is one
    map: str  #: its name
    label: str  #: of the predicted class
    probability: float
    quantized: bool  #: the map has the values of anchors


def read_image(path: str | os.PathLike, size: int) -> torch.Tensor:
    """(3, size, size) in [0, 1] of an image file, as the data sets read and resize theirs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no image, is damaged or too large.
    """
    return images.resized(images.read_image(path), size)


def explain(checkpoint: str | os.PathLike, path: str | os.PathLike, map: str | None = None) -> Explained:
    """The prediction of a trained network for an image file, and where it looks.

    Args:
        checkpoint: of ``attnkern train``.
        map: name of the attention map, or of a module for Grad-CAM; by default all levels combined, or the deepest
            but one of the feature maps of a network without attention.

    Raises:
        FileNotFoundError, ValueError: no such file, no checkpoint, no image, or no such map.
    """
    run = load_run(checkpoint)
    image = read_image(path, run.data["size"])
    network = run.network
    name, predict = map_of(network, map)
    inputs = run.normalise(image[None])
    with torch.no_grad():
        logits, maps = predict(inputs)
        rectangle = None
        if isinstance(getattr(network, "attention", None), WindowAttention):
            rectangle = network.attention.rectangle(network.local_features(inputs))[0]
    probabilities = logits.softmax(1)[0]
    best = probabilities.argmax().item()
    quantized = any(isinstance(module, AnchorQuantizer) for module in network.modules())
    quantized = quantized and not name.startswith("Grad-CAM")
    return Explained(image, maps[0], rectangle, name, run.class_names[best], probabilities[best].item(), quantized)
