"""`make gpu` on a CPU, in small: interrupted, resumed, finished. Scripts stand in for NVIDIA's tools."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from journal import Journal

HERE = Path(__file__).parents[1]

#: Creates a file in place of the program with planted errors.
NVCC = """#!/bin/sh
[ "$1" = -arch=native ] && touch "$3"
exit 0
"""

#: A different outcome for each tool: no errors, errors, refused by the host, planted error not found.
SANITIZER = """#!/bin/sh
tool=$2
if [ $# = 4 ]; then
  [ "$tool" = synccheck ] && echo "========= ERROR SUMMARY: 0 errors" || echo "========= ERROR SUMMARY: 1 error"
  exit
fi
shift 4
case $tool in
  memcheck) "$@"; code=$?; echo "========= ERROR SUMMARY: 0 errors"; exit $code;;
  racecheck) echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 9;;
  initcheck) echo "========= Device not supported"; exit 1;;
esac
"""

#: Writes a recorded kind of CSV, and runs its program the first time only.
NCU = f"""#!/bin/sh
case "$*" in *"--csv --log-file "*"--clock-control none"*) ;; *) exit 1;; esac
cp {HERE}/data/ncu.csv "$3"
[ -e "$ATTNKERN_RESULTS/ran" ] && exit
touch "$ATTNKERN_RESULTS/ran"
while [ "$1" != {sys.executable} ]; do shift; done
exec "$@"
"""


@pytest.fixture
def start(tmp_path):
    """Starts a call that writes to tmp_path / "results"."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"nvcc": NVCC, "compute-sanitizer": SANITIZER, "ncu": NCU}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "ATTNKERN_RESULTS": str(tmp_path / "results"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def call(*options):
        command = [sys.executable, HERE / "gpu.py", "--rehearsal", "--minutes", "60", *options]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return call


def results(folder):
    (path,) = folder.glob("*.json")
    return path, json.loads(path.read_text(encoding="utf-8"))


def journal(folder):
    """Lines of all stages."""
    return [json.loads(line) for line in (folder / "gpu-run.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_rehearsal(start, tmp_path):
    folder = tmp_path / "results"

    # The first call is interrupted while it measures.
    process = start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[3/"):
            process.send_signal(signal.SIGTERM)
            break
    first = "".join(lines) + process.stdout.read()
    assert process.wait() == 3, first
    assert "\r" not in first
    assert "Not finished: benchmarks, ncu, sanitizer. Run the same command again." in first
    _, before = results(folder)
    assert len(before["rows"]) >= 2
    assert "native" in before["host_us"]["window_attention"]
    tested = [entry["unit"] for entry in journal(folder) if entry["stage"] == "tests" and entry["outcome"] == "passed"]
    assert any("quantize" in unit for unit in tested)

    # The second continues with the next row and does the rest.
    process = start()
    second = process.communicate()[0]
    assert process.returncode == 1, second  # for the errors that the sanitizer found
    path, after = results(folder)
    assert after["rows"][: len(before["rows"])] == before["rows"]
    names = [(row["case"], row["pass"]) for row in after["rows"]]
    assert len(set(names)) == len(names) == 9  # two passes of two operators and of two pools, and a network
    assert after["begun"] == {}
    for row in after["rows"][:4]:
        assert {"eager", "compile", "native"} <= row["device_ms"].keys() == row["ms"].keys() == row["host_us"].keys()
        assert "errors" not in row
        assert row["share_of_copy"] > 0
    again = [entry["unit"] for entry in journal(folder) if entry["stage"] == "tests" and entry["outcome"] == "passed"]
    assert again == tested
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert f"Kernels of {names[0][0]}, {names[0][1]}, native:" in page
    assert "| attnkern::window_fwd | 53.2 |" in page
    assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")
    for line in (
        "compute-sanitizer memcheck: no errors in ",
        "compute-sanitizer racecheck: errors, exit code 9",
        "compute-sanitizer initcheck: not run, the host refuses it",
        "compute-sanitizer synccheck: does not find the planted error",
        "FAILED sanitizer: racecheck, errors, exit code 9",
        "FAILED sanitizer: synccheck, does not find the planted error",
    ):
        assert line in second
    assert "Not finished" not in second
    outcomes = {}
    for entry in journal(folder):
        outcomes.setdefault(entry["stage"], {})[entry.get("unit")] = entry["outcome"]
    checked = {unit: outcome for unit, outcome in outcomes["memcheck"].items() if "[native-" in unit}
    assert checked
    assert checked == outcomes["memcheck"]  # the reference's tests are not the kernels'
    assert set(checked.values()) == {"passed"}
    assert list(outcomes["ncu"].values()) == ["passed"] * 5  # four rows, all
    assert (folder / "ran").exists()

    # Nothing is left for a third.
    process = start()
    third = process.communicate()[0]
    assert process.returncode == 1, third
    assert "---" not in third
    assert "FAILED sanitizer: racecheck" in third
    assert results(folder)[1] == after

    # Few files in one folder, which are easy to copy.
    assert {p.name for p in folder.iterdir()} == {
        "ran", "gpu-run.jsonl", "gpu-run.log", *(path.with_suffix(suffix).name for suffix in (".json", ".md", ".svg")),
    }  # fmt: skip


def test_a_call_without_time_begins_nothing(start, tmp_path):
    process = start("--minutes", "0")
    output = process.communicate()[0]
    assert process.returncode == 3, output
    assert "Not finished: tests, benchmarks, ncu, sanitizer." in output
    assert not (tmp_path / "results/gpu-run.jsonl").exists()


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "ATTNKERN_NO_NATIVE": "1",
        "ATTNKERN_RESULTS": str(tmp_path),
    }
    done = subprocess.run([sys.executable, HERE / "gpu.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "make gpu: PyTorch sees no GPU" in done.stderr


# --- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_keeps_versions_apart_and_forgets_when_asked(tmp_path):
    first, second = (Journal(tmp_path / "journal", version) for version in ("a", "b"))
    first.add("tests", unit="x", outcome="passed")
    second.add("tests", unit="x", outcome="failed")
    second.add("ncu", unit="y", outcome="passed")
    assert first.outcomes("tests") == {"x": "passed"}
    assert second.outcomes("tests") == {"x": "failed"}
    with second.path.open("a", encoding="utf-8") as file:
        file.write('{"version": "b", "sta')  # a process that was killed while it wrote
    assert second.outcomes("tests") == {"x": "failed"}
    file = second.path.read_text(encoding="utf-8")
    second.path.write_text(file[: file.rindex("\n") + 1], encoding="utf-8")
    second.add("tests", outcome="forgotten")
    assert second.outcomes("tests") == {}
    assert second.outcomes("ncu") == {"y": "passed"}


TESTS = """
import os
def test_a(): pass
def test_b(): assert False, "of no use"
def test_c():
    if os.environ.get("DIES"): os._exit(7)
def test_d(): pass
def test_e(): pass
"""


def test_tests_go_on_where_they_stopped(tmp_path):
    """Finished tests are not repeated, a test that ends the process twice is given up, and the time limit holds."""
    (tmp_path / "test_them.py").write_text(TESTS, encoding="utf-8")
    record = Journal(tmp_path / "journal", "v")

    def run(until, **environment):
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "resume", "-p", "no:cacheprovider", "--journal", record.path,
            "--journal-version", "v", "--journal-stage", "tests", "--until", str(until), "test_them.py",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(HERE), **environment}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        found = {unit.partition("::")[2]: outcome for unit, outcome in record.outcomes("tests").items()}
        return done.returncode, found, done.stdout

    far = 1e12
    assert run(far, DIES="1")[:2] == (7, {"test_a": "passed", "test_b": "failed"})
    assert run(far, DIES="1")[:2] == (7, {"test_a": "passed", "test_b": "failed", "test_c": "unfinished"})
    code, found, output = run(0)  # time is up at once, after one test
    assert (code, found["test_d"], found.get("test_e")) == (2, "passed", None)
    assert "time is up" in output
    assert run(far)[1]["test_e"] == "passed"
    (entry,) = [entry for entry in record.entries("tests") if entry["outcome"] == "failed"]
    assert entry["text"] == "AssertionError: of no use"
