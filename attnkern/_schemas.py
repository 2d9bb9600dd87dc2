"""The operators' schemas: the one place that Python, C++ and the build read them from.

Tensors may have any strides. Outputs and gradients of features have the memory layout of the features if these are
dense with positions or channels innermost (see attnkern/_layout.py); all other results are contiguous.
"Wide" means float64 for float64 features and float32 for all others; maps, statistics, losses and residuals are wide.

``rectangle``  (N, 5), or (N, K, 5) for the union of K windows.
``stats``      (N, 2 + 5K): max log f or a bound near it, Σ f relative to it, and Σ π ∂log f/∂β for the parameters of
               all windows, or what the backward pass of the same backend uses instead; (N, 0) without rescale.
``*_loss``     (): Σ (v - a)² / divisor, the same number twice: autograd needs a tensor of each.
``residuals``  (Q,): Σ (v - a) over the elements that chose anchor k, so that the anchors' gradient is 2·residuals.
``divisor``    what the sums of the two losses are divided by.
``query``      (N, C), (C,), (N, M, C) or (1, M, C). With the axis M, pooled vectors and maps have it after N.
``mask``       (N, positions...) or (1, positions...), bool: those that take part in the softmax. None: all.
``pooled_wide`` pooled before rounding, in its shape, for half-precision features, else (0,): then it is ``pooled``.
``need_grad_*`` False: that gradient is not computed and comes back with shape (0,).
"""

import hashlib

SCHEMAS = {
    "window_map_fwd": "(Tensor rectangle, SymInt height, SymInt width, float scale, bool rescale, bool aspect,"
    " bool ellipse)"
    " -> (Tensor map, Tensor stats)",
    "window_map_bwd": "(Tensor grad_map, Tensor rectangle, Tensor stats, float scale, bool rescale, bool aspect,"
    " bool ellipse)"
    " -> Tensor",
    "window_fwd": "(Tensor x, Tensor rectangle, float scale, bool rescale, bool residual, bool aspect, bool ellipse)"
    " -> (Tensor output, Tensor map, Tensor stats)",
    "window_bwd": "(Tensor grad_output, Tensor? grad_map, Tensor x, Tensor rectangle, Tensor stats,"
    " float scale, bool rescale, bool residual, bool aspect, bool ellipse, bool need_grad_x)"
    " -> (Tensor grad_x, Tensor grad_rectangle)",
    "quantize_fwd": "(Tensor a, Tensor anchors, SymInt divisor)"
    " -> (Tensor values, Tensor indices, Tensor anchor_loss, Tensor commitment_loss,"
    " Tensor counts, Tensor residuals)",
    "quantize_bwd": "(Tensor? grad_values, Tensor? grad_anchor_loss, Tensor? grad_commitment_loss,"
    " Tensor a, Tensor anchors, Tensor indices, Tensor residuals, SymInt divisor)"
    " -> (Tensor grad_a, Tensor grad_anchors)",
    "anchor_fwd": "(Tensor x, Tensor a, Tensor anchors, bool residual, SymInt divisor)"
    " -> (Tensor output, Tensor values, Tensor indices, Tensor anchor_loss, Tensor commitment_loss,"
    " Tensor counts, Tensor residuals)",
    "anchor_bwd": "(Tensor grad_output, Tensor? grad_values, Tensor? grad_anchor_loss, Tensor? grad_commitment_loss,"
    " Tensor x, Tensor a, Tensor anchors, Tensor indices, Tensor residuals,"
    " bool residual, SymInt divisor, bool need_grad_x)"
    " -> (Tensor grad_x, Tensor grad_a, Tensor grad_anchors)",
    "pool_fwd": "(Tensor local, Tensor query, Tensor? mask)"
    " -> (Tensor pooled, Tensor attention, Tensor scores, Tensor pooled_wide)",
    "pool_bwd": "(Tensor? grad_pooled, Tensor? grad_attention, Tensor? grad_scores,"
    " Tensor local, Tensor query, Tensor? mask, Tensor attention, Tensor pooled_wide, bool need_grad_local)"
    " -> (Tensor grad_local, Tensor grad_query)",
}

#: Increase this if the contract described above changes but no schema does.
CONTRACT = 2
#: Compiled into every library as ``attnkern-schema:<HASH>``; a library that lacks it is refused.
HASH = hashlib.sha256(repr((CONTRACT, sorted(SCHEMAS.items()))).encode()).hexdigest()[:16]
