"""The cases of the benchmarks, operators and training steps, and their competitors, for run.py and bench_ops.py."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

import attnkern
from attnkern._ops import BACKENDS
from attnkern.testing import OPS, available_backends, make_inputs, output_gradients
from benchmarks import pooling
from benchmarks.report import EMPTY, NETWORK_PASSES, TRAINING

PASSES = ("forward", "forward+backward")
#: forward+backward, with max-autotune for the compiled competitor
AUTOTUNED = "forward+backward, max-autotune"
#: measured besides the cases: host time of calls on tiny tensors
HOST = "host costs"


@dataclass(frozen=True)
class Case:
    """One operator, or a layer of timm, at one shape, dtype and layout.

    ``queries`` is the number of queries per image, if the queries have that axis: for a layer, its number of heads.
    ``windows`` is the number of windows per image, if the rectangles have that axis.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    anchors: int = 20
    queries: int = 0
    windows: int = 0

    def __str__(self):
        size = "x".join(map(str, self.shape))
        counts = {"M": self.queries, "K": self.windows, "Q": 0 if self.anchors == 20 else self.anchors}
        many = "".join(f" {letter}={count}" for letter, count in counts.items() if count)
        return f"{self.op} {size} {str(self.dtype).split('.')[-1]} {self.layout}{many}"

    @classmethod
    def parse(cls, text: str):
        """The case with this name."""
        op, shape, dtype, layout, *more = text.split()
        many = {{"Q": "anchors", "M": "queries", "K": "windows"}[text[0]]: int(text[2:]) for text in more}
        return cls(op, tuple(map(int, shape.split("x"))), getattr(torch, dtype), layout, **many)

    def bytes(self, which: str) -> int:
        """Bytes that the pass must move: features read and written once."""
        features = torch.Size(self.shape).numel() * self.dtype.itemsize
        forward, backward = (1, 2) if self.queries or self.op == "compatibility_pool" else (2, 3)
        return features * (forward if which == "forward" else forward + backward)


FEATURE_OPS = ("window_attention", "compatibility_pool", "anchor_attention")
_LAYOUTS = ("contiguous", "channels_last")


def _grid(shapes, dtypes=(torch.float32,), layouts=_LAYOUTS):
    return [
        Case(op, shape, dtype, layout)
        for dtype, layout, shape, op in itertools.product(dtypes, layouts, shapes, FEATURE_OPS)
    ]


_QUANTIZED = [Case("anchor_quantize", (128, 1, 16, 16))]
CPU_CASES = _grid([(32, 512, 7, 7), (32, 512, 14, 14), (32, 256, 32, 32)]) + _QUANTIZED
CPU_WINDOWS = [
    Case("window_attention", shape, windows=windows)
    for shape in ((32, 512, 14, 14), (32, 256, 32, 32))
    for windows in (4, 16)
]

_GPU_SHAPES = [
    (32, 256, 56, 56), (64, 512, 32, 32), (32, 512, 14, 14), (32, 2048, 7, 7), (32, 64, 128, 128),
    (128, 512, 8, 8), (32, 512, 28, 28), (256, 320, 10, 10), (32, 960, 10, 10),
]  # fmt: skip
_QUANTIZED += [
    Case("anchor_quantize", shape, anchors=anchors)
    for shape, anchors in (((32, 1, 56, 56), 20), ((128, 1, 16, 16), 50), ((32, 1, 56, 56), 50))
]
#: Most valuable first.
GPU_CASES = [
    *_QUANTIZED,
    *_grid(_GPU_SHAPES, (torch.bfloat16,), ("contiguous",)),
    *_grid(_GPU_SHAPES, (torch.float32,), ("contiguous",)),
    *_grid(_GPU_SHAPES, (torch.bfloat16, torch.float32), ("channels_last",)),
]
GPU_WINDOWS = [
    Case("window_attention", shape, torch.bfloat16, windows=windows)
    for shape in ((32, 256, 56, 56), (64, 512, 32, 32), (32, 512, 14, 14))
    for windows in (4, 16)
]
GPU_AUTOTUNED = _grid(_GPU_SHAPES[:2], (torch.bfloat16,), ("contiguous",))
#: What the rehearsal of a GPU's run measures on a CPU.
TINY_CASES = [
    Case("anchor_quantize", (2, 1, 4, 4)),
    Case("window_attention", (2, 4, 3, 5), torch.bfloat16),
    Case("AttentionPoolLatent", (2, 8, 6), torch.bfloat16, "tokens", queries=2),
    Case("compatibility_pool", (2, 8, 3, 4), queries=3),
]

#: The GPU's shapes on a CPU, those of at most 64 MiB, and a single image.
CPU_FULL_CASES = [
    *_grid([shape for shape in _GPU_SHAPES if math.prod(shape) * 4 <= 2**26]),
    *_grid([(1, 256, 56, 56)]),
    *_grid([(32, 512, 14, 14)], (torch.bfloat16,)),
    *_QUANTIZED,
]

#: Shapes (N, C, H, W) along each axis, with the other sizes fixed.
SCALING = {
    "images": [(n, 256, 14, 14) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)],
    "positions": [(8, 64, side, side) for side in (7, 14, 28, 56, 112, 224, 256)],
    "channels": [(8, channels, 14, 14) for channels in (16, 32, 64, 128, 256, 512, 1024, 2048)],
}


def _pooling(layers: list[int], maps: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Layers of SigLIP, CLIP's ResNet-50 and SigLIP SO400M for these numbers of images, the pooling in them alone, and
    NCHW maps with few and with many queries."""
    tokens = [((768, 196), 12), ((2048, 50), 32), ((1152, 729), 16)]  # channels and positions, heads
    found = []
    for images, (size, heads) in zip(layers, tokens, strict=True):
        if size == (2048, 50):  # 7x7 and their mean
            found.append(Case("AttentionPool2d", (images, 2048, 7, 7), dtype, queries=heads))
        else:
            found.append(Case("AttentionPoolLatent", (images, *size), dtype, "tokens", queries=heads))
        found.append(Case("compatibility_pool", (images, *size), dtype, "tokens", queries=heads))
    shapes = [(maps, 512, 14, 14), (maps, 256, 32, 32)]
    return found + [
        Case("compatibility_pool", shape, dtype, queries=queries) for shape in shapes for queries in (1, 4, 12, 32)
    ]


CPU_POOLING = _pooling([32, 32, 16], 32)
GPU_POOLING = _pooling([64, 64, 64], 64, torch.bfloat16)

#: The results that get gradients in a training step; side outputs get none.
_USED = {
    **dict.fromkeys(pooling.LAYERS, ("output",)),
    "window_attention": ("output",),
    "compatibility_pool": ("pooled",),
    "anchor_attention": ("output", "anchor_loss", "commitment_loss"),
    "anchor_quantize": ("values", "anchor_loss", "commitment_loss"),
}


def _inputs(case, device):
    if case.queries:
        return {name: value.to(device) for name, value in pooling.inputs(case).items()}
    inputs = make_inputs(case.op, case.shape, case.dtype, layout=case.layout, device=device)
    if case.windows:
        inputs["rectangle"] = _several(case).to(inputs["rectangle"])
    if "anchors" in inputs:
        inputs["anchors"] = torch.linspace(0, 1, case.anchors, device=device).to(inputs["anchors"].dtype)
    return inputs


def _several(case):
    """Windows (N, K, 5) all over the map, smaller if there are more of them."""
    low, high = torch.tensor([[0.1, 0.1, 0.4, 0.4, -1.5], [0.9, 0.9, 0.8, 0.8, 1.5]])
    generator = torch.Generator().manual_seed(0)
    drawn = low + (high - low) * torch.rand(case.shape[0], case.windows, 5, generator=generator)
    drawn[..., 2:4] /= case.windows**0.5
    return drawn


def _sdpa(local, query):
    return attnkern.CompatibilityPooled(pooling.sdpa(local, query[:, None])[:, 0], None, None)


#: Options of torch.compile: those of the usual competitor, and of the one with max-autotune.
COMPILED = {"dynamic": False, "fullgraph": True}
TUNED = {**COMPILED, "mode": "max-autotune-no-cudagraphs"}
REHEARSED = {**COMPILED, "backend": "aot_eager"}  # a rehearsal compiles no code


def competitors(case: Case, device: torch.device, compiled: dict | None = COMPILED) -> dict[str, Callable]:
    """Functions of the op's inputs by name: literal formula in eager, compiled, other libraries, then our backends.

    ``compiled`` are options of torch.compile; None leaves it out.
    """
    if case.queries:  # the reference takes too long to be timed
        backends = [name for name in reversed(available_backends(device, case.dtype)) if name != "reference"]
        return pooling.competitors(case, device, compiled, backends)
    literal = OPS[case.op].literal
    found = {"eager": literal}
    if compiled is not None:
        found["compile"] = torch.compile(literal, **compiled)
    if case.op == "compatibility_pool":
        found["sdpa"] = _sdpa
    for backend in reversed(available_backends(device, case.dtype)):
        found[backend] = lambda backend=backend, **inputs: OPS[case.op].function(**inputs, backend=backend)
    return found


class Workload:
    """Inputs and output gradients of a case, in several copies, and the expected result."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, self.used = case, device, _USED[case.op]
        inputs = _inputs(case, device)
        if case.queries:
            self.truth = pooling.exact(case, inputs)  # of the first images
            images = case.shape[:1]
            outputs = {self.used[0]: self.truth.new_empty(images + self.truth.shape[1:], dtype=case.dtype)}
        else:
            function = functools.partial(OPS[case.op].function, backend="reference")
            self.truth = getattr(function(**{k: v.double() for k, v in inputs.items()}), self.used[0])
            outputs = {key: getattr(function(**inputs), key) for key in self.used}
        # Each in its output's layout, as a network's next layer sends it back.
        grads = {k: torch.empty_like(outputs[k]).copy_(grad) for k, grad in output_gradients(outputs).items()}
        self._copies = [(inputs, [grads[key] for key in self.used])]

    @property
    def bytes(self) -> int:
        """The bytes of one copy."""
        inputs, grads = self._copies[0]
        return sum(tensor.nbytes for tensor in (*inputs.values(), *grads))

    def copy(self, number: int) -> tuple[dict, list]:
        while len(self._copies) <= number:
            inputs, grads = self._copies[0]
            self._copies.append(({key: value.clone() for key, value in inputs.items()}, [g.clone() for g in grads]))
        return self._copies[number]


#: Cached, so that both passes of a case share its inputs.
workload = functools.lru_cache(maxsize=1)(Workload)


class Call:
    """A pass of one competitor, checked against the reference in float64."""

    def __init__(self, name: str, function: Callable, work: Workload, which: str):
        self.function, self.work, self.which, self._leaves = function, work, which, {}
        key, truth = work.used[0], work.truth
        error = (getattr(function(**work.copy(0)[0]), key)[: len(truth)].double() - truth).abs().max()
        # The literal formulas round every step to the features' type.
        allowed = 0.02 if name in BACKENDS or work.case.dtype == torch.float32 else 0.2
        if not error <= allowed * truth.abs().max().clamp(min=1):
            raise AssertionError(f"{name} computes {work.case} wrong by {error}")
        self()

    def __call__(self) -> None:
        """Run and wait for the device."""
        self.run()
        synchronize(self.work.device)

    def run(self, number: int = 0) -> tuple:
        """Run on a copy of the inputs. Returns all results; their memory may be reused once they are dropped."""
        inputs, grads = self.work.copy(number)
        if self.which == "forward":
            with torch.no_grad():
                return self.function(**inputs)
        if number not in self._leaves:
            self._leaves[number] = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        leaves = self._leaves[number]
        result = self.function(**leaves)
        outputs = [getattr(result, key) for key in self.work.used]
        leaves = [*leaves.values(), *getattr(self.function, "parameters", ())]
        return *result, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls(case: Case, which: str, device: torch.device, compiled: dict | None = COMPILED) -> dict[str, Call]:
    """Ready calls of every competitor."""
    work = workload(case, device)
    return {name: Call(name, function, work, which) for name, function in competitors(case, device, compiled).items()}


#: name: (options, side of the images, batch). The frozen trunk of the pc network is skipped with every backend.
MODELS = {
    "vgg_att2_concat_pc": ({"width": 0.25}, 32, 32),
    "vgg_aib_qt": ({"width": 0.25}, 32, 32),
    "efficientnet_b0_window": ({"width": 1.0}, 96, 16),
}
#: What ``--networks`` measures beside them.
MORE_MODELS = {
    "vgg_att2_concat_dp": ({"width": 0.25}, 32, 32),
    "wrn28_10_aib_qt": ({"width": 0.2, "blocks": 2}, 32, 32),
    "mobilenet_v3_large_window": ({"width": 1.0}, 96, 16),
}
TINY_MODELS = {"vgg_aib_qt tiny": ({"width": 0.05}, 32, 2)}
#: Networks of timm that pool by attention. ``--networks`` measures them with and without `attnkern.accelerate`.
TIMM_MODELS = {"resnet50_clip": ({}, 224, 4), "vit_base_patch32_siglip_256": ({}, 256, 4)}
NETWORKS = MODELS | MORE_MODELS | TINY_MODELS | TIMM_MODELS


def work(suite: str, gpu: bool, compiled: bool, again: bool = False) -> list[tuple[Case | str, str]]:
    """What a run measures, (case or network, pass), most valuable first. A process that measures the rows ``again``
    leaves out the forward pass of many queries, to keep the run short."""
    if suite == "rehearsal":
        return [(HOST, ""), *itertools.product(TINY_CASES, PASSES), *((name, TRAINING) for name in TINY_MODELS)]
    if suite == "networks":
        return [(name, which) for which in NETWORK_PASSES for name in MODELS | MORE_MODELS | TIMM_MODELS]
    if suite == "full":
        return list(itertools.product(CPU_FULL_CASES, PASSES))
    networks = [(name, TRAINING) for name in MODELS]
    if not gpu:
        pooled = itertools.product(CPU_POOLING, PASSES[again:])
        windows = itertools.product(CPU_WINDOWS, PASSES)
        return [*itertools.product(CPU_CASES, PASSES), *windows, *pooled, *networks, (HOST, "")]
    layouts = {layout: [case for case in GPU_CASES if case.layout == layout] for layout in _LAYOUTS}
    return [
        (HOST, ""),
        *itertools.product(layouts["contiguous"], PASSES),
        *networks,
        *itertools.product(GPU_POOLING, PASSES),
        *itertools.product(GPU_WINDOWS, PASSES),
        *itertools.product(layouts["channels_last"], PASSES),
        *((case, AUTOTUNED) for case in GPU_AUTOTUNED if compiled),
    ]


def network_calls(name: str, which: str, device: torch.device, compiled: bool) -> dict[str, Callable[[], None]]:
    """A pass of a network by backend, and of the same network compiled. ``which`` is TRAINING (forward, loss, backward,
    SGD) or INFERENCE. attnkern's networks see cluttered digits; a network of timm is accelerated for each backend, and
    "timm" is the network as it is.
    """
    images, loss = _task(name, device)
    found = {}
    for backend, compiles in itertools.product(_network_names(name, device), (False, True)[: 1 + compiled]):
        network = _network(name, device, backend).train(which == TRAINING)
        optimizer = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), 1e-3)
        forward = torch.compile(network, dynamic=False) if compiles else network

        def step(network=network, forward=forward, optimizer=optimizer, backend=backend):
            with (
                attnkern.use_backend(None if backend == "timm" else backend),
                torch.set_grad_enabled(which == TRAINING),
            ):
                output = forward(images)
                if which == TRAINING:
                    optimizer.zero_grad()
                    loss(network, output).backward()
                    optimizer.step()
            synchronize(device)

        found[backend + " compiled" * compiles] = step
    return found


def _network_names(name: str, device: torch.device) -> list[str]:
    """The backends that a network is measured with, and "timm" for its own code."""
    backends = list(reversed(available_backends(device)))
    return ["timm", *(each for each in backends if each != "reference")] if name in TIMM_MODELS else backends


def _task(name: str, device: torch.device) -> tuple[torch.Tensor, Callable]:
    """Images, and the loss of a network and its output."""
    if name in TIMM_MODELS:
        _, side, batch = NETWORKS[name]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, side, side, generator=generator)
        return images.to(device), lambda network, output: output.square().mean()
    digits = _digits(name, device)
    return digits.images, lambda network, output: network.loss(output, digits.labels)


def _head_calls(name: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """Forward and backward of a timm network's head, the attention pool, by backend."""
    images, _ = _task(name, device)
    found = {}
    for backend in _network_names(name, device):
        network, features = _network(name, device, backend).train(), []
        (head,) = (module for module in network.modules() if type(module).__name__ in pooling.LAYERS)
        with torch.no_grad():
            handle = head.register_forward_pre_hook(lambda module, given, features=features: features.append(given[0]))
            network(images)
            handle.remove()
        leaves = [features[0].requires_grad_(), *head.parameters()]

        def attend(head=head, leaves=leaves, backend=backend):
            with attnkern.use_backend(None if backend == "timm" else backend):
                output = head(leaves[0])
            torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
            synchronize(device)

        found[backend] = attend
    return found


def attention_calls(name: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """Forward and backward of the attention operators that a training step of a network calls, alone, by backend; of
    the head, for a network of timm."""
    if name in TIMM_MODELS:
        return _head_calls(name, device)
    recorded = []

    def recorder(function):
        def record(*args, **kwargs):
            recorded.append((function, [arg.detach().requires_grad_() for arg in args], kwargs))
            return function(*args, **kwargs)

        return record

    with contextlib.ExitStack() as patched:
        for module in (attnkern.nn.pool, attnkern.nn.quantize, attnkern.nn.window):
            for op in FEATURE_OPS:
                if hasattr(module, op):
                    patched.enter_context(mock.patch.object(module, op, recorder(getattr(attnkern, op))))
        _network(name, device).train()(_digits(name, device).images)
    found = {}
    for backend in reversed(available_backends(device)):

        def attend(backend=backend):
            for function, leaves, options in recorded:
                result = function(*leaves, **options, backend=backend)
                outputs = [getattr(result, key) for key in _USED[function.__name__]]
                torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
            synchronize(device)

        found[backend] = attend
    return found


def _digits(name, device):
    from attnkern.training.digits import digits_clutter

    _, side, batch = NETWORKS[name]
    digits = digits_clutter("train", size=side, count=batch)
    return digits._replace(images=digits.images.to(device), labels=digits.labels.to(device))


def _network(name, device, backend=None):
    """A network with random weights. That of timm is accelerated, unless the backend is "timm"."""
    torch.manual_seed(0)
    if name in TIMM_MODELS:
        import timm

        network = timm.create_model(name, pretrained=False, **NETWORKS[name][0]).to(device)
        if backend != "timm" and not attnkern.accelerate(network).replaced:
            raise AssertionError(f"accelerate replaces nothing in {name}")
        return network
    from attnkern.models import create_model

    return create_model(name.split()[0], 10, **NETWORKS[name][0]).to(device)


class _Nothing(torch.autograd.Function):
    """An empty Function of two tensors: the cost of any Function."""

    @staticmethod
    def forward(ctx, x, companion):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def host_calls(device: torch.device) -> dict[str, dict[str, Callable[[], None]]]:
    """Forward and backward of tiny tensors by op and backend, and of an empty Function: what a call costs the host."""
    cases = [Case(op, (2, 8, 2, 2)) for op in FEATURE_OPS] + [Case("anchor_quantize", (2, 1, 2, 2))]
    found = {}
    for case in cases:
        ready = calls(case, "forward+backward", device, compiled=None)
        found[case.op] = {name: ready[name].run for name in ("eager", "native", "triton") if name in ready}
    x, companion = (torch.zeros(2, 8, 2, 2, device=device, requires_grad=True) for _ in range(2))
    grad = torch.ones_like(x)

    def empty():
        torch.autograd.grad(_Nothing.apply(x, companion), [x, companion], grad, allow_unused=True)

    found[EMPTY] = {"eager": empty}
    return found
