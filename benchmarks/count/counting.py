"""Counts of a launch, with the resources that it uses."""

import dataclasses
import json
import os
from functools import cache
from pathlib import Path

from benchmarks.count import machine, opcodes, sass
from benchmarks.count.code import CACHE, digest
from benchmarks.count.launches import Launch

#: Resources of a multiprocessor of compute capability 9.0.
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 233472
#: Bytes of scratch that stay in the second-level cache until they are read.
CACHED_SCRATCH = 32 << 20


@cache
def _version() -> str:
    """A hash of the interpreter: counts that another version made are not reused."""
    return digest(
        *(Path(module.__file__).read_text(encoding="utf-8") for module in (sass, opcodes, machine)),
        Path(__file__).read_text(encoding="utf-8"),
    )


def blocks_per_multiprocessor(registers: int, threads: int, shared: int) -> int:
    """The number of resident blocks. Registers are allocated in groups of 256 per warp, shared memory in 128 bytes."""
    warps = threads // sass.WARP
    of_warp = -(-max(registers, 1) * sass.WARP // 256) * 256
    of_block = -(-max(shared, sass.SHARED_RESERVED) // 128) * 128
    return min(REGISTERS // of_warp // warps, THREADS // threads, BLOCKS, SHARED // of_block)


def count(launch: Launch) -> dict:
    """Counts for one block of a launch, with the resources of the launch. Cached in build/count."""
    identity = (
        launch.kernel.function.text, launch.grid, launch.threads, launch.shared, launch.cluster,
        launch.parameters.hex(), launch.regions, launch.kernel[1:],
    )  # fmt: skip
    path = CACHE / f"counts/{digest(_version(), *identity)}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_count(launch)), encoding="utf-8")
        partial.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


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
        "grid": launch.blocks,
        "threads": launch.threads,
        "cluster": launch.cluster,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared": shared,
        "resident": blocks_per_multiprocessor(kernel.registers, launch.threads, shared),
        "instructions": counts.total,
        "longest_warp": max(warps),
        "bytes": _bytes(launch, read, read=True) + _bytes(launch, written, read=False),
        "opcodes": found.pop("instructions"),
        **{f"{key}_by": by for key, by in found.items() if isinstance(by, dict)},
        "l2_sectors": counts.l2_sectors,
        "tensor_cycles": counts.tensor_cycles,
        "waits": round(counts.waits, 2),
    }


def _bytes(launch, of_block: dict[int, int], read: bool) -> int:
    """Bytes of all blocks, each tensor at most once. Scratch that fits into the cache is read from there."""
    total = 0
    for region, size in of_block.items():
        if region < 0:
            continue
        tensor = launch.regions[region]
        moved = min(size * launch.blocks, tensor.size)
        if not (read and tensor.scratch and moved <= CACHED_SCRATCH):
            total += moved
    return total
