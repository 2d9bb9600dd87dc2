"""What torch.compile launches for the literal formulas, generated without a GPU.

Dynamo and AOTAutograd trace the formula on the CPU; its graphs are moved to "cuda" before Inductor lowers them, which
asks PyTorch and Triton for properties that an H100 has. The generated code then runs on meta tensors while recorders
stand in for its kernels. Inductor tunes a kernel by timing a few configurations: all of them are returned, for the
estimate to choose from. Configurations that it would try only when a kernel uses many registers are left out.
"""

import contextlib
import importlib.util
import os
import types
from pathlib import Path
from unittest import mock

import torch
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import attnkern.testing
from attnkern.testing import OPS
from benchmarks import cases
from benchmarks.count.code import CACHE, digest, stored
from benchmarks.count.launches import Launch, Others, Recorded, cubin_launch, inputs, nothing_filled

#: Properties of the device that Inductor reads.
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)


@contextlib.contextmanager
def _pretended():
    """While this is active, PyTorch and Triton generate code for an H100."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget

    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=types.SimpleNamespace(get_device_properties=lambda device: properties),
    )
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        torch.cuda: {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
            "get_device_capability": (9, 0), "get_rng_state": state, "set_rng_state": None, "synchronize": None,
            "set_device": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None,
        },
        CudaInterface: {
            "get_device_properties": H100, "is_available": True, "get_compute_capability": 90,
            "is_triton_capable": True, "raise_if_triton_unavailable": None,
        },
        CudaInterface.Worker: {"get_device_properties": H100},
        triton_helpers: {"set_driver_to_gpu": None},
    }  # fmt: skip
    with contextlib.ExitStack() as patched:
        for owner, functions in answers.items():
            for name, answer in functions.items():
                patched.enter_context(mock.patch.object(owner, name, mock.Mock(return_value=answer)))
        patched.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        has_triton.cache_clear()
        yield
    has_triton.cache_clear()


# --- generating code -------------------------------------------------------------------------------------------------


class _Module:
    """Replaces the module of a generated wrapper."""

    __file__ = "not written"
    key = "none"
    call = None


def _lowered(gm, example_inputs, options) -> tuple[str, list[torch.Tensor]]:
    """Inductor's code of a graph on "cuda", and meta tensors for its inputs."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    device = torch.device("cuda", 0)

    def moved(value):
        return device if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        node.args, node.kwargs = tuple(map(moved, node.args)), {key: moved(v) for key, v in node.kwargs.items()}
    gm.recompile()
    mode = next(tensor.fake_mode for tensor in example_inputs if isinstance(tensor, torch.Tensor))
    written = []

    def keep(graph, wrapper):
        written.append(wrapper.value)
        return _Module()

    def empty(tensor, where):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)

    settings = {"fx_graph_cache": False, "compile_threads": 1, "triton.autotune_at_compile_time": False}
    with (
        _pretended(),
        config.patch(settings),
        mock.patch.object(GraphLowering, "_compile_to_module_lines", keep),
    ):
        with mode:
            on_device = [empty(x, device) if isinstance(x, torch.Tensor) else x for x in example_inputs]
        FakeTensorProp(gm, mode=mode).propagate_dont_convert_inputs(*on_device)
        compile_fx_inner(gm, on_device, **options)
    (code,) = written
    return code, [empty(x, "meta") if isinstance(x, torch.Tensor) else x for x in example_inputs]


def _results(gm) -> list:
    """Tensors like a graph's results; integer ones are zero."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    results = []
    for node in output.args[0]:
        value = node.meta["val"] if isinstance(node, torch.fx.Node) else node
        if isinstance(value, torch.Tensor):
            make = torch.empty_strided if value.is_floating_point() else torch.zeros
            layout = (value.shape, value.stride()) if value.is_floating_point() else (value.shape,)
            value = make(*layout, dtype=value.dtype)
        results.append(value)
    return results


def _graphs(case: cases.Case, gradients: bool) -> dict[str, list[tuple[str, list]]]:
    """The code of the graphs of each pass, with their inputs."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    found = {"forward": [], "backward": []}

    def compile_inner(gm, example_inputs, **options):
        results = _results(gm)
        found["backward" if options.get("is_backward") else "forward"].append(_lowered(gm, example_inputs, options))

        def run(arguments):
            return results

        run._boxed_call = True
        return run

    def backend(gm, example_inputs):
        return compile_fx(gm, example_inputs, inner_compile=compile_inner)

    torch._dynamo.reset()
    function = torch.compile(OPS[case.op].literal, backend=backend, dynamic=False)
    with config.patch(enable_autograd_cache=False), nothing_filled(), torch.set_grad_enabled(gradients):
        leaves = {name: tensor.requires_grad_(gradients) for name, tensor in inputs(case, "cpu").items()}
        results = function(**leaves)
        if gradients:
            outputs = [getattr(results, key) for key in cases._USED[case.op]]
            torch.autograd.grad(
                outputs, list(leaves.values()), [torch.empty_like(output) for output in outputs], allow_unused=True
            )
    return found


# --- running it ------------------------------------------------------------------------------------------------------


class _Recorder:
    """Replaces a generated kernel; ``run`` records the arguments of the launch."""

    def __init__(self, name, source, launched):
        from torch._inductor.async_compile import _load_triton_kernel_from_source

        self.kernel, self.launched = _load_triton_kernel_from_source(name, source), launched

    def run(self, *arguments, stream):
        self.launched.append((self.kernel, arguments))


def _run(code: str, arguments: list) -> Recorded:
    """Run generated code on meta tensors."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache

    launched = []
    with (
        _pretended(),
        mock.patch.object(AsyncCompile, "triton", lambda self, name, source, **_: _Recorder(name, source, launched)),
        mock.patch.object(AsyncCompile, "wait"),
    ):
        # PyCodeCache.load would return a cached module with the recorders of an earlier run.
        spec = importlib.util.spec_from_file_location("generated", PyCodeCache.write(code)[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        scope = vars(module)
        scope |= {
            "empty_strided_cuda": lambda *layout: torch.empty_strided(*layout[:2], dtype=layout[2], device="meta"),
            "reinterpret_tensor": _reinterpreted,
            "copy_if_misaligned": lambda tensor: tensor,
            "get_raw_stream": lambda device: 0,
            "assert_size_stride": lambda *_: None,
            "assert_size_stride_grouped": lambda *_: None,
            "assert_alignment": lambda *_: None,
        }
        given = list(arguments)
        with Others() as others:
            results = scope["call"](given)
        known = {t.untyped_storage()._cdata for t in (*arguments, *results) if isinstance(t, torch.Tensor)}
        return Recorded([_configured(kernel, values, known) for kernel, values in launched], others.found)


def _reinterpreted(tensor, size, stride, offset=0):
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _configured(kernel, arguments, known) -> list[Launch]:
    """A launch in each configuration that Inductor would time."""
    return [_launch(kernel, config, arguments, known) for config in kernel.configs]


def _launch(kernel, config, arguments, known) -> Launch:
    from torch._inductor.runtime.triton_heuristics import GridExpr
    from triton.compiler import ASTSource

    meta = kernel._create_compile_meta(config)
    options = kernel._create_compile_options(config, meta)
    signature = meta["signature"]
    names = [name for name in kernel.fn.arg_names if signature.get(name) != "constexpr" and name in signature]
    values = dict(zip(names, arguments, strict=False))
    grid = GridExpr.from_meta(kernel.inductor_meta, config).eval_slow(meta["constants"] | values | config.kwargs)
    source = ASTSource(kernel.fn, signature, meta["constants"], meta["configs"][0])
    typed = [(signature[name], values[name]) for name in names]
    return cubin_launch(kernel.fn.__name__, source, options, tuple(map(int, grid)), typed, known)


def compiled(case: cases.Case) -> dict[str, Recorded]:
    """What torch.compile launches for a case: forward without gradients, backward of a training step."""
    import triton

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    sources = (Path(attnkern.testing.__file__), Path(attnkern.reference.__file__), Path(__file__))

    def make():
        graphs = {"forward": _graphs(case, False)["forward"], "backward": _graphs(case, True)["backward"]}
        found = {}
        for which, parts in graphs.items():
            recorded = [_run(*part) for part in parts]
            launches = [launch for part in recorded for launch in part.launches]
            found[which] = Recorded(launches, [other for part in recorded for other in part.others])
        return found

    key = digest(case, torch.__version__, triton.__version__, *(path.read_text(encoding="utf-8") for path in sources))
    return stored(f"compiled/{key}", make)
