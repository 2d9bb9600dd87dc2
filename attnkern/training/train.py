"""``attnkern train``: train the network of a recipe on a data set, with the options of Lightning's command line."""

import contextlib
import json
import logging
import os
import platform
import re
import shlex
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import attnkern
from attnkern._checks import check_items, check_kind
from attnkern._extras import needs_extra
from attnkern.evaluation.inputs import collect
from attnkern.evaluation.localisation import localisation
from attnkern.evaluation.maps import attention_of, gradcam_of, map_of
from attnkern.evaluation.orientation import Orientation, orientation
from attnkern.evaluation.protocols import stratified, write_json
from attnkern.models import create_model, map_names
from attnkern.models.efficientnet_lite import WEIGHTS
from attnkern.training._options import option_error
from attnkern.training.data import ImageData
from attnkern.training.modules import FAMILIES
from attnkern.training.normalisation import normalisation_from
from attnkern.training.recipes import read_recipe

with needs_extra("attnkern.training.train", "train"):
    import lightning.pytorch as pl
    import yaml
    from jsonargparse import ArgumentError
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


#: Files that describe a run, beside the checkpoint and ``result.json``, which the next run replaces at its end.
_OF_A_RUN = ("csv/version_*/metrics.csv", "tensorboard/events.out.tfevents.*", "evaluation.json", "measures.json")


class _SaveSettings(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder after the data has been found.

    It then removes what belongs to an earlier run there: curves, which would be drawn as the beginning of the new ones,
    and measurements.
    """

    def __init__(self, parser, config, *args, **kwargs):
        super().__init__(parser, config, *args, save_to_log_dir=False, **kwargs)
        # Found now, before the loggers open files of their own.
        self.replaced = [] if config.resume else [path for name in _OF_A_RUN for path in run_folder(config).glob(name)]

    def save_config(self, trainer, pl_module, stage):
        out = run_folder(self.config)
        out.mkdir(parents=True, exist_ok=True)
        for path in self.replaced:
            path.unlink(missing_ok=True)
        (out / "config.yaml").write_text(f"# attnkern train\n{self.parser.dump(self.config)}", encoding="utf-8")


def run_folder(config) -> Path:
    """The folder into which a run writes its files."""
    return Path(config.out or config.trainer.default_root_dir or f"runs/{config.model.name}-{config.data.name}")


class _LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` after each epoch.

    Lightning refuses two callbacks of one class with the same settings: as a class of its own, this one does not
    collide with a ModelCheckpoint of the user's.
    """

    def __init__(self, out: Path):
        # With the same name each epoch the file is replaced in one step: after a kill it is the old or the new one.
        super().__init__(out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


#: Largest number of training images that the orientation of a map is chosen on.
_ORIENTING = 256

_LIGHTNING = Path(pl.__file__).parents[1]


@contextlib.contextmanager
def _in_one_sentence():
    """Turn errors that Lightning raises about its options into a ValueError with Lightning's message.

    An error counts as such if a ``raise`` statement in Lightning's code raised it. All others are bugs, and keep their
    type and traceback.
    """
    try:
        yield
    except Exception as error:
        # jsonargparse wraps an error of a class's constructor into a list of all types that the option accepts.
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        frames = traceback.extract_tb(first.__traceback__)
        where = frames[-1] if frames else None
        if not (where and _LIGHTNING in Path(where.filename).parents and (where.line or "").startswith("raise ")):
            raise
        raise ValueError(f"train: {' '.join(str(first).split())}") from error


class _Command(LightningCLI):
    """Lightning's command line with three more options: ``--out``, ``--resume`` and ``--overwrite``.

    Args:
        weights: pretrained weights from which the recipe starts, or None. They may have to be downloaded, so the user
            must choose them, a file or random weights.
    """

    def __init__(self, *args, weights: str | None = None, **kwargs):
        self.weights = weights
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser):
        folder = "folder of the run, by default --trainer.default_root_dir or else runs/NAME-DATA"
        parser.add_argument("--out", type=str | None, default=None, help=folder)
        parser.add_argument("--resume", type=bool, default=False, help="continue from the last checkpoint in --out")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")

    def parse_arguments(self, parser, args):
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            # Every network has a width, which users look for under --model.
            options = ["--model.options.width", *re.findall(r"--[\w.]+", parser.format_help())]
            raise ValueError(f"train: {option_error(str(error), options)}") from error

    def before_instantiate_classes(self):
        config = self.config
        self.out = run_folder(config)
        self.last = self.out / "last.ckpt"
        if config.resume and not self.last.exists():
            raise FileNotFoundError(f"train: resume: there is no checkpoint {os.fspath(self.last)!r}")
        has_run = self.last.exists() or (self.out / "result.json").exists()
        if has_run and not config.resume and not config.overwrite and not config.trainer.fast_dev_run:
            raise FileExistsError(
                f"train: {os.fspath(self.out)!r} already contains a run; continue it with --resume true, replace it "
                "with --overwrite true, or choose another folder with --out"
            )
        self._check_network()
        if config.seed_everything is False:  # an earlier run in this process may have left its seed
            os.environ.pop("PL_GLOBAL_SEED", None)

    def _check_network(self):
        """Raise ValueError for wrong options of the network, before any file is created or downloaded."""
        model, options = self.config.model, dict(self.config.model.options or {})
        chosen = "weights" in options or model.pretrained is not None or self.config.resume
        if self.weights is not None and not chosen:
            raise ValueError(
                f"train: the paper trains {model.name} from torchvision's pretrained weights {self.weights}; choose "
                f"--model.options.weights {self.weights} (downloads them unless torchvision has them in its cache), "
                "--model.options.weights FILE, or --model.options.weights null to start from random weights"
            )
        options.pop("weights", None)
        try:
            with torch.device("meta"):
                create_model(model.name, model.num_classes or 10, **options)
        except TypeError as error:
            raise ValueError(f"train: {error}") from error

    def instantiate_trainer(self, **kwargs):
        given = self.config_init.trainer
        if given.accumulate_grad_batches < 1:
            raise ValueError(
                f"train: trainer.accumulate_grad_batches must be at least 1, got {given.accumulate_grad_batches}"
            )
        if given.model_registry is not None:
            raise ValueError("train: trainer.model_registry is not supported: a run saves its checkpoint in --out")
        # Lightning refuses callbacks for features that are switched off.
        callbacks = self.trainer_defaults["callbacks"] = []
        if given.enable_checkpointing is not False and not given.barebones:
            callbacks.append(_LastCheckpoint(self.out))
        logger = given.logger
        if (logger is None or logger is True) and not given.barebones:
            # A resumed run gets another CSV file: Lightning would empty the first one.
            logger = [TensorBoardLogger(self.out, "tensorboard", version=""), CSVLogger(self.out, "csv")]
        if logger:
            callbacks.append(LearningRateMonitor("epoch"))
        root = given.default_root_dir or self.out
        trainer = super().instantiate_trainer(logger=logger, default_root_dir=root, **kwargs)
        # Strategies that spawn or fork train in child processes, which do not return the network and the images.
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "train: trainer.strategy must start new processes, as ddp does from a command line or a script; got "
                "one that spawns or forks this process"
            )
        return trainer


class TrainedRun(NamedTuple):
    """Result of :func:`run_recipe`."""

    result: dict[str, Any]  #: as :func:`train` returns it
    folder: Path | None  #: of the files of the run; None if none were written


def train(name: str, data: str | None = None, arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and test the network of a recipe, and save the run in a folder: ``attnkern train NAME --data DATA``.

    The folder gets the settings (``config.yaml``), logs (``csv/``, ``tensorboard/``), ``last.ckpt`` after each
    epoch and ``result.json`` at the end. A run that was killed continues with ``--resume true`` and ends with the
    weights of an uninterrupted run. The weights of the last epoch count; nothing is selected by the test set. With
    ``--trainer.fast_dev_run true`` no files are written.

    Args:
        name: name of the recipe, one of :func:`attnkern.training.recipes.list_recipes`.
        data: name of the data set, one of :func:`attnkern.training.data.data_sets`; None: the recipe's.
        arguments: options of Lightning's command line, which override the recipe: ``["--trainer.max_epochs", "3"]``.

    Returns:
        the content of ``result.json``. ``accuracy`` is None if nothing was tested (``--trainer.limit_test_batches 0``),
        ``localisation`` also if the data set has no boxes. ``orientations`` holds the fields of
        :class:`attnkern.evaluation.Orientation` for each attention map, from training images, or is None if the data
        set has no boxes; the checkpoint has them, too.

    Raises:
        ValueError, TypeError: an unknown recipe, data set or option, an argument of another type, an option that
            Lightning refuses, or a recipe that starts from pretrained weights without ``--model.options.weights``,
            because nothing is downloaded unasked.
        FileExistsError: the folder already contains a run, and neither resume nor overwrite is set.
        FileNotFoundError: there are no data, or nothing to resume.
        KeyboardInterrupt: the run was interrupted; the message says how to continue it.
    """
    return run_recipe(name, data, arguments).result


def run_recipe(name: str, data: str | None = None, arguments: list[str] | None = None) -> TrainedRun:
    """Train as :func:`train` does; arguments and errors as there."""
    family, settings, published = read_recipe(name, data)
    if arguments is not None:
        check_items("train", str, arguments=arguments)
    options = settings["model"].get("options") or {}
    # Weights that ship in a package need no choice by the user: they are never downloaded.
    weights = None if options.get("weights") == WEIGHTS else options.pop("weights", None)
    _silence()
    with _in_one_sentence():
        cli = _Command(
            FAMILIES[family],
            ImageData,
            args=["--config", yaml.safe_dump(settings), *(arguments or [])],
            run=False,
            save_config_callback=_SaveSettings,
            seed_everything_default=0,
            trainer_defaults={"enable_model_summary": False},
            parser_kwargs={"prog": "attnkern train", "allow_abbrev": False, "exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            weights=weights,
        )
        trainer, module, images, out = cli.trainer, cli.model, cli.datamodule, cli.out
        began = time.perf_counter()
        try:
            trainer.fit(module, images, ckpt_path=cli.last if cli.config.resume else None, weights_only=True)
            seconds, epochs = time.perf_counter() - began, trainer.current_epoch
            tested = trainer.test(module, images, verbose=False)
        except SystemExit as error:
            if error.code == 1 and trainer.interrupted:  # Lightning exits like this after Ctrl-C
                raise KeyboardInterrupt(_how_to_resume(cli.last, name, data, arguments or [])) from error
            raise
    data = cli.config.data.name
    accuracy = tested[0].get("test_accuracy") if tested else None  # missing without batches or without logging
    located = images.located() if trainer.limit_test_batches else None
    if located is not None and trainer.fast_dev_run:
        located = Subset(located, range(min(int(trainer.fast_dev_run) * images.batch_size, len(located))))
    module.network.float()  # for localise, after a run with --trainer.precision 16-true or the like
    limit = int(trainer.fast_dev_run) * images.batch_size or _ORIENTING
    oriented = orientations(module.network, images, limit) if trainer.limit_test_batches else None
    result = {
        "recipe": name,
        "network": module.hparams.name,
        "options": module.hparams.options or {},
        "data": data,
        "seed": cli.config.seed_everything,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "seconds": round(seconds, 1),
        "accuracy": None if accuracy is None else round(accuracy, 4),
        "published_error": published.get(data),
        "localisation": None if located is None else localise(module.network, located, cli.config.data.batch_size),
        "orientations": oriented,
        "versions": {
            "attnkern": attnkern.__version__,
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "python": platform.python_version(),
        },
    }
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return TrainedRun(result, None)
    path = out / "result.json"
    saved = any(isinstance(each, _LastCheckpoint) and each.best_model_path for each in trainer.callbacks)
    try:
        if oriented and saved and cli.last.is_file():  # some strategies write a folder
            _add_to_checkpoint(cli.last, {"orientations": oriented})
        write_json(path, result)
    except Exception as error:  # the message keeps the numbers
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"train: {path} cannot be written ({reason}): {json.dumps(result)}") from error
    return TrainedRun(result, out)


def _silence():
    """Switch off messages of Lightning and PyTorch that are advertisements, or hints about settings made on purpose.

    Messages of callbacks and profilers stay: the user asked for them.
    """
    for name in ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",
        "Checkpoint directory .* exists",
        "The number of training batches .* is smaller than the logging interval",
        ".*does not have many workers",
        ".*LeafSpec",
        r"Found \d+ module\(s\) in eval mode",
    ):
        warnings.filterwarnings("ignore", message=message)


def _how_to_resume(last: Path, name: str, data: str | None, arguments: list[str]) -> str:
    """What to do after an interruption."""
    if not last.exists():
        return "interrupted before the first checkpoint was written; there is nothing to resume"
    chosen = [] if data is None else ["--data", data]
    command = shlex.join(["attnkern", "train", name, *chosen, *arguments, "--resume", "true"])
    return f"interrupted after the checkpoint {os.fspath(last)!r}; continue with: {command}"


def localise(network: torch.nn.Module, located: Dataset, batch_size: int = 128) -> dict[str, Any]:
    """How well a network's map finds the boxes of ``located`` (items: image, label, box, mask).

    The map is the network's attention map. For a network without attention it is Grad-CAM at the feature map with the
    largest sum of both measures on these images, which makes the baseline as strong as possible.

    Returns:
        ``map``, its name; ``pointing`` and ``iou_tight`` of :func:`attnkern.evaluation.localisation`; ``images``, their
        number.
    """
    network.eval()
    images, _, boxes, _ = next(iter(DataLoader(located, batch_size=len(located))))
    names = map_names(network)
    candidates = (
        {" x ".join(names[-2:]): attention_of(network)}
        if names
        else {f"Grad-CAM {name}": gradcam_of(network, name) for name in network.feature_modules}
    )
    found = []
    for name, predict in candidates.items():
        _, maps = collect(predict, images, batch_size=batch_size)
        measured = localisation(maps, boxes, images.shape[2:])
        found.append({"map": name, "pointing": round(measured.pointing, 4), "iou_tight": round(measured.iou_tight, 4)})
    return max(found, key=lambda entry: entry["pointing"] + entry["iou_tight"]) | {"images": len(images)}


def orientations(network: torch.nn.Module, images: ImageData, limit: int) -> dict[str, dict[str, Any]] | None:
    """The orientation of each attention map and of their combination, from training images without augmentation.

    Args:
        network: with or without attention.
        images: after ``setup()``.
        limit: largest number of images, drawn by :func:`attnkern.evaluation.protocols.stratified`.

    Returns:
        by the names that :func:`attnkern.evaluation.map_of` gives the maps, :class:`attnkern.evaluation.Orientation`
        as a dictionary; {} of a network without attention; None if the data set has no boxes.
    """
    located, names = images.located("train"), map_names(network)
    if located is None or not names:
        return None if located is None else {}
    network.eval()
    part = located.part
    chosen = stratified([part.labels[index] for index in part.indices], limit)
    pixels, _, boxes, _ = next(iter(DataLoader(Subset(located, chosen), batch_size=len(chosen))))
    predicts = dict(map_of(network, name) for name in (None, *names))
    found = {}
    for name, predict in predicts.items():
        _, maps = collect(predict, pixels, batch_size=images.batch_size)
        found[name] = orientation(maps, boxes, pixels.shape[2:])._asdict()
    return found


def _add_to_checkpoint(path: Path, entries: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        torch.save(torch.load(path, map_location="cpu", weights_only=True) | entries, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Run(NamedTuple):
    """Result of :func:`load_run`."""

    network: torch.nn.Module  #: in evaluation mode
    name: str  #: of the network, for :func:`attnkern.models.create_model`
    normalise: torch.nn.Module  #: from images (N, 3, H, W) in [0, 1] to the network's inputs
    class_names: list[str]
    data: dict[str, Any]  #: arguments of :class:`attnkern.training.data.ImageData`
    orientations: dict[str, Orientation]  #: by name of the map; {} without boxes, or before training has ended


def load_run(checkpoint: str | os.PathLike) -> Run:
    """Read the network and the settings of the data from a checkpoint of ``attnkern train``.

    The file is read with ``weights_only=True``: no code in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: the file is not a checkpoint of ``attnkern train``, or ``checkpoint`` is not a path.
    """
    check_kind("load_run", str | os.PathLike, checkpoint=checkpoint)
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"checkpoint: there is no file {os.fspath(checkpoint)!r}")
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        name, num_classes, options = (saved["hyper_parameters"][key] for key in ("name", "num_classes", "options"))
        normalise, data = normalisation_from(saved["normalisation"]), saved["data"]
        oriented = {name: Orientation(**entry) for name, entry in saved.get("orientations", {}).items()}
    except Exception as error:
        raise ValueError(f"checkpoint: {os.fspath(checkpoint)!r} is not a checkpoint of attnkern train") from error
    # The trained weights replace those from which training started.
    options = {key: value for key, value in (options or {}).items() if key != "weights"}
    network = create_model(name, num_classes, pretrained=checkpoint, **options).eval()
    return Run(network, name, normalise, list(data["class_names"]), dict(data["settings"]), oriented)


def load_network(checkpoint: str | os.PathLike) -> torch.nn.Module:
    """The trained network of a checkpoint of ``attnkern train``, in evaluation mode; errors as :func:`load_run`."""
    return load_run(checkpoint).network
