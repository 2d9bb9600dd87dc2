"""Random calls against float64 (fuzz.py) and many random shapes (soak.py), which find planted faults.

ATTNKERN_FUZZ_SEED repeats a run.
"""

import sys

import fuzz
import pytest
import soak
import torch
from cases import FUNCTIONS
from conftest import BACKENDS

import attnkern
from attnkern import _ops

INTERPRETED = _ops.TRITON_INTERPRETS
EXAMPLES = 4 if INTERPRETED else 300
KERNELS = [name for name in BACKENDS if name != "reference"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_call(function, request):
    print(f"ATTNKERN_FUZZ_SEED={fuzz.SEED}")
    seen, totals = 0, torch.zeros(2)

    def watch(case, counts):
        nonlocal seen
        if counts is not None:
            seen += 1
            totals.add_(torch.tensor(counts))

    examples = EXAMPLES // 4 if request.config.getoption("quick") else EXAMPLES
    failure = fuzz.find(examples, functions=(function,), backends=BACKENDS, watch=watch)
    if failure is not None:
        pytest.fail(f"{failure[1]}\n{fuzz.repro(failure[0])}\nATTNKERN_FUZZ_SEED={fuzz.SEED}")
    assert seen >= examples
    assert INTERPRETED or totals[0] > 0.6 * totals.sum(), f"only {totals[0] / totals.sum():.0%} of results had a bound"


# --- planted faults --------------------------------------------------------------------------------------------------


def shifted(results, at, by):
    return tuple(result + by if i == at else result for i, result in enumerate(results))


def forgets_strides(results, x, *_):
    """A fault: x is read as if it were contiguous."""
    contiguous = torch.empty(x.shape, device="meta").stride()
    holds_all = x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.element_size()
    wrong = x.as_strided(x.shape, contiguous) if holds_all else x
    return (torch.where(wrong == x, results[0], 0), *results[1:])


def leaks(results, *_):
    """A fault: NaN in the first image reaches the last one."""
    results[0][-1:] += 0 * results[0][:1]
    return results


def writes_its_input(results, local, *_):
    local.as_strided((min(1, local.numel()),), (1,)).add_(1)
    return results


def forgets_a_mask(results, local, query, mask):
    """A fault: the first position of each image takes part."""
    mask = mask.clone()
    mask.flatten(1)[:, :1] = True
    return (*attnkern.compatibility_pool(local, query, mask=mask, backend="reference"), results[3])


def next_index(results, *_):
    if results[1].numel():
        results[1][(-1,) * results[1].dim()] = results[4].argmin()
    return results


FAULTS = {
    "an output off by 0.01": ("compatibility_pool", "pool_fwd", lambda results, *_: shifted(results, 0, 1e-2)),
    "an output off by 1e-4": ("window_attention", "window_fwd", lambda results, *_: shifted(results, 0, 1e-4)),
    "a gradient off by a thousandth": (
        "window_attention", "window_bwd", lambda results, *_: (results[0], results[1] * 1.001)
    ),
    "a wrong index": ("anchor_quantize", "quantize_fwd", next_index),
    "strides forgotten": ("window_attention", "window_fwd", forgets_strides),
    "NaN in the wrong image": ("anchor_attention", "anchor_fwd", leaks),
    "a position not masked": ("compatibility_pool_masked", "pool_fwd", forgets_a_mask),
    "an input written": ("compatibility_pool", "pool_fwd", writes_its_input),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.skipif(INTERPRETED, reason="hundreds of interpreted calls")
def test_planted_faults_are_found(fault, monkeypatch, capsys):
    function, operator, break_it = FAULTS[fault]
    handles = _ops.BACKENDS[KERNELS[0]]
    right = getattr(handles, operator)
    with monkeypatch.context() as patch:
        patch.setattr(handles, operator, lambda *args: break_it(right(*args), *args))
        failure = fuzz.find(
            EXAMPLES, functions=(function,), backends=KERNELS[:1], shrink=fault == "an output off by 0.01"
        )
        assert failure is not None
        line = fuzz.repro(failure[0])
        repeat = ["--case", line.split("'")[1], "--backends", KERNELS[0]]
        assert fuzz.main(repeat) == 1
    assert fuzz.main(repeat) == 0
    assert "fails: " in capsys.readouterr().out


# --- soak ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_soak():
    broken, line = soak.soak(40 if INTERPRETED else 900, backends=BACKENDS)
    print(line)
    assert not broken, broken


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="many calls; /proc")
def test_soak_finds_what_is_planted(monkeypatch):
    handles = _ops.BACKENDS[KERNELS[0]]
    forward, kept = handles.window_fwd, {}

    def leaking(*args):
        results = forward(*args)
        kept[len(kept)] = torch.ones(2**18)
        return shifted(results, 0, 1e-3 if len(kept) > 20 else 0)

    monkeypatch.setattr(handles, "window_fwd", leaking)
    monkeypatch.setattr(_ops, "planted", kept, raising=False)
    broken, _ = soak.soak(400, backends=KERNELS[:1])
    for sign in ("memory grew", "attnkern._ops.planted grew", "output of window_attention on"):
        assert any(sign in sentence for sentence in broken), (sign, broken)
