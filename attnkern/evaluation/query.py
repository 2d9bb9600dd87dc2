"""Attention with the global vector of another image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from attnkern._checks import check_kind, check_shape
from attnkern.evaluation.inputs import Normalise, batches, check_evaluating, check_maps, identity
from attnkern.nn import CompatibilityPool


class QueryDriven(NamedTuple):
    """Result of :func:`query_driven`."""

    own: torch.Tensor  #: (N, h, w) A₁, with the target's own global vector
    queried: torch.Tensor  #: (N, h, w) A₂, with the query image's global vector
    change: torch.Tensor  #: (N, h, w) (A₂ - A₁)/A₁; 0 where the two are equal


def pool_attention(
    model: nn.Module, name: str, normalise: Normalise = identity
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function ``attend(images, queries)``: maps of a pool for images, with the query vectors of other images.

    The query that a :class:`attnkern.nn.CompatibilityPool` receives in a forward pass of ``queries`` replaces the one
    in a forward pass of ``images``. A pool that is called without a query (the parametrised compatibility) gives the
    same map for all ``queries``.

    Args:
        model: in evaluation mode.
        name: name of the pool, such as "attention10".
        normalise: applied to images and queries first.

    Raises:
        ValueError: no CompatibilityPool of that name, or a model in training mode.

    Source: Learn to Pay Attention, Appendix A.5.
    """
    check_evaluating("pool_attention", model)
    pool = dict(model.named_modules()).get(name)
    if not isinstance(pool, CompatibilityPool):
        raise ValueError(f"pool_attention: name must be the name of a CompatibilityPool, got {name!r}")

    def attend(images, queries):
        taken, maps = [], []

        def take(_module, inputs, options):
            taken.append(inputs[1] if len(inputs) > 1 else options.get("query"))

        def give(_module, inputs, options):
            query = taken[0]
            if query is not None and query.dim() == 2:
                query = query.expand(len(inputs[0]), -1)
            return inputs[:1], {**options, "query": query}

        def keep(_module, _inputs, output):
            maps.append(output)

        handle = pool.register_forward_pre_hook(take, with_kwargs=True)
        try:
            model(normalise(queries))
        finally:
            handle.remove()
        handles = [
            pool.register_forward_pre_hook(give, with_kwargs=True),
            pool.map.register_forward_hook(keep),
        ]
        try:
            model(normalise(images))
        finally:
            for handle in handles:
                handle.remove()
        return maps[0]

    return attend


@torch.no_grad()
def query_driven(
    attend: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    query: torch.Tensor,
    *,
    batch_size: int = 128,
    device=None,
) -> QueryDriven:
    """How attention on target images changes when a query image provides the global vector.

    Args:
        attend: from images (N, C, H, W) and N or one images that provide the global vectors to maps (N, h, w), such as
            :func:`pool_attention` returns. With the parametrised compatibility the change is zero.
        targets: (N, C, H, W), or an iterable of batches (of tuples that begin with the images).
        query: (C, H, W) or (1, C, H, W).
        batch_size: images per batch if ``targets`` is a tensor.
        device: device for the images, or None to leave them where they are.

    Returns:
        A₁, A₂ and (A₂ - A₁)/A₁, on the CPU.

    Raises:
        ValueError, TypeError: no target, images or maps of another shape or dtype.

    Source: Learn to Pay Attention, Appendix A.5 and Figure 10.
    """
    where = "query_driven"
    check_kind(where, torch.Tensor, query=query)
    ok = query.dim() == 3 or (query.dim() == 4 and len(query) == 1)
    check_shape(where, "query", query, "(C, H, W) or (1, C, H, W)", ok)
    query = query.view(1, *query.shape[-3:])
    query = query if device is None else query.to(device)
    own, queried = [], []
    for images, *_ in batches(where, "targets", targets, batch_size, device):
        for found, source in ((own, images), (queried, query)):
            maps = attend(images, source)
            check_maps(where, "attend's map", maps)
            found.append(maps.cpu())
    own, queried = torch.cat(own), torch.cat(queried)
    return QueryDriven(own, queried, torch.where(own == queried, 0, (queried - own) / own))
