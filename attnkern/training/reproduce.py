"""``make reproduce``: the three families and their baselines on digits-clutter, in one table.

Every row is ``attnkern train NAME --data digits-clutter`` with its recipe's settings and seed 0, in a process of one
thread, as many at a time as there are cores. Rows that are there already are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attnkern.evaluation.protocols import check_writable, write_text

#: The papers' networks, each family's baselines first.
ROWS = {
    "Learn to Pay Attention": ("vgg", "vgg_gap", "vgg_pan", "vgg_att2_concat_dp", "vgg_att2_concat_pc"),
    "Information bottleneck": ("vgg_dvib", "vgg_aib", "vgg_aib_qt"),
    "Rectangular": (
        "efficientnet_b0_none",
        "efficientnet_b0_positionwise",
        "efficientnet_b0_window",
        "efficientnet_b0_window_equivariance",
    ),
}


def table(results: dict[str, dict]) -> str:
    """The page: one row a network, of the results by recipe."""
    lines = [
        "# Digits in clutter",
        "",
        "Written by `make reproduce`. scikit-learn's handwritten digits, each at a random place, angle and size on a "
        "cluttered canvas; 359 test images of digits that no training image shows. Narrow networks, a few minutes each "
        "on one core: not the papers' experiments, but the same code. One seed (0): differences of a few images mean "
        "nothing.",
        "",
        "Where a network looks: *pointing* is the share of images whose map has its maximum inside the digit's box, "
        "*IoU* the mean intersection over union of that box with the one around the largest region above a fifth of "
        "the map's range, as Zhou et al. localise by class activation maps. Networks without attention are given "
        "Grad-CAM of the predicted class at whichever of their feature maps does best on these very images, which "
        "flatters them. The box of the whole image has an IoU of 0.20 to 0.21.",
        "",
        "Pooling by compatibility finds the digit. The bottlenecked maps tell the digit from its ground, but by low "
        "values: in x + v·x before a batch normalisation nothing says which way is up. The rectangles have maps of "
        "4x4 and a few hundred steps here, and do not find it: their networks classify as well without.",
        "",
        "| network | map | parameters | epochs | seconds | accuracy | pointing | IoU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, names in ROWS.items():
        lines.append(f"| **{family}** | | | | | | | |")
        for name in names:
            if name not in results:
                lines.append(f"| `{name}` | not run | | | | | | |")
                continue
            result = results[name]
            where = result["localisation"]
            lines.append(
                f"| `{name}` | {where['map']} | {result['parameters']:,} | {result['epochs']} | "
                f"{result['seconds']:.0f} | {result['accuracy']:.3f} | {where['pointing']:.3f} | "
                f"{where['iou_tight']:.3f} |"
            )
    versions = next(iter(results.values()))["versions"] if results else {}
    lines += ["", ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    return "\n".join(lines) + "\n"


def run(name: str, folder: Path) -> dict:
    """Train one row, unless its result is there."""
    out = folder / name
    if not (out / "result.json").exists():
        command = [sys.executable, "-m", "attnkern", "train", name, "--data", "digits-clutter", "--out", str(out)]
        command += ["--overwrite", "true", "--trainer.enable_progress_bar", "false"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"reproduce: {name} failed:\n{done.stderr[-2000:]}")
        print(done.stdout.strip().splitlines()[-1], flush=True)
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the table goes")
    options = parser.parse_args(arguments)
    numbers, page = options.docs / "reproduction.json", options.docs / "reproduction.md"
    for path in (numbers, page):
        check_writable("reproduce", path, "--docs")
    names = [name for rows in ROWS.values() for name in rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(names, pool.map(lambda name: run(name, options.runs), names), strict=True))
    text = table(results)
    print(text)
    write_text(numbers, json.dumps(results, indent=1) + "\n")
    write_text(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
