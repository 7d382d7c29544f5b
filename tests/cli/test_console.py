"""Names from files and options reach a terminal as data, whatever they hold, and files survive an output that fails."""

from __future__ import annotations

import ast
import dataclasses
import errno
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lqlora as lq
from lqlora import _progress
from lqlora._printable import printable
from lqlora.reports.grouping import kind_and_layer
from lqlora.reports.tables import Table
from tests.requirements import require_module

for package in ("typer", "rich"):
    require_module(package)
import typer.main  # noqa: E402

from lqlora.cli import console  # noqa: E402
from lqlora.cli.app import app  # noqa: E402
from tests.cli.running import run  # noqa: E402
from tests.cli.streams import DRAWN, Stream, run_in  # noqa: E402

#: Names of matrices that a terminal, rich or Markdown would obey.
NAMES = [
    "title.\x1b]0;OWNED\x07",
    "style.\x1b[31;7mred\x1b[m",
    "link.\x1b]8;;http://x.y\x1b\\here\x1b]8;;\x1b\\",
    "c1.\x9b2J",
    "[red]markup[/red]",
    "[link=http://x.y]link[/link]",
    "[here](http://x.y)",
    "<b>bold</b>",
    ":smile:",
    "__init__",
    "model.layers.3.experts.7.*up*",
    "line\nbreak",
    "tab\tand\rreturn",
    "paragraph\u2029",
    "\u202egnp.q",
    "\U0001f600.emoji",
    "Größe.q",
    "`code`",
    "pipe|pipe",
    "back\\slash\\|q",
    "$x_1$",
    "300." + "abcdefghi." * 30,
    "",
]

#: A value of an option. It may name a file, and what cannot be decoded in it is a lone surrogate.
VALUE = "a.\x1b]0;OWNED\x07\u202e[red]x\n\tü\x9b2J\udcff"

#: Encoding, whether it is a terminal, and its width.
STREAMS = {
    "wide terminal": ("utf-8", True, 2000),
    "terminal": ("utf-8", True, 80),
    "narrow terminal": ("utf-8", True, 20),
    "ASCII terminal": ("ascii", True, 100),
    "pipe": ("utf-8", False, 80),
    "ASCII pipe": ("ascii", False, 80),
    "Latin-1 pipe": ("latin-1", False, 80),
    "cp1252 pipe": ("cp1252", False, 80),
}
FORMATS = [lq.BlockFormat.parse(f"nf{bits}/16:float16") for bits in (2, 3, 4)]


@pytest.fixture(params=STREAMS)
def stream(request):
    return STREAMS[request.param]


@pytest.fixture(params=["terminal", "ASCII pipe"])
def extreme(request):
    return STREAMS[request.param]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a table, models and a checkpoint, in which the names of matrices are hostile."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    weights = {str(i): (1 + i) * rng.standard_normal((32, 32), dtype=np.float32) for i in range(len(NAMES))}
    table = dataclasses.replace(lq.cost_table(weights, FORMATS, rank=0), names=tuple(NAMES))
    (folder / "table.json").write_text(table.to_json())
    name = NAMES[0] + "\u202e\n"
    save_file({name: weights["0"]}, folder / "model.safetensors")
    save_file({name: weights["0"] * np.nan}, folder / "nan.safetensors")
    save_file({name: weights["0"] * np.float32(1e-30)}, folder / "small.safetensors")
    lq.save(folder / "checkpoint.safetensors", {name: lq.decompose(weights["0"], FORMATS[0], rank=1)})
    return folder


def clean(stream, text: str) -> str:
    """Return a text without what was drawn for a terminal; what is left must be printable, or a line break."""
    text = DRAWN.sub("", text) if stream[1] else text
    assert {c for c in text if not c.isprintable()} <= {"\n"}
    return text


def shown(stream, name: str) -> str:
    """Return a name as a stream shows it."""
    return printable(name).encode(stream[0], "backslashreplace").decode(stream[0])


class TestNames:
    def test_a_plan_shows_every_name(self, files, stream, tmp_path):
        code, out, err = run_in(stream, "plan", files / "table.json", "--bits", "3.5", "--output", tmp_path / "p.json")
        assert (code, err) == (0, "")
        assert lq.Plan.from_json((tmp_path / "p.json").read_text()).matrices.keys() == set(NAMES)
        lines = clean(stream, out).split("\n")
        if lines[0].startswith("| kind |"):
            found = "\n".join(lines).replace(r"\|", "|")
        else:  # a name may take several lines of the first column
            width = next(line.index("matrices") for line in lines if "matrices" in line)
            found = "".join(line[:width].strip("| ") for line in lines)
        for name in NAMES:
            assert shown(stream, kind_and_layer(name)[0]) in found

    @pytest.mark.parametrize("name", ["nan", "small", "model"])
    def test_costs_of_a_model(self, files, extreme, tmp_path, name):
        options = ("--formats", "nf2/16:float16", "--ranks", "0", "--output", tmp_path / "t.json")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            code, out, err = run_in(extreme, "costs", files / f"{name}.safetensors", *options)
        text = clean(extreme, out + err)
        assert code == (2 if name == "nan" else 0)
        assert (shown(extreme, NAMES[0]) in text) == (name != "model")
        assert text.count("warning: ") == (name == "small")

    @pytest.mark.parametrize(
        "words",
        [
            ["--bits", "3.5", "--minimum-bits", "title*=99"],
            ["--bits", "3.5", "--tie", "title*"],
            ["--bits", "3.5", "--fix", "title*=nf1/16:float16"],
            ["--max-error", "1e-9"],
        ],
    )
    def test_errors_of_a_plan(self, files, extreme, words):
        code, out, err = run_in(extreme, "plan", files / "table.json", *words)
        assert (code, out) == (2, "")
        assert clean(extreme, err).startswith("lqlora: ")
        assert err.count("\n") == 1

    def test_the_table_and_stages_of_the_demo(self, monkeypatch, stream, tmp_path):
        require_module("torch")
        stages = pytest.importorskip("lqlora.recipes.demo.stages")

        def run_demo(settings, output, *, stage, **options):
            with stage(VALUE) as progress:
                progress(1, 2)
            return Table(("model", "bits per weight"), [(name, "3.127") for name in NAMES])

        monkeypatch.setattr(stages, "run_demo", run_demo)
        code, out, err = run_in(stream, "demo", "--output", tmp_path / VALUE)
        assert code == 0
        assert shown(stream, VALUE) in clean(stream, out).splitlines()[-1]
        assert shown(stream, VALUE) + ": 0 s" in clean(stream, err)
        assert shown(stream, NAMES[0])[:11] in out

    def test_a_checkpoint_with_a_strange_path(self, files, extreme, tmp_path):
        path = tmp_path / VALUE
        path.write_bytes((files / "checkpoint.safetensors").read_bytes())
        code, out, _ = run_in(extreme, "verify", path)
        assert code == 0
        assert out == f"{shown(extreme, str(path))}: 1 quantized matrices, 0 other tensors, no fault found.\n"


COMMANDS = typer.main.get_command(app).commands
OPTIONS = [
    (command, option.opts[0] if option.param_type_name == "option" else option.name)
    for command, own in COMMANDS.items()
    for option in own.params
    if not getattr(option, "is_flag", False)
]


class TestOptions:
    @pytest.mark.sampled(16)
    @pytest.mark.parametrize(("command", "option"), OPTIONS)
    def test_every_option_with_a_strange_value(self, files, extreme, tmp_path, monkeypatch, command, option):
        require_module("gguf")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            "lqlora.cli.plan._picture", lambda _: b"picture"
        )  # tests/reports/test_pictures.py draws names
        usual = {
            "costs": {
                "model": files / "model.safetensors",
                "--output": "t.json",
                "--formats": "nf2/16:float16",
                "--ranks": 0,
            },
            "plan": {"table": files / "table.json", "--bits": 3.5},
            "eval": {"model": "nowhere.gguf"},
            "inspect": {"path": files / "model.safetensors"},
            "decompose": {
                "source": files / "model.safetensors",
                "folder": "out",
                "--format": "nf2/16:float16",
                "--rank": 0,
            },
            "export": {"checkpoint": files / "checkpoint.safetensors", "folder": "out"},
            "merge": {"checkpoint": files / "checkpoint.safetensors", "folder": "out"},
            "verify": {"path": files / "checkpoint.safetensors"},
            "demo": {"--model": "nowhere.gguf"},
            "compress": {"source": "nowhere.gguf", "folder": "out", "--bits": 3},
            "calibrate": {"source": "nowhere", "folder": "out"},
        }[command]
        given = (usual | {option: VALUE}).items()
        words = [word for name, value in given for word in ((name, value) if name.startswith("--") else (value,))]
        code, out, err = run_in(extreme, command, *words)
        assert code in (0, 2)
        assert clean(extreme, out + err)
        assert code == 0 or clean(extreme, err).splitlines()[-1].startswith("lqlora: ")

    @pytest.mark.parametrize("words", [[VALUE], ["plan", f"--{VALUE}"], ["verify", "a", VALUE]])
    def test_usage_errors_are_one_line(self, extreme, words):
        code, out, err = run_in(extreme, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert clean(extreme, err).startswith("lqlora: ")
        assert "--help" in err

    @pytest.mark.parametrize("words", [["--help"], [], *([command, "--help"] for command in COMMANDS)])
    @pytest.mark.parametrize("name", ["narrow terminal", "ASCII pipe"])
    def test_the_help_in_any_encoding(self, name, words):
        code, out, err = run_in(STREAMS[name], *words)
        assert code == (0 if words else 2)
        assert clean(STREAMS[name], out + err)


class TestOtherTexts:
    """Texts of other libraries, and errors that no command expects."""

    @pytest.fixture
    def verify(self, monkeypatch, extreme, tmp_path):
        def verify(act) -> tuple[int, str]:
            monkeypatch.setattr("lqlora.checkpoint.verify", act)
            code, out, err = run_in(extreme, "verify", tmp_path)
            assert out == ""
            return code, clean(extreme, err)

        return verify

    def test_an_unexpected_error_has_a_traceback(self, verify, extreme):
        def act(_):
            raise RuntimeError(VALUE.replace("\n", ""))

        code, err = verify(act)
        assert code == 1
        assert err.startswith("Traceback")
        assert err.endswith(f"RuntimeError: {shown(extreme, VALUE.replace(chr(10), ''))}\n")

    def test_warnings_and_logs(self, verify, extreme, monkeypatch):
        def act(_):
            monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of pytest
            warnings.simplefilter("default")
            warnings.warn(VALUE, UserWarning, stacklevel=1)
            logging.getLogger("other").warning("%s is strange", VALUE)
            raise OSError(VALUE)

        name = shown(extreme, VALUE)
        assert verify(act) == (2, f"warning: {name}\nwarning: {name} is strange\nlqlora: {name}\n")

    def test_errors_of_the_library_can_be_printed(self):
        assert str(lq.errors.CheckpointError(f"{VALUE}.")) == f"{VALUE}.".translate(
            {0x1B: r"\x1b", 7: r"\x07", 0x202E: r"\u202e", 9: r"\t", 0x9B: r"\x9b", 0xDCFF: r"\udcff"}
        )


class Broken(Stream):
    """A stream that cannot be written."""

    def __init__(self, error: Exception) -> None:
        super().__init__("utf-8", terminal=True)
        self._error = error

    def write(self, _: str) -> int:
        """Fail."""
        raise self._error


class TestOutputsThatFail:
    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), BrokenPipeError(), ValueError("closed")])
    def test_files_are_complete_and_the_code_is_1(self, files, monkeypatch, tmp_path, capsys, error):
        words = ("--bits", "3.5", "--output", tmp_path / "p.json", "--png", tmp_path / "p.png")
        require_module("matplotlib")
        monkeypatch.setattr("lqlora.cli.plan._picture", lambda _: b"picture")
        monkeypatch.setattr("sys.stdout", Broken(error))
        assert run("plan", files / "table.json", *words) == 1
        assert lq.Plan.from_json((tmp_path / "p.json").read_text()).matrices.keys() == set(NAMES)
        assert (tmp_path / "p.png").read_bytes() == b"picture"
        said = capsys.readouterr().err
        if isinstance(error, BrokenPipeError):
            assert said == ""
        else:
            assert said.startswith(f"lqlora: standard output cannot be written: {error}")

    @pytest.mark.parametrize("words", [["--help"], ["verify", "checkpoint.safetensors"]])
    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), BrokenPipeError()])
    def test_commands_without_files(self, files, monkeypatch, capsys, words, error):
        monkeypatch.chdir(files)
        monkeypatch.setattr("sys.stdout", Broken(error))
        assert run(*words) == 1
        assert "Traceback" not in capsys.readouterr().err

    def test_without_standard_output(self, files, monkeypatch, capsys):
        monkeypatch.setattr("sys.stdout", None)
        assert run("verify", files / "checkpoint.safetensors") == 1
        assert "closed" in capsys.readouterr().err

    @pytest.mark.parametrize("stderr", [None, Broken(OSError(errno.EIO, "terminal is gone"))])
    def test_standard_error_that_fails_stops_nothing(self, files, monkeypatch, tmp_path, stderr):
        options = ("--formats", "nf2/16:float16", "--ranks", "0", "--output", tmp_path / "t.json")
        monkeypatch.setattr("sys.stderr", stderr)
        assert run("costs", files / "model.safetensors", *options) == 0
        assert (tmp_path / "t.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
class TestProcesses:
    @pytest.fixture
    def plan(self, files, tmp_path):
        """Run the command in a shell with a redirection; return its result, and check that the plan is complete."""

        def plan(redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
            program = f"{shlex.quote(sys.executable)} -m lqlora.cli plan {shlex.quote(str(files / 'table.json'))}"
            line = f"{program} --bits 3.5 --output {shlex.quote(str(tmp_path / 'p.json'))} {redirection}"
            settings = {"PYTHONPATH": str(Path(lq.__file__).parents[1]), **environment}
            done = subprocess.run(
                ["bash", "-c", line], capture_output=True, env=os.environ | settings, check=False, timeout=100
            )
            assert lq.Plan.from_json((tmp_path / "p.json").read_text()).matrices.keys() == set(NAMES)
            return done

        return plan

    @pytest.mark.parametrize(
        ("redirection", "said"),
        [
            (">/dev/full", b"No space left"),
            (">&-", b"it is closed"),
            (">&- 2>&-", b""),
            (">/dev/full 2>/dev/full", b""),
        ],
    )
    def test_outputs_that_fail(self, plan, redirection, said):
        done = plan(redirection)
        assert (done.returncode, done.stdout) == (1, b"")
        assert said in done.stderr
        assert done.stderr.count(b"\n") == bool(said)

    def test_a_pipe_that_is_closed(self, plan):
        done = plan("| true; exit ${PIPESTATUS[0]}")
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")

    @pytest.mark.parametrize(
        "environment",
        [
            {"PYTHONIOENCODING": "ascii"},
            {"PYTHONIOENCODING": "cp1252:ignore"},
            {"PYTHONIOENCODING": "utf-16"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "20"},
        ],
        ids=str,
    )
    def test_environments(self, plan, environment):
        done = plan("", **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        name = "model.layers.*.experts.*.*up*".encode(environment.get("PYTHONIOENCODING", "ascii").partition(":")[0])
        assert name.removeprefix(b"\xff\xfe") in done.stdout


def test_a_table_of_many_rows_is_not_drawn(monkeypatch):
    stream = Stream("utf-8", terminal=True)
    monkeypatch.setattr("sys.stdout", stream)
    table = Table(("kind",), [(f"a_{i}",) for i in range(501)])
    console.show_table(table)
    assert stream.text() == f"{table.markdown()}\n"


def test_only_the_console_and_progress_bars_print():
    prints = {"print", "echo", "secho", "Console", "StreamHandler", "basicConfig", "stdout", "stderr", "__stderr__"}
    word = re.compile(rf"\b({'|'.join(prints)})\b")
    found = set()
    for path in Path(lq.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(text)) if word.search(text) else ()
        if any(getattr(node, "id", getattr(node, "attr", None)) in prints for node in nodes):
            found.add(path)
    assert found == {Path(console.__file__), Path(_progress.__file__)}
