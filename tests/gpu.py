"""Builds, tests, measures and profiles attnkern on a machine with a GPU and no network: `make gpu`.

It builds in place with the Python that runs it and installs nothing. A call ends after ``--minutes``; running the same
command again continues where the last call stopped. Results, a journal (gpu-run.jsonl) and the output of every command
(gpu-run.log) are written to build/bench/ or to the folder that ATTNKERN_RESULTS names. When the sources change,
everything starts again. Exit codes: 0 everything is done, 1 something failed, 3 nothing failed so far, but something is
left to do.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from journal import Journal  # noqa: E402

from benchmarks.profile import NOT_RUN  # noqa: E402
from benchmarks.report import COLUMNS, OURS, slowest, write  # noqa: E402
from benchmarks.run import RESTART, UNFINISHED  # noqa: E402
from benchmarks.store import MEASURED, RESULTS, code_version  # noqa: E402

#: Each call runs build and info, and then those of these that are not done.
STAGES = ("tests", "benchmarks", "ncu", "sanitizer")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = ["tests/kernels", "tests/integration/test_device.py", "tests/integration/test_transforms.py"]
#: A small subset, because the sanitizer slows kernels down a hundredfold.
SANITIZED = ["tests/kernels/test_ops.py", "-k", "(golden and float32) or several_programs"]
REHEARSED = ["tests/kernels/test_ops.py", "-k", "golden and float32 and quantize"]
#: Time limit of a command in seconds; the time left in the call applies if it is shorter, and alone in a rehearsal,
#: whose outcome must not depend on the machine's speed.
LIMITS = {"build": 540, "info": 120, "tests": 540, "ncu": 120, "control": 60, "sanitizer": 120}
PROFILED = 4  # rows
END = 15  # seconds at the end of a call in which nothing is started

MACHINE = """
import torch
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
"""
INFO = """
import json, torch
from attnkern import _backend, cli
print(cli.info())
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needed = ["native", "triton", "reference"]
if device.type == "cpu" or torch.cuda.get_device_capability() < (8, 0):  # Triton does not support it
    needed.remove("triton")
print(json.dumps({name: _backend.reason(name, device, torch.float32) for name in needed}))
"""


class OutOfTime(Exception):
    """The next call does the rest."""


class Run:
    def __init__(self, minutes: float, rehearsal: bool):
        self.end, self.rehearsal = time.monotonic() + 60 * minutes, rehearsal
        self.version = code_version(*MEASURED, "tests/**/*.py")
        self.folder = ROOT / "build/rehearsal" if rehearsal and not os.environ.get("ATTNKERN_RESULTS") else RESULTS
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "gpu-run.jsonl", self.version)
        self.log = (self.folder / "gpu-run.log").open("a", buffering=1, encoding="utf-8")
        self.torch = self.gpu = ""  # until `identify` knows them
        self.backends: list[str] = []
        self.tell(f"\n=== make gpu: code {self.version}, {minutes:g} minutes, results in {self.folder}")

    def tell(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log)

    def left(self) -> float:
        return self.end - time.monotonic() - END

    def within(self, limit: float) -> float:
        """The seconds that a command with this limit may take."""
        return self.left() if self.rehearsal else min(limit, self.left())

    def need(self, seconds: float) -> None:
        """Start nothing that could not get anywhere."""
        if self.left() < seconds:
            raise OutOfTime

    def command(self, *words, limit: float, quiet: bool = False, **environment) -> tuple[int | None, str]:
        """Run a command. Returns its exit code, or None if it took too long, and its output."""
        self.need(5)
        limit = self.within(limit)
        words = [str(word) for word in words]
        print("$", *words, file=self.log)
        if self.rehearsal:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _paths(ROOT), **environment}
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace", process_group=0,
            env={**os.environ, "ATTNKERN_RESULTS": str(self.folder), **environment},
        )  # fmt: skip
        lines = []

        def read():
            for line in process.stdout:
                lines.append(line)
                self.log.write(line)
                if not quiet:
                    print(line, end="", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        code = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            self.tell(f"stopped after {limit:.0f} s: {' '.join(words[:6])} ...")
        finally:
            self._end(process)
            reader.join(30)  # a child in a group of its own may hold the pipe open
        return code, "".join(lines)

    @staticmethod
    def _end(process) -> None:
        """Stop a command and its children, also when this program is interrupted."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(5)
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)

    # --- stages ------------------------------------------------------------------------------------------------------

    def identify(self) -> None:
        """The journal is that of this version of the code, of PyTorch and of this GPU."""
        code, output = self.command(sys.executable, "-c", MACHINE, limit=LIMITS["info"])
        if code != 0:
            sys.exit("make gpu: PyTorch cannot be imported")
        machine = output.splitlines()[-1]
        if machine.endswith(" cpu") and not self.rehearsal:
            sys.exit("make gpu: PyTorch sees no GPU (`make gpu GPU=--rehearsal` runs everything in small on the CPU)")
        self.journal.version = f"{self.version}, {machine}"
        _, self.torch, self.gpu = machine.split(" ", 2)

    def build(self) -> None:
        """Build the libraries; setup.py keeps those that fit."""
        if self.journal.outcomes("build").get("build") == "failed":
            self.tell('build: failed before, not tried again without GPU="--again build"')
            return
        command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        environment = {"ATTNKERN_NO_NATIVE": "1"} if self.rehearsal else {}
        code, _ = self.command(*command, limit=LIMITS["build"], **environment)
        if code is not None:
            self.journal.add("build", unit="build", outcome="failed" if code else "passed")

    def info(self) -> None:
        """Print what is available. A missing backend is an error; the stages continue with the others."""
        code, output = self.command(sys.executable, "-c", INFO, limit=LIMITS["info"])
        if code != 0:
            sys.exit("make gpu: attnkern does not run")
        reasons = json.loads(output.splitlines()[-1])
        for name, missing in reasons.items():
            self.journal.add("info", unit=f"{name} backend", outcome="failed" if missing else "passed", text=missing)
        self.backends = [name for name, missing in reasons.items() if missing is None]

    def pytest(self, stage: str, *tests: str, backends: list[str], limit: float, before=(), **environment):
        """Run those of the tests that the journal does not contain. Returns exit code and output."""
        limit = self.within(limit)
        return self.command(
            *before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "resume",
            "--journal", self.journal.path, "--journal-version", self.journal.version, "--journal-stage", stage,
            "--until", time.time() + limit - 20, *tests,
            limit=limit, quiet=bool(before), PYTHONPATH=_paths(ROOT, ROOT / "tests"),
            ATTNKERN_TEST_BACKENDS=",".join(backends), **environment,
        )  # fmt: skip

    def tests(self) -> None:
        if not importlib.util.find_spec("pytest"):
            self.journal.add("tests", unit="pytest", outcome="skipped", text="not installed")
            self.journal.add("tests", unit="all", outcome="passed")
            return
        self.need(30)
        # Triton compiles one kernel at a time per process.
        parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        if not parallel:
            self.tell("tests: pytest-xdist is not installed, one process runs them all")
        chosen = REHEARSED if self.rehearsal else TESTS
        code = -1
        while code is not None and code < 0:  # a test crashed; the journal leaves it out after the second time
            code, output = self.pytest(
                "tests", *parallel, *chosen, backends=self.backends, limit=LIMITS["tests"], ATTNKERN_TEST_LARGE="1"
            )
        if code in (0, 1, 5):  # all passed, some failed, nothing was left to run
            self.journal.add("tests", unit="all", outcome="passed")
        elif code is not None and "time is up" not in output:
            self.journal.add("tests", unit="pytest", outcome="failed", text=f"exit code {code}")

    def benchmarks(self) -> None:
        suite = "--rehearsal" if self.rehearsal else "--gpu"
        before = None
        while (rows := self.results()) != before:  # otherwise it crashes before it starts a row
            before = rows
            self.need(30)
            code, _ = self.command(
                sys.executable, "-m", "benchmarks.run", suite, "--seconds", self.left() - END, limit=self.left()
            )
            if code == 0:
                self.journal.add("benchmarks", unit="all", outcome="passed")
            if code in (0, UNFINISHED):
                return
            self.tell(f"benchmarks: {'the device failed' if code == RESTART else f'exit code {code}'}; starting again")
        self.journal.add("benchmarks", unit="benchmarks.run", outcome="failed", text=f"exit code {code}")

    def results(self) -> tuple[Path | None, dict]:
        """File and content of the benchmark results of this version of the code on this machine."""
        key = {"version": code_version(*MEASURED), "compiled": True}
        for path in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            content = json.loads(path.read_text(encoding="utf-8"))
            same = content.get("key") == key and content["torch"] == self.torch
            if same and (content["suite"] == "rehearsal" if self.rehearsal else content["machine"] == self.gpu):
                return path, content
        return None, {"rows": []}

    def ncu(self) -> None:
        """Profile the slowest of the rows measured so far."""
        path, content = self.results()
        done = self.journal.outcomes("ncu")
        for case, which, backend in slowest(content["rows"], PROFILED):
            unit = f"{case}, {which}, {backend}"
            if unit in done:
                continue
            self.need(LIMITS["ncu"] / 2)
            self.journal.add("ncu", unit=unit, outcome="begun")
            command = (sys.executable, "-m", "benchmarks.profile", case, which, "--backend", backend, "--store", path)
            code, output = self.command(*command, limit=LIMITS["ncu"])
            if code == NOT_RUN:
                self.journal.add(
                    "ncu", unit="ncu", outcome="skipped", text=output.splitlines()[0].removeprefix("ncu: ")
                )
                break
            if code is not None:
                self.journal.add("ncu", unit=unit, outcome="failed" if code else "passed")
        if path is not None:
            write(path)
        if "all" in self.journal.outcomes("benchmarks"):
            self.journal.add("ncu", unit="all", outcome="passed")

    def sanitizer(self) -> None:
        sanitizer = _tool("compute-sanitizer")
        if sanitizer is None:
            self.journal.add("sanitizer", unit="compute-sanitizer", outcome="skipped", text="not installed")
        else:
            with tempfile.TemporaryDirectory() as folder:
                control = Path(folder) / "control"
                nvcc = _tool("nvcc")
                command = (nvcc, "-arch=native", "-o", control, "tests/sanitizer_control.cu")
                if nvcc is None or self.command(*command, limit=LIMITS["control"], quiet=True)[0] != 0:
                    control = None
                    text = "nvcc is missing, or cannot build it"
                    self.journal.add("sanitizer", unit="planted errors", outcome="skipped", text=text)
                for tool in TOOLS:
                    if tool not in self.journal.outcomes("sanitizer"):
                        self.sanitize(tool, sanitizer, control)
            if not set(TOOLS) <= self.journal.outcomes("sanitizer").keys():
                return
        self.journal.add("sanitizer", unit="all", outcome="passed")

    def sanitize(self, tool: str, sanitizer: str, control: Path | None) -> None:
        def say(outcome, text):
            self.tell(f"compute-sanitizer {tool}: {text}")
            self.journal.add("sanitizer", unit=tool, outcome=outcome, text=text)

        # Otherwise the memory behind a tensor belongs to PyTorch's cache, and an access to it is not an error.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if control is not None:
            command = (sanitizer, "--tool", tool, control, tool)
            code, output = self.command(*command, limit=LIMITS["control"], quiet=True, **environment)
            if "SUMMARY: " not in output:
                return say("skipped", "not run, it took too long" if code is None else "not run, the host refuses it")
            if "SUMMARY: 0 " in output:
                return say("failed", "does not find the planted error")
        self.need(LIMITS["sanitizer"] / 2)
        # conftest.py fills new tensors, which would hide uninitialized reads from initcheck.
        code, output = self.pytest(
            tool, *(REHEARSED if self.rehearsal else SANITIZED), limit=LIMITS["sanitizer"],
            backends=[name for name in self.backends if name != "reference"],
            before=(sanitizer, "--tool", tool, "--error-exitcode", "9"), ATTNKERN_TEST_FILL="0", **environment,
        )  # fmt: skip
        outcomes = list(self.journal.outcomes(tool).values())
        passed = f"{outcomes.count('passed')} tests"
        if code is not None and "SUMMARY: " not in output:
            self.tell("".join(output.splitlines(keepends=True)[-5:]))
            say("skipped", "not run, the host refuses it")
        elif code in (0, 5) and "passed" in outcomes:
            say("passed", f"no errors in {passed}")
        elif code is None or (code != 9 and "time is up" in output):
            self.tell(f"compute-sanitizer {tool}: no errors in {passed} so far")
        else:
            self.tell("".join(output.splitlines(keepends=True)[-40:]))
            say("failed", f"errors, exit code {code}: gpu-run.log")

    # --- the whole ---------------------------------------------------------------------------------------------------

    def everything(self, stages: list[str], again: list[str]) -> int:
        try:
            self.identify()
            for stage in again:
                for part in (stage, *(TOOLS if stage == "sanitizer" else ())):
                    self.journal.add(part, outcome="forgotten")
            self.build()
            self.info()
            for stage in stages:
                if "all" not in self.journal.outcomes(stage):
                    self.tell(f"\n--- {stage}, {self.left():.0f} s left")
                    getattr(self, stage)()
        except OutOfTime:
            self.tell("time is up")
        except KeyboardInterrupt:
            self.tell("interrupted")
        return self.summary()

    def summary(self) -> int:
        rows = self.results()[1]["rows"]
        failures, unfinished = [], []
        self.tell("\nstage       outcome")
        for stage in ("build", "info", *STAGES):
            outcomes = self.journal.outcomes(stage)
            reasons = {entry.get("unit"): entry.get("text") for entry in self.journal.entries(stage)}
            over = outcomes.pop("all", None) is not None or stage in ("build", "info")
            counts = [f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).items()]
            text = ", ".join(([f"{len(rows)} rows"] if stage == "benchmarks" else []) + counts)
            self.tell(f"{stage:11} {text or 'nothing'}{'' if over else ' so far: not finished'}")
            for unit, outcome in outcomes.items():
                line = f"{unit}, {reasons[unit]}" if reasons[unit] else unit
                if outcome in ("failed", "unfinished"):
                    failures.append(f"{stage}: {line}")
                elif stage in ("ncu", "sanitizer"):
                    self.tell(f"            {outcome}: {line}")
            if not over:
                unfinished.append(stage)
        for row in rows:
            for name, error in row.get("errors", {}).items():
                line = f"{row['case']} {row['pass']}, {name}: {error}"
                if name == "inputs" and error.startswith(("ImportError", "ModuleNotFoundError")):
                    self.tell(f"not run: benchmarks: {line}")
                elif name.startswith(OURS) or name not in COLUMNS:  # the failure of a competitor is not ours
                    failures.append(f"benchmarks: {line}")
        for failure in failures[:30]:
            self.tell(f"FAILED {failure}")
        if unfinished:
            self.tell(f"Not finished: {', '.join(unfinished)}. Run the same command again.")
        return 1 if failures else 3 if unfinished else 0


def _paths(*folders: Path) -> str:
    """PYTHONPATH with these folders in front."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of this call (default 9.5)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="run only these stages")
    parser.add_argument(
        "--again", nargs="+", choices=("build", *STAGES), default=(), help="forget the outcome of these"
    )
    parser.add_argument("--rehearsal", action="store_true", help="run everything in small on the CPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(options.minutes, options.rehearsal)
    return run.everything([stage for stage in STAGES if stage in options.stages], options.again)


if __name__ == "__main__":
    sys.exit(main())
