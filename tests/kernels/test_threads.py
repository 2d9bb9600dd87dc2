"""Devices, threads and forked processes: docs/reliability.md."""

import concurrent.futures
import itertools
import sys
import threading

import pytest
import torch
from cases import CASES, FUNCTIONS, call, check, doubles, make, run, same
from conftest import EMULATED, PATIENCE, every_function, large

SIZE = (3, 4)


# --- devices ---------------------------------------------------------------------------------------------------------


@every_function
def test_features_elsewhere_than_their_companions(function, backend, device):
    """With the features on meta, the error names the first other argument (the reverse case: test_errors)."""
    tensors = make(function, dtype=torch.float32, device=device)
    first, *rest = tensors
    moved = tensors | {first: tensors[first].to("meta")}
    if rest:
        public = function.removesuffix("_many").removesuffix("_masked")
        with pytest.raises(ValueError, match=rf"{public}: {rest[0]} must be on meta \(as {first}\), got {device}"):
            call(function, moved, backend=backend)
    elif backend != "reference":
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run torch.float32 on meta"):
            call(function, moved, size=SIZE, backend=backend)


# --- threads and processes -------------------------------------------------------------------------------------------


@large
def test_eight_threads_at_once(backend, device):
    """Forward and backward of every function, many times in 8 Python threads, give the bits of one thread."""
    # Large enough that a call uses several threads and that calls overlap.
    work = [
        (case, make(case[0], 2, 24, (17, 19), dtype=torch.float32, device=device, seed=seed), {"size": (17, 19)})
        for seed, case in enumerate(CASES)
    ]

    def everything():
        return [run(case[0], tensors, backend=backend, **case[1], **size) for case, tensors, size in work]

    alone = everything()
    barrier = threading.Barrier(8)

    def loop(_):
        barrier.wait(PATIENCE)
        return [everything() for _ in range(2 if EMULATED else 5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in itertools.chain(*pool.map(loop, range(8))):
            for results, expected in zip(found, alone, strict=True):
                same(results, expected, "in a thread")


class Attended(torch.utils.data.Dataset):
    """Calls every function, with a gradient, in the workers of a DataLoader."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        found = {}
        for function in FUNCTIONS:
            tensors = make(function, 1, 16, (9, 10), dtype=torch.float32, seed=seed)
            results = run(function, tensors, size=(9, 10), backend=self.backend)
            found |= {f"{function}.{name}": result for name, result in results.items()}
        return found


@large
@pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_initialized(), reason="CUDA does not survive a fork")
def test_forked_workers_of_a_data_loader(backend):
    """Workers are forked after the parent has used the functions with several threads."""
    data, threads = Attended(backend), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = make("compatibility_pool", 4, 64, (32, 32), dtype=torch.float32)
        run("compatibility_pool", big, backend=backend)  # its threads run now
        here = [data[i] for i in range(len(data))]
        loader = torch.utils.data.DataLoader(
            data, None, num_workers=2, timeout=PATIENCE, multiprocessing_context="fork", persistent_workers=False
        )
        count = 0
        for there, expected in zip(loader, here, strict=True):
            # A worker has one thread, on which PyTorch's own sums may have another order.
            check(there, doubles(expected)) if backend == "reference" else same(there, expected, "in a worker")
            count += 1
        assert count == len(data)
        run("compatibility_pool", big, backend=backend)  # and the parent still works
    finally:
        torch.set_num_threads(threads)
