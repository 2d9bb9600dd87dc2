"""The journal of `make gpu`, which records what has been done."""

import json
from pathlib import Path


class Journal:
    """Lines of JSON, each written at once. Lines of other versions are kept and ignored."""

    def __init__(self, path: Path, version: str):
        self.path, self.version = Path(path), version

    def add(self, stage: str, **entry) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"version": self.version, "stage": stage, **entry}) + "\n")

    def entries(self, stage: str) -> list[dict]:
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if (entry["version"], entry["stage"]) == (self.version, stage):
                if entry["outcome"] == "forgotten":
                    found.clear()
                else:
                    found.append(entry)
        return found

    def outcomes(self, stage: str) -> dict[str, str]:
        """Outcomes of a stage by unit: "passed", "failed", "skipped", or "unfinished" if it was begun twice."""
        found, begun = {}, {}
        for entry in self.entries(stage):
            unit, outcome = entry.get("unit"), entry["outcome"]
            if outcome == "begun":
                begun[unit] = begun.get(unit, 0) + 1
            else:
                found[unit] = outcome
        return {unit: "unfinished" for unit, count in begun.items() if count > 1} | found
