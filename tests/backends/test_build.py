"""Compilation of the kernels: with and without a compiler, for other processors, and the hash of the sources."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lqlora._optional import is_installed
from lqlora.backends.cpu import loading as library
from tests.requirements import require_or_skip

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "lqlora" / "backends" / "cpu" / "kernels"


@pytest.fixture(scope="module")
def hook():
    require_or_skip("hatchling", is_installed("hatchling"))
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_sources(folder):
    for source in (*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")):
        shutil.copy(source, folder)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a copy of the sources, laid out like the package."""
    copy_sources(tmp_path)
    return tmp_path


def loaded_from(folder, monkeypatch):
    monkeypatch.setattr(library, "_FOLDER", folder)
    return library._load.__wrapped__()


def test_the_build_and_the_package_read_the_same_sources(hook):
    assert hook.digest(SOURCES) == library._digest()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["kernels.h", "decoding.h", "library.cpp"])
def test_what_is_compiled_is_loaded_until_the_sources_change(hook, folder, monkeypatch, source):
    require_or_skip("g++", shutil.which("g++") is not None)
    hook.compile_kernels(folder, folder / hook.LIBRARY, "g++")
    assert loaded_from(folder, monkeypatch)[1] == ""
    with (folder / source).open("a") as file:
        file.write("// changed\n")
    assert loaded_from(folder, monkeypatch) == (None, "compiled from other sources: install lqlora again")


def test_without_a_library_there_is_one_line(folder, monkeypatch):
    usable, reason = loaded_from(folder, monkeypatch)
    assert usable is None
    assert reason == "not compiled: there was no C++ compiler when lqlora was installed"


def test_a_file_that_is_no_library_is_not_loaded(folder, monkeypatch):
    (folder / "kernels.shared").write_bytes(b"\x7fELF and no more")
    usable, reason = loaded_from(folder, monkeypatch)
    assert usable is None
    assert reason.startswith("cannot be loaded: ")


class Recorder:
    """Stand in for hatch, and keep the messages that it would print."""

    def __init__(self):
        self.lines = []

    def display_warning(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("compiler", ["no-such-compiler", f"{sys.executable} -c import-nothing", "false"])
def test_an_installation_goes_on_without_a_compiler(hook, monkeypatch, folder, compiler):
    monkeypatch.setenv("CXX", compiler)
    package = folder / "root" / hook.FOLDER
    package.mkdir(parents=True)
    copy_sources(package)
    app, data = Recorder(), {"artifacts": []}
    builder = object.__new__(hook.NativeKernels)
    monkeypatch.setattr(hook.NativeKernels, "root", str(folder / "root"))
    monkeypatch.setattr(hook.NativeKernels, "app", app)
    monkeypatch.setattr(hook.NativeKernels, "target_name", "wheel")
    builder.initialize("standard", data)
    assert data == {"artifacts": []}
    (line,) = app.lines
    assert line.startswith("lqlora is installed without compiled kernels: ")
    assert "\n" not in line


def test_no_compiler_at_all_is_named(hook, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(OSError, match=r"there is no C\+\+ compiler"):
        hook.found_compiler()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "head"), [("aarch64-linux-gnu", b"\x7fELF"), ("aarch64-macos", b"\xcf\xfa\xed\xfe")]
)
def test_the_kernels_compile_for_processors_with_neon(hook, tmp_path, target, head):
    require_or_skip("ziglang", is_installed("ziglang"))
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    made = Path(hook.compiled(zig, SOURCES, "kernels.cpp", str(tmp_path), "-DLQLORA_ISA=baseline")).read_bytes()
    assert made.startswith(head)
    if "linux" in target:
        assert int.from_bytes(made[18:20], "little") == 183  # an object of AArch64


@pytest.mark.slow
def test_the_text_compiles_without_warnings(hook, tmp_path):
    require_or_skip("g++", shutil.which("g++") is not None)
    strict = [*hook.FLAGS, "-Wall", "-Wextra", "-Werror"]
    for flags in ([], *([flag] for flag in hook.ISAS_OF_X86.values())):
        source = str(SOURCES / "kernels.cpp")
        command = ["g++", *strict, *flags, "-DLQLORA_ISA=baseline", "-c", source, "-o", str(tmp_path / "kernels.o")]
        assert subprocess.run(command, check=False, capture_output=True, text=True).stderr == ""
