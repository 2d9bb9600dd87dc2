"""Calls every backend with many random shapes: no memory leak, bitwise equal results, bounded caches.

`python tests/soak.py --calls 40000` prints each broken promise and then exits with 1.
"""

import argparse
import ctypes
import functools
import gc
import random
import sys
import time
from pathlib import Path

import torch
from cases import CASES, make, run

from attnkern import _backend, testing

#: Allowed growth of memory: after malloc_trim, glibc keeps pages with one live block, some MiB for any mix of shapes.
#: A leak of the smallest tensor here, about 500 bytes, exceeds 16 MiB after 34,000 calls.
MEMORY = 16 * 2**20
#: Allowed growth of the caches of the library after the warm-up: their keys are devices, not calls.
ENTRIES = 8

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned")


def resident():
    """Bytes of anonymous memory of this process, swapped out or not, without the pages of files."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return sum(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmSwap"))


def caches():
    """The number of entries of every cache and container in the modules of the library, by name."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "attnkern"}
    sizes = {}
    for name, module in modules.items():
        for key, value in list(vars(module).items()):
            # PyTorch's FakeTensor has a method of that name.
            if isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{name}.{key}"] = value.cache_info().currsize
            elif isinstance(value, (dict, list, set)) and not key.startswith("__"):
                sizes[f"{name}.{key}"] = len(value)
    return sizes


def fixed(backends):
    """Results and gradients of the same inputs, on every backend."""
    found = {}
    for backend in backends:
        for i, (function, options) in enumerate(CASES):
            for dtype in (torch.float32, torch.bfloat16):
                tensors = make(function, 2, 33, (9, 7), dtype=dtype, layout=LAYOUTS[i % 2])
                results = run(function, tensors, size=(9, 7), backend=backend, **options)
                found |= {f"{name} of {function} on {backend}, {dtype}": value for name, value in results.items()}
    return found


def one(random, backend, interpreted):
    """A call of any shape, forward and backward."""
    function, options = random.choice(CASES)
    size = tuple(random.randint(1, 6 if interpreted else 40) for _ in range(2))
    dtype = random.choice((torch.float32, torch.bfloat16, torch.float16) + (torch.float64,) * (backend != "triton"))
    tensors = make(
        function, random.randint(0, 4), random.randint(0, 9 if interpreted else 64), size,
        dtype=dtype, layout=random.choice(LAYOUTS), anchors=random.randint(1, 70), seed=random.randrange(2**16),
    )  # fmt: skip
    run(function, tensors, size=size, backend=backend, **options)


def soak(calls, backends=None, seed=0):
    """Make this number of calls, the first third as warm-up. Returns broken promises and a line of summary."""
    backends = backends or testing.available_backends()
    interpreted = _backend._ops.TRITON_INTERPRETS
    draw = random.Random(seed)
    began = time.monotonic()
    first = fixed(backends)
    warm, broken, memory = calls // 3, [], []
    checked = 1  # at the end
    for number in range(calls):
        if number == warm:
            entries = caches()
        if number in (warm, (warm + calls) // 2):
            memory.append(resident())
        backend = backends[number % len(backends)]
        one(draw, backend, interpreted and backend == "triton")
        if (number + 1) % 2000 == 0 and not broken:
            broken, checked = differing(first, fixed(backends)), checked + 1
    broken = broken or differing(first, fixed(backends))
    # A leak grows in both halves; the heap of a process that ran other tests may grow once.
    before, halfway = memory
    growth = 2 * min(halfway - before, resident() - halfway)
    if growth > MEMORY:
        broken.append(
            f"memory grew by {growth / 2**20:.1f} MiB in {calls - warm} calls, {growth / (calls - warm):.0f} bytes each"
        )
    for name, size in caches().items():
        if size > entries.get(name, 0) + ENTRIES:
            broken.append(f"{name} grew from {entries.get(name, 0)} to {size} entries")
    line = (
        f"{calls} calls on {', '.join(backends)} in {time.monotonic() - began:.0f} s: memory {growth / 2**20:+.1f} MiB "
        f"after the first {warm}, {len(first)} fixed results compared {checked} times, {len(entries)} caches"
    )
    return broken, line


def differing(first, again):
    """The names of the fixed results whose bits have changed."""
    return [
        f"{name} is no longer what it was in the first pass"
        for name, value in first.items()
        if value is not None and not torch.equal(value, again[name])
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    broken, line = soak(options.calls, seed=options.seed)
    print(line, *broken, sep="\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
