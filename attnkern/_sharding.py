"""DTensor's sharding rules for the operators."""

import functools

from attnkern._operators import OPERATORS
from attnkern._ops import BACKENDS


def _strategies(operator, shards, args):
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements = {"0": Shard(0), "1": Shard(1), "R": Replicate(), "P": Partial()}
    tensors = ["Tensor" in str(argument.type) for argument in operator._schema.arguments]
    replicated = " ".join(["R"] * sum(tensors)) + " -> " + " ".join(["R"] * len(operator._schema.returns))
    found = []
    for rule in (*shards(*args), replicated):
        inputs, outputs = ([placements[mark] for mark in side.split()] for side in rule.split(" -> "))
        if len(inputs) != sum(tensors) or len(outputs) != len(operator._schema.returns):
            raise ValueError(
                f"{operator}: the sharding rule {rule!r} must have {sum(tensors)} arguments and "
                f"{len(operator._schema.returns)} results"
            )
        marks = iter(inputs)
        wanted = [next(marks) if tensor else None for tensor in tensors]
        found.append((outputs, [place if arg is not None else None for place, arg in zip(wanted, args, strict=True)]))
    return found


@functools.cache
def register_sharding() -> None:
    """Register the operators' sharding rules with DTensor: all by image, and by channel where that is exact.

    Call it before passing DTensors to attnkern. It imports ``torch.distributed.tensor``, which is slow. Sums over the
    batch (anchors' gradients and counts, losses, the gradient of a query shared by the batch) and the rectangle's
    gradient over shards of channels are partial sums, which DTensor adds when they are used. The losses of a shard are
    divided by the divisor of the whole batch, so that shards of different sizes give the right mean.
    """
    from torch.distributed.tensor import experimental

    for operators in BACKENDS.values():
        for name, record in OPERATORS.items():
            operator = getattr(operators, name)
            experimental.register_sharding(operator)(
                lambda *args, operator=operator, shards=record.shards: _strategies(operator, shards, args)
            )
