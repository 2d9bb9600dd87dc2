"""Base class, layers, initialisation and backbone weights of the networks."""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import check_choice, check_count, check_number, check_shape, check_tensor, describe
from attnkern.models.weights import read_state
from attnkern.nn._precision import floating_parameter


class Network(nn.Module):
    """Base class of the papers' networks.

    In training a network returns the argument of its ``loss(output, labels)``, in evaluation logits (N, num_classes).
    Its last layers are ``classifier``: a Linear, or a ModuleList with one Linear per level.

    Args:
        num_classes: number of logits.
        in_chans: channels of the images.
        width: multiplier of the channels.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    #: Names of the modules whose outputs ``features_only`` returns, fine to coarse.
    feature_modules: tuple[str, ...] = ()
    #: Prefixes of the names of the weights whose shapes depend on the number of classes.
    class_layers: tuple[str, ...] = ("classifier.",)

    def __init__(self, num_classes: int, in_chans: int, width: float):
        super().__init__()
        where = type(self).__name__
        check_count(where, num_classes=num_classes, in_chans=in_chans)
        check_number(where, width=width)
        if not width > 0:
            raise ValueError(f"{where}: width must be positive, got {width!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans

    def get_classifier(self) -> nn.Module:
        """The layers that compute the logits, as in timm."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the layers whose shapes depend on the number of classes by newly initialised ones.

        Raises:
            ValueError, TypeError: ``num_classes`` is not an integer of at least 1.
        """
        check_count(type(self).__name__, num_classes=num_classes)

        def renewed(layer):
            new, like = nn.Linear(layer.in_features, num_classes), floating_parameter(layer, self)
            return new if like is None else new.to(like.device, like.dtype)

        self.num_classes = num_classes
        old = self.classifier
        self.classifier = nn.ModuleList(map(renewed, old)) if isinstance(old, nn.ModuleList) else renewed(old)

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of logits (N, num_classes) and labels (N,), or probabilities (N, num_classes)."""
        return F.cross_entropy(output, labels)

    def _check_images(self, x: torch.Tensor) -> None:
        where = type(self).__name__
        check_tensor(where, "x", x)
        ok = x.dim() == 4 and x.shape[1] == self.in_chans and min(x.shape[2:]) > 0
        check_shape(where, "x", x, f"(N, {self.in_chans}, H, W) with H and W of at least 1", ok)


def check_dropout(where: str, dropout: float, rate: float) -> None:
    """Raise unless ``dropout`` is a number whose product with ``rate``, the network's largest, is a probability."""
    check_number(where, dropout=dropout)
    if not 0 <= dropout * rate <= 1:
        raise ValueError(f"{where}: dropout must be at least 0 and at most {1 / rate:.4g}, got {dropout}")


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, at least 1."""
    return max(1, round(channels * width))


def halved() -> nn.Module:
    """2x2 maximum that keeps the last row and column of odd maps, so that no map becomes empty."""
    return nn.MaxPool2d(2, ceil_mode=True)


def conv_bn_relu(inputs: int, outputs: int, eps: float = 1e-5) -> list[nn.Module]:
    """3x3 convolution, BatchNorm and ReLU."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        MapNorm(outputs, eps=eps),
        nn.ReLU(inplace=True),
    ]


def he_normal(network: nn.Module) -> None:
    """He et al.'s normal weights (fan-out) for every convolution."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")


def zero_biases(network: nn.Module, kind: type[nn.Module]) -> None:
    """Set the bias of every layer of this kind to zero."""
    for module in network.modules():
        if isinstance(module, kind) and module.bias is not None:
            nn.init.zeros_(module.bias)


def xavier_uniform(network: nn.Module) -> None:
    """Glorot and Bengio's uniform weights with ReLU's gain, zero biases, BatchNorm scales uniform in [0, 1]."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)


class _RunningStatisticsForOne:
    """Batch normalisation that uses its running statistics for one value per channel, which has no variance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class VectorNorm(_RunningStatisticsForOne, nn.BatchNorm1d):
    """Batch normalisation of (N, C) that can train on a batch of one."""


class MapNorm(_RunningStatisticsForOne, nn.BatchNorm2d):
    """Batch normalisation of (N, C, H, W) that can train on a batch of one with a map of one position."""


def check_backbone(where: str, backbone: str, choices: tuple[str, ...], weights, width: float, in_chans: int) -> None:
    """Raise unless the backbone is one of ``choices``, torchvision is installed, and pretrained weights would fit."""
    check_choice(where, "backbone", backbone, choices)
    if weights is not None and (width, in_chans) != (1, 3):
        raise ValueError(f"{where}: weights need width=1 and in_chans=3, got width={width} and in_chans={in_chans}")
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{where} needs torchvision: pip install torchvision") from error


def backbone_weights(where: str, known, weights, prefix: str) -> dict[str, torch.Tensor]:
    """Weights of a torchvision backbone whose names begin with ``prefix``, without that prefix.

    Args:
        where: name of the network, for errors.
        known: torchvision's enum of weights for the backbone.
        weights: a member of ``known``, its name, or a file. torchvision downloads a member unless it is cached.
        prefix: of the entries to take.
    """
    if isinstance(weights, str) and weights in known.__members__:
        weights = known[weights]
    if isinstance(weights, known):
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except OSError as error:  # urllib's errors are of this kind
            reason = getattr(error, "reason", error)
            raise OSError(
                f"{where}: weights {weights.name} cannot be downloaded from {weights.url} ({reason}); "
                "get the file another way and pass its path as weights"
            ) from error
    elif isinstance(weights, (str, os.PathLike)) and os.path.isfile(weights):
        state = read_state(f"{where}: weights", weights)
    else:
        names = ", ".join(map(repr, known.__members__))
        raise ValueError(f"{where}: weights must be None, {names} or a file, got {describe(weights)}")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def replace_stem(features: nn.Module, in_chans: int) -> None:
    """Replace torchvision's first convolution, which takes three channels, by one for ``in_chans`` channels."""
    if in_chans == 3:
        return
    name, stem = next((n, m) for n, m in features.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_chans, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=stem.bias is not None
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out")
    parent, _, last = name.rpartition(".")
    setattr(features.get_submodule(parent), last, new)
