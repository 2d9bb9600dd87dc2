"""Kernels on features of more than 2**31 elements, without a GPU: `python tests/large_index.py triton|cuda`.

Only the last programs of each grid run, in Triton's interpreter or under the host emulation of CUDA, and memory that is
never touched is never allocated. Their results must have the same bits as those of the last image alone.
"""

import os
import sys

import torch


def triton_last(count):
    """Make kernels run only the last ``count`` programs of their grid."""
    from triton.runtime import interpreter

    builder, call, set_index = (
        interpreter.interpreter_builder, interpreter.GridExecutor.__call__, interpreter.interpreter_builder.set_grid_idx
    )  # fmt: skip

    def last(self, *args, **kwargs):
        if self.fn.__name__ == "_add_partials_kernel":  # a sum over the whole batch
            return
        (programs,) = self.grid
        some = min(count, programs)

        def from_the_end(x, y, z):
            builder.grid_dim = (programs, 1, 1)
            set_index(programs - some + x, y, z)

        self.grid, builder.set_grid_idx = (some,), from_the_end
        call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = last
    # The interpreter copies tensors back to their own memory, which would touch all of it.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None

    def restore():
        interpreter.GridExecutor.__call__, builder.set_grid_idx = call, set_index

    return restore


def cuda_last(count):
    os.environ["ATTNKERN_HOST_LAST"] = str(count)
    return lambda: os.environ.pop("ATTNKERN_HOST_LAST")


def features(shape, layout, generator):
    """Uninitialised memory except for the last image, because memory that is not touched is not allocated."""
    n, c, h, w = shape
    x = torch.empty((n, h, w, c) if layout == "channels_last" else shape, dtype=torch.bfloat16)
    x[-1] = torch.randn(x.shape[1:], generator=generator)
    return x.movedim(-1, 1) if layout == "channels_last" else x


def companion(*shape, generator, dtype=torch.float32):
    made = torch.zeros(shape, dtype=dtype)
    made[-1] = torch.rand(shape[1:], generator=generator)
    return made


def passes(ops, shape, layout):
    """Each operator, its arguments, and those of its results that have one part per image."""
    g = torch.Generator().manual_seed(0)
    n, c, h, w = shape
    x, grad = features(shape, layout, g), features(shape, layout, g)
    rectangle, a, grad_map = (
        companion(*s, generator=g) for s in ((n, 5), (n, 1, h, w), (n, h, w))
    )  # fmt: skip
    query, grad_pooled = companion(n, c, generator=g), companion(n, c, generator=g).bfloat16()
    anchors, loss = torch.linspace(0, 1, 5), torch.tensor(0.5)
    window = (6.0, True, True, False, False)
    yield "window_fwd", (x, rectangle, *window), (0, 1, 2)
    stats = ops.window_fwd(x[-1:], rectangle[-1:], *window)[2]
    yield "window_bwd", (grad, grad_map, x, rectangle, stats.expand(n, -1).contiguous(), *window, True), (0, 1)
    yield "anchor_fwd", (x, a, anchors, True, 7), (0, 1, 2)
    indices = torch.zeros(a.shape, dtype=torch.int64)
    indices[-1] = ops.anchor_fwd(x[-1:], a[-1:], anchors, True, 7)[2]
    residuals = torch.zeros(5)
    yield "anchor_bwd", (grad, a, loss, loss, x, a, anchors, indices, residuals, True, 7, True), (0, 1)
    yield "pool_fwd", (x, query, None), (0, 1, 2, 3)
    attention, pooled = torch.zeros(n, h, w), torch.zeros(n, c)
    one = ops.pool_fwd(x[-1:], query[-1:], None)
    attention[-1], pooled[-1] = one[1], one[3]
    yield "pool_bwd", (grad_pooled, grad_map, grad_map, x, query, None, attention, pooled, True), (0, 1)
    query, grad_pooled = companion(n, 3, c, generator=g), companion(n, 3, c, generator=g).bfloat16()
    grad_map, mask = companion(n, 3, h, w, generator=g), companion(n, h, w, generator=g) > 0.3
    yield "pool_fwd", (x, query, mask), (0, 1, 2, 3)
    attention, pooled = torch.zeros(n, 3, h, w), torch.zeros(n, 3, c)
    one = ops.pool_fwd(x[-1:], query[-1:], mask[-1:])
    attention[-1], pooled[-1] = one[1], one[3]
    yield "pool_bwd", (grad_pooled, grad_map, None, x, query, mask, attention, pooled, True), (0, 1)


def main(kind):
    from attnkern import _ops

    if kind == "cuda":
        import cuda_on_host

        cuda_on_host.load()
        ops, last = _ops.Handles("attnkern_host"), cuda_last
    else:
        ops, last = _ops.BACKENDS["triton"], triton_last
    for layout in ("contiguous", "channels_last"):
        n = 2**17 + 1
        shape = (n, 64, 16, 16)
        assert torch.Size(shape).numel() > 2**31
        for name, arguments, results in passes(ops, shape, layout):
            alone = [
                arg[-1:] if isinstance(arg, torch.Tensor) and arg.dim() and len(arg) == n else arg for arg in arguments
            ]
            wanted = getattr(ops, name)(*alone)
            restore = last(16)  # those of the last image and what follows
            found = getattr(ops, name)(*arguments)
            restore()
            for i in results:
                assert wanted[i].numel() == 0 or wanted[i].any(), f"{name}: result {i} is nothing but zero"
                assert torch.equal(found[i][-1:], wanted[i]), f"{name} {layout}: result {i} differs"
            del arguments, alone, found
            print(name, layout, "same", flush=True)
    a, anchors = torch.empty(2**31 + 4096, dtype=torch.bfloat16), torch.linspace(0, 1, 5).bfloat16()
    a[-2048:] = torch.rand(2048, generator=torch.Generator().manual_seed(0))
    wanted = ops.quantize_fwd(a[-2048:], anchors, 1)
    restore = last(3)  # the emulation may have two more
    found = ops.quantize_fwd(a, anchors, 1)
    restore()
    assert torch.equal(found[0][-256:], wanted[0][-256:])
    assert torch.equal(found[1][-256:], wanted[1][-256:])
    print("quantize_fwd same")


if __name__ == "__main__":
    main(sys.argv[1])
