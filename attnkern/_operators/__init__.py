"""Fake kernels, decompositions, layouts and sharding rules of the operators: one module per mechanism."""

import inspect

import torch

from attnkern._operators import pool, quantize, window
from attnkern._operators.record import Operator
from attnkern._schemas import SCHEMAS

OPERATORS = {**window.OPERATORS, **quantize.OPERATORS, **pool.OPERATORS}

if OPERATORS.keys() != SCHEMAS.keys():
    raise ImportError(f"operators without a schema or without a record: {sorted(OPERATORS.keys() ^ SCHEMAS.keys())}")


def check_record(name: str, record: Operator) -> None:
    """Raise ImportError unless the functions of a record take the arguments of the operator's schema."""
    arguments = [argument.name for argument in torch._C.parse_schema(name + SCHEMAS[name]).arguments]
    for role in ("fake", "decomposition"):
        taken = list(inspect.signature(getattr(record, role)).parameters)
        if taken != arguments:
            raise ImportError(f"{name}: the arguments of its {role} are {taken}, those of its schema {arguments}")
    if unknown := set(record.features) - set(arguments):
        raise ImportError(f"{name}: its features name arguments that the schema does not have: {sorted(unknown)}")


for _name, _record in OPERATORS.items():
    check_record(_name, _record)
