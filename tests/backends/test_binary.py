"""Kernels are compiled for the current device and kept on disk; a damaged file is compiled again."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from lqlora.backends.cuda.compiling import Binary
from lqlora.backends.cuda.private_files import _private_group
from lqlora.errors import KernelError


def test_compiled_kernels_are_kept_on_disk(emulated, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    first = Binary.of("packing", "pack_codes<3>")
    assert len(list((tmp_path / "kernels" / "lqlora").iterdir())) == 1
    monkeypatch.setattr(emulated.cuda.nvrtc, "compileProgram", None)
    assert Binary.of("packing", "pack_codes<3>") == first
    with pytest.raises(TypeError):
        Binary.of("packing", "pack_codes<5>")


DAMAGE = {"cut": lambda whole: whole[:-1], "emptied": lambda _: b"", "changed": lambda whole: whole[:-1] + b"?"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_damaged_on_disk_is_compiled_again(emulated, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    first = Binary.of("packing", "pack_codes<3>")
    [file] = (tmp_path / "lqlora").iterdir()
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


posix = pytest.mark.skipif(sys.platform == "win32", reason="that system has no owners and permissions of this kind")
as_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give a file away")


def _piped(file):
    file.unlink()
    os.mkfifo(file)


def _linked(file):
    other = file.parent.parent / "other"
    file.rename(other)
    file.symlink_to(other)


#: What makes a kept kernel one that somebody else may have written, in its file or in a folder.
FILES = {
    "written by the group": lambda file: file.chmod(0o664),
    "written by all": lambda file: file.chmod(0o602),
    "a link": _linked,
    "a pipe": _piped,
    "of another user": lambda file: os.chown(file, 12345, -1),
}
FOLDERS = {
    "written by the group": lambda folder: folder.chmod(0o770),
    "written by all": lambda folder: folder.chmod(0o1707),
    "replaced by all": lambda folder: folder.parent.chmod(0o777),
    "of another user": lambda folder: os.chown(folder, 12345, -1),
    "in a folder of another user": lambda folder: os.chown(folder.parent, 12345, -1),
}


def _marked(kinds):
    return [pytest.param(kinds[name], id=name, marks=as_root if "another" in name else ()) for name in kinds]


@pytest.fixture
def forged(emulated, tmp_path, monkeypatch):
    """A kernel, and the file in which it is kept, which now has other code."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    right = Binary.of("packing", "pack_codes<3>")
    [file] = (tmp_path / "cache" / "lqlora").iterdir()
    file.write_bytes(Binary("evil", b"code").to_bytes())
    return right, file


@posix
def test_folders_and_files_are_for_their_user_only(forged, tmp_path):
    _, file = forged
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache", file.parent, file)]
    assert modes == [0o700, 0o700, 0o600]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o400])
@pytest.mark.parametrize("above", [0o755, 0o700, 0o1777])
def test_what_only_the_user_can_have_written_is_read(forged, mode, above):
    _, file = forged
    file.chmod(mode)
    file.parent.parent.chmod(above)
    assert Binary.of("packing", "pack_codes<3>").code == b"code"


@posix
@pytest.mark.parametrize("change", _marked(FILES))
def test_a_file_that_others_may_have_written_is_not_read_and_is_replaced(forged, change):
    right, file = forged
    change(file)
    assert Binary.of("packing", "pack_codes<3>") == right
    assert file.read_bytes() == right.to_bytes()
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600


@posix
@pytest.mark.parametrize("change", _marked(FOLDERS))
def test_in_a_folder_that_others_can_change_nothing_is_read_or_written(forged, change):
    right, file = forged
    change(file.parent)
    assert Binary.of("packing", "pack_codes<3>") == right
    assert file.read_bytes() == Binary("evil", b"code").to_bytes()
    assert list(file.parent.iterdir()) == [file]


@posix
def test_no_folder_is_made_where_others_could_replace_it(emulated, tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "open" / "deep" / "cache"))
    Binary.of("packing", "pack_codes<3>")
    assert list((tmp_path / "open").iterdir()) == []


@posix
def test_a_folder_may_be_reached_by_a_link(forged, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "link"))
    assert Binary.of("packing", "pack_codes<3>").code == b"code"


@posix
@pytest.mark.parametrize(
    ("members", "name", "is_read"), [([], "me", True), (["you"], "me", False), ([], "staff", False)]
)
def test_folders_above_may_be_written_by_the_group_of_the_user_alone(forged, monkeypatch, members, name, is_read):
    import grp
    import pwd

    _, file = forged
    above = file.parent.parent
    above.chmod(0o775)
    group = above.stat().st_gid
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("me", "x", 0, group, "", "", "")))
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group((name, "x", group, members)))
    _private_group.cache_clear()
    try:
        assert (Binary.of("packing", "pack_codes<3>").code == b"code") == is_read
    finally:
        _private_group.cache_clear()
