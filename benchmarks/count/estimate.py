"""Estimates the time of a kernel from its counts, within about ±30 %: that of the slowest resource.

A kernel takes as long as the largest of
- **issue**: its warp instructions through the four schedulers of each multiprocessor,
- **chain**: what one block waits for, one thing after the other (loads that nothing covers, and the instructions of its
  longest warp), times the blocks that follow each other on a multiprocessor,
- **memory**: its bytes at 93 % of the bandwidth of a copy,
- **l2**: the sectors of its loads and stores, narrow ones several times each,
- **tensor**: the cycles of its matrix products,
- **shared**: the cycles of its requests to shared memory with their bank conflicts, and of those to global memory,
and for each launch a fixed time.
"""

from typing import NamedTuple

from benchmarks.count.sass import MEMORY_LATENCY, SECTOR

MULTIPROCESSORS = 132
CLOCK = 1.755e9  #: cycles a second under load
SCHEDULERS = 4  #: per multiprocessor, one instruction per cycle each
ISSUE = 0.8  #: share of the cycles in which they issue at best, with enough warps
CHAIN_CYCLES = 3  #: mean cycles between two instructions of a warp: more than 4 for dependent ones, fewer otherwise
LATENCY = MEMORY_LATENCY / (SCHEDULERS * ISSUE * CLOCK)  #: seconds of a load from memory
OVERLAPPED = 0.25  #: how much longer the last of many blocks take than their share, as a share of the resident blocks
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  #: bytes a second of a copy
SHARE = 0.93  #: the share of it that a kernel reaches
OF_MULTIPROCESSOR = 55e9  #: bytes a second that one multiprocessor takes at most
L2 = 5.0e12  #: bytes a second in sectors between the multiprocessors and the second-level cache
FILL = 0.6e-6  #: seconds before the first bytes arrive and after the last have left
LAUNCH = 2.2e-6  #: seconds of a launch after another one, in a graph


class Estimate(NamedTuple):
    """Seconds of a launch, by the resource that needs them."""

    seconds: float
    limit: str


def kernel(counts: dict, device: str) -> Estimate:
    """The estimate for one launch."""
    grid, resident = counts["grid"], counts["resident"]
    share = grid / MULTIPROCESSORS  # blocks per multiprocessor
    if share <= resident:
        blocks = -(-grid // MULTIPROCESSORS)
        rounds = 1.0
    else:
        blocks = share + OVERLAPPED * resident
        rounds = blocks / resident
    used = min(grid, MULTIPROCESSORS)
    waiting = counts["waits"] * LATENCY + counts["longest_warp"] * CHAIN_CYCLES / CLOCK
    sectors = sum(counts["load_sectors_by"].values()) + sum(counts["store_sectors_by"].values())
    cycles = sum(counts["shared_cycles_by"].values()) + sectors * SECTOR / 128
    limits = {
        "issue": blocks * counts["instructions"] / (SCHEDULERS * ISSUE * CLOCK),
        "chain": rounds * waiting,
        "memory": counts["bytes"] / min(BANDWIDTH[device] * SHARE, used * OF_MULTIPROCESSOR),
        "l2": grid * counts["l2_sectors"] * SECTOR / L2,
        "shared": blocks * cycles / CLOCK,
        "tensor": blocks * counts.get("tensor_cycles", 0) / (SCHEDULERS * CLOCK),
    }
    limit = max(limits, key=limits.get)
    return Estimate(limits[limit] + FILL, limit)


def row(counted: dict, device: str) -> Estimate:
    """The estimate for all launches of a row, and what limits the longest of them."""
    launches = [kernel(launch, device) for launch in counted["launches"]]
    seconds = sum(launch.seconds + LAUNCH for launch in launches) + (LAUNCH + FILL) * len(counted["others"])
    return Estimate(seconds, max(launches).limit if launches else "launch")
