"""What the networks of Learn to Pay Attention share: layers, initialisation, compatibility pooling at several levels.

Layers, dropout, initialisation and heads follow the authors' code (Torch7), except where a class says otherwise. Under
the parametrised compatibility the global vector g cancels (see :class:`attnkern.nn.CompatibilityPool`), so the layers
between the last local map and g receive no gradient. They are in the state_dict, but frozen and not run unless
``global_branch`` is True; the logits are the same either way. The bias of that compatibility cancels too and is left
out: each of its levels has one parameter fewer than in the authors' code.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import check_choice
from attnkern.models.layers import MapNorm, Network, VectorNorm, conv_bn_relu, he_normal, zero_biases
from attnkern.nn import CompatibilityPool, ProgressiveAttention

#: Epsilon of BatchNorm after the convolutions of VGG and of the branches to g; elsewhere the default, 1e-5.
EPS = 1e-3
#: The networks' short names of the compatibilities of :class:`attnkern.nn.CompatibilityPool`.
COMPATIBILITIES = {"pc": "parametrised", "dp": "dot"}
#: Initialisations. "torch7", the authors': BatchNorm scales uniform in [0, 1], u normal with variance 2 (He et al.'s
#: for a 1x1 convolution to one map). "pytorch": scales of one, u uniform in ±1/√C, so that attention starts almost
#: uniform.
INITS = ("torch7", "pytorch")


def initialise(network: nn.Module, init: str) -> None:
    """He et al.'s weights for convolutions, zero biases, and BatchNorm scales and u as :data:`INITS` describes."""
    he_normal(network)
    zero_biases(network, nn.Conv2d)
    for module in network.modules():
        if init == "torch7" and isinstance(module, (VectorNorm, MapNorm)):
            nn.init.uniform_(module.weight)
        elif init == "torch7" and isinstance(module, CompatibilityPool) and module.weight is not None:
            nn.init.normal_(module.weight, std=math.sqrt(2))
        elif init == "pytorch" and isinstance(module, ProgressiveAttention):
            module.score.reset_parameters()


def conv_block(inputs: int, outputs: int, convs: int, rate: float, first_rate: float | None = None) -> list[nn.Module]:
    """``convs`` 3x3 convolutions with dropout after each but the last; ``first_rate`` is for the first dropout."""
    layers = conv_bn_relu(inputs, outputs, EPS)
    for index in range(convs - 1):
        layers += [nn.Dropout(first_rate if index == 0 and first_rate is not None else rate)]
        layers += conv_bn_relu(outputs, outputs, EPS)
    return layers


def max_pool(size: int) -> nn.Module:
    """Maximum over windows of ``size``; partial windows at the borders count."""
    return nn.MaxPool2d(size, ceil_mode=True)


class PooledNetwork(Network):
    """A trunk whose maps are pooled by compatibility at one or more levels.

    A subclass adds the layers of the trunk, among them ``trunk`` from the last map to g, then calls ``_add_pools``.

    Args:
        compatibility: "pc" (parametrised) or "dp" (dot product).
        head: "concat" joins the levels' vectors for one classifier; "indep" has one classifier per level.
        combine: of "indep": "mean" of the probabilities (the paper), or "sum_logprob", the sum of their logarithms
            (the authors' code): a product of experts, whose loss is the sum of the levels' losses.
        global_branch: under "pc", run the layers up to g, whose gradients are exactly zero.
    """

    def _check_options(self, compatibility, head, combine, init):
        where = type(self).__name__
        check_choice(where, "compatibility", compatibility, COMPATIBILITIES)
        check_choice(where, "head", head, ("concat", "indep"))
        check_choice(where, "combine", combine, ("mean", "sum_logprob"))
        check_choice(where, "init", init, INITS)

    def _add_pools(self, channels, query_channels, rate, query_rate, compatibility, head, combine, global_branch):
        """Add pools, context layers, projections of g and the classifier.

        Args:
            channels: {level: C}.
            query_channels: of g.
            rate: dropout rate of the context layers.
            query_rate: dropout rate before the projections of g.
        """
        self.combine = combine
        self.global_branch = global_branch or compatibility == "dp"
        for level, c in channels.items():
            self.add_module(f"attention{level}", CompatibilityPool(c, c, COMPATIBILITIES[compatibility]))
            context = nn.Sequential(VectorNorm(c), nn.ReLU(inplace=True), nn.Dropout(rate))
            self.add_module(f"context{level}", context)
        # Levels with the same number of channels share a projection of g.
        self.projections = nn.ModuleDict(
            {
                str(c): nn.Sequential(
                    VectorNorm(query_channels), nn.ReLU(), nn.Dropout(query_rate), nn.Linear(query_channels, c)
                )
                for c in sorted(set(channels.values()) - {query_channels})
            }
        )
        widths = list(channels.values())
        self.classifier = (
            nn.Linear(sum(widths), self.num_classes)
            if head == "concat"
            else nn.ModuleList(nn.Linear(c, self.num_classes) for c in widths)
        )

    def _freeze_unused(self):
        """Freeze the layers up to g unless ``global_branch``: they would receive no gradient."""
        for module in (self.trunk, self.projections):
            module.requires_grad_(self.global_branch)

    def _classify(self, levels, last):
        """Logits from the local maps {level: (N, C, H, W)}; ``last`` is the input of ``trunk``."""
        g = self.trunk(last) if self.global_branch else None
        vectors = []
        for level, local in levels.items():
            query, c = g, str(local.shape[1])
            if g is not None and c in self.projections:
                query = self.projections[c](g)
            pooled = self.get_submodule(f"attention{level}")(local, query)
            vectors.append(self.get_submodule(f"context{level}")(pooled))
        if not isinstance(self.classifier, nn.ModuleList):
            return self.classifier(torch.cat(vectors, 1))
        heads = zip(self.classifier, vectors, strict=True)
        experts = torch.stack([F.log_softmax(head(vector), 1) for head, vector in heads])
        return (
            experts.sum(0) if self.combine == "sum_logprob" else experts.logsumexp(0) - torch.tensor(len(experts)).log()
        )

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy; with "sum_logprob" the sum of the levels' cross entropies."""
        if isinstance(self.classifier, nn.ModuleList) and self.combine == "sum_logprob":
            return F.nll_loss(output, labels)
        return F.cross_entropy(output, labels)
