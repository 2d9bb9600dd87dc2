"""Published checkpoints: which implementation wrote one, and how its names of weights become attnkern's."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class _Rename(NamedTuple):
    """Names that begin with ``old`` begin with ``new`` in attnkern."""

    old: str
    new: str
    shift: int | None = None  # added to the number that follows
    flatten: int | None = None  # flatten the tensor from this dimension on

    def shown(self) -> tuple[str, str]:
        """The two names as patterns."""
        if self.shift is not None:
            return f"{self.old}N.*", f"{self.new}(N+{self.shift}).*" if self.shift else f"{self.new}N.*"
        return tuple(f"{name}*" if name.endswith(".") else name for name in (self.old, self.new))


@dataclass(frozen=True)
class _Layout:
    """The names in the checkpoints of one implementation."""

    title: str
    #: Names by which the layout is recognised: no other layout has them all.
    marks: tuple[str, ...]
    #: attnkern's networks with these weights; with anchors their names end in _qt.
    networks: tuple[str, ...]
    #: Weight of the last layer, whose first dimension is the number of classes.
    classifier: str
    renames: tuple[_Rename, ...]
    #: Prefixes of names that are left out, and why.
    left_out: dict[str, str] = field(default_factory=dict)
    #: Renames of the part that follows "layer.I." in the names of a block.
    blocks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Renamed:
    """Result of :func:`rename`."""

    state: dict[str, torch.Tensor]  #: with attnkern's names
    layout: str = ""  #: title of the implementation; empty for attnkern's own and unknown names
    networks: tuple[str, ...] = ()  #: names for create_model
    num_classes: int = 0  #: of the checkpoint
    options: dict[str, int] = field(default_factory=dict)  #: of the networks' constructors
    renamed: dict[str, tuple[str, int]] = field(default_factory=dict)  #: {old name: (new name, entries)}
    left_out: dict[str, tuple[str, int]] = field(default_factory=dict)  #: {old name: (reason, entries)}

    def calls(self) -> str:
        """The calls of create_model that build the networks."""
        arguments = ", ".join([str(self.num_classes), *(f"{key}={value}" for key, value in self.options.items())])
        return " or ".join(f'create_model("{name}", {arguments})' for name in self.networks)

    def summary(self) -> str:
        """What was renamed and left out, in one line."""
        pairs = ", ".join(f"{old} to {new}" for old, (new, _) in self.renamed.items())
        line = f"{sum(count for _, count in self.renamed.values())} entries were renamed ({pairs})"
        if self.left_out:
            reasons = {}
            for old, (why, _) in self.left_out.items():
                reasons.setdefault(why, []).append(old)
            listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
            line += f", {sum(count for _, count in self.left_out.values())} left out ({listed})"
        return line


_TWICE = "the same weights under a second name"
_ANCHORS = _Rename("emb.weight", "attention.quantizer.anchors", flatten=0)
_STD = _Rename("att_module_std.0.", "attention.std.")
_QUERY = "computes the global vector, which the softmax cancels"

LAYOUTS = (
    _Layout(
        "VGG-aib of the bottleneck paper's authors (CIFAR)",
        ("att_module_mu.0.weight", "encode.4.op.0.weight"),
        ("vgg_aib",),
        "decode.2.weight",
        (
            _Rename("features.0.op.", "features.", 0),
            _Rename("features.1.op.", "features.", 6),
            _Rename("features.2.op.", "features.", 12),
            _Rename("encode.0.op.", "encoder.", 0),
            _Rename("encode.2.op.", "encoder.", 10),
            _Rename("encode.4.op.", "encoder.", 20),
            _Rename("encode.5.", "encoder.28."),
            _Rename("encode.8.", "encoder.32."),
            _Rename("att_module_mu.0.", "attention.mean."),
            _STD,
            _ANCHORS,
            _Rename("decode.0.", "decoder.0."),
            _Rename("decode.2.", "classifier."),
        ),
    ),
    _Layout(
        "WRN-aib of the bottleneck paper's authors (CIFAR)",
        ("att_module_mu.0.layer.0.bn1.weight", "encode.0.layer.0.bn1.weight"),
        ("wrn28_10_aib",),
        "decode.1.weight",
        (
            _Rename("conv1.", "features.0."),
            _Rename("block1.layer.", "features.1."),
            _Rename("block2.layer.", "features.2."),
            _Rename("encode.0.layer.", "encoder.0."),
            _Rename("encode.1.", "encoder.1."),
            _Rename("encode.5.", "encoder.5."),
            _Rename("att_module_mu.0.layer.", "attention.mean.0."),
            _Rename("att_module_mu.", "attention.mean."),
            _STD,
            _ANCHORS,
            _Rename("decode.1.", "classifier."),
        ),
        dict.fromkeys(("block3.", "bn1.", "att_block3.", "bn_att", "att_conv"), _TWICE),
        {"bn1": "norm", "conv1": "body.0", "bn2": "body.1", "conv2": "body.4", "convShortcut": "shortcut"},
    ),
    _Layout(
        "VGG-aib of the bottleneck paper's authors (CUB)",
        ("att_module_mu.0.weight", "features.28.weight", "encode.2.weight"),
        ("vgg16_aib",),
        "decode.2.weight",
        (
            _Rename("features.", "features."),
            _Rename("encode.2.", "encoder.2."),
            _Rename("att_module_mu.", "attention.mean."),
            _STD,
            _ANCHORS,
            _Rename("decode.0.", "decoder.0."),
            _Rename("decode.2.", "classifier."),
        ),
    ),
    _Layout(
        "WRN-aib of the bottleneck paper's authors (CUB)",
        ("att_module_mu.0.0.conv1.weight", "encode.0.0.conv1.weight"),
        ("wrn50_2_aib",),
        "decode.2.weight",
        (
            _Rename("conv1.", "features.0."),
            _Rename("bn1.", "features.1."),
            _Rename("layer1.", "features.4."),
            _Rename("layer2.", "features.5."),
            _Rename("layer3.", "features.6."),
            _Rename("encode.", "encoder."),
            _Rename("att_module_mu.", "attention.mean."),
            _STD,
            _ANCHORS,
            _Rename("decode.0.", "decoder.0."),
            _Rename("decode.2.", "classifier."),
        ),
        dict.fromkeys(("layer4.", "att_layer4."), _TWICE) | {"tmp_layer.": "not used in the forward pass"},
    ),
    _Layout(
        "SaoYan's AttnVGG",
        ("conv_block1.op.0.weight", "projector.op.weight", "attn1.op.weight"),
        ("attn_vgg_before", "attn_vgg_after"),
        "classify.weight",
        (
            _Rename("conv_block1.op.", "local7.", 0),
            _Rename("conv_block2.op.", "local7.", 6),
            _Rename("conv_block3.op.", "local7.", 12),
            _Rename("conv_block4.op.", "local10.", 0),
            _Rename("conv_block5.op.", "local13.", 0),
            _Rename("projector.op.", "attention7.projection.", flatten=1),
            _Rename("attn1.op.", "attention7.", flatten=0),
            _Rename("attn2.op.", "attention10.", flatten=0),
            _Rename("attn3.op.", "attention13.", flatten=0),
            _Rename("classify.", "classifier."),
        ),
        dict.fromkeys(("conv_block6.", "dense."), _QUERY),
    ),
)


def rename(state: dict[str, torch.Tensor]) -> Renamed:
    """Convert the names of a published implementation to attnkern's; other names stay as they are."""
    layout = next((layout for layout in LAYOUTS if state.keys() >= {*layout.marks, layout.classifier}), None)
    if layout is None:
        return Renamed(state)
    found, renamed, left_out = {}, {}, {}
    for key, tensor in state.items():
        reason = next((old for old in layout.left_out if key.startswith(old)), None)
        if reason is not None:
            shown = f"{reason}*"
            left_out[shown] = (layout.left_out[reason], left_out.get(shown, ("", 0))[1] + 1)
            continue
        rule = next((rule for rule in layout.renames if key.startswith(rule.old)), None)
        if rule is None:
            found[key] = tensor  # an unknown name: loading raises an error
            continue
        rest = key[len(rule.old) :]
        if rule.shift is not None:
            rest = re.sub(r"^\d+", lambda number, rule=rule: str(int(number[0]) + rule.shift), rest)
        if layout.blocks and rule.old.endswith("layer."):
            rest = re.sub(r"(?<=\.)\w+(?=\.)", lambda part: layout.blocks.get(part[0], part[0]), rest, count=1)
        found[rule.new + rest] = tensor if rule.flatten is None else tensor.flatten(rule.flatten)
        old, new = rule.shown()
        if old != new:
            renamed[old] = (new, renamed.get(old, ("", 0))[1] + 1)
    networks, options, anchors = layout.networks, {}, found.get(_ANCHORS.new)
    if anchors is not None:
        networks, options = tuple(f"{name}_qt" for name in networks), {"num_anchors": anchors.numel()}
    classes = state[layout.classifier].shape[0]
    return Renamed(found, layout.title, networks, classes, options, renamed, left_out)
