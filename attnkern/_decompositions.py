"""The operators in plain ATen, for programs that must run without attnkern."""

import torch

from attnkern._operators import OPERATORS
from attnkern._ops import BACKENDS


def decompositions() -> dict:
    """PyTorch's default decompositions, plus one into plain ATen for every attnkern operator.

    ``torch.export.export(model, ...).run_decompositions(attnkern.decompositions())`` gives a program that runs without
    attnkern: for ONNX (``torch.onnx.export(program, dynamo=True)``) and other runtimes.
    """
    table = torch.export.default_decompositions()
    for operators in BACKENDS.values():
        table.update({getattr(operators, name): record.decomposition for name, record in OPERATORS.items()})
    return table
