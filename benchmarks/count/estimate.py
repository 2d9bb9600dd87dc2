"""Microseconds of a kernel out of its counts, about ±30 %: the slowest of what a multiprocessor's blocks need.

A kernel takes as long as the largest of
- **issue**: its warp instructions through the four schedulers of each multiprocessor,
- **chain**: what one block waits for, one thing after the other (loads that nothing covers, and the instructions of its
  longest warp), times the blocks that follow each other on a multiprocessor,
- **memory**: its bytes at 93 % of the bandwidth of a copy,
- **l2**: the sectors of its loads and stores, narrow ones several times each,
- **shared**: the cycles of its requests to shared memory with their bank conflicts, and of those to global memory,
and for each launch a fixed time.
"""

from typing import NamedTuple

from benchmarks.count.sass import MEMORY_LATENCY, SECTOR

MULTIPROCESSORS = 132
CLOCK = 1.755e9  #: cycles a second under load
SCHEDULERS = 4  #: of a multiprocessor, an instruction a cycle each
ISSUE = 0.8  #: of these cycles at best, with enough warps
CHAIN_CYCLES = 3  #: between two instructions of a warp: more than 4 where one needs the other, fewer where not
LATENCY = MEMORY_LATENCY / (SCHEDULERS * ISSUE * CLOCK)  #: seconds of a load from memory
OVERLAPPED = 0.25  #: of the resident blocks: how much longer the last of many blocks take than their share
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  #: bytes a second of a copy
SHARE = 0.93  #: of it that a kernel reaches
OF_MULTIPROCESSOR = 55e9  #: bytes a second that one multiprocessor takes at most
L2 = 5.0e12  #: bytes a second in sectors between the multiprocessors and the second-level cache
FILL = 0.6e-6  #: until the first bytes come and after the last have gone
LAUNCH = 2.2e-6  #: a launch behind another one, in a graph


class Estimate(NamedTuple):
    """Seconds of a launch, and what they are spent on."""

    seconds: float
    limit: str


def kernel(counts: dict, device: str) -> Estimate:
    """The estimate for one launch."""
    grid, resident = counts["grid"], counts["resident"]
    share = grid / MULTIPROCESSORS  # of the blocks on each multiprocessor
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
    }
    limit = max(limits, key=limits.get)
    return Estimate(limits[limit] + FILL, limit)


def row(counted: dict, device: str) -> Estimate:
    """The estimate for all launches of a row, and what limits the longest of them."""
    launches = [kernel(launch, device) for launch in counted["launches"]]
    seconds = sum(launch.seconds + LAUNCH for launch in launches) + (LAUNCH + FILL) * len(counted["others"])
    return Estimate(seconds, max(launches).limit if launches else "launch")
