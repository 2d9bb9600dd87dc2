"""Attention under the global vector of another image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from attnkern._checks import check_kind, check_shape, check_tensor, device_of
from attnkern.evaluation.inputs import Normalise, batches, check_evaluating, check_maps, identity
from attnkern.nn import CompatibilityPool


class QueryDriven(NamedTuple):
    """Result of :func:`query_driven`."""

    own: torch.Tensor  #: (N, h, w) A₁, under the target's own global vector
    queried: torch.Tensor  #: (N, h, w) A₂, under the query image's
    change: torch.Tensor  #: (N, h, w) (A₂ - A₁)/A₁; 0 where the two are equal


def pool_attention(
    model: nn.Module, name: str, normalise: Normalise = identity
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``attend(images, queries)``: the map of a :class:`attnkern.nn.CompatibilityPool` under others' query vectors.

    The vector that the pool takes in a forward of ``queries`` takes the place of that in a forward of ``images``. A
    pool that is called without one (the parametrised compatibility) stays as it is.

    Args:
        model: in evaluation mode.
        name: of the pool, such as "attention10".
        normalise: applied to images and queries first.

    Raises:
        ValueError, TypeError: the name is no pool's, or the model is in training mode or no Module.

    Source: Learn to Pay Attention, Appendix A.5.
    """
    check_kind("pool_attention", nn.Module, model=model)
    check_evaluating("pool_attention", model)
    check_kind("pool_attention", str, name=name)
    check_kind("pool_attention", Callable, normalise=normalise)
    pool = dict(model.named_modules()).get(name)
    if not isinstance(pool, CompatibilityPool):
        raise ValueError(f"pool_attention: name must be that of a CompatibilityPool, got {name!r}")

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
    """How attention on target images changes when a query image gives the global vector.

    Args:
        attend: from images (N, C, H, W) and the images that give the global vectors, as many or one, to maps
            (N, h, w), such as :func:`pool_attention`. Under the parametrised compatibility the change is zero.
        targets: (N, C, H, W), or an iterable of batches (of tuples, the first of each).
        query: (C, H, W) or (1, C, H, W).
        batch_size: images at a time, where ``targets`` is a tensor.
        device: where images are moved, or None.

    Returns:
        A₁, A₂ and (A₂ - A₁)/A₁, on the CPU.

    Raises:
        ValueError, TypeError: no target, images or maps of another shape or kind.

    Source: Learn to Pay Attention, Appendix A.5 and Figure 10.
    """
    where = "query_driven"
    check_kind(where, Callable, attend=attend)
    check_tensor(where, "query", query)
    ok = query.dim() == 3 or (query.dim() == 4 and len(query) == 1)
    check_shape(where, "query", query, "(C, H, W) or (1, C, H, W)", ok)
    query = query.view(1, *query.shape[-3:])
    query = query if device is None else query.to(device_of(where, device))
    own, queried = [], []
    for images, *_ in batches(where, "targets", targets, batch_size, device):
        for found, source in ((own, images), (queried, query)):
            maps = attend(images, source)
            check_maps(where, "attend's map", maps)
            found.append(maps.cpu())
    own, queried = torch.cat(own), torch.cat(queried)
    return QueryDriven(own, queried, torch.where(own == queried, 0, (queried - own) / own))
