"""``attnkern train``: a recipe, a data set and Lightning's own command line."""

import contextlib
import json
import logging
import os
import platform
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import attnkern
from attnkern._common import check_items, check_kind
from attnkern._extras import needs_extra
from attnkern.evaluation.inputs import collect
from attnkern.evaluation.localisation import localisation
from attnkern.evaluation.maps import attention_of, gradcam_of
from attnkern.evaluation.protocols import write_json
from attnkern.models import create_model, map_names
from attnkern.training.data import ImageData
from attnkern.training.modules import FAMILIES
from attnkern.training.normalisation import normalisation_from
from attnkern.training.recipes import read_recipe

with needs_extra("attnkern.training.train", "train"):
    import lightning.pytorch as pl
    import yaml
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


class _SaveSettings(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder once the data has been found."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer, pl_module, stage):
        out = run_folder(self.config)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(f"# attnkern train\n{self.parser.dump(self.config)}", encoding="utf-8")


def run_folder(config) -> Path:
    """Where a run leaves its files."""
    return Path(config.out or config.trainer.default_root_dir or f"runs/{config.model.name}-{config.data.name}")


class _LastCheckpoint(ModelCheckpoint):
    """``last.ckpt`` after each epoch. A class of its own, so that the user's ModelCheckpoint can stand beside it."""

    def __init__(self, out: Path):
        # The same name each epoch: the file is replaced at once, so a kill leaves the old or the new one.
        super().__init__(out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


@contextlib.contextmanager
def _in_one_sentence():
    """Turn what Lightning raises about its options into a ValueError with Lightning's message.

    Errors that are not raised by a statement of Lightning's own are faults, and keep their type and traceback.
    """
    try:
        yield
    except Exception as error:
        # jsonargparse puts what a class raised into a list of all types that the option may have.
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        frames = traceback.extract_tb(first.__traceback__)
        where = frames[-1] if frames else None
        if not (where and _LIGHTNING in Path(where.filename).parents and (where.line or "").startswith("raise ")):
            raise
        raise ValueError(f"train: {' '.join(str(first).split())}") from error


_LIGHTNING = Path(pl.__file__).parents[1]


class _Command(LightningCLI):
    """Lightning's command line, of which ``--out``, ``--resume`` and ``--overwrite`` are ours."""

    def add_arguments_to_parser(self, parser):
        folder = "folder of the run, by default --trainer.default_root_dir or else runs/NAME-DATA"
        parser.add_argument("--out", type=str | None, default=None, help=folder)
        parser.add_argument("--resume", type=bool, default=False, help="go on from the last checkpoint in --out")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")

    def before_instantiate_classes(self):
        config = self.config
        self.out = run_folder(config)
        self.last = self.out / "last.ckpt"
        if config.resume and not self.last.exists():
            raise FileNotFoundError(f"train: resume: there is no checkpoint {os.fspath(self.last)!r}")
        held = self.last.exists() or (self.out / "result.json").exists()
        if held and not config.resume and not config.overwrite and not config.trainer.fast_dev_run:
            raise FileExistsError(
                f"train: {os.fspath(self.out)!r} holds a run; go on with --resume true, replace it with "
                "--overwrite true, or choose another --out"
            )
        if config.seed_everything is False:  # an earlier run of this process may have left its seed
            os.environ.pop("PL_GLOBAL_SEED", None)

    def instantiate_trainer(self, **kwargs):
        given = self.config_init.trainer
        if given.accumulate_grad_batches < 1:
            raise ValueError(
                f"train: trainer.accumulate_grad_batches must be at least 1, got {given.accumulate_grad_batches}"
            )
        if given.model_registry is not None:
            raise ValueError("train: trainer.model_registry does not apply, a run keeps its checkpoint in --out")
        # Lightning refuses callbacks for what is switched off.
        callbacks = self.trainer_defaults["callbacks"] = []
        if given.enable_checkpointing is not False and not given.barebones:
            callbacks.append(_LastCheckpoint(self.out))
        logger = given.logger
        if (logger is None or logger is True) and not given.barebones:
            # A resumed run gets a CSV file of its own: Lightning would empty the first one.
            logger = [TensorBoardLogger(self.out, "tensorboard", version=""), CSVLogger(self.out, "csv")]
        if logger:
            callbacks.append(LearningRateMonitor("epoch"))
        root = given.default_root_dir or self.out
        trainer = super().instantiate_trainer(logger=logger, default_root_dir=root, **kwargs)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # leaves network and images in its children
            raise ValueError(
                "train: trainer.strategy must start processes of their own, as ddp does from a command line or a "
                "script; got one that spawns or forks this process"
            )
        return trainer


def train(name: str, data: str | None = None, arguments: list[str] | None = None) -> dict[str, Any]:
    """Train a recipe's network, test it, and leave everything in a folder: ``attnkern train NAME --data DATA``.

    The folder gets the settings (``config.yaml``), logs (``csv/``, ``tensorboard/``), ``last.ckpt`` after each
    epoch and ``result.json``. A run that was killed goes on with ``--resume true`` and ends with the weights it would
    have had. The last epoch counts; nothing is selected by the test set. With ``--trainer.fast_dev_run true``
    nothing is written.

    Args:
        name: of the recipe; :func:`attnkern.training.recipes.list_recipes`.
        data: of the data set; :func:`attnkern.training.data.data_sets`.
        arguments: of Lightning's command line, which win over the recipe: ``["--trainer.max_epochs", "3"]``.

    Returns:
        what ``result.json`` holds. ``accuracy`` is None where nothing was tested (``--trainer.limit_test_batches 0``),
        ``localisation`` also where the data set does not say where things are.

    Raises:
        ValueError, TypeError: an unknown recipe or data set, an argument of another kind, or an option that Lightning
            refuses.
        FileExistsError: the folder holds a run already, and neither resume nor overwrite is asked for.
        FileNotFoundError: no data, or nothing to resume.
    """
    family, settings, published = read_recipe(name, data)
    if arguments is not None:
        check_items("train", str, arguments=arguments)
    # What Lightning says of itself, and of the folder and the arguments that we give it on purpose. What callbacks and
    # profilers say was asked for.
    for chatty in ("utilities.rank_zero", "accelerators.cuda"):
        logging.getLogger(f"lightning.pytorch.{chatty}").setLevel(logging.WARNING)
    for message in ("LightningCLI's args parameter", "Checkpoint directory .* exists", ".*LeafSpec"):
        warnings.filterwarnings("ignore", message=message)
    with _in_one_sentence():
        cli = _Command(
            FAMILIES[family],
            ImageData,
            args=["--config", yaml.safe_dump(settings), *(arguments or [])],
            run=False,
            save_config_callback=_SaveSettings,
            seed_everything_default=0,
            trainer_defaults={"enable_model_summary": False},
            parser_kwargs={"prog": "attnkern train"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        trainer, module, images, out = cli.trainer, cli.model, cli.datamodule, cli.out
        began = time.perf_counter()
        try:
            trainer.fit(module, images, ckpt_path=cli.last if cli.config.resume else None, weights_only=True)
        except SystemExit as error:
            if error.code == 1 and trainer.interrupted:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from error
            raise
        seconds, epochs = time.perf_counter() - began, trainer.current_epoch
        tested = trainer.test(module, images, verbose=False)
    data = cli.config.data.name
    accuracy = tested[0].get("test_accuracy") if tested else None  # without batches or without logging there is none
    located = images.located() if trainer.limit_test_batches else None
    if located is not None and trainer.fast_dev_run:
        located = Subset(located, range(min(int(trainer.fast_dev_run) * images.batch_size, len(located))))
    module.network.float()  # after a run with --trainer.precision 16-true or the like
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
        "versions": {
            "attnkern": attnkern.__version__,
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "python": platform.python_version(),
        },
    }
    if trainer.is_global_zero and not trainer.fast_dev_run:
        path = out / "result.json"
        try:
            write_json(path, result)
        except OSError as error:  # the numbers must not be lost
            raise OSError(f"train: {path} cannot be written ({error.strerror}): {json.dumps(result)}") from error
    return result


def localise(network: torch.nn.Module, located: Dataset, batch_size: int = 128) -> dict[str, Any]:
    """Where a network looks, against the boxes of ``located`` (items: image, label, box, mask).

    Its attention map counts. Of a network without attention Grad-CAM counts, at whichever of its feature maps does best
    here by the sum of both measures: the strongest baseline it can be.

    Returns:
        ``map``, its name; ``pointing`` and ``iou_tight`` of :func:`attnkern.evaluation.localisation`; ``images``.
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


class Run(NamedTuple):
    """Result of :func:`load_run`."""

    network: torch.nn.Module  #: in evaluation mode
    name: str  #: as :func:`attnkern.models.create_model` takes it
    normalise: torch.nn.Module  #: images (N, 3, H, W) in [0, 1] to what the network takes
    class_names: list[str]
    data: dict[str, Any]  #: arguments of :class:`attnkern.training.data.ImageData`


def load_run(checkpoint: str | os.PathLike) -> Run:
    """What a checkpoint of ``attnkern train`` holds for evaluation. No code in the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: a file that is no such checkpoint, or no path.
    """
    check_kind("load_run", str | os.PathLike, checkpoint=checkpoint)
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"checkpoint: there is no file {os.fspath(checkpoint)!r}")
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
        name, num_classes, options = (held["hyper_parameters"][key] for key in ("name", "num_classes", "options"))
        normalise, data = normalisation_from(held["normalisation"]), held["data"]
    except Exception as error:
        raise ValueError(f"checkpoint: {os.fspath(checkpoint)!r} is no checkpoint of attnkern train") from error
    # Trained weights take the place of those that training began with.
    options = {key: value for key, value in (options or {}).items() if key != "weights"}
    network = create_model(name, num_classes, pretrained=checkpoint, **options).eval()
    return Run(network, name, normalise, list(data["class_names"]), dict(data["settings"]))


def load_network(checkpoint: str | os.PathLike) -> torch.nn.Module:
    """The trained network in a checkpoint of ``attnkern train``, in evaluation mode; raises as :func:`load_run`."""
    return load_run(checkpoint).network
