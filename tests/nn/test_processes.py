"""Training in two processes, by replicas and by shards, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lqlora as lq
from tests.requirements import require_module

torch = require_module("torch")
if not torch.distributed.is_available():  # as in torch for some systems
    pytest.skip("torch has no distributed package", allow_module_level=True)

from lqlora.nn import LQLinear, load_factors, load_model  # noqa: E402 - needs torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

KINDS = ("replicas", "shards", "sharded codes", "sharded scales", "offloaded replicas", "offloaded shards")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder with the results of two processes, which train each kind in turn: to start them takes the most time."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.nn.two_processes", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = [subprocess.Popen([*command, str(rank), *KINDS], cwd=ROOT, env=environment) for rank in range(2)]
    assert [own.wait(timeout=300) for own in both] == [0, 0]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_and_save_as_one_does(kind, folders):
    folder = folders / kind
    for rank in range(2):
        found = json.loads((folder / f"{rank}.json").read_text())
        for total, expected in found["losses"]:
            assert total == pytest.approx(expected, rel=1e-5)
        assert found["losses"][-1][1] < found["losses"][0][1]
        assert "none" in found["refused"][0]
        # The start sends the parameters and the buffer of two numbers, a forward pass that buffer: no codes and scales.
        assert found["sent"] == ([found["parameters"] + 8, 8, 8, 8] if "replicas" in kind else [])
        assert found["here"] == (found["stored"] / 2 if "sharded" in kind else 0)
        assert len(found["refused"]) == (2 if "shard" in kind else 1)
    models = [torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)) for _ in range(2)]
    for name, model in zip(("model", "alone0"), models, strict=True):
        load_model(folder / f"{name}.safetensors", model)
    for own, alone in zip(*(model.modules() for model in models), strict=True):
        if isinstance(own, LQLinear):
            assert torch.equal(own.quantized.codes, alone.quantized.codes)
            for one, other in zip(
                own.quantized.array.to_arrays().values(), alone.quantized.array.to_arrays().values(), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
            torch.testing.assert_close(own.lora_B, alone.lora_B, rtol=1e-4, atol=1e-5)
    before = lq.nn.factors(models[0])
    # A file of factors belongs to its codes and scales, and scales that trained differ in the order of sums.
    target = models[0 if "scales" in kind else 1]
    load_factors(folder / "factors.safetensors", target)
    after = lq.nn.factors(target)
    assert all(torch.equal(before[name].lora_A, after[name].lora_A) for name in before)


def test_tensor_parallelism_is_refused(folders):
    for rank in range(2):
        found = json.loads((folders / f"refused{rank}.json").read_text())
        # The sentence of torch, before anything is changed.
        assert found.pop("parallelize").startswith("NotImplementedError: ColwiseParallel")
        kinds = {name: message.partition(":")[0] for name, message in found.items()}
        argument, file = "InvalidArgumentError", "CheckpointError"
        assert kinds == {"quantize": argument, "load": file, "load others": file, "x": argument, "ids": argument}
        for name in ("quantize", "load", "load others"):
            assert "spread over processes" in found[name]
        assert "'norm.weight'" in found["load others"]
        for name in ("x", "ids"):
            assert found[name].startswith(f"{argument}: {name} of a quantized layer")
            assert "DTensor" in found[name]
