"""Streams, CUDA graphs and the allocator of a GPU. Skipped on a machine without one."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import MAPS, call, check, check_run, doubles, make, run, same, upstream
from conftest import DEVICE, PATIENCE, every_case, every_function
from test_accelerate import Network

import attnkern

if DEVICE.type != "cuda":
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.kernels
SIZE = (14, 14)

#: A kernel on the wrong stream would start before its inputs are there.
CYCLES = 20_000_000


def inputs(function, dtype=torch.float32, **options):
    return make(function, 4, 64, SIZE, dtype=dtype, device=DEVICE, **options)


@every_case
def test_on_a_stream_of_its_own(function, options, backend):
    """Forward and backward run after the work that is queued on the current stream."""
    tensors = inputs(function)
    expected = run(function, tensors, size=SIZE, backend=backend, **options)
    late = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        found = run(function, late, size=SIZE, backend=backend, **options)
    stream.synchronize()
    same(found, expected, "on another stream")


@every_function
def test_tensors_that_another_stream_still_reads(function, backend):
    """`record_stream` works for inputs and results, whose memory comes from PyTorch's allocator."""
    tensors = inputs(function)
    expected = call(function, tensors, size=SIZE, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        found = call(function, given, size=SIZE, backend=backend)
    for tensor in given.values():
        tensor.record_stream(stream)
    shapes = [tensor.shape for tensor in given.values()]
    del given, tensor
    for shape in shapes:  # would reuse the memory of the inputs
        torch.full(shape, torch.nan, device=DEVICE)
    stream.synchronize()
    same(found, expected, "after its inputs were freed")


COLD = """
import sys, torch
sys.path.insert(0, {tests!r})
from cases import MAPS, call, make, run, same, upstream
function, options, backend, size = {function!r}, {options!r}, {backend!r}, (14, 14)
tensors, others = (make(function, 4, 64, size, dtype=torch.float32, device="cuda", seed=seed) for seed in (0, 1))
like = call(function, tensors, size=size, backend="reference", **options)
grads = {{name: grad.clone() for name, grad in upstream(like).items()}}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    found = run(function, tensors, size=size, grads=grads, backend=backend, **options)
for name, other in others.items():
    tensors[name].copy_(other)
for _ in range(2):
    graph.replay()
torch.cuda.synchronize()
same(found, run(function, tensors, size=size, grads=grads, backend=backend, **options), "in a graph")
print("same")
"""


@every_function
def test_a_graph_captured_cold(function, backend, tmp_path):
    """The first call of a process, with compilation, is captured in a graph and replayed on other numbers."""
    code = COLD.format(tests=str(Path(__file__).parents[1]), function=function, options={}, backend=backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr


@every_function
def test_memory_that_ends_midway(function, backend):
    """Forward or backward raises PyTorch's OutOfMemoryError, and the next call is correct."""
    few, many = inputs(function), make(function, 16, 256, (56, 56), dtype=torch.float32, device=DEVICE)
    if function in MAPS:
        many = make(function, 4096, dtype=torch.float32, device=DEVICE)
    size = (256, 256) if function in MAPS else (56, 56)
    expected = run(function, few, size=SIZE, backend=backend)
    grads = upstream(call(function, many, size=size, backend=backend))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    failures = 0
    try:
        for share in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 8):
            extra = share * max(tensor.nbytes for tensor in (*many.values(), *grads.values()))
            torch.cuda.set_per_process_memory_fraction(min(1.0, (used + extra) / total))
            try:
                run(function, many, size=size, grads=grads, backend=backend)
            except torch.OutOfMemoryError:
                failures += 1
            torch.cuda.set_per_process_memory_fraction(1.0)
            same(run(function, few, size=SIZE, backend=backend), expected, "after memory ended")
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < failures < 8


@every_function
def test_threads_on_streams_of_their_own(function, backend):
    expected = run(function, inputs(function), size=SIZE, backend=backend)
    errors = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    found = run(function, inputs(function), size=SIZE, backend=backend)
                torch.cuda.current_stream().synchronize()
            same(found, expected, "in a thread")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@every_function
def test_results_of_the_cpu(function, backend):
    """The same numbers on the other device, within rounding."""
    found = check_run(function, inputs(function), backend, SIZE)
    host = {name: tensor.cpu() for name, tensor in inputs(function).items()}
    expected = run(function, doubles(host), size=SIZE, backend="reference")
    names = [name for name in expected if not name.startswith("grad_")]
    check({name: found[name].cpu() for name in names}, {name: expected[name] for name in names})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_function
def test_tensors_on_another_device_than_the_current(function, backend):
    expected = run(function, inputs(function), size=SIZE, backend=backend)
    there = {name: tensor.to("cuda:1") for name, tensor in inputs(function).items()}
    grads = {name: grad.to("cuda:1") for name, grad in upstream(call(function, there, size=SIZE)).items()}
    found = run(function, there, size=SIZE, grads=grads, backend=backend)
    assert torch.cuda.current_device() == 0
    same({name: tensor.to("cuda:0") for name, tensor in found.items()}, expected, "on another device")


def test_a_model_on_the_gpu_is_compared_there():
    model = Network().to(DEVICE)
    done = attnkern.accelerate(model)
    assert done.replaced == {"attention": "LinearAttentionBlock", "quantizer": "StraightThroughQuantizer"}
    model(torch.randn(2, 3, 9, 8, device=DEVICE))[0].sum().backward()
    assert all(parameter.is_cuda for parameter in model.parameters())
