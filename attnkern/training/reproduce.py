"""``make reproduce``: train the three families and their baselines on digits-clutter, and write one table.

Each row is ``attnkern train NAME --data digits-clutter`` with the settings of its recipe and seed 0, in a process with
one thread; as many processes run at a time as there are cores. Rows with a result from an earlier call are not run
again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attnkern.evaluation.protocols import check_writable, write_text

#: The rows of the table by family; baselines come first.
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
    """The page in Markdown, from the results by recipe: one row per network."""
    lines = [
        "# Digits in clutter",
        "",
        "Written by `make reproduce`. The data set shows scikit-learn's handwritten digits, each at a random place, "
        "angle and size on a cluttered canvas; the digits of the 359 test images do not appear in training. The "
        "networks are narrow and train for a few minutes on one core: these are not the papers' experiments, but they "
        "run the same code. All rows have one seed (0), so differences of a few images are not significant.",
        "",
        "*Pointing* is the share of images whose map has its maximum inside the digit's box. *IoU* is the mean "
        "intersection over union of this box and the box around the largest region above a fifth of the map's range "
        "(the method of Zhou et al. for class activation maps). For networks without attention, the map is Grad-CAM of "
        "the predicted class at the feature map with the best results on these test images, which favours these "
        "baselines. The box of the whole image has an IoU of 0.20 to 0.21.",
        "",
        "Compatibility pooling finds the digit. The quantized maps separate the digit from the background, but with "
        "low values on the digit: x + v·x is followed by batch normalisation, so the loss does not prefer high values "
        "of v to low ones. The rectangles do not find the digit here, with maps of 4x4 and a few hundred steps; their "
        "networks classify as well as those without rectangles.",
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
    """Train one row, unless it already has a result."""
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
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the table")
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
