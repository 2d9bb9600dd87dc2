"""Each failed allocation in the compiled operators raises PyTorch's own exception and corrupts nothing."""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FUNCTIONS, POOLS, call, leaves_of, make, run, same, upstream
from conftest import DEVICE

import attnkern

HERE = Path(__file__).parent
TESTS = HERE.parent
TORCH = Path(torch.__file__).parent
SIZE = (4, 6)
LAYOUTS = ("contiguous", "sliced")


@pytest.mark.parametrize("function", ["window_attention", "anchor_attention", "compatibility_pool"])
def test_as_pytorch_itself(function):
    """Features too large for any memory raise the same exception and message as a PyTorch tensor of that size."""
    tensors = make(function, 1, 1, SIZE, dtype=torch.float32, device=DEVICE)
    features = next(iter(tensors))
    tensors[features] = tensors[features].expand(1, 2**44, *SIZE)
    if "query" in tensors:
        tensors["query"] = tensors["query"].expand(1, 2**44)
    with pytest.raises(RuntimeError) as expected:
        torch.empty(tensors[features].shape, device=DEVICE)
    with pytest.raises(expected.type) as found:
        call(function, tensors, backend="native")
    assert type(found.value) is type(expected.value)
    if DEVICE.type == "cpu":  # on a GPU the message has the allocated memory
        assert str(found.value) == str(expected.value)


@pytest.fixture(scope="module")
def no_memory(tmp_path_factory):
    """no_memory.cpp, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("no_memory") / "no_memory.so"
    include, lib = TORCH / "include", TORCH / "lib"
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", f"-isystem{include}", TESTS / "no_memory.cpp", "-o", library,
         f"-L{lib}", "-lc10", f"-Wl,-rpath,{lib}"],
        check=True,
    )  # fmt: skip
    return library


def scarce(library: Path) -> None:
    """Let the allocation of each tensor of each function fail once; prints the number of tensors."""
    left = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "tensors_left")

    def ends(compute):
        for made in range(100):
            left.value = made
            try:
                compute()
            except torch.OutOfMemoryError as error:
                message = str(error)
                assert left.value == 0
                assert message.startswith("CUDA out of memory. Tried to allocate")
            else:
                assert left.value == 0, "fewer tensors than there was memory for"
                return made
            finally:
                left.value = -1
        raise AssertionError("there is never enough memory")

    def forward(tensors):
        return call(function, tensors, size=SIZE, backend="native")

    def backward(tensors):
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    for function, layout in itertools.product(FUNCTIONS, LAYOUTS):
        tensors = make(function, 2, 8, SIZE, dtype=torch.float32, layout=layout)
        expected = run(function, tensors, size=SIZE, backend="native")
        inputs = leaves_of(tensors)
        results = {name: result for name, result in forward(inputs).items() if result.requires_grad}
        outputs, grads = [*results.values()], [*upstream(results).values()]
        counts = [ends(functools.partial(each, inputs)) for each in (forward, backward)]
        same(run(function, tensors, size=SIZE, backend="native"), expected, "after memory ended")
        print(function, layout, *counts)
    compiled = torch.compile(attnkern.window_attention, backend="aot_eager", fullgraph=True)
    with attnkern.use_backend("native"):
        print("compiled", "contiguous", ends(lambda: compiled(torch.ones(2, 3, 4, 6), torch.ones(2, 5))), 0)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU, test_device.py takes the memory away")
def test_every_tensor_of_every_operator(no_memory):
    """torch.OutOfMemoryError is raised in forward, backward and compiled graphs, and the next call is correct."""
    code = f"import ctypes; ctypes.CDLL({str(no_memory)!r}, ctypes.RTLD_GLOBAL)\n"  # before PyTorch
    code += f"from pathlib import Path; import test_out_of_memory; test_out_of_memory.scarce(Path({str(no_memory)!r}))"
    folders = os.pathsep.join(map(str, (HERE, TESTS, TESTS.parent)))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": folders}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counts = {
        (function, layout): tuple(map(int, rest))
        for function, layout, *rest in map(str.split, done.stdout.splitlines())
    }
    assert counts.keys() == {*itertools.product(FUNCTIONS, LAYOUTS), ("compiled", "contiguous")}
    for function in FUNCTIONS:
        forward, backward = counts[function, "contiguous"]
        assert forward >= 2
        assert backward >= 1
        assert counts[function, "sliced"][0] > forward  # a copy in another layout
    for function in POOLS:  # no copy of the features for many queries or a mask
        assert counts[function, "contiguous"] == counts["compatibility_pool", "contiguous"]
    assert counts["compiled", "contiguous"][0] == counts["window_attention", "contiguous"][0]
