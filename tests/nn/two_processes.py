"""Train quantized models in two processes and compare them with one: run by test_processes, once for each rank."""

from __future__ import annotations

import copy
import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lqlora as lq


def wrapped(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    """Return a model that is spread over both processes."""
    found = model
    if "sharded" in kind:
        lq.nn.make_shardable(model)
    if "shard" in kind:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        found = fully_shard(model)
    if "offloaded" in kind:
        lq.nn.offload_model(model, folder / "codes.safetensors")
    return DistributedDataParallel(model) if "replicas" in kind else found


def train(folder: Path, rank: int, kind: str) -> None:
    """Train in both processes and alone, and record what was seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/16:u8/16:float32"), rank=4)
    if "scales" in kind:
        lq.nn.train_scales(model, train_factors=True)
    model.register_buffer("calls", torch.zeros(2), persistent=False)
    alone = copy.deepcopy(model)
    sent: list[int] = []
    distributed._broadcast_coalesced = lambda group, tensors, *rest: (
        sent.append(sum(tensor.nbytes for tensor in tensors)),
        _broadcast(group, tensors, *rest),
    )
    trained = wrapped(model, kind, folder)
    losses = []
    optimizers = [
        torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=0.01) for own in (trained, alone)
    ]
    for x in torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1)):
        total = trained(x[4 * rank : 4 * rank + 4]).square().mean()
        expected = alone(x).square().mean()
        for loss, optimizer in zip((total, expected), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        distributed.all_reduce(total := total.detach() / 2)
        losses.append((total.item(), expected.item()))
    lq.nn.save_model(folder / "model.safetensors", trained)
    lq.nn.save_factors(folder / "factors.safetensors", trained)
    refused = []
    for call in (
        lambda: lq.nn.save_model(folder / "none" / "model.safetensors", trained),
        lambda: lq.nn.merged_weight(model[0]),
    ):
        try:
            call()
        except lq.errors.LQLoRAError as error:
            refused.append(str(error))
    lq.nn.save_model(folder / f"alone{rank}.safetensors", alone)
    of_codes = [p for name, p in model.named_parameters() if ".quantized." in name and not p.requires_grad]
    numbers = {
        "losses": losses,
        "sent": sent,
        "refused": refused,
        "parameters": sum(parameter.nbytes for parameter in alone.parameters()),
        "stored": sum(own.nbytes for own in alone.buffers()) - 8,
        "here": sum(own.to_local().nbytes for own in of_codes),
    }
    (folder / f"{rank}.json").write_text(json.dumps(numbers))


def refused(folder: Path) -> dict[str, str]:
    """Return what is said about tensor parallelism."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    fmt = lq.BlockFormat.parse("nf4/16:u8/16:float32")

    def model() -> nn.Module:
        parts = {
            "embed": nn.Embedding(16, 32),
            "up": nn.Linear(32, 48),
            "down": nn.Linear(48, 32),
            "norm": nn.LayerNorm(32),
        }
        return nn.Sequential(OrderedDict(parts))

    dense, quantized = parallelize_module(model(), mesh, plan), model()
    lq.nn.quantize_model(quantized, fmt, rank=2, embeddings=fmt)
    ids = torch.arange(4)
    expected = quantized(ids)
    lq.nn.save_model(folder / "quantized", quantized)
    x = distribute_tensor(torch.ones(2, 32), mesh, [Replicate()])
    calls = {
        "parallelize": lambda: parallelize_module(quantized, mesh, plan),
        "quantize": lambda: lq.nn.quantize_model(dense, fmt, rank=2),
        "load": lambda: lq.nn.load_model(folder / "quantized", dense),
        "load others": lambda: lq.nn.load_model(
            folder / "quantized", parallelize_module(model(), mesh, {"norm": SequenceParallel()})
        ),
        "x": lambda: quantized.up(x),
        "ids": lambda: quantized.embed(distribute_tensor(ids, mesh, [Replicate()])),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (lq.errors.LQLoRAError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    assert torch.equal(quantized(ids), expected)
    return found


def main(folder: Path, rank: int, kinds: list[str]) -> None:
    """Train each kind in a folder of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for kind in kinds:
        (folder / kind).mkdir(exist_ok=True)
        train(folder / kind, rank, kind)
    (folder / f"refused{rank}").mkdir(exist_ok=True)
    (folder / f"refused{rank}.json").write_text(json.dumps(refused(folder / f"refused{rank}")))
    distributed.destroy_process_group()


_broadcast = distributed._broadcast_coalesced

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
