"""The ``attnkern`` command, also ``python -m attnkern``."""

import argparse
import platform
import sys
from importlib import metadata

import torch

import attnkern
from attnkern import _backend, _ops


def info() -> str:
    """Versions, what is available here, and for each backend that is not, why and how to get it."""

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    lines = [
        f"attnkern {attnkern.__version__} (schemas {_ops.HASH})",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {version('triton')}, "
        f"CUDA of torch {torch.version.cuda or 'none'}, {platform.machine()} {platform.system()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor}")
    lines.append("")
    lines += [
        f"{name:9} on {device:6} {'available' if missing is None else 'not available: ' + missing}"
        for name, device, missing in _backend.status()
    ]
    chosen = _backend.current()
    lines += ["", f"chosen: {chosen or 'automatically: native, then triton, then reference'}"]
    return "\n".join(lines)


def _train(options: argparse.Namespace, others: list[str]) -> int:
    from attnkern.training.recipes import list_recipes, read_recipe

    if options.recipe is None:
        for name in list_recipes():
            print(f"{name:36} {read_recipe(name)[1]['data']['name']}")
        return 0
    from attnkern.training.train import train

    result = train(options.recipe, options.data, others)
    published = result["published_error"]
    print(
        f"{result['recipe']} on {result['data']}: accuracy {result['accuracy']:.4f} after {result['epochs']} epochs, "
        f"{result['seconds']:.0f} s, {result['parameters']:,} parameters, seed {result['seed']}"
        + ("" if published is None else f" (published error {published} %)")
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attnkern", description="Fused kernels for spatial attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, available backends, and why the others are not")
    commands.add_parser("models", help="the papers' networks, their parameters and attention maps")
    train = commands.add_parser(
        "train",
        help="train a network of the papers",
        description="Trains a network by a recipe. Every other option is one of Lightning's command line and wins over "
        "the recipe: --trainer.max_epochs 3, --trainer.precision bf16-mixed, --trainer.devices 2, "
        "--model.options.width 0.25, --data.root DIR, --data.download true, --seed_everything 1, --out DIR, "
        "--resume true; --print_config shows them all.",
    )
    train.add_argument("recipe", nargs="?", help="name of a recipe; without one, they are listed")
    train.add_argument("--data", help="data set, by default the recipe's: digits-clutter needs no download")
    options, others = parser.parse_known_args(arguments)
    if others and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.command == "info":
        print(info())
        return 0
    try:
        if options.command == "models":
            from attnkern.models.table import table

            print(table(), end="")
            return 0
        return _train(options, others)
    except (ImportError, OSError, ValueError) as error:
        print(f"attnkern: {error}", file=sys.stderr)
        return 1
