"""`make bench`: every competitor of every case in one run, rounds interleaved, medians compared.

Prints one table and writes JSON, a Markdown table and a plot to benchmarks/results/. With ``--gpu`` the GPU's cases:
each row is appended to the results file as it is measured, rows that are there already are skipped, and GPU_SHARD=i/n
takes every n-th case, so that the run fits into pieces.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

from benchmarks.report import ATTENTION, NETWORK_PASSES, OURS, RESULTS, TRAINING, write

# glibc gives large blocks back to the kernel and takes them again at every call: keep them, for every competitor alike.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
BUDGET, FLUSHED_BUDGET = 1.5, 0.5  # seconds a case and pass
TURN = 0.01  # seconds that a competitor is called in a row


def processor() -> str:
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()


def machine(device) -> dict:
    import torch

    import attnkern

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnkern": attnkern.__version__,
    }


def copy_bandwidth(device) -> float:
    """GB/s of a copy larger than the caches, bytes read and written."""
    import torch

    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * source.numel() * source.itemsize / median_times({"copy": copy})["copy"] / 1e9


def median_times(ready: dict, budget: float = BUDGET, flush=None) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that what disturbs the machine disturbs all.

    A turn is one call after ``flush``, or without it as many calls as take about TURN: each then finds the caches as it
    left them itself, and not as another competitor did.
    """
    calls_a_turn = {}
    for name, call in ready.items():
        call(), call()
        start = time.perf_counter()
        call()
        calls_a_turn[name] = 1 if flush else math.ceil(TURN / (time.perf_counter() - start))
    times = {name: [] for name in ready}
    began = time.perf_counter()
    while len(next(iter(times.values()))) < 7 or time.perf_counter() - began < budget:
        for name, call in ready.items():
            if flush is not None:
                flush()
            start = time.perf_counter()
            for _ in range(calls_a_turn[name]):
                call()
            times[name].append((time.perf_counter() - start) / calls_a_turn[name])
    return {name: statistics.median(values) for name, values in times.items()}


def graph_times(ready: dict, device) -> dict[str, float]:
    """Seconds of a replay from a CUDA graph: kernel time without the cost of launching from Python."""
    import torch

    found = {}
    for name, call in ready.items():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        try:
            with torch.cuda.stream(stream):
                call.body()
            with torch.cuda.graph(graph, stream=stream):
                call.body()
        except RuntimeError:
            continue  # this competitor cannot be captured: its column stays empty

        def replay(graph=graph):
            graph.replay()
            torch.cuda.synchronize(device)

        found[name] = median_times({name: replay}, 0.1)[name]
    return found


def shard(cases: list, text: str) -> list:
    """Every n-th case from the i-th: "1/3", "2/3", "3/3" cover all."""
    index, count = map(int, text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(f"GPU_SHARD must be i/n with 1 <= i <= n, got {text!r}")
    return cases[index - 1 :: count]


def row_of(case: str, which: str, seconds: dict[str, float], **more) -> dict:
    times = {}
    for suffix in ("", " compiled"):  # each network against its like
        best = min((value for name, value in seconds.items() if name in [o + suffix for o in OURS]), default=None)
        rivals = [name for name in seconds if name.endswith(" compiled") == bool(suffix) and not name.startswith(OURS)]
        times |= {name: seconds[name] / best for name in rivals if best is not None}
    return {"case": case, "pass": which, "ms": {k: v * 1e3 for k, v in seconds.items()}, "times": times, **more}


class Store:
    """The results file: every row is on disk as soon as it is measured."""

    def __init__(self, path: Path, about: dict, resume: bool):
        self.path = path
        self.content = json.loads(path.read_text()) if resume and path.exists() else {**about, "rows": []}

    def has(self, case: str, which: str) -> bool:
        return any(row["case"] == case and row["pass"] == which for row in self.content["rows"])

    def add(self, row: dict) -> None:
        self.put("rows", [*self.content["rows"], row])

    def put(self, key: str, value) -> None:
        self.content[key] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def measure(store: Store, device, cases: list, networks: list[tuple[str, str]], compiled: bool) -> None:
    """Rows of the cases, then of the (network, pass) pairs."""
    import torch

    from benchmarks.cases import AUTOTUNED, GPU_AUTOTUNED, NETWORKS, PASSES, attention_calls, calls, network_calls

    flush = None
    if device.type == "cuda":
        scratch = torch.empty(2**28, dtype=torch.uint8, device=device)  # larger than any L2

        def flush():
            scratch.zero_()
            torch.cuda.synchronize(device)

    work = [(case, which) for case in cases for which in PASSES] + networks
    if compiled:
        work += [(case, AUTOTUNED) for case in cases if device.type == "cuda" and case in GPU_AUTOTUNED]
    began = time.monotonic()
    for done, (case, which) in enumerate(work):
        text = case if isinstance(case, str) else str(case)
        place = f"[{done + 1}/{len(work)}, {time.monotonic() - began:.0f} s] {text} {which}"
        print(f"\r\033[K{place}", end="", file=sys.stderr, flush=True)
        if store.has(text, which):
            continue
        torch._dynamo.reset()
        if isinstance(case, str):
            if which == ATTENTION:
                ready = attention_calls(case, device)
            else:
                ready = network_calls(case, which, device, compiled and store.content["suite"] == "networks")
            store.add(row_of(text, which, median_times(ready, budget=4), images=NETWORKS[case][2]))
            continue
        ready = calls(case, which, device, "max-autotune-no-cudagraphs" if which == AUTOTUNED else compiled)
        seconds = median_times(ready, BUDGET if flush is None else FLUSHED_BUDGET, flush)
        ours = min((seconds[name] for name in OURS if name in seconds), default=math.nan)
        speed = case.bytes(which) / ours / 1e9
        share = speed / store.content["copy_gb_per_s"]
        more = {"bytes": case.bytes(which), "gb_per_s": speed, "share_of_copy": share}
        if device.type == "cuda":
            more["graph_ms"] = {k: v * 1e3 for k, v in graph_times(ready, device).items()}
        store.add(row_of(text, which, seconds, **more))
    print("\r\033[K", end="", file=sys.stderr)


def host_costs(device) -> dict[str, dict[str, float]]:
    """Microseconds of the host for forward and backward on tiny tensors, by what is called and backend."""
    from benchmarks.cases import host_calls

    return {
        what: {name: seconds * 1e6 for name, seconds in median_times(ready, 0.3).items()}
        for what, ready in host_calls(device).items()
    }


def measure_scaling(store: Store, device) -> None:
    """Forward and backward along one axis at a time, eager against ours."""
    from benchmarks.cases import FEATURE_OPS, SCALING, Case, calls

    for axis, shapes in SCALING.items():
        for op in FEATURE_OPS:
            for shape in shapes:
                case = Case(op, shape)
                print(f"\r\033[K{axis}: {case}", end="", file=sys.stderr, flush=True)
                ready = calls(case, "forward+backward", device, compiled=False)
                chosen = {name: ready[name] for name in ("eager", *OURS) if name in ready}
                seconds = median_times(chosen, 0.5)
                store.add(row_of(str(case), axis, seconds, op=op, bytes=case.bytes("forward+backward")))
    print("\r\033[K", end="", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the GPU's cases, resumable")
    parser.add_argument("--full", action="store_true", help="the GPU's shapes that fit, on the CPU, resumable")
    parser.add_argument("--networks", action="store_true", help="training steps and inference, compiled as well")
    parser.add_argument("--scaling", action="store_true", help="time against images, positions and channels")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()

    import torch

    from benchmarks.cases import CPU_CASES, CPU_FULL_CASES, GPU_CASES, MODELS, NETWORKS

    torch.manual_seed(0)
    device = torch.device("cuda" if options.gpu else "cpu")
    piece = os.environ.get("GPU_SHARD", "1/1") if options.gpu else "1/1"
    cases = shard(GPU_CASES, piece) if options.gpu else CPU_FULL_CASES if options.full else CPU_CASES
    cases = [case for case in cases if options.only in str(case) and not options.networks]
    first = piece.startswith("1/") and not options.full
    names = NETWORKS if options.networks else MODELS
    networks = [(name, which) for which in NETWORK_PASSES for name in names if first and options.only in name]
    if not options.networks:
        networks = [(name, which) for name, which in networks if which == TRAINING]
    about = machine(device)
    about["copy_gb_per_s"] = copy_bandwidth(device)
    suite = next((name for name in ("scaling", "networks", "full") if getattr(options, name)), "")
    RESULTS.mkdir(exist_ok=True)
    words = f"{about['machine']} {about['threads']} threads {about['date']} {suite}"
    stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    resume = options.gpu or options.full or options.networks
    store = Store(RESULTS / f"{stem}.json", about | {"suite": suite}, resume)
    if options.scaling:
        measure_scaling(store, device)
    else:
        measure(store, device, cases, networks, not options.no_compile)
        if first and not options.networks:
            store.put("host_us", host_costs(device))
    print(write(store.path))
    print(f"\nwritten: benchmarks/results/{stem}.json, .md, .svg")
    return 0


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in _MALLOC.items()):
        os.environ.update(_MALLOC)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]])
    sys.exit(main())
