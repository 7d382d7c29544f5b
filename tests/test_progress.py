"""Progress of every public function that takes long: a bar on a terminal, a function of the caller, or silence."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import itertools
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

import lqlora as lq
from lqlora import _progress
from lqlora._progress import Bar, bars_hidden
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
require_module("tqdm")
from tests.nn.structures import InBlocks  # noqa: E402 - needs torch

nn = importlib.import_module("lqlora.nn")
recipes = importlib.import_module("lqlora.recipes")
calibrate_checkpoint = importlib.import_module("lqlora.integrations.calibration").calibrate_checkpoint

FORMAT = lq.BlockFormat.parse("nf4/16:float32")
W = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


def dense():
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))


def language_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9))


def collecting():
    return {"model": dense(), "batches": [torch.ones(2, 16)] * 3, "loss": lambda model, batch: model(batch).sum(-1)}


def distilling():
    model, batches = dense(), list(torch.eye(16).view(4, 4, 16))[:3]
    nn.quantize_model(model, FORMAT, rank=1, progress=False)
    return {"model": model, "teacher": nn.collect_outputs(dense(), batches, progress=False), "batches": batches}


def compressing():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 16), InBlocks(), torch.nn.Linear(16, 9))
    return {"model": model, "split": recipes.Split(TOKENS, TOKENS[:2], TOKENS[:1]), "bits": 16.0, "rank": 1}


def language_files(**options):
    transformers = require_module("transformers")
    require_module("accelerate")
    transformers.utils.logging.disable_progress_bar()
    folder, sizes = Path(tempfile.mkdtemp()), {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=12, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return {"source": folder / "model", "folder": folder / "out", **options}


def compressing_files():
    return language_files(
        bits=16.0, split=recipes.Split(TOKENS, TOKENS[:0], TOKENS[:0]), rank=1, iterations=1, include="*.0.mlp.up_proj"
    )


def decomposing():
    folder = Path(tempfile.mkdtemp())
    safetensors.numpy.save_file({"a.weight": W, "b.weight": W}, folder / "model.safetensors")
    return {"source": folder / "model.safetensors", "folder": folder / "small", "formats": FORMAT, "rank": 1}


TOKENS = torch.arange(12).remainder(9).view(3, 4)

#: Functions with arguments, the title and unit of the bar, and what a function of the caller sees.
CALLS = {
    "calibrate_checkpoint": (
        calibrate_checkpoint, lambda: language_files(batches=[TOKENS], gradients=True), "Calibrating", "block", [1, 2, 3, 4]
    ),
    "collect_fisher": (nn.collect_fisher, collecting, "Fisher information", "batch", [1, 2, 3]),
    "collect_gram": (nn.collect_gram, collecting, "Gram matrices", "batch", [1, 2, 3]),
    "collect_kronecker": (nn.collect_kronecker, collecting, "Kronecker factors", "batch", [1, 2, 3]),
    "collect_outputs": (nn.collect_outputs, lambda: {"teacher": dense(), "batches": [torch.ones(2, 16)] * 3}, "Teacher", "batch", [1, 2, 3]),
    "compress": (recipes.compress, compressing, "Compressing", "step", list(range(1, 11))),
    "compress_checkpoint": (recipes.compress_checkpoint, compressing_files, "Compressing", "step", [1, 2, 3]),
    "cost_table": (lq.cost_table, lambda: {"weights": {"a": W, "b": W}, "formats": [FORMAT], "rank": 1}, "Cost table", "matrix", [1, 2]),
    "decompose_checkpoint": (lq.decompose_checkpoint, decomposing, "Decomposing", "matrix", [1, 2]),
    "decompose_stack": (lq.decompose_stack, lambda: {"w": np.stack([W, W]), "fmt": FORMAT, "rank": 1}, "Decomposing", "matrix", [1, 2]),
    "distill": (nn.distill, distilling, "Distilling", "step", [1, 2, 3]),
    "divergence": (
        recipes.divergence, lambda: {"model": language_model(), "teacher": language_model(), "sequences": TOKENS}, "Divergence", "sequence",
        [2, 3],
    ),
    "fine_tune": (recipes.fine_tune, lambda: {"model": language_model(), "sequences": TOKENS, "batch_size": 2}, "Fine-tuning", "step", [1, 2]),
    "peqa_model": (nn.peqa_model, lambda: {"model": dense(), "formats": FORMAT}, "Quantizing", "layer", [1, 2]),
    "perplexity": (recipes.perplexity, lambda: {"model": language_model(), "sequences": TOKENS}, "Perplexity", "sequence", [2, 3]),
    "quantize_blocks": (
        nn.quantize_blocks, lambda: {"model": InBlocks(), "formats": FORMAT, "batches": [torch.ones(2, 16)], "rank": 1},
        "Quantizing", "block", [1, 2],
    ),
    "quantize_model": (
        nn.quantize_model,
        lambda: {"model": torch.nn.Sequential(torch.nn.Embedding(4, 16), *dense()), "formats": FORMAT, "rank": 1, "embeddings": FORMAT},
        "Quantizing", "layer", [1, 2, 3],
    ),
}  # fmt: skip


class Terminal:
    """Standard error that claims to be a terminal, and may fail."""

    encoding = "utf-8"

    def __init__(self, *, is_terminal=True, fails=None):
        self.written, self._is_terminal, self._fails = "", is_terminal, fails

    def isatty(self):
        if self._fails == "closed":
            raise ValueError("I/O operation on closed file")
        return self._is_terminal

    def write(self, text):
        if self._fails == "full":
            raise OSError(errno.ENOSPC, "full")
        self.written += text
        return len(text)

    def flush(self):
        pass

    def screen(self):
        """Return the lines of text that stay: a carriage return makes what follows overwrite the line."""
        lines = []
        for line in self.written.split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return [line for line in lines if line]


@pytest.fixture
def terminal(monkeypatch):
    return use(monkeypatch, Terminal())


def use(monkeypatch, stream):
    """Make a stream the standard error of the bars; for them each look at the clock is a second later."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("tqdm.std.time", functools.partial(next, itertools.count(1)))
    # Not sys.stderr itself, which pytest sets again between a fixture and its test.
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))
    return stream


def test_every_public_function_with_progress_is_in_the_table():
    modules = (
        "lqlora",
        "lqlora.nn",
        "lqlora.recipes",
        "lqlora.costs",
        "lqlora.decomposition",
        "lqlora.integrations.calibration",
    )
    found = {
        name: inspect.signature(own).parameters["progress"]
        for module in map(importlib.import_module, modules)
        for name in module.__all__
        if inspect.isfunction(own := getattr(module, name)) and "progress" in inspect.signature(own).parameters
    }
    assert found.keys() == CALLS.keys()
    assert {own.default for own in found.values()} == {True}
    kinds = {"bool | Callable[[int, int], None]", "bool | Callable[[int, int | None], None]"}
    assert {own.annotation for own in found.values()} == kinds


@pytest.mark.parametrize("name", CALLS)
class TestEveryFunction:
    def test_a_bar_on_a_terminal_is_erased_at_the_end(self, name, terminal):
        function, arguments, title, unit, counts = CALLS[name]
        function(**arguments())
        assert f"{title}:   0%|" in terminal.written
        for done in counts:
            assert re.search(rf"\| {done}/{counts[-1]} \[00:\d\d<00:\d\d, .*{unit}.*\]", terminal.written), done
        assert terminal.screen() == []

    def test_nothing_where_there_is_no_terminal(self, name, monkeypatch):
        function, arguments, *_ = CALLS[name]
        stream = use(monkeypatch, Terminal(is_terminal=False))
        function(**arguments())
        assert stream.written == ""

    def test_false_is_silence(self, name, terminal):
        function, arguments, *_ = CALLS[name]
        function(**arguments(), progress=False)
        assert terminal.written == ""

    def test_a_function_gets_the_counts_instead(self, name, terminal):
        function, arguments, _, _, counts = CALLS[name]
        seen = []
        function(**arguments(), progress=lambda done, total: seen.append((done, total)))
        assert seen == [(done, counts[-1]) for done in counts]
        assert terminal.written == ""

    @pytest.mark.parametrize("value", [None, 1, "yes"])
    def test_anything_else_is_refused_before_the_work(self, name, value):
        function, arguments, *_ = CALLS[name]
        with pytest.raises(InvalidArgumentError, match=r"^progress must be True, False"):
            function(**arguments(), progress=value)


def other_threads_can_write():
    """Return whether a second thread can take the lock that all progress bars share."""
    lock, found = sys.modules["tqdm.std"].tqdm.get_lock(), []

    def take():
        found.append(all(own.acquire(True, 1) for own in lock.locks))
        lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("fails", ["full", "closed"])
def test_a_terminal_that_fails_costs_no_result(monkeypatch, fails):
    stream = use(monkeypatch, Terminal(fails=fails))
    assert lq.cost_table({"a": W, "b": W}, [FORMAT], rank=1).names == ("a", "b")
    assert stream.written == ""
    assert other_threads_can_write()


def test_a_terminal_that_fails_later_costs_no_result(monkeypatch):
    stream = use(monkeypatch, Terminal())

    def load():
        stream._fails = "full"
        return W

    assert lq.cost_table({"a": load, "b": W}, [FORMAT], rank=1).names == ("a", "b")
    assert stream.written != ""
    assert other_threads_can_write()
    assert use(monkeypatch, Terminal()).written == ""
    lq.cost_table({"a": W}, [FORMAT], rank=1)
    assert "\n" not in _progress.sys.stderr.written  # of a second line below another bar


def test_no_standard_error(monkeypatch):
    use(monkeypatch, None)
    assert lq.cost_table({"a": W}, [FORMAT], rank=1).names == ("a",)


def test_no_bar_without_tqdm(monkeypatch, terminal):
    monkeypatch.setattr(_progress, "is_installed", lambda _: False)
    lq.cost_table({"a": W}, [FORMAT], rank=1)
    assert terminal.written == ""


@pytest.mark.parametrize(("rank", "shows"), [("0", True), ("1", False)])
def test_one_bar_of_several_processes_on_a_machine(monkeypatch, terminal, rank, shows):
    monkeypatch.setenv("LOCAL_RANK", rank)
    lq.cost_table({"a": W}, [FORMAT], rank=1)
    assert bool(terminal.written) == shows


def test_the_number_of_batches_may_be_unknown(terminal):
    class Stream:
        def __iter__(self):
            return iter([torch.ones(2, 16)] * 2)

        def __len__(self):
            raise TypeError("a stream has no length")

    seen = []
    nn.collect_gram(dense(), Stream(), progress=lambda *own: seen.append(own))
    assert seen == [(1, None), (2, None)]
    nn.collect_gram(dense(), Stream())
    assert "Gram matrices: 2 batch [00:" in terminal.written
    assert terminal.screen() == []


def test_what_the_store_holds_is_no_work_in_the_time_left(terminal, tmp_path):
    few, more = {f"{i}": W for i in range(3)}, {f"{i}": W for i in range(4)}
    lq.cost_table(few, [FORMAT], rank=1, store=tmp_path / "store", progress=False)
    lq.cost_table(more, [FORMAT], rank=1, store=tmp_path / "store")
    assert re.search(r"\| 3/4 \[00:\d\d<\?, ", terminal.written)


def test_lines_of_the_log_and_of_the_commands_stay_whole(terminal, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lqlora"), "handlers", [logging.StreamHandler(terminal)])
    with caplog.at_level(logging.INFO, "lqlora"):
        nn.quantize_model(dense(), FORMAT, rank=1)
    assert sorted(line.split(":")[0] for line in terminal.screen()) == ["0", "1"]
    terminal.written = ""
    with caplog.at_level(logging.INFO, "lqlora"):
        lq.cost_table({"a\x1b": W}, [FORMAT, lq.BlockFormat.parse("nf2/16:float32")], rank=1)
    assert terminal.screen() == [r"a\x1b: 2 costs, 1 of 1 matrices"]
    terminal.written = ""
    with Bar("Reading"):
        with bars_hidden():
            terminal.write("a line\n")
        assert terminal.screen() == ["a line", "Reading"]
    assert terminal.screen() == ["a line"]


def test_an_interrupt_erases_the_bar(terminal):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lq.cost_table({"a": interrupt, "b": W}, [FORMAT], rank=1)
    assert "Cost table" in terminal.written
    assert terminal.screen() == []


@pytest.mark.slow
def test_a_signal_leaves_a_real_terminal_whole():
    code = """
import signal, time, numpy as np, lqlora as lq
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
def load():
    time.sleep(0.3)
    return np.ones((8, 16), np.float32)
lq.cost_table({str(i): load for i in range(1000)}, [lq.BlockFormat.parse("nf4/16:float32")], rank=1)
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    environment = {name: own for name, own in os.environ.items() if name != "LOCAL_RANK"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    written = ""
    while "| 1/1000 [00:0" not in written:
        written += os.read(ours, 4096).decode()
    child.send_signal(signal.SIGINT)
    with suppress(OSError):  # its end
        while True:
            written += os.read(ours, 4096).decode()
    assert child.wait(timeout=30) == -signal.SIGINT
    os.close(ours)
    terminal = Terminal()
    terminal.written = written
    assert "\x1b" not in written
    assert terminal.screen()[0].startswith("Traceback")
    assert terminal.screen()[-1] == "KeyboardInterrupt"
