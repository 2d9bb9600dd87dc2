"""What is measured: ops and training steps, and who competes in each. One source for run.py and pytest-benchmark."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import attnkern
from attnkern.testing import OPS, available_backends, make_inputs, output_gradients

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One op at one shape, dtype and layout."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self):
        size = "x".join(map(str, self.shape))
        return f"{self.op} {size} {str(self.dtype).split('.')[-1]} {self.layout}"

    def bytes(self, which: str) -> int:
        """Bytes that the pass must move: features read and written once."""
        features = torch.Size(self.shape).numel() * self.dtype.itemsize
        forward, backward = {"compatibility_pool": (1, 2), "anchor_quantize": (2, 3)}.get(self.op, (2, 3))
        return features * (forward if which == "forward" else forward + backward)


CPU_CASES = [
    *(
        Case(op, shape, layout=layout)
        for shape in ((32, 512, 7, 7), (32, 512, 14, 14), (32, 256, 32, 32))
        for op in ("window_attention", "compatibility_pool", "anchor_attention")
        for layout in ("contiguous", "channels_last")
    ),
    Case("anchor_quantize", (128, 1, 16, 16)),
]

#: Most valuable first.
_GPU_SHAPES = [
    (32, 256, 56, 56), (64, 512, 32, 32), (32, 512, 14, 14), (32, 2048, 7, 7), (32, 64, 128, 128),
    (128, 512, 8, 8), (32, 512, 28, 28), (256, 320, 10, 10), (32, 960, 10, 10),
]  # fmt: skip
GPU_CASES = [
    *(Case("anchor_quantize", shape) for shape in ((128, 1, 16, 16), (32, 1, 56, 56))),
    *(
        Case(op, shape, dtype, layout)
        for shape in _GPU_SHAPES
        for dtype in (torch.bfloat16, torch.float32)
        for op in ("window_attention", "compatibility_pool", "anchor_attention")
        for layout in ("contiguous", "channels_last")
    ),
]

#: The results whose gradients a training step sends back; side outputs get none.
_USED = {
    "window_attention": ("output",),
    "compatibility_pool": ("pooled",),
    "anchor_attention": ("output", "anchor_loss", "commitment_loss"),
    "anchor_quantize": ("values", "anchor_loss", "commitment_loss"),
}


def _inputs(case, device):
    inputs = make_inputs(case.op, case.shape, case.dtype, layout=case.layout, device=device)
    if "anchors" in inputs:
        inputs["anchors"] = torch.linspace(0, 1, 20, device=device).to(inputs["anchors"].dtype)
    return inputs


def _sdpa(local, query):
    """Pooling as attention of one query over the positions, with the scale taken out."""
    tokens = local.flatten(2).transpose(1, 2)
    pooled = F.scaled_dot_product_attention(query[:, None], tokens, tokens, scale=1.0)[:, 0]
    return attnkern.CompatibilityPooled(pooled, None, None)


def competitors(case: Case, device: torch.device, compiled: bool = True) -> dict[str, Callable]:
    """Functions of the op's inputs by name: literal formula in eager, compiled, other libraries, then our backends."""
    literal = OPS[case.op].literal
    found = {"eager": literal}
    if compiled:
        found["compile"] = torch.compile(literal, dynamic=False)
    if case.op == "compatibility_pool":
        found["sdpa"] = _sdpa
    for backend in reversed(available_backends(device, case.dtype)):
        found[backend] = lambda backend=backend, **inputs: OPS[case.op].function(**inputs, backend=backend)
    return found


def calls(case: Case, which: str, device: torch.device, compiled: bool = True) -> dict[str, Callable[[], None]]:
    """Ready calls of every competitor, each checked against the reference in float64 before it is returned."""
    inputs = _inputs(case, device)
    used = _USED[case.op]
    truth = OPS[case.op].function(**{k: v.double() for k, v in inputs.items()}, backend="reference")._asdict()
    outputs = {key: getattr(OPS[case.op].function(**inputs), key) for key in used}
    # Each in its output's layout, as a network's next layer sends it back.
    grads = {k: torch.empty_like(outputs[k]).copy_(grad) for k, grad in output_gradients(outputs).items()}
    ready = {}
    for name, function in competitors(case, device, compiled).items():
        result = function(**inputs)
        error = (getattr(result, used[0]).double() - truth[used[0]]).abs().max()
        assert error <= 0.02 * truth[used[0]].abs().max().clamp(min=1), f"{name} computes {case} wrong by {error}"
        ready[name] = _call(function, inputs, used, grads, which, device)
    return ready


def _call(function, inputs, used, grads, which, device):
    def synchronised(body):
        def call():
            body()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        call.body = body  # what a CUDA graph captures
        return call

    if which == "forward":

        def forward():
            with torch.no_grad():
                function(**inputs)

        return synchronised(forward)
    leaves = {key: value.detach().requires_grad_() for key, value in inputs.items()}
    upstream = [grads[key] for key in used]

    def step():
        result = function(**leaves)
        outputs = [getattr(result, key) for key in used]
        torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)

    return synchronised(step)


#: name: (options, side of the images, batch). The frozen trunk of the pc network is skipped on every side alike.
MODELS = {
    "vgg_att2_concat_pc": ({"width": 0.25}, 32, 32),
    "vgg_aib_qt": ({"width": 0.25}, 32, 32),
    "efficientnet_b0_window": ({"width": 1.0}, 96, 16),
}


def training_steps(name: str, device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """A training step (forward, loss, backward, SGD) of a network on cluttered digits, by backend."""
    from attnkern.models import create_model
    from attnkern.training.digits import digits_clutter

    options, side, batch = MODELS[name]
    digits = digits_clutter("train", size=side, count=batch)
    images, labels = digits.images.to(device), digits.labels.to(device)
    for backend in reversed(available_backends(device)):
        torch.manual_seed(0)
        model = create_model(name, 10, **options).to(device).train()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1e-3)

        def step(model=model, optimizer=optimizer, backend=backend):
            with attnkern.use_backend(backend):
                optimizer.zero_grad()
                model.loss(model(images), labels).backward()
                optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        yield backend, step
