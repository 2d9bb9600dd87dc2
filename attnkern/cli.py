"""The ``attnkern`` command, also ``python -m attnkern``."""

import argparse
import contextlib
import io
import logging
import os
import platform
import re
import shlex
import sys
from importlib import metadata

import torch

import attnkern
from attnkern import _backend, _ops
from attnkern._checks import device_of
from attnkern._extras import needs_extra
from attnkern._spelling import did_you_mean

#: The extras that train, evaluate, report and show need together.
_EXTRAS = "train,viz"


def info() -> str:
    """Versions, the GPUs, and for each backend whether it is available, or else why not and how to install it."""

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


def _train(options: argparse.Namespace) -> int:
    with needs_extra("train", _EXTRAS):
        from attnkern.training.recipes import list_recipes, read_recipe

        recipes = list_recipes()
        if options.recipe is None:
            for name in recipes:
                print(f"{name:36} {read_recipe(name)[1]['data']['name']}")
            return 0
        if options.recipe not in recipes:
            # argparse takes the value of an option that it does not know for the name.
            for name in filter(recipes.__contains__, options.others):
                raise ValueError(f"train: the name of the recipe must be the first argument: attnkern train {name} ...")
        read_recipe(options.recipe)  # an unknown name is an error before Lightning is imported, which takes seconds
        from lightning.pytorch.utilities import rank_zero_only

        from attnkern.evaluation import Orientation
        from attnkern.training.train import run_recipe

    result, folder = run_recipe(options.recipe, options.data, options.others)
    published, accuracy = result["published_error"], result["accuracy"]
    accuracy = "not tested" if accuracy is None else f"accuracy {accuracy:.4f}"
    rank_zero_only(print)(  # once, if several processes train
        f"{result['recipe']} on {result['data']}: {accuracy} after {result['epochs']} epochs, "
        f"{result['seconds']:.0f} s, {result['parameters']:,} parameters, seed {result['seed']}"
        + ("" if published is None else f" (published error {published} %)")
    )
    for map, chosen in (result["orientations"] or {}).items():
        rank_zero_only(print)(f"{map}: on training images, {Orientation(**chosen)}")
    if folder is not None:
        print(_next_steps(folder))
    return 0


def _next_steps(folder) -> str:
    """Where a run's files are, and the commands that use them."""
    lines = [f"results: {folder}"]
    checkpoint = folder / "last.ckpt"
    if checkpoint.exists():
        run, trained = shlex.quote(str(folder)), shlex.quote(str(checkpoint))
        lines += [
            "next:",
            f"  attnkern evaluate {trained}    # measure it by the papers' protocols",
            f"  attnkern report {run}    # write a page with its numbers and pictures",
            f"  attnkern show IMAGE --checkpoint {trained} --out map.png    # draw the attention of an image",
        ]
    return "\n".join(lines)


def _models(options: argparse.Namespace) -> int:
    with needs_extra("models", _EXTRAS):
        from attnkern.models.table import table

        print(table(), end="")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from pathlib import Path

    from attnkern.evaluation.protocols import check_writable
    from attnkern.models import create_model
    from attnkern.models.weights import load_state, read_weights, save_state

    if options.out is not None:
        check_writable("convert", options.out)
    what = "convert: checkpoint"
    read = read_weights(what, options.checkpoint, options.average)
    if not read.layout:
        raise ValueError(
            f"{what}: {options.checkpoint!r} does not have the weight names of a known published implementation"
        )
    # Loading them into a network checks that every weight fits, before a file is written.
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

    with needs_extra("evaluate", _EXTRAS):
        from attnkern.evaluation.protocols import choices, chosen_protocols, write_json
        from attnkern.evaluation.summary import failures

    out = Path(options.out or Path(options.checkpoint).with_name("evaluation.json"))
    protocols = chosen_protocols(options.protocol)
    subject, name = _subject(options, out, options.checkpoint, options.map)
    results = {"network": name, "checkpoint": options.checkpoint, **choices(subject), "protocols": {}}
    with _printed({options.checkpoint: results["protocols"]}):
        _measure(subject, protocols, results["protocols"])
        write_json(out, results)
    print(f"details: {out}")
    return 1 if failures(results["protocols"]) else 0


def _measure(subject, protocols, results):
    """Add the results of each protocol to ``results``, its error included."""
    from tqdm import tqdm

    from attnkern.evaluation.protocols import evaluate

    bar = tqdm(protocols, disable=None)
    for name in bar:
        bar.set_description(name)
        results |= evaluate(subject, [name])


@contextlib.contextmanager
def _printed(measured):
    """Print a summary of {run: results} at the end of the block, after an error too: measuring them took minutes."""
    from attnkern.evaluation.protocols import plain
    from attnkern.evaluation.summary import summary

    try:
        yield
    finally:
        for run, results in measured.items():
            heading = f"{run}:\n" if len(measured) > 1 else ""
            print(f"{heading}{summary(plain(results))}")


def _subject(options, out, checkpoint, map):
    """The network of a checkpoint with the images and settings that the options name, and the network's name.

    Raises OSError if ``out`` cannot be written, before anything is computed.
    """
    with needs_extra(options.command, _EXTRAS):
        from attnkern.evaluation.protocols import Subject, check_writable
        from attnkern.training.data import ImageData
        from attnkern.training.train import load_run

    device = _device(options)
    run = load_run(checkpoint)
    check_writable(options.command, out)
    settings = run.data if options.data is None else {"name": options.data, "size": run.data["size"]}
    images = ImageData(**settings | ({} if options.root is None else {"root": options.root}))
    images.setup()
    shared = {"map": map, "limit": options.limit, "seed": options.seed, "device": device}
    shared["orientations"] = run.orientations
    return Subject(run.network, images, run.normalise.to(device), run.class_names, **shared), run.name


def _device(options):
    """The device of ``--device``; raises ValueError if it cannot be used on this machine."""
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
    from pathlib import Path

    with needs_extra("report", _EXTRAS):
        from attnkern.evaluation.protocols import PROTOCOLS, write_text
        from attnkern.report import Reported, check_against, report, saved_results

    given = {"run": (options.run, options.map), "against": (options.against, options.against_map)}
    if options.against is None:
        if options.against_map is not None:
            raise ValueError("report: --against-map needs a run to compare with: pass --against")
        del given["against"]
    out = Path(options.out or Path(options.run) / "report.html")
    reported = []
    for name, (run, map) in given.items():
        checkpoint = Path(run) / "last.ckpt"
        if not checkpoint.is_file():
            why = f"there is no file {os.fspath(checkpoint)!r}"
            raise FileNotFoundError(f"report: {name} must be the folder of a run of attnkern train, got {run!r}: {why}")
        subject, _ = _subject(options, out, checkpoint, map)
        reported.append(Reported(subject, run, saved_results(subject, run)))
    first, *others = reported
    for other in others:
        check_against(first, other)

    incomplete = [each for each in reported if not PROTOCOLS.keys() <= each.results.keys()]
    with _printed({each.run: each.results for each in incomplete}):
        for each in incomplete:
            _measure(each.subject, [name for name in PROTOCOLS if name not in each.results], each.results)
        write_text(out, report(*first, options.examples, *others))
    print(f"written: {out}")
    return 0


def _show(options: argparse.Namespace) -> int:
    with needs_extra("show", _EXTRAS):
        from attnkern import viz
        from attnkern.evaluation.protocols import check_writable
        from attnkern.training.show import draw, explain, summary

    if options.out is not None:
        check_writable("show", options.out)
    shown = explain(options.checkpoint, options.image, options.map)
    figure = draw(shown)
    print(f"{options.image}: {summary(shown)}")
    if options.out is None:
        return _on_screen(figure)
    viz.save(figure, options.out)
    print(f"written: {options.out}")
    return 0


def _on_screen(figure) -> int:
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        raise ValueError("show: there is no screen; choose a file with --out")
    manager = plt.figure().canvas.manager
    manager.canvas.figure = figure
    figure.set_canvas(manager.canvas)
    plt.show()
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, with a suggestion for a misspelled command."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        command = re.search(r"invalid choice: '(.*?)'", message)
        if command:
            message = f"there is no command {command[1]!r}{did_you_mean(command[1], _COMMANDS)}"
        help = "" if message.endswith("?") else f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: {message}{help}\n")

    def refuse(self, others: list[str]):
        """Exit because of arguments that this parser does not know."""
        word = others[0].partition("=")[0]
        kind = "option" if word.startswith("-") else "argument"
        self.error(f"unknown {kind} {word}{did_you_mean(word, re.findall(r'--[a-z]+', self.format_help()))}")


def _positive(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line, and the parser of each command."""
    parser = _Parser(prog="attnkern", description="Fused kernels for spatial attention.")
    parser.add_argument("--version", action="version", version=f"attnkern {attnkern.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="show versions, the available backends, and why others are not available")
    commands.add_parser("models", help="list the papers' networks, their parameters and attention maps")
    convert = commands.add_parser(
        "convert",
        help="convert published weights to attnkern's names",
        description="Shows which published implementation a checkpoint comes from (the bottleneck paper's authors', "
        "SaoYan's AttnVGG), how its weights are named here, and which network they belong to. With --out, writes the "
        "weights under their new names.",
    )
    convert.add_argument("checkpoint", help="checkpoint file of the published implementation")
    convert.add_argument("--out", help="file to write: .safetensors, or any other name for PyTorch's format")
    convert.add_argument(
        "--average",
        action="store_true",
        help="convert the moving average of the weights (net_ema) that the file must hold",
    )
    train = commands.add_parser(
        "train",
        help="train one of the papers' networks",
        description="Trains a network by a recipe. All other options are those of Lightning's command line and "
        "override the recipe: --trainer.max_epochs 3, --trainer.precision bf16-mixed, --trainer.devices 2, "
        "--model.options.width 0.25, --data.root DIR, --data.download true, --seed_everything 1, --out DIR, "
        "--resume true, --overwrite true. --print_config shows all of them with their values.",
    )
    train.add_argument("recipe", nargs="?", help="name of a recipe; without a name, lists the recipes")
    train.add_argument("--data", help="data set, by default the recipe's; digits-clutter needs no download")
    evaluate = commands.add_parser("evaluate", help="measure a trained network by the papers' protocols")
    evaluate.add_argument("checkpoint", help="last.ckpt of a run of attnkern train")
    evaluate.add_argument(
        "--protocol", nargs="+", default=["all"], metavar="NAME", help="protocols to run; all by default"
    )
    evaluate.add_argument("--out", help="JSON file to write, by default evaluation.json next to the checkpoint")
    page = commands.add_parser(
        "report",
        help="write a self-contained HTML page about a run, or about two runs side by side",
        description="Writes a self-contained HTML page about a run: numbers, training curves, test images with their "
        "maps, and the results of all protocols. With --against, all of this is shown for two runs side by side, with "
        "the test images that only one of them gets right and McNemar's test. Results in a run's evaluation.json are "
        "used if they are of the same images, map and seed; protocols that it lacks are run.",
    )
    page.add_argument("run", help="folder of a run of attnkern train")
    page.add_argument("--against", metavar="OTHER", help="folder of another run on the same test images, to compare")
    page.add_argument("--against-map", metavar="MAP", help="--map of the other run")
    page.add_argument("--out", help="HTML file to write, by default report.html in the run's folder")
    page.add_argument("--examples", type=_positive, default=24, help="number of test images on the page, 24 by default")
    for command in (evaluate, page):
        command.add_argument("--data", help="data set, by default that of the training")
        command.add_argument("--root", help="folder of the data, by default that of the training")
        command.add_argument("--map", help="name of the attention map, or of a module for Grad-CAM")
        command.add_argument("--limit", type=_positive, help="number of test images, by default all")
        command.add_argument("--seed", type=int, default=0, help="random seed, 0 by default")
        command.add_argument("--device", help="cpu or cuda, by default cuda if there is a GPU")
    show = commands.add_parser("show", help="draw what a trained network looks at in an image")
    show.add_argument("image", help="an image file")
    show.add_argument("--checkpoint", required=True, help="last.ckpt of a run of attnkern train")
    show.add_argument("--map", help="name of the attention map, or of a module for Grad-CAM")
    show.add_argument("--out", help="file to write, .png or .svg; without it, the picture is shown on the screen")
    return parser, commands.choices


def _run(arguments: list[str] | None) -> int:
    parser, commands = _parsers()
    options, options.others = parser.parse_known_args(arguments)
    if options.command is None:
        if options.others:
            parser.refuse(options.others)
        parser.print_help()
        return 0
    if options.others and options.command != "train":  # train gives them to Lightning
        commands[options.command].refuse(options.others)
    return _COMMANDS[options.command](options)


_COMMANDS = {
    "info": _info,
    "models": _models,
    "convert": _convert,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "show": _show,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code. Expected errors are printed as one sentence."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal lacks are printed as escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    # It warns about a missing GPU when other parts of PyTorch import it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, because an error while Python exits cannot be caught
    except BrokenPipeError:  # the reader has closed its end, as in attnkern info | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush while Python exits
        return 128 + 13  # the exit code after SIGPIPE
    except KeyboardInterrupt as interrupt:
        print(f"attnkern: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 128 + 2  # the exit code after SIGINT
    except (ImportError, OSError, ValueError) as error:
        print(f"attnkern: {error}", file=sys.stderr)
        return 1
