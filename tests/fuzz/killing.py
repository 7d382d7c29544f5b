"""A process that forks children, which write something, and which are killed or meet a fault at a chosen point.

``python -m tests.fuzz.killing WORK`` imports what the work needs once. It reads a line of JSON with a folder and jobs, runs
them at the same time, each in a child, and answers with a line. :class:`Children` is the other end. A job is a dict with
these keys:

- ``version``: what to write.
- ``event``: the child kills itself just before the call of this number that touches files: the audit events of Python,
  and the flushes of files.
- ``bytes``: the system kills the child in the middle of a write, when a file would grow above this size.
- ``seconds``: the child is killed after this time.
- ``fault``: the call of this number fails with the error ``errno`` instead.
- ``full``: no file can grow above this size, as on a full disk.
- ``user``: the child runs as this user.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import lqlora as lq
from lqlora.errors import LQLoRAError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parents[2]

#: Audit events that change a file or a folder, or that look for one. Those for paths outside the folder do not count.
EVENTS = {
    "fcntl.flock", "open", "os.chmod", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.scandir", "os.truncate", "shutil.rmtree",
}  # fmt: skip

#: A job that takes longer hangs.
PATIENCE = 60.0

NF4, NF3 = (lq.BlockFormat.parse(text) for text in ("nf4/16:float32", "nf3/16:u8/4:float32"))


class Children:
    """A process that runs one kind of work in children.

    Parameters
    ----------
    work : str
        Name of the work.
    """

    #: Where the children write.
    folder: Path

    def __init__(self, work: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.killing", work],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def run(self, version: int, **fault: object) -> dict[str, Any]:
        """Run one job, and return how it ended: its status, the calls that touched files, its error and the seconds."""
        [ended] = self.together({"version": version, **fault})
        return ended

    def together(self, *jobs: dict[str, object]) -> list[dict[str, Any]]:
        """Run several jobs at the same time."""
        self._process.stdin.write(json.dumps([str(self.folder), jobs]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _matrices(version: int) -> dict[str, lq.Decomposition]:
    chance = np.random.default_rng(version)
    return {
        name: lq.decompose(chance.standard_normal((48, 64)).astype(np.float32), NF4, rank=2, max_iter=1)
        for name in ("a", "b")
    }


def _save(_: Path) -> Callable[[Path, int], None]:
    made = [_matrices(version) for version in range(4)]
    tensors = {"norm": np.ones(700, dtype=np.float32)}
    return lambda folder, version: lq.save(folder / "m.safetensors", made[version], tensors, {"version": version})


def _models() -> list[Any]:
    import torch

    models = []
    for version in range(4):
        torch.manual_seed(version)
        model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16))
        lq.nn.quantize_model(model, NF4, rank=2, max_iter=1)
        models.append(model)
    return models


def _save_model(_: Path) -> Callable[[Path, int], None]:
    models = _models()
    return lambda folder, version: lq.nn.save_model(folder / "m.safetensors", models[version], {"version": version})


def _save_factors(_: Path) -> Callable[[Path, int], None]:
    models = _models()
    return lambda folder, version: lq.nn.save_factors(folder / "m.safetensors", models[version], {"version": version})


def _save_scales(_: Path) -> Callable[[Path, int], None]:
    models = _models()
    for model in models:
        lq.nn.train_scales(model)
    return lambda folder, version: lq.nn.save_scales(folder / "m.safetensors", models[version], {"version": version})


def _merge(beside: Path) -> Callable[[Path, int], None]:
    from lqlora.costs import CostStore, StoredRow

    for version in range(4):
        with CostStore(beside / str(version), {"seed": version}) as store:
            for name in "abcdef":
                store.append(StoredRow(name, (2, 3), "c0ffee", "none", {"nf4/64:float16 rank 8": 0.1 * version}))

    def merge(folder: Path, version: int) -> None:
        with suppress(OSError):
            (folder / "m.jsonl").unlink()  # it replaces no file
        CostStore.merge([beside / str(version)], folder / "m.jsonl")

    return merge


def _costs(beside: Path) -> Callable[[Path, int], None]:
    from safetensors.numpy import save_file

    from lqlora.cli.app import app

    model = beside / "model.safetensors"
    chance = np.random.default_rng(0)
    names = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("q_proj", "up_proj")]
    save_file({name: chance.standard_normal((32, 48)).astype(np.float32) for name in names}, model)
    model.chmod(0o644)

    def costs(folder: Path, version: int) -> None:
        app(
            ["costs", str(model), "--output", str(folder / "m.json"), "--store", str(folder / "m.jsonl"), "--force",
             "--formats", f"{NF4},{NF3}", "--ranks", "1", "--seed", str(version)],
            standalone_mode=False,
        )  # fmt: skip

    return costs


def _checkpoint(beside: Path) -> Callable[[Path, int], None]:
    from safetensors.numpy import save_file

    model = beside / "dense"
    model.mkdir()
    chance = np.random.default_rng(0)
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj")]
    tensors = {f"{name}.weight": chance.standard_normal((32, 48)).astype(np.float32) for name in names}
    tensors |= {f"{name}.bias": np.ones(32, dtype=np.float32) for name in names}
    save_file(tensors, model / "model.safetensors")
    (model / "model.safetensors").chmod(0o644)
    (model / "config.json").write_text('{"model_type": "llama"}')

    def decompose(folder: Path, version: int) -> None:
        options = {"rank": 2, "max_iter": 1, "shard_bytes": 3000, "seed": version, "progress": False}
        lq.decompose_checkpoint(model, folder / "m", NF3, **options)

    return decompose


def _calibration(beside: Path) -> Callable[[Path, int], None]:
    import torch
    import transformers

    from lqlora.integrations.calibration import calibrate_checkpoint

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(beside / "model")
    tokens = list(torch.randint(20, (3, 2, 6)))

    def calibrate(folder: Path, version: int) -> None:
        calibrate_checkpoint(beside / "model", folder / "m", tokens[version:], gradients=True, progress=False)

    return calibrate


def _demo(_: Path) -> Callable[[Path, int], None]:
    from lqlora.recipes.demo import stages

    version = 0
    made = [_matrices(version) for version in range(4)]

    def plans(work: Any, _: object) -> dict[str, Any]:
        (work.folder / "some.plan.json").write_text(f'{{"version": {version}}}' * 500, encoding="utf-8")
        return {}

    stubs = {
        "load_llama": lambda _: (None, None),
        "packaged_text": lambda: "",
        "_split": lambda *_: None,
        "_check_budgets": lambda _: None,
        "_parameter_bytes": lambda _: 0.0,
        "_measure": lambda *_: 1.0,
        "_fisher": lambda _: {},
        "_plans": plans,
        "_compare": lambda work, *_: lq.save(work.folder / "some.safetensors", made[version]),
        "draw": lambda path, *_: path.write_bytes(bytes([version]) * 3000),
    }
    for name, stub in stubs.items():
        setattr(stages, name, stub)

    def demo(folder: Path, own: int) -> None:
        nonlocal version
        version = abs(own)
        stages.run_demo(stages.Settings(), folder / "m", model_file=folder.parent, force=own >= 0)

    return demo


WORKS = {
    "save": _save,
    "save_model": _save_model,
    "save_factors": _save_factors,
    "save_scales": _save_scales,
    "merge": _merge,
    "costs": _costs,
    "checkpoint": _checkpoint,
    "calibration": _calibration,
    "demo": _demo,
}


def _arm(folder: Path, job: Mapping[str, Any], counted: Any) -> None:
    """Prepare this process for the kill or the fault of a job."""
    if (limit := job.get("bytes", job.get("full"))) is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if "bytes" in job else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "user" in job:
        os.setgid(job["user"])
        os.setuid(job["user"])

    def touch() -> None:
        number = next(counted)
        if number == job.get("event"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == job.get("fault"):
            raise OSError(job["errno"], os.strerror(job["errno"]))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS:
            path = str(arguments[0])  # a name in an open folder, or the number of an open file, is not absolute
            if not path.startswith("/") or path.startswith(str(folder)):
                touch()

    flush = os.fsync
    os.fsync = lambda file: (touch(), flush(file))[1]
    sys.addaudithook(hook)


def _child(work: Callable[[Path, int], None], folder: Path, job: Mapping[str, Any], answer: int, gate: int) -> None:
    """Run a job when the gate opens, and write how it ended."""
    counted, said = itertools.count(), {}
    try:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.read(gate, 1)
        _arm(folder, job, counted)
        work(folder, job["version"])
    except LQLoRAError as error:
        said = {"error": str(error)}
    except BaseException:  # noqa: BLE001 - the other end says it
        said = {"raw": traceback.format_exc()}
    os.write(answer, json.dumps(said | {"events": next(counted)}).encode())
    os._exit(0)


def _run(work: Callable[[Path, int], None], folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run jobs in children that begin at the same time."""
    gate, opener = os.pipe()
    children, ended = [], []
    for job in jobs:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(opener)
            _child(work, folder, job, writing, gate)
        os.close(writing)
        children.append((pid, reading))
    os.close(gate)
    begun = time.monotonic()
    os.close(opener)
    for job, (pid, reading) in zip(jobs, children, strict=True):
        left = begun + job.get("seconds", PATIENCE) - time.monotonic()
        is_heard = bool(select.select([reading], [], [], max(0.0, left))[0])
        if not is_heard:
            os.kill(pid, signal.SIGKILL)
        said = os.read(reading, 1 << 16)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reading)
        took = time.monotonic() - begun
        hung = not is_heard and "seconds" not in job
        ended.append({"status": status, "seconds": took, "hung": hung, **json.loads(said or "{}")})
    return ended


def main(name: str) -> None:
    """Answer lines with jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a work may print
    with tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory() as other:
        Path(beside).chmod(0o755)
        work = WORKS[name](Path(beside))
        work(Path(other), 0)  # imports what is imported when it is needed
        for line in sys.stdin:
            folder, jobs = json.loads(line)
            answers.write(json.dumps(_run(work, Path(folder), jobs)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
