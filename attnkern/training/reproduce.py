"""``make reproduce``: train networks with every kind of attention on digits, measure them, and write one page.

The small networks, which share a trunk and differ in their attention, are trained with several seeds; ``--full``
(``make reproduce FULL=1``) adds the parts that take longer and the papers' architectures. Each run is ``attnkern
train`` in a process with one thread; as many processes run at a time as there are cores. A run that has its numbers
from an earlier call is not trained again, and parts of the page that a call leaves out (``--part``) keep their numbers.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from attnkern._json import read_json
from attnkern.evaluation.protocols import check_writable, write_json, write_text
from attnkern.models.efficientnet_lite import weights_file
from attnkern.training.page import page

SEEDS = (0, 1, 2, 3, 4)


class Row(NamedTuple):
    """A network on a data set; its runs differ in the seed."""

    recipe: str
    data: str = "digits-clutter"
    count: int | None = None  #: training images; None: the recipe's
    start: str | None = None  #: name of the row whose network with the same seed training starts from
    variant: str = ""  #: a short name for the options
    options: tuple[tuple[str, str], ...] = ()  #: further options of ``attnkern train`` and their values

    @property
    def name(self) -> str:
        """Unique, for a folder."""
        parts = [
            self.recipe,
            "" if self.data == "digits-clutter" else self.data.removeprefix("digits-"),
            "" if self.count is None else self.count,
            self.variant,
        ]
        return "-".join(str(part) for part in parts if part)

    def arguments(self, folder: Path, seed: int) -> list[str]:
        """What ``attnkern train`` is called with, ``folder`` being that of all runs."""
        found = {"data.seed": seed, "seed_everything": seed}
        if self.start is not None:
            found["model.pretrained"] = folder / self.start / f"seed{seed}" / "last.ckpt"
        if self.count is not None:
            epochs = _EPOCHS[self.count]
            found |= {"data.count": self.count, "trainer.max_epochs": epochs}
            found |= {"model.lr_scheduler.init_args.T_max": epochs - 1, "trainer.check_val_every_n_epoch": epochs // 10}
        found |= dict(self.options)
        options = [part for key, value in found.items() for part in (f"--{key}", str(value))]
        return [self.recipe, "--data", self.data, *options]


#: Training images: epochs, so that few images do not mean few steps.
_EPOCHS = {50: 300, 200: 100, 1000: 25}
_WINDOWS = ("none", "positionwise_norm", "window", "window4", "ellipse", "ellipse4")
_ATTENTIONS = (
    "none", "positionwise", "positionwise_norm", "window", "window_equivariance",
    "compatibility_dp", "compatibility_pc", "compatibility2_dp", "compatibility2_pc",
    "dvib", "bottleneck", "bottleneck_qt",
)  # fmt: skip
#: What may decide whether high or low values of a bottlenecked map mark the digit.
_SIGNS = {
    "short": {},
    "no_residual": {"model.options.residual": "false"},
    "norm_after": {"model.options.norm": "after"},
    "beta0": {"model.options.beta": "0"},
}
_SHORT = {"trainer.max_epochs": "5", "model.lr_scheduler.init_args.T_max": "4"}
#: Whether ten epochs are enough.
_LONG = {"trainer.max_epochs": "20", "model.lr_scheduler.init_args.T_max": "19"}
_TRAINED_LONG = ("none", "window", "compatibility_pc", "bottleneck")
#: Rows of the parts of the page with several seeds.
PARTS = {
    "attention": [Row(f"small_{name}") for name in _ATTENTIONS],
    "windows": [Row(f"small_{name}") for name in _WINDOWS],
    "pairs": [Row(f"small_{name}", "digits-pairs", start=f"small_{name}") for name in _WINDOWS],
    "few": [Row(f"small_{name}", count=count) for count in _EPOCHS for name in ("none", "positionwise_norm", "window")],
    "epochs": [Row(f"small_{name}") for name in _TRAINED_LONG]
    + [Row(f"small_{name}", variant="epochs20", options=tuple(_LONG.items())) for name in _TRAINED_LONG],
    "sign": [Row(f"small_{name}") for name in ("bottleneck", "bottleneck_qt")]
    + [
        Row("small_bottleneck", variant=name, options=tuple((_SHORT | options).items()))
        for name, options in _SIGNS.items()
    ],
    "photographs": [
        # The test with Grad-CAM takes minutes, and the row is measured later anyway.
        Row(f"efficientnet_lite0_{name}", "photo-clutter", options=(("trainer.limit_test_batches", "0"),))
        for name in ("none", "positionwise_norm", "window")
    ],
}
#: Parts that are made by default.
DEFAULT = ("attention", "windows", "few")
#: The papers' architectures by family; baselines come first.
PAPERS = {
    "Learn to Pay Attention": ("vgg", "vgg_gap", "vgg_pan", "vgg_att2_concat_dp", "vgg_att2_concat_pc"),
    "Information bottleneck": ("vgg_dvib", "vgg_aib", "vgg_aib_qt"),
    "Rectangular": (
        "efficientnet_b0_none",
        "efficientnet_b0_positionwise",
        "efficientnet_b0_window",
        "efficientnet_b0_window_equivariance",
    ),
}


def _python(*arguments: str) -> str:
    """Run Python with one thread; the first line that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"reproduce: {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().partition("\n")[0]


def _train(arguments: list[str], out: Path) -> dict[str, Any]:
    """The result of a run in ``out``, which is trained unless there is one."""
    path = out / "result.json"
    if not path.exists():
        quiet = ["--overwrite", "true", "--trainer.enable_progress_bar", "false"]
        print(_python("attnkern", "train", *arguments, "--out", str(out), *quiet), flush=True)
    return read_json("reproduce", path, "delete it to train the run again")


def run(row: Row, seed: int, folder: Path) -> dict[str, Any]:
    """Train and measure a row with a seed, unless that has been done: its numbers.

    Raises:
        RuntimeError: training or measuring failed; the message ends with the last lines of its error.
        ValueError: a file with numbers of the run is damaged.
    """
    out = folder / row.name / f"seed{seed}"
    result = _train(row.arguments(folder, seed), out)
    if not (out / "measures.json").exists():
        _python("attnkern.training.measures", str(out))
    measures = read_json("reproduce", out / "measures.json", "delete it to measure the run again")
    kept = ("parameters", "epochs", "seconds", "versions")
    return {name: result[name] for name in kept} | measures


def run_paper(recipe: str, folder: Path) -> dict[str, Any]:
    """Train a paper's architecture with seed 0, unless that has been done: its result.

    Raises:
        RuntimeError: training failed; the message ends with the last lines of its error.
        ValueError: the file with the result of the run is damaged.
    """
    return _train([recipe, "--data", "digits-clutter"], folder / recipe)


def reproduce(parts: list[str], seeds: list[int], folder: Path, results: dict[str, Any]) -> None:
    """Add the numbers of the parts to ``results``, in the form that :func:`attnkern.training.page.page` takes."""
    results["parts"] = [part for part in PARTS if part in {*results["parts"], *parts}]
    chosen = [row for part in parts if part in PARTS for row in PARTS[part]]
    # Rows that others start from come first.
    rows = list({row.name: row for row in [*(Row(row.start) for row in chosen if row.start), *chosen]}.values())
    stages = [[(row, seed) for seed in seeds for row in rows if bool(row.start) == later] for later in (False, True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for stage in stages:
            numbers = pool.map(lambda each: run(*each, folder), stage)
            for (row, seed), found in zip(stage, numbers, strict=True):
                results["small"].setdefault(row.name, {})[str(seed)] = found
        if "papers" in parts:
            recipes = [recipe for family in PAPERS.values() for recipe in family]
            found = pool.map(lambda recipe: run_paper(recipe, folder), recipes)
            results["papers"] = dict(zip(recipes, found, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of the small networks")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--part", nargs="+", choices=[*PARTS, "papers"], default=DEFAULT, help="parts of the page")
    chosen.add_argument("--full", action="store_true", help="all parts, also the papers' architectures")
    options = parser.parse_args(arguments)
    numbers, text = options.docs / "reproduction.json", options.docs / "reproduction.md"
    for path in (numbers, text):
        check_writable("reproduce", path, "--docs")
    results = {"parts": [], "small": {}, "papers": {}}
    if numbers.exists():
        results |= read_json("reproduce", numbers, "restore it or delete it")
    parts = [*PARTS, "papers"] if options.full else options.part
    if "photographs" in parts:
        try:
            weights_file("the part photographs")
        except (ModuleNotFoundError, ValueError) as error:
            if not options.full:
                parser.error(str(error))
            print(f"reproduce: left out {error}", file=sys.stderr)
            parts.remove("photographs")
    reproduce(parts, options.seeds, options.runs, results)
    write_json(numbers, results)
    write_text(text, page(results, {name: [row.name for row in rows] for name, rows in PARTS.items()}, PAPERS))
    print(text.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:  # damaged files and failed runs
        sys.exit(str(error))
