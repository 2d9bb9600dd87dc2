"""Any shape, layout, dtypes and options that a call may have: results and gradients are those of float64."""

import os

import pytest
import torch
from cases import FUNCTIONS, check_run, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnkern import _ops

INTERPRETED = _ops.TRITON_INTERPRETS
settings.register_profile(
    "fast", deadline=None, derandomize=True, max_examples=8 if INTERPRETED else 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # backend and device are the same for all examples
)  # fmt: skip
settings.register_profile("explore", settings.get_profile("fast"), derandomize=False, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "misaligned")
lengths = st.integers(1, 9 if INTERPRETED else 20)
flag = st.booleans()
OPTIONS = {
    "window_map": {"scale": st.floats(0.5, 12), "rescale": flag, "aspect": flag},
    "window_attention": {"scale": st.floats(0.5, 12), "rescale": flag, "aspect": flag, "residual": flag},
    "anchor_quantize": {"reduction": st.sampled_from(("mean", "batchmean", "sum"))},
    "anchor_attention": {"reduction": st.sampled_from(("mean", "batchmean", "sum")), "residual": flag},
    "compatibility_pool": {},
}


@st.composite
def calls(draw, function, dtypes):
    """Inputs and keywords of a check_run of the function."""
    names, differentiable = FUNCTIONS[function]
    dtype = draw(st.sampled_from(dtypes))
    size = (draw(lengths), draw(lengths))
    if function == "compatibility_pool" and draw(flag):
        size = (size[0] * size[1],)
    layouts = LAYOUTS if function != "window_map" else ("contiguous", "sliced", "misaligned")
    tensors = make(
        function,
        n=draw(st.integers(0, 4)),
        c=draw(st.integers(0, 9 if INTERPRETED else 70)),
        size=size,
        dtype=dtype,
        companion=tuple(draw(st.sampled_from((dtype, torch.float32))) for _ in names[1:]),
        layout=draw(st.sampled_from(layouts)),
        anchors=draw(st.integers(1, 70)),
        shared=draw(flag),
        seed=draw(st.integers(0, 2**16)),
    )
    keywords = {name: draw(values) for name, values in OPTIONS[function].items()}
    keywords["wrt"] = tuple(name for name in names if draw(flag)) or names
    keywords["through"] = tuple(name for name in differentiable if draw(flag)) or differentiable
    keywords["grad_layout"] = draw(st.sampled_from(LAYOUTS))
    return tensors, size, keywords


@pytest.mark.kernels
@pytest.mark.parametrize("function", FUNCTIONS)
@given(data=st.data())
def test_any_call(function, data, backend, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16) + (torch.float64,) * (backend != "triton")
    tensors, size, keywords = data.draw(calls(function, dtypes))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    check_run(function, tensors, backend, size, **keywords)
