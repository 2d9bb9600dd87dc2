"""Which of native and Triton is faster, row by row, and the simplest rule that predicts it."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.count import estimate

OURS = ("native", "triton")
#: A longer rule must be this much faster by geometric mean.
WORTH = 1.01


class Call(NamedTuple):
    """One call: an operator at a shape, dtype and layout, with the seconds of forward and backward by backend."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    seconds: dict[str, float]

    @property
    def positions(self) -> int:
        return math.prod(self.shape[2:])


class Rule(NamedTuple):
    """Chooses Triton where all conditions hold, otherwise native."""

    conditions: tuple[str, ...]
    mean: float  #: geometric mean of the time over that of the better backend
    worst: float
    worst_at: str

    def __str__(self):
        if self.conditions == ("never",):
            return "native"
        if not self.conditions:
            return "Triton"
        return f"Triton where {' and '.join(self.conditions)}, else native"


def calls(rows: list[dict], device: str) -> list[Call]:
    """Joins the rows of both backends and both passes of each call."""
    found = {}
    for row in rows:
        if row["backend"] in OURS:
            key = row["op"], tuple(row["shape"]), row["dtype"], row["layout"], row["anchors"]
            seconds = found.setdefault(key, {})
            seconds[row["backend"]] = seconds.get(row["backend"], 0) + estimate.row(row, device).seconds
    return [Call(*key[:4], seconds) for key, seconds in found.items() if len(seconds) == len(OURS)]


def _conditions(group: list[Call]) -> dict[str, Callable[[Call], bool]]:
    """The conditions of rules: on the layout, the dtype, and whether positions or channels exceed a number."""
    found = {
        "channels lie innermost": lambda call: call.layout == "channels_last",
        "positions lie innermost": lambda call: call.layout == "contiguous",
        "features are float32": lambda call: call.dtype == "float32",
        "features are half-precision": lambda call: call.dtype != "float32",
    }
    for name, size in (("positions", lambda call: call.positions), ("channels", lambda call: call.shape[1])):
        for limit in sorted({size(call) for call in group})[1:]:
            found[f"{name} ≥ {limit}"] = lambda call, size=size, limit=limit: size(call) >= limit
            found[f"{name} < {limit}"] = lambda call, size=size, limit=limit: size(call) < limit
    return found


def _rule(names, conditions, group) -> Rule:
    ratios = []
    for call in group:
        triton = names != ("never",) and all(conditions[name](call) for name in names)
        ratio = call.seconds[OURS[triton]] / min(call.seconds.values())
        ratios.append((ratio, "x".join(map(str, call.shape)) + f" {call.dtype} {call.layout}"))
    mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
    return Rule(names, mean, *max(ratios))


def rule(group: list[Call]) -> Rule:
    """The best rule of at most two conditions. A second condition must bring a minimum gain."""
    conditions = _conditions(group)
    best = min((_rule(names, conditions, group) for names in ((), ("never",))), key=lambda rule: rule.mean)
    for count in (1, 2):
        names = itertools.combinations(conditions, count)
        longer = min((_rule(each, conditions, group) for each in names), key=lambda rule: rule.mean)
        if longer.mean * WORTH <= best.mean:
            best = longer
    return best


def always_native(rows: list[dict], device: str = "H200") -> Rule:
    """The rule of the automatic choice, which is native for all calls."""
    return _rule(("never",), {}, calls(rows, device))


def rules(rows: list[dict], device: str = "H200") -> dict[str, Rule]:
    """The rule of each operator."""
    found = calls(rows, device)
    return {op: rule([call for call in found if call.op == op]) for op in dict.fromkeys(call.op for call in found)}
