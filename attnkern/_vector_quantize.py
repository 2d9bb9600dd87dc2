"""Scalar quantizers of vector-quantize-pytorch through :func:`attnkern.anchor_quantize`.

For each class, :func:`attnkern.accelerate` makes a class that derives from it and then from the library's own class.
Methods that are not defined here are therefore the library's.
"""

import torch
import torch.nn.functional as F

from attnkern.compat import quantize_promoted
from attnkern.quantize import anchor_quantize


class LatentQuantize:
    """The nearest of the values of each latent, from which the library computes indices and losses."""

    def quantize(self, z: torch.Tensor) -> torch.Tensor:
        latents = zip(z.unbind(-1), self.values_per_latent, strict=True)
        return torch.stack([quantize_promoted(latent, values.detach()).values for latent, values in latents], -1)


def _means(a, codes, counts):
    """The mean of the elements nearest to each code: the gradient of Σ (v - a)² holds their sums."""
    with torch.enable_grad():
        codes = codes.detach().requires_grad_()
        distance = anchor_quantize(a.detach(), codes, reduction="sum").anchor_loss
        (doubled,) = torch.autograd.grad(distance, codes)
    return codes.detach() - doubled / 2 / counts.clamp(min=1)


class VectorQuantize:
    """The nearest of codes of dimension 1. The library itself updates the codebook and handles calls with options."""

    def forward(self, x: torch.Tensor, *args, **options):
        book = self._codebook
        maps = self.accept_image_fmap or self.accept_3d_fmap
        axes = (4, 5) if maps else (2, 3)
        options = {name: value for name, value in options.items() if value is not None}
        if args or options or x.dim() not in axes or x.numel() == 0 or not book.initted:
            return super().forward(x, *args, **options)
        learns = self.training and self.learnable_codebook and not self.freeze_codebook
        codes = book.embed if book.learnable_codebook else book.embed.detach()
        codes = codes.flatten().float().clone()  # a copy, because training may change the codes before backward
        quantized = anchor_quantize(x.float(), codes if learns else codes.detach())
        through = self.training and x.requires_grad and self.route_gradients_to_input
        values = quantized.values if through else codes[quantized.indices]
        indices = quantized.indices.squeeze(1 if maps or (x.dim() == 3 and not self.channel_last) else -1)
        loss = self.zero
        if self.training:
            loss.requires_grad_()
            if not self.freeze_codebook and (book.ema_update or book.has_dead_code_replacement):
                # The library sums by a matrix product with one row per element. One row per code gives the same sums,
                # unless the library draws elements as replacements of codes.
                if book.has_dead_code_replacement or torch.is_inference_mode_enabled():
                    rows, weights = x.detach().float(), F.one_hot(indices.flatten(), self.codebook_size)
                else:
                    rows, weights = _means(x.float(), codes, quantized.counts), quantized.counts.diag()
                book.update_codebook(rows.reshape(1, -1, 1), weights[None].float())
            if self.has_commitment_loss:
                distance = quantized.commitment_loss
                if learns:  # one loss that moves both
                    distance = quantized.anchor_loss + (distance - distance.detach())
                loss = loss + distance.to(x.dtype) * self.commitment_weight
        return values.to(x.dtype), indices, loss
