"""The normalisation of images, and its state in a checkpoint."""

import torch
from torch import nn
from torch.utils.data import Dataset

from attnkern._extras import needs_extra
from attnkern.evaluation.crossdomain import Whitening, whitening_from

with needs_extra("attnkern.training.data", "train"):
    from torchvision.transforms import v2


class ZCA(nn.Module):
    """The whitening of :func:`attnkern.evaluation.zca` as a module for images.

    Args:
        whitening: of D = C·H·W values.
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, whitening: Whitening):
        super().__init__()
        self.register_buffer("mean", whitening.mean)
        self.register_buffer("matrix", whitening.matrix)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Whitens images (..., C, H, W) on any device."""
        batch = images.reshape(-1, *images.shape[-3:])
        return Whitening(self.mean, self.matrix)(batch).view(images.shape)


def fit_zca(images: Dataset, chunk: int = 512) -> ZCA:
    """ZCA of a data set with items (image, label).

    Mean and covariance are summed in chunks, because CIFAR's training images take 1.2 GB in float64.
    """
    total, products = 0, 0
    for start in range(0, len(images), chunk):
        items = images.__getitems__(range(start, min(start + chunk, len(images))))
        flat = torch.stack([image for image, _ in items]).flatten(1).double()
        total, products = total + flat.sum(0), products + flat.T @ flat
    mean = total / len(images)
    return ZCA(whitening_from(mean, products / len(images) - mean.outer(mean)))


def normalisation_state(normalisation: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a normalisation, which are saved with the network that was trained with it."""
    if isinstance(normalisation, ZCA):
        return dict(normalisation.state_dict())
    return {"mean": torch.tensor(normalisation.mean), "std": torch.tensor(normalisation.std)}


def normalisation_from(state: dict[str, torch.Tensor]) -> nn.Module:
    """The inverse of :func:`normalisation_state`."""
    if "std" in state:
        return v2.Normalize(state["mean"].tolist(), state["std"].tolist())
    return ZCA(Whitening(state["mean"], state["matrix"]))
