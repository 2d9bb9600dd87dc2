"""Run by torchrun in two processes (integration/test_distributed.py): each check compares two halves with the whole."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import attnkern.nn as ann


class Network(nn.Module):
    """A network with every operator, and its losses."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.window = ann.WindowAttention(6, (4,))
        self.bottleneck = ann.BottleneckAttention(6, 5)
        self.bottleneck.std.requires_grad_(False)  # has no gradient without noise
        self.pool = ann.CompatibilityPool(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.window(self.body(x))
        attended = self.bottleneck(x, sample=False)
        return self.head(self.pool(attended.output)), attended.anchor_loss, attended.commitment_loss


def network():
    torch.manual_seed(0)
    return Network().double()


def loss(outputs):
    logits, anchor_loss, commitment_loss = outputs
    return logits.sin().square().mean() + 0.4 * anchor_loss + 0.1 * commitment_loss


def same(found, expected, what):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def step(model, x):
    loss(model(x)).backward()
    return model


def images():
    return torch.randn(8, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check_wrapped(wrap, whole_gradient):
    """The gradients of two halves are those of the whole batch."""
    rank = dist.get_rank()
    plain = step(network(), images())
    model = network()
    wrapped = wrap(model)
    step(wrapped, images()[4 * rank : 4 * rank + 4])
    trained = [p for p in plain.parameters() if p.requires_grad], [p for p in model.parameters() if p.requires_grad]
    same([whole_gradient(p.grad) for p in trained[1]], [p.grad for p in trained[0]], wrap.__name__)


def check_ddp():
    check_wrapped(DistributedDataParallel, lambda gradient: gradient)


def check_fsdp():
    mesh = init_device_mesh("cpu", (2,))

    def wrap(model):
        for part in (model.window, model.bottleneck, model.pool):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    check_wrapped(wrap, lambda gradient: gradient.full_tensor())


def check_counts():
    """With sync_counts every process has the counts of all processes, otherwise its own."""
    rank = dist.get_rank()
    a = torch.rand(4, 10, generator=torch.Generator().manual_seed(2))
    whole = ann.AnchorQuantizer(5)
    whole(a)
    synced, own = ann.AnchorQuantizer(5, sync_counts=True), ann.AnchorQuantizer(5)
    half = a[: 1 + rank] if rank == 0 else a[1:]  # uneven
    for quantizer in (synced, own):
        quantizer(half)
    assert torch.equal(synced.counts, whole.counts)
    assert torch.equal(synced.perplexity(), whole.perplexity())
    assert own.counts.sum() == half.numel()


def check_uneven_losses():
    """Losses of uneven shards: sums are added over the processes before they are divided."""
    rank = dist.get_rank()
    a = torch.rand(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = ann.AnchorQuantizer(5).double()
    expected = whole(a).anchor_loss
    expected.backward()
    half = a[:1] if rank == 0 else a[1:]
    shard = ann.AnchorQuantizer(5, reduction="sum").double()
    total = shard(half).anchor_loss
    total.backward()
    count = torch.tensor(float(half.numel()), dtype=torch.float64)
    total = total.detach()
    for tensor in (total, count, shard.anchors.grad):
        dist.all_reduce(tensor)
    torch.testing.assert_close(total / count, expected.detach())
    torch.testing.assert_close(shard.anchors.grad / count, whole.anchors.grad)


def sharded_run(function, tensors, places):
    """Results and gradients of a function of DTensors, gathered."""
    from cases import FUNCTIONS, call
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    names, ends = FUNCTIONS[function]
    leaves = {}
    for name, tensor in tensors.items():
        leaf = distribute_tensor(tensor, mesh, [places[name]]) if places else tensor
        leaves[name] = leaf.requires_grad_(name in names)
    results = call(function, leaves, size=(4, 6))
    total = sum((results[name] * results[name]).sum() for name in ends)
    gradients = torch.autograd.grad(total, [leaves[name] for name in names])
    found = [*results.values(), *gradients]
    return [tensor.full_tensor() if places else tensor for tensor in found]


def check_dtensor():
    """Images and channels sharded unevenly over two processes give the numbers of one process."""
    from cases import FUNCTIONS, make
    from torch.distributed.tensor import Replicate, Shard

    import attnkern

    attnkern.register_sharding()
    companions = {"anchors": Replicate()}
    for function in FUNCTIONS:
        tensors = make(function, 3, 5)
        names = list(tensors)
        expected = sharded_run(function, tensors, None)
        layouts = [{name: companions.get(name, Shard(0)) for name in names}, dict.fromkeys(names, Replicate())]
        if names[0] in ("x", "local"):
            layouts.append({name: Shard(1) if name == names[0] else Replicate() for name in names})
        for places in layouts:
            same(sharded_run(function, tensors, places), expected, f"{function} {places}")
    shared = make("compatibility_pool", 3, 5, shared=True)
    found = sharded_run("compatibility_pool", shared, {"local": Shard(0), "query": Replicate()})
    same(found, sharded_run("compatibility_pool", shared, None), "a shared query")
    tensors = make("compatibility_pool_masked", 3, 5)
    for name, wanted in (("query", Replicate()), ("mask", Replicate()), ("query", Shard(1)), ("mask", Shard(1))):
        shared = tensors | {name: tensors[name][:1].detach().clone()}
        places = dict.fromkeys(tensors, Shard(0)) | {name: wanted}
        found = sharded_run("compatibility_pool_masked", shared, places)
        same(found, sharded_run("compatibility_pool_masked", shared, None), f"a shared {name}, {wanted}")


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items()
          if name.startswith("check_") and name != "check_wrapped"}  # fmt: skip

if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        if dist.get_rank() == 0:
            print(f"{name}: ok", flush=True)
    dist.destroy_process_group()
    # PyTorch's threads sometimes abort a process that ends normally.
    sys.stdout.flush()
    os._exit(0)
