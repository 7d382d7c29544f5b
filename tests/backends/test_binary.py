"""Kernels are compiled for the current device and kept on disk; a damaged file is compiled again."""

from __future__ import annotations

import pytest

from lqlora.backends.cuda.compiling import Binary
from lqlora.errors import KernelError


def test_compiled_kernels_are_kept_on_disk(emulated, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    first = Binary.of("packing", "pack_codes<3>")
    assert len(list((tmp_path / "kernels").iterdir())) == 1
    monkeypatch.setattr(emulated.cuda.nvrtc, "compileProgram", None)
    assert Binary.of("packing", "pack_codes<3>") == first
    with pytest.raises(TypeError):
        Binary.of("packing", "pack_codes<5>")


DAMAGE = {"cut": lambda whole: whole[:-1], "emptied": lambda _: b"", "changed": lambda whole: whole[:-1] + b"?"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_damaged_on_disk_is_compiled_again(emulated, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    first = Binary.of("packing", "pack_codes<3>")
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert Binary.of("packing", "pack_codes<3>") == first
    assert file.read_bytes() == whole


def test_where_nothing_can_be_kept_kernels_are_compiled_again(emulated, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file" / "kernel").read_bytes()
    assert Binary.of("packing", "pack_codes<3>") == Binary.of("packing", "pack_codes<3>")


def test_a_device_that_is_newer_than_the_compiler_compiles_itself(emulated, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    emulated.options.clear()
    monkeypatch.setattr(type(emulated.cuda.Device()), "compute_capability", "86")
    Binary.of("packing", "pack_codes<3>")
    assert {options[-1] for options in emulated.options} == {"--gpu-architecture=compute_80"}


def test_what_the_compiler_refuses_is_said(emulated, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("lqlora.backends.cuda.compiling.source", lambda _: "")
    with pytest.raises(KernelError, match=r"pack_codes<3> .* nothing to compile"):
        Binary.of("packing", "pack_codes<3>")
    assert not list(tmp_path.iterdir())
