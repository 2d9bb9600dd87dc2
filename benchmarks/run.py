"""`make bench`: measures every competitor of every case in one run, in interleaved turns, and compares medians.

Writes JSON, a Markdown page and a plot to build/bench/, or to the folder that ATTNKERN_RESULTS names, and prints a
summary. `make bench-publish` copies a run to benchmarks/results/ and docs/performance.md. On a CPU, operators and
networks are measured in two processes, which PROCESSES describes. Each row is written as soon as it is measured; with
--gpu, --full and --networks a run continues an earlier one of the same code and options. A competitor that fails is
recorded as an error, and the run continues. Rows whose times vary too much are measured again.
"""

import argparse
import contextlib
import ctypes
import datetime
import itertools
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import ATTENTION, BUSY, NOISY, OURS, printed, write
from benchmarks.store import MEASURED, RESULTS, ROOT, Store, code_version

#: Environments of the processes that measure on a CPU, by name. By default glibc gives large blocks back to the kernel
#: when they are freed, and takes them again at the next call; the tuned process keeps them, for every competitor alike.
PROCESSES = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}
BUDGET, FLUSHED_BUDGET = 1.5, 0.5  # seconds a case and pass
POOLING_BUDGET = 0.75  # the same for many queries, on a CPU
DEVICE_BUDGET = 0.1  # seconds a competitor, for its device time and for its cost to the host
TURN = 0.01  # seconds that a competitor is called in a row
TURNS, SLOW, SLOW_TURNS = 7, 0.5, 3  # turns at least; calls that take longer than SLOW, in seconds, have SLOW_TURNS
TRIES = 3  # how often a row is measured at most, until its times vary by no more than NOISY
#: Seconds a row, preparation and compilation included; a rehearsal may run on a busy machine.
ROW_LIMIT, LONG_LIMIT, REHEARSED_LIMIT = 120, 300, 3600  # LONG_LIMIT: max-autotune, and compiled networks of timm

#: Exit codes: rows are left because the time is up, or because the device is unusable in this process.
UNFINISHED, RESTART = 3, 4


def processor() -> str:
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()


def commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    return None


def machine(device) -> dict:
    import torch

    import attnkern

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "date": f"{datetime.datetime.now():%Y-%m-%d}",
        "time": f"{datetime.datetime.now():%H:%M:%S}",
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
        seconds = statistics.median(replay_seconds(copy, 30, device))
    else:
        seconds = median_times({"copy": copy}, clock=clock_of(device))["copy"]
    return 2 * source.numel() * source.itemsize / seconds / 1e9


def clock_of(device):
    """The clock that times calls. On one thread of a CPU it is the CPU time of the process, page faults included, which
    other programs on the machine do not lengthen."""
    import torch

    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def turns(ready: dict, budget: float = BUDGET, flush=None, clock=time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each call, a number for each turn. The calls take turns, so that a disturbance affects all of them.

    A turn is one call after ``flush``, or without it an untimed call and then as many calls as take about TURN: each
    then finds the caches and the free memory as it left them itself, and not as another competitor did. Slow calls
    have few turns and no untimed call.
    """
    took = {}
    for name, call in ready.items():
        call(), call()
        start = clock()
        call()
        took[name] = clock() - start
    slow = {name for name in ready if took[name] > SLOW}
    times = {name: [] for name in ready}
    began, turn = clock(), 0
    while turn < SLOW_TURNS or (len(slow) < len(ready) and (turn < TURNS or clock() - began < budget)):
        turn += 1
        for name, call in ready.items():
            if name in slow and turn > SLOW_TURNS:
                continue
            if flush or name not in slow:
                (flush or call)()
            count = 1 if flush else math.ceil(TURN / took[name])
            start = clock()
            for _ in range(count):
                call()
            times[name].append((clock() - start) / count)
    return times


def median_times(ready: dict, *arguments, **options) -> dict[str, float]:
    """Median seconds of each call, from `turns`."""
    return {name: statistics.median(times) for name, times in turns(ready, *arguments, **options).items()}


def spread(times: list[float]) -> float:
    """The interquartile range over the median."""
    first, median, third = statistics.quantiles(times, n=4)
    return (third - first) / median


def settled_times(ready: dict, tries: int, *arguments) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and spread of each call, from the attempt at `turns` with the least spread of any call: the first
    within NOISY, or the best of ``tries``."""
    best = None
    for _ in range(tries):
        times = turns(ready, *arguments)
        spreads = {name: spread(values) for name, values in times.items()}
        worst = max(spreads.values(), default=0)
        if best is None or worst < best[0]:
            best = worst, {name: statistics.median(values) for name, values in times.items()}, spreads
        if worst <= NOISY:
            break
    return best[1:]


# --- device time and host time. In a rehearsal the CPU stands in for the device. --------------------------------------


def cache_bytes(device) -> int:
    """The L2 cache of a GPU."""
    import torch

    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def captured(call, numbers: list[int], device):
    """Capture calls on these copies of the inputs in a CUDA graph. Returns the function that replays it."""
    import torch

    if device.type != "cuda":
        return lambda: [call.run(number) for number in numbers]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")  # names the operation that would break the capture
        try:
            call.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    kept = [None] * (max(numbers) + 1)  # results rotate like the inputs, otherwise they would stay in the cache
    with torch.cuda.graph(graph, stream=stream):
        for number in numbers:
            kept[number] = call.run(number)
    return graph.replay


def mark(device):
    """A moment in the device's time."""
    import torch

    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first, last, device) -> float:
    """Seconds between two marks, both of which must have been reached."""
    return first.elapsed_time(last) / 1e3 if device.type == "cuda" else last - first


def replay_seconds(replay, count: int, device) -> list[float]:
    """Seconds of each of ``count`` replays in a row; the device does not wait for the host between them."""
    from benchmarks.cases import synchronize

    marks = [mark(device)]
    for _ in range(count):
        replay()
        marks.append(mark(device))
    synchronize(device)
    return [between(first, last, device) for first, last in itertools.pairwise(marks)]


def device_seconds(call, device, budget: float = DEVICE_BUDGET) -> float:
    """Device time of a call: a replay's median time per call. The inputs in it exceed three L2 caches together."""
    copies = max(2, math.ceil(3 * cache_bytes(device) / call.work.bytes))
    numbers = list(range(copies)) * math.ceil(8 / copies)
    replay = captured(call, numbers, device)
    samples = min(100, max(5, math.ceil(budget / replay_seconds(replay, 2, device)[1])))
    return statistics.median(replay_seconds(replay, samples, device)) / len(numbers)


def host_seconds(call, device, budget: float = DEVICE_BUDGET) -> float:
    """Host time of a call: a few calls in a row, without waiting for the device."""
    from benchmarks.cases import synchronize

    times, began = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - began < budget:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            call.run()
        times.append((time.perf_counter() - start) / 10)
    synchronize(device)
    return statistics.median(times)


# --- memory ----------------------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """Bytes of this process's resident memory: "VmRSS" now, "VmHWM" at its peak."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024


def peak_bytes(call, device) -> int:
    """Bytes that a call needs at its peak, beyond those that are in use before it: results, what is saved for the
    backward pass, and temporary memory. On a CPU the kernel counts them, page by page, after malloc has returned
    what is free."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now what is in use
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


# --- rows ------------------------------------------------------------------------------------------------------------


def row_of(case: str, which: str, seconds: dict[str, float], **more) -> dict:
    times = {}
    for suffix in ("", " compiled"):  # compiled networks are compared with compiled ones
        best = min((value for name, value in seconds.items() if name in [o + suffix for o in OURS]), default=None)
        rivals = [name for name in seconds if name.endswith(" compiled") == bool(suffix) and not name.startswith(OURS)]
        times |= {name: seconds[name] / best for name in rivals if best is not None}
    row = {"case": case, "pass": which, "process": "default", "ms": {k: v * 1e3 for k, v in seconds.items()}}
    return {**row, "times": times, **more}


class OutOfTime(Exception):
    """The time of this run is up; the next run measures the row."""


class Attempts:
    """Runs the parts of a row. If a part fails or takes half of the time left, the error is recorded and the row
    continues."""

    def __init__(self, device, limit: float, end: float):
        self.device, self.end = device, min(time.monotonic() + limit, end)
        self.cut_short = self.end == end
        self.errors = {}
        self.broken = False  # is the device unusable in this process?

    def one(self, name: str, function, *arguments):
        """The function's result, or None if it fails; the error is recorded under the name."""
        if self.broken:
            self.errors[name] = "not measured: the device failed before"
            return None
        limit = TimeLimit((self.end - time.monotonic()) / 2)
        try:
            with limit:
                return function(*arguments)
        except Exception as error:
            if limit.reached and self.cut_short:
                raise OutOfTime from None
            self.errors[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            self._recover()
            return None

    def each(self, function, items: dict, *arguments) -> dict:
        """The function's results by name, without those that fail."""
        found = {name: self.one(name, function, item, *arguments) for name, item in items.items()}
        return {name: result for name, result in found.items() if result is not None}

    def _recover(self):
        import torch

        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError:
                self.broken = True


class TimeLimit:
    """Raises TimeoutError in the block after this many seconds. ``reached`` tells whether that happened, even if the
    error that leaves the block is another one that wraps it."""

    def __init__(self, seconds: float):
        self.seconds, self.reached = max(0.001, seconds), False

    def __enter__(self):
        self._before = signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _stop(self, *_):
        self.reached = True
        raise TimeoutError(f"it took more than {self.seconds:.0f} s")


class Bench:
    """Measures rows. In a rehearsal the CPU stands in for the device, and every budget is 0."""

    def __init__(
        self,
        device,
        compiled: dict | None,
        copy_gb_per_s: float = math.nan,
        rehearsal: bool = False,
        process: str = "default",
    ):
        import torch

        self.device, self.compiled, self.copy_gb_per_s, self.rehearsal = device, compiled, copy_gb_per_s, rehearsal
        self.process, self.clock = process, clock_of(device)
        self.on_gpu = device.type == "cuda"
        self.tries = 1 if self.on_gpu or rehearsal else TRIES
        self.flush = None
        if self.on_gpu:
            scratch = torch.ones(cache_bytes(device), device=device)  # four times the cache

            def flush():
                """Read, because written lines would be copied back to memory during the next call."""
                scratch.amax()
                torch.cuda.synchronize(device)

            self.flush = flush

    def budget(self, seconds: float) -> float:
        return 0 if self.rehearsal else seconds

    def operator(self, attempts: Attempts, case, which: str) -> dict:
        """Latency of a call; on a GPU also its device time and its host time."""
        from benchmarks.cases import AUTOTUNED, TUNED, Call, competitors, workload

        compiled = TUNED if which == AUTOTUNED else self.compiled
        work = attempts.one("inputs", workload, case, self.device)
        ready = {}
        for name, function in (competitors(case, self.device, compiled) if work else {}).items():
            ready[name] = attempts.one(name, Call, name, function, work, which)
        ready = {name: call for name, call in ready.items() if call is not None}
        budget = self.budget(FLUSHED_BUDGET if self.on_gpu else POOLING_BUDGET if case.queries else BUDGET)
        latency = attempts.one("latency", settled_times, ready, self.tries, budget, self.flush, self.clock)
        seconds, spreads = latency or ({}, {})
        more, best = {"bytes": case.bytes(which), "spread": spreads}, seconds
        if case.queries:
            peaks = attempts.each(peak_bytes, ready, self.device)
            more["peak_mb"] = {name: value / 1e6 for name, value in peaks.items()}
        if self.on_gpu or self.rehearsal:
            budget = self.budget(DEVICE_BUDGET)
            host = attempts.each(host_seconds, ready, self.device, budget)
            best = attempts.each(device_seconds, ready, self.device, budget)
            more["host_us"] = {name: value * 1e6 for name, value in host.items()}
            more["device_ms"] = {name: value * 1e3 for name, value in best.items()}
        ours = min((best[name] for name in OURS if name in best), default=None)
        if ours is not None:
            more["gb_per_s"] = more["bytes"] / ours / 1e9
            more["share_of_copy"] = more["gb_per_s"] / self.copy_gb_per_s
        return row_of(str(case), which, seconds, **more)

    def network(self, attempts: Attempts, name: str, which: str, compile_too: bool) -> dict:
        from benchmarks.cases import NETWORKS, attention_calls, network_calls

        if which == ATTENTION:
            ready = attempts.one("inputs", attention_calls, name, self.device)
        else:
            compiled = compile_too and self.compiled is not None
            ready = attempts.one("inputs", network_calls, name, which, self.device, compiled)
        ready = attempts.each(called, ready or {})
        latency = attempts.one("latency", settled_times, ready, self.tries, self.budget(4), None, self.clock)
        seconds, spreads = latency or ({}, {})
        return row_of(name, which, seconds, images=NETWORKS[name][2], spread=spreads)

    def host(self, attempts: Attempts) -> dict[str, dict[str, float]]:
        """Microseconds of the host for forward and backward on tiny tensors, by what is called and backend."""
        from benchmarks.cases import host_calls

        found = {}
        for what, ready in (attempts.one("inputs", host_calls, self.device) or {}).items():
            seconds = attempts.one(what, median_times, ready, self.budget(0.3), None, self.clock) or {}
            found[what] = {name: value * 1e6 for name, value in seconds.items()}
        return found


def called(call):
    call()
    return call


def measure(store: Store, bench: Bench, work: list, end: float = math.inf, again: bool = False) -> int:
    """Measure the (case or network, pass) pairs; stored rows only if ``again``. Returns the exit code."""
    import torch

    from benchmarks.cases import AUTOTUNED, HOST, TIMM_MODELS

    content, progress = store.content, Progress(len(work))
    for number, (case, which) in enumerate(work):
        name = f"{case} {which}".strip()
        progress.begin(number, name)
        if not again and ("host_us" in content if case == HOST else store.has(str(case), which, bench.process)):
            continue
        if end - time.monotonic() < (10 if bench.on_gpu else 0):
            return UNFINISHED
        tries = content.get("begun", {}).get(name, 0)
        store.put("begun", {name: tries + 1})
        limit = (
            REHEARSED_LIMIT
            if bench.rehearsal
            else LONG_LIMIT
            if which == AUTOTUNED or case in TIMM_MODELS
            else ROW_LIMIT
        )
        attempts = Attempts(bench.device, limit, end)
        torch._dynamo.reset()
        try:
            if tries >= 2:
                attempts.errors["row"] = "not measured: it ended the process twice"
                row = row_of(str(case), which, {})
            elif case == HOST:
                row = row_of(HOST, "", {}, host_us=bench.host(attempts))
            elif isinstance(case, str):
                row = bench.network(attempts, case, which, content["suite"] == "networks")
            else:
                row = bench.operator(attempts, case, which)
        except OutOfTime:
            store.put("begun", {})
            return UNFINISHED
        row |= {"process": bench.process, "load": os.getloadavg()[0]}
        if attempts.errors:
            row["errors"] = attempts.errors
        content["begun"] = {}
        if case == HOST:
            store.put("host_us", row.pop("host_us", {}))
        if case != HOST or attempts.errors:
            store.add(row)
        progress.end(row)
        if attempts.broken:
            return RESTART
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return 0


class Progress:
    """A line that is overwritten on a terminal; elsewhere a line for each row."""

    def __init__(self, rows: int):
        self.rows, self.began, self.terminal = rows, time.monotonic(), sys.stderr.isatty()

    def begin(self, number: int, name: str) -> None:
        self.text = f"[{number + 1}/{self.rows}, {time.monotonic() - self.began:.0f} s] {name}"
        if self.terminal:
            print(f"\r\033[K{self.text}", end="", file=sys.stderr, flush=True)

    def end(self, row: dict) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr)
        else:
            cells = [f"{name} {ms:.4f}" for name, ms in row.get("device_ms", row["ms"]).items()]
            cells += [f"{name}: {error}" for name, error in row.get("errors", {}).items()]
            print(f"{self.text}: {', '.join(cells) or 'measured'}", file=sys.stderr, flush=True)


def measure_scaling(store: Store, device) -> None:
    """Forward and backward along one axis at a time, eager against ours."""
    from benchmarks.cases import FEATURE_OPS, SCALING, Case, calls

    work = [(axis, Case(op, shape)) for axis, shapes in SCALING.items() for op in FEATURE_OPS for shape in shapes]
    progress = Progress(len(work))
    for number, (axis, case) in enumerate(work):
        progress.begin(number, f"{axis}: {case}")
        ready = calls(case, "forward+backward", device, compiled=None)
        chosen = {name: ready[name] for name in ("eager", *OURS) if name in ready}
        seconds, spreads = settled_times(chosen, TRIES, 0.5, None, clock_of(device))
        row = row_of(str(case), axis, seconds, op=case.op, bytes=case.bytes("forward+backward"), spread=spreads)
        store.add(row | {"load": os.getloadavg()[0]})
        progress.end(row)


def run_processes(path: Path, end: float) -> int:
    """Measure the rows of this command in each of PROCESSES, one after the other. Returns the first exit code not 0."""
    inherited = {key: value for key, value in os.environ.items() if key not in PROCESSES["tuned"]}
    for name, environment in PROCESSES.items():
        more = ["--process", name, "--store", path, "--seconds", str(end - time.monotonic())]
        command = [sys.executable, "-m", "benchmarks.run", *sys.argv[1:], *more]
        code = subprocess.run(command, env={**inherited, **environment}).returncode
        if code:
            return code
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    suites = parser.add_mutually_exclusive_group()
    suites.add_argument("--gpu", action="store_true", help="the GPU's cases, resumable")
    suites.add_argument("--full", action="store_true", help="the GPU's shapes that fit, on the CPU, resumable")
    suites.add_argument("--networks", action="store_true", help="training steps and inference, compiled as well")
    suites.add_argument("--scaling", action="store_true", help="time against images, positions and channels")
    suites.add_argument("--rehearsal", action="store_true", help="the same as --gpu, in small on the CPU")
    parser.add_argument("--only", default="", help="rows whose name contains this, also if they are stored")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help=f"time limit; exit code {UNFINISHED} if rows are left"
    )
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)  # what runs in one of them
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds

    import torch

    from benchmarks import cases

    torch.manual_seed(0)
    device = torch.device("cuda" if options.gpu else "cpu")
    compiled = None if options.no_compile else cases.REHEARSED if options.rehearsal else cases.COMPILED
    suite = next((name for name in ("scaling", "networks", "full", "rehearsal") if getattr(options, name)), "")
    if options.store:
        store = Store.of(options.store)
    else:
        about = machine(device) | {"commit": commit(), "suite": suite}
        if suite != "scaling" and (suite or options.gpu):
            about["key"] = {"version": code_version(*MEASURED), "compiled": compiled is not None}
        RESULTS.mkdir(parents=True, exist_ok=True)
        store = Store(RESULTS, about)
        if about["load"] > about["cores"]:
            print(BUSY.format(**about), file=sys.stderr, flush=True)
    if "copy_gb_per_s" not in store.content:
        store.put("copy_gb_per_s", copy_bandwidth(device))
    code = 0
    if options.scaling:
        measure_scaling(store, device)
    elif options.gpu or options.rehearsal or options.process:
        bench = Bench(device, compiled, store.content["copy_gb_per_s"], options.rehearsal, options.process or "default")
        work = cases.work(suite, options.gpu, compiled is not None, options.process == "tuned")
        work = [(case, which) for case, which in work if options.only in f"{case} {which}"]
        code = measure(store, bench, work, end, again=bool(options.only))
    else:
        code = run_processes(store.path, end)
    if options.process:
        return code
    written = write(store.path)
    if not (options.gpu or options.rehearsal):
        print(printed(store.content if options.scaling else Store.of(store.path).content))
    print(f"{'Unfinished. ' if code else ''}Written: {', '.join(map(str, written))}")
    return code


if __name__ == "__main__":
    sys.exit(main())
