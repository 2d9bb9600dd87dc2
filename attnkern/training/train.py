"""``attnkern train``: a recipe, a data set and Lightning's own command line."""

import json
import logging
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch.utils.data import DataLoader, Dataset

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
except ImportError as error:
    raise ImportError("attnkern train needs lightning: pip install attnkern[train]") from error

import attnkern
from attnkern._common import check_items, check_kind
from attnkern.evaluation._inputs import collect
from attnkern.evaluation.localisation import localisation
from attnkern.evaluation.maps import attention_of, gradcam_of
from attnkern.models import create_model, map_names
from attnkern.training.data import ImageData, normalisation_from
from attnkern.training.modules import FAMILIES
from attnkern.training.recipes import read_recipe


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
    return Path(config.out or f"runs/{config.model.name}-{config.data.name}")


class _Command(LightningCLI):
    """Lightning's command line, of which ``--out``, ``--resume`` and ``--overwrite`` are ours."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--out", type=str | None, default=None, help="folder of the run, by default runs/NAME-DATA")
        parser.add_argument("--resume", type=bool, default=False, help="go on from the last checkpoint in --out")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")

    def before_instantiate_classes(self):
        config = self.config
        self.out = run_folder(config)
        self.last = self.out / "last.ckpt"
        if config.resume and not self.last.exists():
            raise FileNotFoundError(f"train: resume: there is no checkpoint {os.fspath(self.last)!r}")
        held = self.last.exists() or (self.out / "result.json").exists()
        if held and not config.resume and not config.overwrite:
            raise FileExistsError(
                f"train: {os.fspath(self.out)!r} holds a run; go on with --resume true, replace it with "
                "--overwrite true, or choose another --out"
            )

    def instantiate_trainer(self, **kwargs):
        self.trainer_defaults["callbacks"] = [
            # The same name each epoch: the file is replaced at once, so a kill leaves the old or the new one.
            ModelCheckpoint(self.out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
            LearningRateMonitor("epoch"),
        ]
        # A resumed run gets a CSV file of its own: Lightning would empty the first one.
        loggers = [TensorBoardLogger(self.out, "tensorboard", version=""), CSVLogger(self.out, "csv")]
        return super().instantiate_trainer(logger=loggers, **kwargs)


def train(name: str, data: str | None = None, arguments: list[str] | None = None) -> dict[str, Any]:
    """Train a recipe's network, test it, and leave everything in a folder: ``attnkern train NAME --data DATA``.

    The folder gets the settings (``config.yaml``), logs (``csv/``, ``tensorboard/``), ``last.ckpt`` after each
    epoch and ``result.json``. A run that was killed goes on with ``--resume true`` and ends with the weights it would
    have had. The last epoch counts; nothing is selected by the test set.

    Args:
        name: of the recipe; :func:`attnkern.training.recipes.list_recipes`.
        data: of the data set; :func:`attnkern.training.data.data_sets`.
        arguments: of Lightning's command line, which win over the recipe: ``["--trainer.max_epochs", "3"]``.

    Returns:
        what ``result.json`` holds.

    Raises:
        ValueError, TypeError: an unknown recipe or data set, or an argument of another kind.
        FileExistsError: the folder holds a run already, and neither resume nor overwrite is asked for.
        FileNotFoundError: no data, or nothing to resume.
    """
    family, settings, published = read_recipe(name, data)
    if arguments is not None:
        check_items("train", str, arguments=arguments)
    # What Lightning says of itself, and of the folder and the arguments that we give it on purpose.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in ("LightningCLI's args parameter", "Checkpoint directory .* exists", ".*LeafSpec"):
        warnings.filterwarnings("ignore", message=message)
    cli = _Command(
        FAMILIES[family],
        ImageData,
        args=["--config", yaml.safe_dump(settings), *(arguments or [])],
        run=False,
        save_config_callback=_SaveSettings,
        seed_everything_default=0,
        trainer_defaults={"enable_model_summary": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    trainer, module, images, out = cli.trainer, cli.model, cli.datamodule, cli.out
    data = cli.config.data.name

    began = time.perf_counter()
    trainer.fit(module, images, ckpt_path=cli.last if cli.config.resume else None, weights_only=True)
    seconds = time.perf_counter() - began
    if trainer.interrupted:
        raise KeyboardInterrupt
    (test,) = trainer.test(module, images, verbose=False)
    located = images.located()
    result = {
        "recipe": name,
        "network": module.hparams.name,
        "options": module.hparams.options or {},
        "data": data,
        "seed": cli.config.seed_everything,
        "epochs": trainer.current_epoch,
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "seconds": round(seconds, 1),
        "accuracy": round(test["test_accuracy"], 4),
        "published_error": published.get(data),
        "localisation": None if located is None else localise(module.network, located, cli.config.data.batch_size),
        "versions": {
            "attnkern": attnkern.__version__,
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "python": platform.python_version(),
        },
    }
    if trainer.is_global_zero:
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
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
