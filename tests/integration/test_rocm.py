"""Simulates, in a new process, a PyTorch built for ROCm, whose GPUs have the device type cuda."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

#: Replaces queries of PyTorch by those of a machine with one AMD GPU, which has no CUDA compute capability.
MACHINE = """
import types
import torch

def refuse(*_):
    raise AssertionError("the compute capability of an AMD GPU was asked for")

torch.version.cuda, torch.version.hip = None, "7.0.51831"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = refuse
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(
    name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4, warp_size=64
)
"""


def on_rocm(code):
    done = subprocess.run([sys.executable, "-c", MACHINE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info_says_that_triton_runs_and_the_native_kernels_do_not():
    lines = on_rocm("from attnkern import cli; print(cli.info())").splitlines()
    assert any("ROCm of torch 7.0.51831" in line for line in lines)
    assert "cuda:0 AMD Instinct MI300X, gfx942:sramecc+:xnack-" in lines
    (native,) = (line for line in lines if line.startswith("native    on cuda:0"))
    assert "for NVIDIA GPUs" in native
    assert "CPU build" not in native


def test_without_triton_the_package_is_named():
    code = """
from attnkern import _backend
_backend._TRITON_FOUND = False
print(_backend.reason("triton", torch.device("cuda", 0), torch.float32))
"""
    assert "pytorch-triton-rocm" in on_rocm(code)


def test_the_automatic_choice_is_triton():
    code = """
from attnkern import _backend
_backend._TRITON_FOUND = True
_backend._first_kernel_fails = lambda device: False
features = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
print(_backend.choose(None, features))
"""
    assert on_rocm(code).strip() == "triton"


def test_kernels_have_as_many_threads_with_warps_of_64():
    pytest.importorskip("triton")
    code = """
from attnkern._triton import common

kernel = {(3,): lambda *arguments, **options: print(options["num_warps"])}
torch.Tensor = types.SimpleNamespace
for warps in (1, 4, 8):
    common.launch(kernel, 3, types.SimpleNamespace(data_ptr=lambda: 0, device=torch.device("cuda", 0)), num_warps=warps)
"""
    assert on_rocm(code).split() == ["1", "2", "4"]
