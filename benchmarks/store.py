"""The results file of a run. Each row is written as soon as it is measured, and a later run can continue the file."""

import hashlib
import itertools
import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Published results. Only ``benchmarks.report`` writes here, when it is asked to.
COMMITTED = ROOT / "benchmarks/results"
#: Where runs write their results. git ignores the default folder.
RESULTS = Path(os.environ.get("ATTNKERN_RESULTS") or ROOT / "build/bench").absolute()

#: Files on which the measured times depend.
MEASURED = ("attnkern/**/*.py", "csrc/**/*", "setup.py", "benchmarks/cases.py", "benchmarks/run.py")


def code_version(*patterns: str) -> str:
    """A hash of the files in the source tree that match the patterns."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}):
        found.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def name_of(row: dict) -> tuple[str, str, str]:
    """Identifies a row within its run."""
    return row["case"], row["pass"], row["process"]


def unused(path: Path) -> Path:
    """The path, with a number appended to its stem if the file exists already."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], numbered) if not found.exists())


class Store:
    """A results file. A run with a key (the version of the code and the options) continues the file that has the same
    key, machine, version of PyTorch and suite. A run without a key starts a new file.
    """

    def __init__(self, folder: Path, about: dict):
        stem = f"{about['machine']} {about['threads']} threads {about['date']} {about['suite']}"
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}.json"
        if "key" in about:
            key = hashlib.sha256(json.dumps([about["key"], about["torch"]]).encode()).hexdigest()[:6]
            path = path.with_stem(f"{path.stem}-{key}")
        self.path, self.content = unused(path), {**about, "rows": []}
        if "key" in about:
            for path in sorted(folder.glob("*.json")):
                content = json.loads(path.read_text(encoding="utf-8"))
                if all(content.get(name) == about[name] for name in ("key", "machine", "threads", "torch", "suite")):
                    self.path, self.content = path, content

    @classmethod
    def of(cls, path: Path):
        """The store of an existing file."""
        store = cls.__new__(cls)
        store.path, store.content = path, json.loads(path.read_text(encoding="utf-8"))
        return store

    def has(self, case: str, which: str, process: str = "default") -> bool:
        return (case, which, process) in map(name_of, self.content["rows"])

    def add(self, row: dict) -> None:
        """Append a row, or replace an earlier measurement of it."""
        rows, names = self.content["rows"], [name_of(row) for row in self.content["rows"]]
        if name_of(row) in names:
            rows[names.index(name_of(row))] = row
        else:
            rows.append(row)
        self.put("rows", rows)

    def put(self, key: str, value) -> None:
        self.content[key] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)
