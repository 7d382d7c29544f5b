"""Atomic writing of files: complete content, or the old file and nothing beside it."""

import pytest

from lqlora import _files
from lqlora._files import replace_file, write_whole
from lqlora.errors import CheckpointError


@pytest.fixture
def old(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


def _assert_untouched(path) -> None:
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_the_content_replaces_that_of_an_old_file(old):
    write_whole(old, b"new")
    assert old.read_bytes() == b"new"
    assert list(old.parent.iterdir()) == [old]


def test_the_temporary_file_is_in_the_same_folder(old):
    with replace_file(old) as beside:
        beside.write_bytes(b"new")
        assert beside.parent == old.parent
        assert old.read_bytes() == b"old"
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failure_of_the_file_system_leaves_the_old_file(old, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, step, fail)
    with pytest.raises(CheckpointError, match=r"file.*No space"):
        write_whole(old, b"new")
    _assert_untouched(old)


def test_the_content_is_flushed_before_the_rename(old, monkeypatch):
    calls = []
    for step in ("replace", "fsync"):
        real = getattr(_files.os, step)
        monkeypatch.setattr(_files.os, step, lambda *args, s=step, f=real: (calls.append(s), f(*args))[1])
    write_whole(old, b"new")
    assert calls == ["fsync", "replace"]


def _write_half(path, error: type[BaseException], *failures: type[Exception]) -> None:
    with replace_file(path, *failures) as beside:
        beside.write_bytes(b"half")
        raise error("bad content")


def test_a_named_failure_of_the_body_is_a_failure_to_write(old):
    with pytest.raises(CheckpointError, match="bad content"):
        _write_half(old, KeyError, KeyError)
    _assert_untouched(old)


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_other_exceptions_of_the_body_pass_through(old, kind):
    with pytest.raises(kind):
        _write_half(old, kind)
    _assert_untouched(old)


def test_a_body_that_writes_nothing_is_a_failure(old):
    with pytest.raises(CheckpointError, match="file"), replace_file(old):
        pass
    _assert_untouched(old)
