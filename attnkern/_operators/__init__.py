"""Fake kernels, decompositions, layouts and sharding rules of the operators: one module per mechanism."""

from attnkern._operators import pool, quantize, window
from attnkern._schemas import SCHEMAS

OPERATORS = {**window.OPERATORS, **quantize.OPERATORS, **pool.OPERATORS}

if OPERATORS.keys() != SCHEMAS.keys():
    raise ImportError(f"operators without a schema or without a record: {sorted(OPERATORS.keys() ^ SCHEMAS.keys())}")
