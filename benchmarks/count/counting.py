"""Counts of a launch, and of every launch of a row: an operator's pass at a shape, dtype and layout, on a backend."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.count import launches, machine, opcodes, sass
from benchmarks.count.code import CACHE, digest
from benchmarks.count.launches import Launch

#: What a multiprocessor of compute capability 9.0 has.
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 233472


@cache
def _version() -> str:
    """Of the interpreter: counts that another one made do not count."""
    return digest(
        *(Path(module.__file__).read_text() for module in (sass, opcodes, machine)), Path(__file__).read_text()
    )


def blocks_per_multiprocessor(registers: int, threads: int, shared: int) -> int:
    """How many blocks are resident: registers come in groups of 256 a warp, shared memory in 128 bytes."""
    warps = threads // sass.WARP
    of_warp = -(-max(registers, 1) * sass.WARP // 256) * 256
    of_block = -(-max(shared, sass.SHARED_RESERVED) // 128) * 128
    return min(REGISTERS // of_warp // warps, THREADS // threads, BLOCKS, SHARED // of_block)


def count(launch: Launch) -> dict:
    """What one block of a launch does, counted, with what the launch takes. Remembered in build/count."""
    identity = (
        launch.kernel.function.text, launch.grid, launch.threads, launch.shared, launch.cluster,
        launch.parameters.hex(), launch.regions, launch.kernel[1:],
    )  # fmt: skip
    path = CACHE / f"counts/{digest(_version(), *identity)}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(launch)}")
        partial.write_text(json.dumps(_count(launch)))
        partial.replace(path)
    return json.loads(path.read_text())


def _count(launch: Launch) -> dict:
    kernel, shared = launch.kernel, launch.kernel.shared + launch.shared
    counts = machine.run(
        kernel.function, launch.parameters, grid=launch.grid, threads=launch.threads, cluster=launch.cluster,
        shared=shared, regions=launch.regions,
    )  # fmt: skip
    found = dataclasses.asdict(counts)
    warps, read, written = found.pop("warps"), found.pop("read"), found.pop("written")
    return {
        "kernel": launch.name,
        "grid": launch.grid,
        "threads": launch.threads,
        "cluster": launch.cluster,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared": shared,
        "resident": blocks_per_multiprocessor(kernel.registers, launch.threads, shared),
        "instructions": counts.total,
        "longest_warp": max(warps),
        "bytes": _bytes(launch, read, scratch=False) + _bytes(launch, written, scratch=True),
        "opcodes": found.pop("instructions"),
        **{
            f"{key}_by": {str(width): n for width, n in by.items()} for key, by in found.items() if isinstance(by, dict)
        },
        "waits": round(counts.waits, 2),
    }


def _bytes(launch, of_block: dict[int, int], scratch: bool) -> int:
    """Bytes of all blocks, at most each tensor once. Scratch is read from the cache that it was just written to."""
    total = 0
    for region, size in of_block.items():
        if region < 0:
            continue
        tensor = launch.regions[region]
        if scratch or not tensor.scratch:
            total += min(size * launch.grid, tensor.size)
    return total


def rows(case: cases.Case, backend: str, **options) -> list[dict]:
    """The counted rows of a case, forward and backward."""
    found = []
    for which, recorded in launches.BACKENDS[backend](case, **options).items():
        row = {
            "op": case.op,
            "shape": list(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout,
            "anchors": case.anchors,
            "pass": which,
            "backend": backend,
            "others": recorded.others,
            "launches": [count(launch) for launch in recorded.launches],
        }
        found.append(row)
    return found


def case_of(row: dict) -> cases.Case:
    return cases.Case(row["op"], tuple(row["shape"]), getattr(torch, row["dtype"]), row["layout"], row["anchors"])


def floor_bytes(row: dict) -> int:
    """Bytes that the pass must move: features read and written once."""
    case = case_of(row)
    forward = case.bytes("forward")
    return forward if row["pass"] == "forward" else case.bytes("forward+backward") - forward


def per_element(row: dict) -> float:
    """Executed instructions of threads for each element of the features."""
    executed = sum(launch["instructions"] * launch["grid"] for launch in row["launches"])
    return executed * sass.WARP / torch.Size(row["shape"]).numel()


def widths(row: dict, kind: str) -> dict[str, float]:
    """The share of the bytes that the main kernel loads or stores by width in bits."""
    main = max(row["launches"], key=lambda launch: launch["instructions"] * launch["grid"])
    moved = {width: n * (1024 if width == "bulk" else int(width)) for width, n in main[f"{kind}_by"].items()}
    total = sum(moved.values()) or 1
    return {width: n / total for width, n in moved.items()}
