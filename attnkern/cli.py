"""The ``attnkern`` command, also ``python -m attnkern``."""

import argparse
import contextlib
import io
import os
import platform
import re
import sys
from importlib import metadata

import torch

import attnkern
from attnkern import _backend, _ops
from attnkern._common import device_of


def info() -> str:
    """Versions, what is available here, and for each backend that is not, why and how to get it."""

    def version(*packages):
        for package in packages:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                pass
        return "not installed"

    rocm = torch.version.hip
    runtime = f"ROCm of torch {rocm}" if rocm else f"CUDA of torch {torch.version.cuda or 'none'}"
    lines = [
        f"attnkern {attnkern.__version__} (schemas {_ops.HASH})",
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {version('triton', 'pytorch-triton-rocm')}, {runtime}, {platform.machine()} {platform.system()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = properties.gcnArchName if rocm else f"compute capability {properties.major}.{properties.minor}"
        lines.append(f"cuda:{index} {properties.name}, {kind}")
    lines.append("")
    lines += [
        f"{name:9} on {device:6} {'available' if missing is None else 'not available: ' + missing}"
        for name, device, missing in _backend.status()
    ]
    chosen = _backend.current()
    lines += ["", f"chosen: {chosen or 'automatically: native, then triton, then reference'}"]
    return "\n".join(lines)


def _info(options: argparse.Namespace) -> int:
    print(info())
    return 0


def _train(options: argparse.Namespace, others: list[str]) -> int:
    from attnkern.training.recipes import list_recipes, read_recipe

    if options.recipe is None:
        for name in list_recipes():
            print(f"{name:36} {read_recipe(name)[1]['data']['name']}")
        return 0
    from attnkern.training.train import train

    result = train(options.recipe, options.data, others)
    published, accuracy = result["published_error"], result["accuracy"]
    accuracy = "not tested" if accuracy is None else f"accuracy {accuracy:.4f}"
    print(
        f"{result['recipe']} on {result['data']}: {accuracy} after {result['epochs']} epochs, "
        f"{result['seconds']:.0f} s, {result['parameters']:,} parameters, seed {result['seed']}"
        + ("" if published is None else f" (published error {published} %)")
    )
    return 0


def _models(options: argparse.Namespace) -> int:
    from attnkern.models.table import table

    print(table(), end="")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from pathlib import Path

    from attnkern.models import create_model
    from attnkern.models.weights import load_state, read_weights, save_state

    what = "convert: checkpoint"
    read = read_weights(what, options.checkpoint, options.average)
    if not read.layout:
        raise ValueError(f"{what}: {options.checkpoint!r} has the names of no published implementation that is known")
    # That every weight finds its place is checked on a network, before anything is written.
    network = create_model(read.networks[0], read.num_classes, **read.options)
    load_state(what, network, options.checkpoint, read)
    print(f"{options.checkpoint}: {read.layout}\n{read.calls()}\n")
    for old, (new, count) in read.renamed.items():
        print(f"{old:28} {new:36} {count:4} entries")
    for old, (reason, count) in read.left_out.items():
        print(f"{old:28} {'left out: ' + reason:36} {count:4} entries")
    if options.out is not None:
        save_state(read.state, Path(options.out))
        print(f"\nwritten: {options.out}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pathlib import Path

    from attnkern.evaluation.protocols import PROTOCOLS, check_protocols, choices, write_json

    out = Path(options.out or Path(options.checkpoint).with_name("evaluation.json"))
    protocols = PROTOCOLS if "all" in options.protocol else options.protocol
    check_protocols(protocols)
    subject, name = _subject(options, out)
    results = {"network": name, "checkpoint": options.checkpoint, **choices(subject), "protocols": {}}
    with _printed(results["protocols"]):
        _measure(subject, protocols, results["protocols"])
        write_json(out, results)
    print(f"written: {out}")
    return 0


def _measure(subject, protocols, results):
    """Add the results of each protocol to ``results``: when one fails, those before it are kept."""
    from tqdm import tqdm

    from attnkern.evaluation.protocols import evaluate

    bar = tqdm(protocols, disable=None)
    for name in bar:
        bar.set_description(name)
        results |= evaluate(subject, [name])


@contextlib.contextmanager
def _printed(results):
    """Print ``results`` when the block ends, also when an error ends it: measuring them took minutes."""
    from attnkern.evaluation.protocols import plain

    try:
        yield
    finally:
        _print_entries(plain(results))


def _subject(options, out):
    """What a checkpoint, a data set and the other options of ``evaluate`` describe, and the network's name.

    Raises an error, too, where ``out`` cannot be written: before anything is computed.
    """
    from attnkern.evaluation.protocols import Subject, check_writable
    from attnkern.training.data import ImageData
    from attnkern.training.train import load_run

    device = _device(options)
    run = load_run(options.checkpoint)
    check_writable(options.command, out)
    settings = run.data if options.data is None else {"name": options.data, "size": run.data["size"]}
    images = ImageData(**settings | ({} if options.root is None else {"root": options.root}))
    images.setup()
    shared = {"map": options.map, "limit": options.limit, "seed": options.seed, "device": device}
    return Subject(run.network, images, run.normalise.to(device), run.class_names, **shared), run.name


def _device(options):
    """The device of ``--device``, if it can be used here."""
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_of(options.command, options.device)
    try:
        torch.ones(1, device=device).item()
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        why = re.split(r"\.?\s*\n|\.\s", str(error).strip())[0]
        raise ValueError(f"{options.command}: device {options.device!r} cannot be used here: {why}") from error
    return device


def _report(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from attnkern.evaluation.protocols import PROTOCOLS, write_text
    from attnkern.report import report

    run = Path(options.run)
    options.checkpoint = run / "last.ckpt"
    out = Path(options.out or run / "report.html")
    subject, _ = _subject(options, out)
    held = run / "evaluation.json"
    if held.exists() and options.data is None:
        page = report(subject, run, json.loads(held.read_text(encoding="utf-8"))["protocols"], options.examples)
        write_text(out, page)
    else:
        results = {}
        with _printed(results):
            _measure(subject, PROTOCOLS, results)
            write_text(out, report(subject, run, results, options.examples))
    print(f"written: {out}")
    return 0


def _print_entries(entry, indent=0):
    """Numbers by name, one a line; long lists are left to the file."""
    for key, value in entry.items():
        if isinstance(value, dict):
            print(f"{'  ' * indent}{key}")
            _print_entries(value, indent + 1)
        elif not isinstance(value, list):
            print(
                f"{'  ' * indent}{key:24} {value:.4f}"
                if isinstance(value, float)
                else f"{'  ' * indent}{key:24} {value}"
            )


def _show(options: argparse.Namespace) -> int:
    from attnkern import viz
    from attnkern.evaluation.protocols import check_writable
    from attnkern.training.show import explain

    if options.out is not None:
        check_writable("show", options.out)
    shown = explain(options.checkpoint, options.image, options.map)
    rectangle = {} if shown.rectangle is None else {"rectangle": shown.rectangle}
    title = f"{shown.label} ({shown.probability:.0%})"
    figure = viz.overlay(shown.image, shown.attention, nearest=shown.quantized, title=title, **rectangle)
    print(f"{options.image}: {title}, {shown.map}")
    if options.out is None:
        return _on_screen(figure)
    viz.save(figure, options.out)
    print(f"written: {options.out}")
    return 0


def _on_screen(figure) -> int:
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        raise ValueError("show: there is no screen here; name a file with --out")
    manager = plt.figure().canvas.manager
    manager.canvas.figure = figure
    figure.set_canvas(manager.canvas)
    plt.show()
    return 0


def _run(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="attnkern", description="Fused kernels for spatial attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, available backends, and why the others are not")
    commands.add_parser("models", help="the papers' networks, their parameters and attention maps")
    convert = commands.add_parser(
        "convert",
        help="published weights under attnkern's names",
        description="Shows whose names a published checkpoint has (the bottleneck paper's authors', SaoYan's AttnVGG), "
        "what each is called here, and which network has the weights; --out writes them under the new names.",
    )
    convert.add_argument("checkpoint", help="file of the published implementation")
    convert.add_argument("--out", help="file to write: .safetensors, otherwise PyTorch's format")
    convert.add_argument("--average", action="store_true", help="the average over time, where the file has both")
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
    evaluate = commands.add_parser("evaluate", help="the papers' protocols on a trained network")
    evaluate.add_argument("checkpoint", help="last.ckpt of attnkern train")
    evaluate.add_argument("--protocol", nargs="+", default=["all"], metavar="NAME", help="which of them; all")
    evaluate.add_argument("--out", help="JSON file, by default evaluation.json beside the checkpoint")
    page = commands.add_parser("report", help="one self-contained HTML page for a run")
    page.add_argument("run", help="folder of a run of attnkern train")
    page.add_argument("--out", help="HTML file, by default report.html in the run's folder")
    page.add_argument("--examples", type=int, default=24, help="test images to look at")
    for command in (evaluate, page):
        command.add_argument("--data", help="data set, by default the one that the network was trained on")
        command.add_argument("--root", help="where the data lies, by default where it lay in training")
        command.add_argument("--map", help="name of the attention map, or of a module for Grad-CAM")
        command.add_argument("--limit", type=int, help="test images, by default all")
        command.add_argument("--seed", type=int, default=0, help="of what is drawn")
        command.add_argument("--device", help="cpu or cuda, by default cuda where there is one")
    show = commands.add_parser("show", help="the attention of an image of one's own")
    show.add_argument("image", help="an image file")
    show.add_argument("--checkpoint", required=True, help="last.ckpt of attnkern train")
    show.add_argument("--map", help="name of the attention map, or of a module for Grad-CAM")
    show.add_argument("--out", help=".png or .svg; without it, the picture comes to the screen")
    options, others = parser.parse_known_args(arguments)
    if others and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.command == "train":
        return _train(options, others)
    commands = {
        "info": _info,
        "models": _models,
        "convert": _convert,
        "evaluate": _evaluate,
        "report": _report,
        "show": _show,
    }
    return commands[options.command](options)


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, not at exit, where an error could not be caught
    except BrokenPipeError:  # nobody reads on: attnkern info | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 128 + 13  # as if SIGPIPE had ended the command
    except KeyboardInterrupt:
        print("attnkern: interrupted", file=sys.stderr)
        return 128 + 2
    except (ImportError, OSError, ValueError) as error:
        print(f"attnkern: {error}", file=sys.stderr)
        return 1
