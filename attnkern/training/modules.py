"""One LightningModule per family of networks: its training step, its logs and its parameter groups."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import attnkern
from attnkern._extras import needs_extra
from attnkern.evaluation.rectangles import equivariance_distance, transform_images, transform_rectangle
from attnkern.models import create_model
from attnkern.models.rectangular import RectangularBase
from attnkern.models.registry import load_weights
from attnkern.nn import AnchorQuantizer, WindowAttention
from attnkern.training.data import ImageData
from attnkern.training.normalisation import normalisation_state

with needs_extra("attnkern.training.modules", "train"):
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
    from torchmetrics.classification import MulticlassAccuracy


class Classification(pl.LightningModule):
    """Trains a network of :mod:`attnkern.models` with the network's own loss.

    Args:
        name: name of the network for :func:`attnkern.models.create_model`.
        num_classes: number of classes; None: that of the data.
        options: keyword arguments of the network's constructor: ``{"width": 0.25}``.
        optimizer: makes an optimizer from parameter groups.
        lr_scheduler: makes a schedule, stepped once per epoch, from an optimizer; None: the learning rate is constant.
            A schedule that follows a metric has its name in ``monitor``, as
            ``lightning.pytorch.cli.ReduceLROnPlateau`` has.
        warmup: pairs (epochs, learning rate) that come before the schedule, one after the other; not possible with a
            schedule that follows a metric.
        pretrained: a file of weights from which training starts.
        backend: "native", "triton" or "reference"; None: chosen automatically.
        compiled: compile the network with ``torch.compile``.
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: list[tuple[int, float]] | None = None,
        pretrained: str | None = None,
        backend: str | None = None,
        compiled: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters("name", "num_classes", "options")
        self.make_optimizer = optimizer
        self.make_schedule = lr_scheduler
        self.warmup = warmup or []
        self.pretrained = pretrained
        self.backend = backend
        self.compiled = compiled
        self.network: nn.Module | None = None

    def configure_model(self) -> None:
        """Build the network; Lightning calls this hook after the data has been found, which gives the classes."""
        if self.network is not None:
            return
        if self.hparams.num_classes is None:
            self.hparams.num_classes = self.trainer.datamodule.num_classes
        self.network = create_model(self.hparams.name, self.hparams.num_classes, **(self.hparams.options or {}))
        if self.pretrained is not None:
            load_weights(self.network, self.pretrained)
        if self.compiled:
            self.network.compile()
        if self.backend is not None:
            attnkern.use_backend(self.backend)
        for stage in ("train", "val", "test"):
            setattr(self, f"{stage}_accuracy", MulticlassAccuracy(self.hparams.num_classes, average="micro"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the data with the weights: evaluation needs them."""
        data = self.trainer.datamodule
        if data is not None:
            checkpoint["data"] = {"settings": data.settings(), "class_names": data.class_names}
            checkpoint["normalisation"] = normalisation_state(data.normalisation)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch and its logits."""
        output = self(images)
        loss = self.network.loss(output, labels)
        return loss, output if isinstance(output, torch.Tensor) else output.logits

    def on_train_epoch_start(self):
        # Dropout, noise and augmentation depend on the seed and the epoch only, so that a resumed run draws the same
        # random numbers as an uninterrupted one.
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:  # it is None after --seed_everything false
            torch.manual_seed(hash((int(seed), self.current_epoch, self.global_rank)) % 2**63)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss, logits = self.step(images, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.train_accuracy(logits.detach(), labels)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def _evaluate(self, stage, batch):
        images, labels = batch
        logits = self(images)
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, labels))
        metric = getattr(self, f"{stage}_accuracy")
        metric(logits, labels)
        self.log(f"{stage}_accuracy", metric, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self._evaluate("val", batch)

    def test_step(self, batch, batch_idx):
        self._evaluate("test", batch)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """The parameter groups of the optimizer: all parameters that require gradients."""
        return [{"params": [p for p in self.network.parameters() if p.requires_grad]}]

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameter_groups())
        schedules, milestones = [], []
        if self.warmup:
            rates = [rate / optimizer.defaults["lr"] for epochs, rate in self.warmup for _ in range(epochs)] + [1.0]
            rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rates[min(epoch, len(rates) - 1)])
            schedules.append(rate)
            milestones.append(len(rates) - 1)
        if self.make_schedule is not None:
            schedules.append(self.make_schedule(optimizer))
        if schedules and isinstance(schedules[-1], torch.optim.lr_scheduler.ReduceLROnPlateau):
            if self.warmup:
                raise ValueError("lr_scheduler: ReduceLROnPlateau cannot follow a warm-up; pass --model.warmup null")
            monitor = getattr(schedules[-1], "monitor", None)
            if monitor is None:
                raise ValueError(
                    "lr_scheduler: ReduceLROnPlateau must name a metric: "
                    "--model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau --model.lr_scheduler.monitor val_loss"
                )
            return [optimizer], [{"scheduler": schedules[-1], "monitor": monitor}]
        if len(schedules) == 2:
            schedules = [torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, milestones)]
        return [optimizer], schedules


class LearnToPayAttention(Classification):
    """Learn to Pay Attention: VGG and ResNet-164 with compatibility pooling. Arguments of :class:`Classification`."""


class InformationBottleneck(Classification):
    """Information Bottleneck Approach to Spatial Attention Learning.

    Anchors have their own parameter group without weight decay. The log of each epoch has the number of anchors that
    were never the nearest (``dead_anchors``), the perplexity of their usage (``anchor_perplexity``), and the value and
    the usage of each anchor.

    Args:
        anchor_lr: learning rate of the anchors, by default the optimizer's.
        others: those of :class:`Classification`.
    """

    def __init__(self, *args, anchor_lr: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.anchor_lr = anchor_lr

    def _quantizers(self):
        return [module for module in self.network.modules() if isinstance(module, AnchorQuantizer)]

    def parameter_groups(self):
        anchors = [quantizer.anchors for quantizer in self._quantizers()]
        (group,) = super().parameter_groups()
        group["params"] = [p for p in group["params"] if not any(p is anchor for anchor in anchors)]
        if not anchors:
            return [group]
        own = {"params": anchors, "weight_decay": 0.0}
        return [group, own if self.anchor_lr is None else own | {"lr": self.anchor_lr}]

    def on_train_epoch_end(self):
        for quantizer in self._quantizers():
            counts = self.all_gather(quantizer.counts).reshape(-1, quantizer.counts.numel()).sum(0)
            usage = counts / counts.sum().clamp(min=1)
            self.log("dead_anchors", (counts == 0).sum().float(), rank_zero_only=True)
            self.log("anchor_perplexity", torch.special.entr(usage).sum().exp(), rank_zero_only=True)
            for index, (anchor, share) in enumerate(zip(quantizer.anchors, usage, strict=True)):
                self.log(f"anchors/value_{index:03}", anchor.detach(), rank_zero_only=True)
                self.log(f"anchors/usage_{index:03}", share, rank_zero_only=True)
            quantizer.reset_counts()


class Rectangular(Classification):
    """Convolutional Rectangular Attention Module, with an optional equivariance loss.

    loss = CE + λ·mean ‖T(r(x)) - r(T(x))‖² over the five numbers of the rectangle r, where T is one random
    transformation per batch: a rotation about the centre, a scaling and a shift. Gradients flow through both branches.
    Of several windows it is the mean over them, each compared with the window of the same index: every window is to
    follow its own part of the image.
    Angles are compared by 1 - cos 2Δα, because they have the period π; with ``literal`` by their squared difference, as
    the paper's formula says.

    Args:
        equivariance: λ; 0.1 in the paper, 0 leaves the term out.
        degrees: largest angle of the rotation.
        scales: smallest and largest factor of the scaling.
        shift: largest shift, as a fraction of the side.
        literal: compare angles by their squared difference.
        frozen: keep the backbone, also its batch normalisation, as it is, and train attention and head only. Without
            augmentation and equivariance loss the layers before the attention run only once over each image, before
            the first epoch, and their outputs for all images are kept in memory.
        others: those of :class:`Classification`.

    Source: Convolutional Rectangular Attention Module, Section 4.4, which does not give the ranges.
    """

    def __init__(
        self,
        *args,
        equivariance: float = 0.0,
        degrees: float = 30.0,
        scales: tuple[float, float] = (0.8, 1.2),
        shift: float = 0.1,
        literal: bool = False,
        frozen: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.equivariance = equivariance
        self.degrees = degrees
        self.scales = scales
        self.shift = shift
        self.literal = literal
        self.frozen = frozen
        self.images: tuple[Dataset, Dataset] | None = None  # while the data module has their features instead

    def configure_model(self):
        super().configure_model()
        if self.equivariance and not isinstance(self.network.attention, WindowAttention):
            raise ValueError(
                f"Rectangular: equivariance needs a network with rectangles (..._window), got {self.hparams.name!r}"
            )
        if self.frozen:
            if not isinstance(self.network, RectangularBase):
                raise ValueError(
                    "Rectangular: frozen needs a network with window, position-wise or no attention, "
                    f"got {self.hparams.name!r}"
                )
            self.network.features.requires_grad_(False).eval()  # Lightning keeps the modes of modules

    def on_fit_start(self):
        data = self.trainer.datamodule
        if self.frozen and not self.equivariance and isinstance(data, ImageData) and not data.augment:
            self.images = data.train, data.test
            data.train, data.test = map(self._features, self.images)

    def on_fit_end(self):
        if self.images is not None:
            self.trainer.datamodule.train, self.trainer.datamodule.test = self.images
            self.images = None

    @torch.no_grad()
    def _features(self, images):
        with self.trainer.precision_plugin.forward_context():
            parts = [
                (self.network.local_features(batch.to(self.device, self.dtype)).cpu(), labels)
                for batch, labels in DataLoader(images, self.trainer.datamodule.batch_size)
            ]
        return TensorDataset(*map(torch.cat, zip(*parts, strict=True)))

    def forward(self, images):
        return super().forward(images) if self.images is None else self.network.classify(images)

    def step(self, images, labels):
        if not self.equivariance:
            return super().step(images, labels)
        network = self.network
        features = network.local_features(images)
        rectangle = network.attention.rectangle(features)
        logits = network.classify(features, rectangle)
        draw = torch.rand(4)
        angle = (2 * draw[0] - 1) * self.degrees * torch.pi / 180
        scale = self.scales[0] + (self.scales[1] - self.scales[0]) * draw[1]
        shift = (2 * draw[2:] - 1) * self.shift
        moved = network.local_features(transform_images(images, angle, scale, shift))
        expected = transform_rectangle(rectangle, angle, scale, shift)
        distance = equivariance_distance(network.attention.rectangle(moved), expected, literal=self.literal).mean()
        self.log("equivariance_loss", distance)
        return network.loss(logits, labels) + self.equivariance * distance, logits


class Small(Rectangular, InformationBottleneck):
    """The small networks, which have attention of all three papers. Arguments of both classes above."""


FAMILIES = {
    "learn_to_pay_attention": LearnToPayAttention,
    "information_bottleneck": InformationBottleneck,
    "rectangular": Rectangular,
    "small": Small,
}
