"""Train a quantized model in two processes and compare it with one: run by test_processes, once for each rank."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lqlora as lq


def main(folder: Path, rank: int, kind: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/16:u8/16:float32"), rank=4)
    model.register_buffer("calls", torch.zeros(2), persistent=False)
    alone = copy.deepcopy(model)
    sent: list[int] = []
    if "shards" in kind:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        trained = fully_shard(model)
    if "offloaded" in kind:
        lq.nn.offload_model(model, folder / "codes.safetensors")
    if "replicas" in kind:
        plain = distributed._broadcast_coalesced
        distributed._broadcast_coalesced = lambda group, tensors, *rest: (
            sent.append(sum(tensor.nbytes for tensor in tensors)),
            plain(group, tensors, *rest),
        )
        trained = DistributedDataParallel(model)
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
    refused = ""
    try:
        lq.nn.save_model(folder / "none" / "model.safetensors", trained)
    except lq.errors.CheckpointError as error:
        refused = str(error)
    lq.nn.save_model(folder / f"alone{rank}.safetensors", alone)
    size = sum(parameter.nbytes for parameter in alone.parameters())
    (folder / f"{rank}.json").write_text(json.dumps({"losses": losses, "sent": sent, "refused": refused, "parameters": size}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
