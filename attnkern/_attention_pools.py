"""Attention pools of other libraries, and ``nn.MultiheadAttention`` where it pools, without keys and values.

For each class, :func:`attnkern.accelerate` makes a class that derives from it and then from the library's own class.
Methods that are not defined here are therefore the library's, and so is every call that cannot be folded.
"""

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._tracing import Module
from attnkern.nn._folded import folded_attention, pays
from attnkern.nn._hooks import plain, untouched


def _all_untouched(*layers):
    return all(untouched(layer, nn.Linear) for layer in layers)


def _positions(mask, x):
    """A mask of scores (N | 1, 1, 1, L), bool, as a mask of the positions of x (N, L, C); None if it is another."""
    fits = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[0] in (1, x.shape[0])
    return mask[:, 0, 0] if fits and mask.shape[1:] == (1, 1, x.shape[1]) else None


class _Pool:
    __prepare_scriptable__ = Module.__prepare_scriptable__


class AttentionPoolLatent(_Pool):
    """timm's pool of the global_pool "map": learned queries read tokens (N, L, C)."""

    def forward(self, x, attn_mask=None):
        mask = None if attn_mask is None else _positions(attn_mask, x)
        folds = _all_untouched(self.kv) and untouched(self.q_norm) and untouched(self.k_norm)
        folds = folds and pays(self.latent_len, self.num_heads, self.num_heads * self.head_dim)
        if not folds or (mask is None and attn_mask is not None):
            return super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        key, value = self.kv.weight.chunk(2)
        bias = None if self.kv.bias is None else self.kv.bias.chunk(2)[1]
        x, _ = folded_attention(x.mT, self.q(self.latent), key, value, bias, self.num_heads, mask)
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


def _attended(x, first, positions, query, weights, heads):
    """Attention over the map ``x`` (N, C, H, W) and one token before it, of which the query is made: (N, 1, D).

    Args:
        first: the token (1, C), or None for the mean of ``x``.
        positions: embeddings of all tokens, (1 + H·W, C).
        query: weight and bias of the projection of the query.
        weights: the rest of the arguments of :func:`folded_attention`, by name.
    """
    x = x.flatten(2).mT
    first = x.mean(1, keepdim=True) if first is None else first.expand(x.shape[0], 1, -1)
    x = torch.cat([first, x], 1) + positions  # tokens: faster than (N, C, positions), whose rows are short and odd
    return folded_attention(x.mT, F.linear(x[:, :1], *query), heads=heads, **weights)[0]


class AttentionPool2d(_Pool):
    """timm's pool of CLIP's ResNets: the mean of a map, or a class token, is the query."""

    def forward(self, x, pre_logits=False):
        layers = (self.q, self.k, self.v) if self.qkv is None else (self.qkv,)
        folds = self.pool_type == "token" and _all_untouched(*layers)
        if not (folds and pays(1, self.num_heads, self.num_heads * self.head_dim)):
            return super().forward(x, pre_logits)
        from timm.layers import resample_abs_pos_embed  # the module is timm's

        positions = resample_abs_pos_embed(
            self.pos_embed[None], list(x.shape[2:]), old_size=self.feat_size, num_prefix_tokens=1
        )[0]
        if self.qkv is None:
            query = (self.q.weight, self.q.bias)
            weights = {"key": self.k.weight, "value": self.v.weight, "bias": self.v.bias, "key_bias": self.k.bias}
        else:
            query, key, value = self.qkv.weight.chunk(3)
            biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
            query, weights = (query, biases[0]), {"key": key, "value": value, "bias": biases[2]}
        x = self.drop(_attended(x, self.cls_token, positions, query, weights, self.num_heads))
        return (x if pre_logits else self.proj(x))[:, 0]


class ClipAttentionPool2d(_Pool):
    """The pool of the ResNets of OpenAI's CLIP and of open_clip: the mean of a map is the query."""

    def forward(self, x):
        q, k, v, out = self.q_proj, self.k_proj, self.v_proj, self.c_proj
        if not (_all_untouched(q, k, v, out) and pays(1, self.num_heads, q.out_features)):
            return super().forward(x)
        positions = self.positional_embedding.to(x.dtype)
        weights = {"key": k.weight, "value": v.weight, "bias": v.bias, "key_bias": k.bias}
        return out(_attended(x, None, positions, (q.weight, q.bias), weights, self.num_heads))[:, 0]


class MultiheadAttention(_Pool):
    """``nn.MultiheadAttention``: calls with few queries, and with keys that are the values, are folded."""

    def _folds(self, query, key, value, mask):
        if key is not value or not query.dim() == key.dim() == 3:
            return False
        if not all(map(plain, (*self._parameters.values(), self.out_proj.weight, self.out_proj.bias))):
            return False
        batch, positions = (0, 1) if self.batch_first else (1, 0)
        n, count, queries = key.shape[batch], key.shape[positions], query.shape[positions]
        fits = query.shape[batch] == n and query.shape[2] == self.embed_dim
        fits = fits and key.shape[2] == self.kdim == self.vdim
        masks = mask is None or (mask.dtype == torch.bool and mask.shape == (n, count))
        return fits and masks and 0 < 2 * queries <= count and pays(queries, self.num_heads, self.embed_dim)

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        special = attn_mask is not None or is_causal or self.bias_k is not None or self.add_zero_attn
        drops = self.training and self.dropout > 0
        if special or drops or not self._folds(query, key, value, key_padding_mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not self.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        mask = None if key_padding_mask is None else ~key_padding_mask
        projected = F.linear(query, weights[0], biases[0])
        x, attention = folded_attention(key.mT, projected, *weights[1:], biases[2], self.num_heads, mask)
        x = F.linear(x if self.batch_first else x.transpose(0, 1), self.out_proj.weight, self.out_proj.bias)
        if need_weights:
            attention = attention.unflatten(1, (query.shape[1], self.num_heads)).transpose(1, 2).to(x.dtype)
            attention = attention.mean(1) if average_attn_weights else attention
        return x, attention if need_weights else None
