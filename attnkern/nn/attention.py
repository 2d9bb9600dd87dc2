"""Multi-head attention pooling: few queries read all positions."""

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import (
    check_channels,
    check_count,
    check_device,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
    is_shape,
)
from attnkern._tracing import Module
from attnkern.nn._folded import called_attention, folded_attention, pays
from attnkern.nn._hooks import foldable, untouched
from attnkern.pool import check_mask


class AttentionPool(Module):
    """Features pooled by multi-head attention of a few queries, without computing keys and values.

    Each head attends with a_i = softmax_i ⟨W_k ℓ_i, q⟩/√d, d = attention_channels / num_heads, and returns
    Σ a_i (W_v ℓ_i + b_v). The heads are concatenated and projected, as in ``nn.MultiheadAttention``.

    The projections fold, exactly: ⟨W_k ℓ_i + b_k, q⟩ = ⟨ℓ_i, W_kᵀq⟩ + ⟨b_k, q⟩, whose last term is the same for every
    position, so that softmax cancels it (``key`` therefore has no bias), and Σ a_i (W_v ℓ_i + b_v) = W_v Σ a_i ℓ_i +
    b_v Σ a_i. So there is one vector W_kᵀq for each query and head, :func:`attnkern.compatibility_pool` reads the
    features once for all of them, and W_v is applied to the pooled vectors. Only the order of the sums changes. W_kᵀq
    is float32 (float64 for float64), also in half precision and under autocast, so that folding rounds less than
    computing keys and values does: in units of ε times the root mean square, with 196 positions, 768 channels and 12
    heads, the output is off by 3.1 instead of 3.8 in float32, by 0.37 instead of 0.43 in bfloat16 and float16, and by
    0.47 instead of 0.56 under autocast; gradients by 2.4 to 5.6 instead of 3.6 to 6.2 in float32.

    ``key`` and ``value`` are called on all positions if one of them is no longer an untouched ``nn.Linear`` (it has
    hooks, an adapter, a parametrization or a quantized weight), and if there are so many queries that folding would
    take longer: 2·num_queries·num_heads > attention_channels.

    Args:
        channels: C of the features.
        num_queries: Q.
        num_heads: softmaxes per query.
        attention_channels: channels of queries, keys and values, of all heads together. Default: ``channels``.
        out_channels: channels of the output. Default: ``channels``, or ``attention_channels`` with ``project=False``.
        bias: whether ``query``, ``value`` and ``out`` have a bias.
        project: whether the output is projected.
        positions: number of positions of a learned positional embedding, which is added to the features. Default: none.
        learned: whether the queries are parameters; otherwise they are given in each call.
        query_channels: channels of the queries before their projection. Default: ``attention_channels``.
        dropout: probability with which each attention weight is set to zero in training.

    Raises:
        ValueError, TypeError: an option out of its range, or a tensor whose shape does not fit.

    Source: Set Transformer (pooling by multi-head attention); the fold is the one of
    :class:`CompatibilityPool` with ``project="local"``, for each head.
    """

    def __init__(
        self,
        channels: int,
        num_queries: int = 1,
        num_heads: int = 8,
        *,
        attention_channels: int | None = None,
        out_channels: int | None = None,
        bias: bool = True,
        project: bool = True,
        positions: int | None = None,
        learned: bool = True,
        query_channels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        where = "AttentionPool"
        check_count(where, channels=channels, num_queries=num_queries, num_heads=num_heads)
        optional = {
            "attention_channels": attention_channels, "out_channels": out_channels, "positions": positions,
            "query_channels": query_channels,
        }  # fmt: skip
        check_count(where, **{name: value for name, value in optional.items() if value is not None})
        check_flag(where, bias=bias, project=project, learned=learned)
        check_number(where, dropout=dropout)
        inner = channels if attention_channels is None else attention_channels
        if inner % num_heads:
            raise ValueError(
                f"{where}: num_heads must divide attention_channels (by default channels), got {num_heads} and {inner}"
            )
        if not project and out_channels not in (None, inner):
            raise ValueError(
                f"{where}: out_channels must equal attention_channels (by default channels) with project=False, "
                f"got {out_channels} and {inner}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"{where}: dropout must be at least 0 and less than 1, got {dropout}")
        self.channels = channels
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.attention_channels = inner
        self.query_channels = inner if query_channels is None else query_channels
        self.out_channels = inner if not project else channels if out_channels is None else out_channels
        self.dropout = dropout
        shapes = {
            "queries": (num_queries, self.query_channels) if learned else None,
            "position": (positions, channels) if positions else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
            if shape is not None:
                nn.init.trunc_normal_(getattr(self, name), std=shape[1] ** -0.5)
        self.query = nn.Linear(self.query_channels, inner, bias=bias)
        self.key = nn.Linear(channels, inner, bias=False)
        self.value = nn.Linear(channels, inner, bias=bias)
        self.out = nn.Linear(inner, self.out_channels, bias=bias) if project else nn.Identity()
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.query, self.value, self.out):
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
        self.map = nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        query: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        return_map: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Pool ``x`` (N, C, H, W) or (N, C, L).

        Args:
            query: (N, Q, query_channels), or (Q, query_channels) shared by the batch; only with ``learned=False``.
            mask: (N, H, W) or (N, L), bool, or (1, ...) shared by the batch: the positions that take part. An image
                without any has a map of 0, so its output is the bias of ``out``.
            return_map: also return the attention.

        Returns:
            (N, Q, out_channels); with ``return_map`` also the attention (N, Q·num_heads, H, W) or (N, Q·num_heads, L),
            where the heads of a query stand together, after dropout and hooks.
        """
        where = "AttentionPool"
        check_channels(where, x, self.channels, sequences=True)
        check_flag(where, return_map=return_map)
        query = self._projected(x, query)
        if mask is not None:
            check_mask(where, mask, x, "x")
        if self.position is not None:
            count, sizes = self.position.shape[0], x.shape[2:]
            check_shape(where, "x", x, "features of {} positions", sizes.numel() == count, count)
            x = x + self.position.t().unflatten(1, sizes).to(x.dtype)

        drops = self.training and self.dropout > 0
        through = self._through if drops or not untouched(self.map) else None
        folds = foldable(self.key) and foldable(self.value, bias=True)
        if folds and pays(self.num_queries, self.num_heads, self.attention_channels):
            weights = (self.key.weight, self.value.weight, self.value.bias)
            output, map = folded_attention(x, query, *weights, self.num_heads, mask, through)
        else:
            layers = (self.key, self.value)
            output, map = called_attention(x, query, *layers, self.num_heads, mask, through, return_map)
        output = self.out(output)
        return (output, map) if return_map else output

    def _projected(self, x, query):
        """The queries (N, Q, D) or (1, Q, D), projected."""
        where = "AttentionPool"
        if self.queries is not None:
            if query is not None:
                raise ValueError(f"{where}: query must be None because the queries are learned, got a query")
            return self.query(self.queries[None])
        if query is None:
            raise ValueError(f"{where}: query must be given with learned=False, got None")
        check_tensor(where, "query", query)
        sizes = (x.shape[0], self.num_queries, self.query_channels)
        fits = is_shape(query, *sizes) or is_shape(query, *sizes[1:])
        check_shape(where, "query", query, "({0}, {1}, {2}) or ({1}, {2}) (N as x)", fits, *sizes)
        check_device(where, "query", query, "x", x)
        return self.query(query if query.dim() == 3 else query[None])

    def _through(self, weights):
        return self.map(F.dropout(weights, self.dropout, self.training))

    def extra_repr(self):
        return f"{self.channels}, {self.num_queries}, {self.num_heads}, learned={self.queries is not None}"
