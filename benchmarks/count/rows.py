"""Counted rows: an operator's pass at a shape, dtype and layout, on a backend."""

import functools

import torch

from benchmarks import cases
from benchmarks.count import counting, estimate, inductor, launches, sass

#: What each backend launches for a case, by pass.
BACKENDS = {"native": launches.native, "triton": launches.triton, "compile": inductor.compiled}


def rows(case: cases.Case, backend: str, **options) -> list[dict]:
    """The counted rows of a case, forward and backward. Of the alternatives of a tuner the fastest is taken."""
    found = []
    for which, recorded in BACKENDS[backend](case, **options).items():
        row = {
            "op": case.op,
            "shape": list(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout,
            "anchors": case.anchors,
            "pass": which,
            "backend": backend,
            "others": recorded.others,
            **{name: getattr(case, name) for name in ("queries", "windows") if getattr(case, name)},
            "launches": [
                min(map(counting.count, candidates), key=functools.partial(estimate.kernel, device="H200"))
                for candidates in recorded.launches
            ],
        }
        found.append(row)
    return found


def case_of(row: dict) -> cases.Case:
    return cases.Case(
        row["op"], tuple(row["shape"]), getattr(torch, row["dtype"]), row["layout"], row["anchors"],
        row.get("queries", 0), row.get("windows", 0),
    )  # fmt: skip


def floor_bytes(row: dict) -> int:
    """Bytes that the pass must move: features read and written once."""
    case = case_of(row)
    forward = case.bytes("forward")
    return forward if row["pass"] == "forward" else case.bytes("forward+backward") - forward


def per_element(row: dict) -> float:
    """Executed instructions of threads for each element of the features."""
    executed = sum(launch["instructions"] * launch["grid"] for launch in row["launches"])
    return executed * sass.WARP / torch.Size(row["shape"]).numel()


def main_launch(row: dict) -> dict:
    """The launch that moves the most bytes of the features, or of all tensors if the operator has no features."""
    return max(row["launches"], key=lambda launch: launch["bytes"])


def widths(row: dict, kind: str) -> dict[str, float]:
    """The share of the bytes that the main kernel loads or stores, by width in bits, the largest first."""
    by_width = main_launch(row)[f"{kind}_by"].items()
    moved = {width: n * (1024 if width == "bulk" else int(width)) for width, n in by_width}
    return {width: moved[width] / sum(moved.values()) for width in sorted(moved, key=moved.get, reverse=True)}


def goal(row: dict, device: str) -> float:
    """Seconds for the bytes that must be moved, at the bandwidth that a kernel reaches, and for the launches."""
    count = len(row["launches"]) + len(row["others"])
    return floor_bytes(row) / (estimate.BANDWIDTH[device] * estimate.SHARE) + estimate.LAUNCH * count
