"""How DTensor may cut the operators into shards."""

import functools

from attnkern._ops import BACKENDS, SCHEMAS

#: Of each operator: placements of its tensors, then of its results. 0 is sharded by image, 1 by channel, R replicated,
#: P a partial sum. Everything replicated goes as well. Channels are cut where nothing mixes them: pooling needs all for
#: its scores. A gradient that is added once to a sum over channels is taken as partial, so that shards share it.
_RULES = {
    "window_map_fwd": ("0 -> 0 0",),
    "window_map_bwd": ("0 0 0 -> 0",),
    "window_fwd": ("0 0 -> 0 0 0", "1 R -> 1 R R"),
    "window_bwd": ("0 0 0 0 0 -> 0 0", "1 P 1 R R -> 1 P"),
    "quantize_fwd": ("0 R -> 0 0 P P P P",),
    "quantize_bwd": ("0 R R 0 R 0 P -> 0 P",),
    "anchor_fwd": ("0 0 R -> 0 0 0 P P P P", "1 R R -> 1 R R R R R R"),
    "anchor_bwd": ("0 0 R R 0 0 R 0 P -> 0 0 P", "1 P R P 1 R R R R -> 1 P R"),
    "pool_fwd": ("0 0 -> 0 0 0 0",),
    "pool_bwd": ("0 0 0 0 0 0 0 -> 0 0",),
}
_SHARED_QUERY = {"pool_fwd": ("0 R -> 0 0 0 0",), "pool_bwd": ("0 0 0 0 R 0 0 -> 0 P",)}


def _strategies(name, operator, args):
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements = {"0": Shard(0), "1": Shard(1), "R": Replicate(), "P": Partial()}
    tensors = ["Tensor" in str(argument.type) for argument in operator._schema.arguments]
    rules = _RULES[name]
    if name in _SHARED_QUERY and args[1 if name == "pool_fwd" else 4].ndim == 1:
        rules = _SHARED_QUERY[name]
    everything = " ".join(["R"] * sum(tensors)) + " -> " + " ".join(["R"] * len(operator._schema.returns))
    found = []
    for rule in (*rules, everything):
        inputs, outputs = ([placements[mark] for mark in side.split()] for side in rule.split(" -> "))
        marks = iter(inputs)
        wanted = [next(marks) if tensor else None for tensor in tensors]
        found.append((outputs, [place if arg is not None else None for place, arg in zip(wanted, args, strict=True)]))
    return found


@functools.cache
def register_sharding() -> None:
    """Teach DTensor the operators: sharded by image all of them, by channel where that is exact.

    Call it once, before DTensors reach attnkern; it imports ``torch.distributed.tensor``, which takes long. Sums over
    the batch (anchors' gradients and counts, losses, the gradient of a query that the batch shares) and the rectangle's
    gradient over shards of channels are partial sums, added where they are needed; a shard's losses are divided by
    what the whole batch's are divided by, so uneven shards stay right.
    """
    from torch.distributed.tensor import experimental

    for operators in BACKENDS.values():
        for name in SCHEMAS:
            operator = getattr(operators, name)
            experimental.register_sharding(operator)(
                lambda *args, name=name, operator=operator: _strategies(name, operator, args)
            )
