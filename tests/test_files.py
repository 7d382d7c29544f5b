"""Atomic writing of files: complete content, or the old file and nothing beside it."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lqlora._files import (
    check_writable,
    is_being_written,
    lock,
    open_unshared,
    remove_left_over,
    replace_file,
    replace_folder,
    temporary,
    write_whole,
    writing,
)
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


def test_the_temporary_file_is_below_the_same_folder(old):
    with replace_file(old) as beside:
        beside.write_bytes(b"new")
        assert beside.parent.parent == old.parent
        assert old.read_bytes() == b"old"
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failure_of_the_file_system_leaves_the_old_file(old, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(CheckpointError, match=r"file.*No space"):
        write_whole(old, b"new")
    _assert_untouched(old)


def test_the_content_is_flushed_before_the_rename(old, monkeypatch):
    calls = []
    for step in ("replace", "fsync"):
        real = getattr(os, step)
        monkeypatch.setattr(os, step, lambda *args, s=step, f=real: (calls.append(s), f(*args))[1])
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


posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions, links and signals are those of other systems")


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_gets_what_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_an_old_file_keeps_its_permissions(old, mode):
    old.chmod(mode)
    with replace_file(old) as beside:
        save_file({"x": np.ones(2)}, beside)  # which makes files that only their owner may read
    assert stat.S_IMODE(old.stat().st_mode) == mode


@posix
def test_a_link_is_followed(old, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "link").symlink_to("../file")
    (folder / "dangling").symlink_to("new")
    write_whole(folder / "link", b"new")
    write_whole(folder / "dangling", b"first")
    assert (folder / "link").is_symlink()
    assert (old.read_bytes(), (folder / "new").read_bytes()) == (b"new", b"first")


@posix
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_what_is_not_a_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "other"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(CheckpointError, match=r"other.*cannot be written"):
        write_whole(path, b"new")
    after = path.lstat()  # following a link may change the time of its last access
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a\0b", "x" * 256, "nowhere/file"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name[-1]}.* cannot be written"):
        write_whole(tmp_path / name, b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    write_whole(tmp_path / name, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"new")]


@posix
@pytest.mark.parametrize("name", ["x" * 256, "nowhere/file", "file/x", "a\0b", "loop", "folder"])
def test_what_could_not_be_written_is_found_before(old, name):
    (old.parent / "loop").symlink_to("loop")
    (old.parent / "folder").mkdir()
    before = sorted(old.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=r"cannot be written"):
        check_writable(old.parent / name)
    assert sorted(old.parent.rglob("*")) == before


def test_a_check_changes_nothing(old):
    check_writable(old)
    check_writable(old.with_name("new"))
    _assert_untouched(old)


def test_a_check_finds_a_folder_without_permission(old, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"file.*Permission denied"):
        check_writable(old)


def test_a_file_that_may_not_exist_is_not_replaced(old):
    with pytest.raises(CheckpointError, match=r"file.*exists"), replace_file(old, may_exist=False) as beside:
        beside.write_bytes(b"new")
    _assert_untouched(old)
    with replace_file(old.with_name("other"), may_exist=False) as beside:
        beside.write_bytes(b"new")
    assert old.with_name("other").read_bytes() == b"new"


@posix
def test_permissions_may_be_given(old):
    old.chmod(0o666)
    write_whole(old, b"new", mode=0o600)
    assert stat.S_IMODE(old.stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_lock_ends_with_its_process_though_another_was_forked(old):
    held, (reading, writing) = open_unshared(old, "rb+"), os.pipe()
    lock(held)
    child = os.fork()
    if not child:
        os.write(writing, b".")  # by now it has closed its copy
        signal.pause()
    try:
        os.read(reading, 1)
        with open_unshared(old, "rb+") as other:
            with pytest.raises(BlockingIOError):
                lock(other)
            held.close()
            lock(other)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


KILLED = """
import os, signal, sys
from lqlora._files import replace_file

with replace_file(sys.argv[1]) as beside:
    beside.write_bytes(b"half")
    (beside.parent / ".tmpQ").write_bytes(b"of a library")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_what_a_killed_process_left_is_removed_at_the_next_write_of_the_same_file(old):
    for name in (old, old.with_name("another")):
        done = subprocess.run([sys.executable, "-c", KILLED, str(name)], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
    assert old.read_bytes() == b"old"
    assert len(list(old.parent.iterdir())) == 3
    write_whole(old, b"new")
    (other,) = (path for path in old.parent.iterdir() if path != old)
    assert other.name.startswith(".another.")
    assert old.read_bytes() == b"new"


def test_many_writers_of_one_file_leave_one_whole_file(old):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_whole(old, bytes([i]) * 10_000), range(200)))
    assert len(set(old.read_bytes())) == 1
    assert len(old.read_bytes()) == 10_000
    assert list(old.parent.iterdir()) == [old]


def test_a_writer_whose_folder_is_taken_away_before_it_is_locked_takes_another(old, monkeypatch):
    real, attempts = temporary.lock, []

    def slow(file):
        attempts.append(file.name)
        if len(attempts) == 1:
            shutil.rmtree(Path(file.name).parent)
        real(file)

    monkeypatch.setattr(temporary, "lock", slow)
    write_whole(old, b"new")
    assert len(attempts) == 2
    assert old.read_bytes() == b"new"
    assert list(old.parent.iterdir()) == [old]


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from lqlora._files import replace_folder

rename = Path.rename

def dies(self, target):
    if self.name == "data":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = dies
with replace_folder(sys.argv[1]) as beside:
    (beside / "file").write_bytes(b"new")
"""


@posix
def test_a_folder_whose_process_was_killed_before_it_locked_it_is_removed(old):
    with replace_file(old) as beside:
        beside.write_bytes(b"new")
        name = beside.parent.name
    old.with_name(name).mkdir()
    write_whole(old, b"newer")
    assert list(old.parent.iterdir()) == [old]


class TestFolders:
    @pytest.mark.parametrize("name", ["folder", "é" * 127], ids=len)
    def test_what_the_check_refuses_at_the_end_is_left_and_the_new_folder_is_beside_it(self, tmp_path, name):
        target = tmp_path / name
        (tmp_path / "folder-2").touch()

        def check():
            if target.exists():
                raise CheckpointError("it appeared.")

        def write():
            with replace_folder(target, check) as beside:
                (beside / "results").touch()
                target.mkdir()
                (target / "thesis").touch()

        kept = ["folder-3", "folder-4"] if name == "folder" else ["é" * 120 + "-2", "é" * 120 + "-3"]
        for free in kept:
            with pytest.raises(CheckpointError, match=free):
                write()
            assert [path.name for path in (tmp_path / free).iterdir()] == ["results"]
            assert [path.name for path in target.iterdir()] == ["thesis"]
            shutil.rmtree(target)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "folder-2"])

    @pytest.mark.parametrize("error", [FileExistsError, PermissionError])
    def test_a_free_name_that_is_taken_at_the_last_moment_is_passed_over(self, tmp_path, monkeypatch, error):
        rename = Path.rename

        def check():
            if (tmp_path / "folder").exists():
                raise CheckpointError("it appeared.")

        def renamed(path, to):
            if to.name == "folder-2":
                if error is FileExistsError:
                    to.mkdir()
                raise error(0, "refused")
            return rename(path, to)

        def write():
            with replace_folder(tmp_path / "folder", check):
                (tmp_path / "folder").mkdir()

        monkeypatch.setattr(Path, "rename", renamed)
        with pytest.raises(CheckpointError, match="folder-3" if error is FileExistsError else "refused"):
            write()

    def test_a_folder_is_being_written_while_its_process_lives(self, tmp_path):
        self._step_aside(tmp_path / "folder", "old")  # a process that was killed
        assert not is_being_written(tmp_path / "folder")
        with replace_folder(tmp_path / "folder"):
            assert is_being_written(tmp_path / "folder")
            assert not is_being_written(tmp_path / "other")
        assert not is_being_written(tmp_path / "folder")

    def test_the_new_folder_replaces_the_old_one(self, tmp_path):
        for content in (b"old", b"new"):
            with replace_folder(tmp_path / "new" / "folder") as beside:
                (beside / "file").write_bytes(content)
        assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"new"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]

    @pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
    def test_an_error_leaves_the_old_folder_and_none_that_was_made(self, tmp_path, error):
        def fail(path):
            with replace_folder(path):
                raise error

        (tmp_path / "old").mkdir()
        for path in (tmp_path / "old", tmp_path / "new" / "deep" / "folder"):
            with pytest.raises(error):
                fail(path)
        assert [path.name for path in tmp_path.iterdir()] == ["old"]

    def test_a_failure_of_the_file_system_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"file.*cannot be written"), replace_folder(tmp_path / "file" / "x"):
            pass

    @posix
    def test_a_folder_that_stepped_aside_comes_back(self, tmp_path):
        with replace_folder(tmp_path / "folder") as beside:
            (beside / "file").write_bytes(b"old")
        command = [sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(tmp_path / "folder")]
        assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "folder").exists()
        remove_left_over(tmp_path / "folder")
        assert (tmp_path / "folder" / "file").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def _step_aside(self, target, content):
        """Make what a process leaves that was killed after the renames, and before it removed the folder it replaced."""
        folder = target.parent / f"{temporary._prefix(target)}{content}.partial"
        (folder / "old").mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "old" / "file").write_text(content)
        return folder

    def test_a_folder_that_was_deleted_in_part_does_not_come_back(self, tmp_path, monkeypatch):
        target = tmp_path / "folder"
        target.mkdir()
        self._step_aside(target, "old")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(OSError(5, "killed here")))
            remove_left_over(target)
        target.rmdir()
        remove_left_over(target)
        assert list(tmp_path.iterdir()) == []

    def test_after_two_kills_the_last_folder_comes_back(self, tmp_path, monkeypatch):
        target, real = tmp_path / "folder", Path.rename

        def dies(self, other):
            if self.name == "data":
                raise SystemExit
            return real(self, other)

        def write():
            with replace_folder(target):
                self._step_aside(target, "older")  # another process is killed meanwhile
                monkeypatch.setattr(Path, "rename", dies)
                monkeypatch.setattr(temporary, "_discard", lambda *_: None)

        target.mkdir()
        (target / "file").write_text("old")
        with pytest.raises(SystemExit):
            write()
        monkeypatch.undo()
        assert not target.exists()
        remove_left_over(target)
        assert (target / "file").read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_many_writers_of_one_folder_leave_one_whole_folder(self, tmp_path):
        def write(number):
            with replace_folder(tmp_path / "folder") as beside:
                for name in "ab":
                    (beside / name).write_text(str(number))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(100)))
        assert len({path.read_text() for path in (tmp_path / "folder").iterdir()}) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_a_folder_that_another_writer_renames_away_meanwhile(self, tmp_path):
        class Vanishing(type(tmp_path)):
            """A path that is there for the first look only."""

            def stat(self, **options):
                found = super().stat(**options)
                self.rename(self.with_name("elsewhere"))
                return found

        (tmp_path / "folder").mkdir()
        writing._check_target(Vanishing(tmp_path / "folder"), stat.S_ISDIR, "a folder")

    @pytest.mark.parametrize("reason", ["held", "refused"])
    def test_without_the_lock_of_renames_the_work_is_kept(self, tmp_path, monkeypatch, reason):
        target = tmp_path / "folder"
        monkeypatch.setattr(temporary, "_PATIENCE", 0.0)
        if reason == "refused":
            temporary._lock_of_renames(target).mkdir()  # it cannot be opened
            with replace_folder(target):
                pass
        else:
            with open_unshared(temporary._lock_of_renames(target), "ab") as held:
                lock(held)
                with replace_folder(target):
                    pass
        assert target.is_dir()

    def test_an_error_of_the_body_names_the_folder_that_was_asked_for(self, tmp_path):
        def write(error):
            with replace_folder(tmp_path / "folder") as beside:
                raise error(28, "No space left on device", str(beside / "file"))

        for error in (OSError, lambda *own: CheckpointError(f"{own[2]} is too large.")):
            with pytest.raises(CheckpointError, match=r"folder.*(No space|too large)") as caught:
                write(error)
            assert ".partial" not in str(caught.value)

    @pytest.mark.parametrize("name", ["x" * 256, "file", "loop"])
    def test_what_cannot_be_a_folder_is_refused_before_the_body(self, tmp_path, name):
        (tmp_path / "file").touch()
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(CheckpointError, match=r"cannot be written"), replace_folder(tmp_path / name):
            raise AssertionError

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_an_error_between_the_renames_brings_the_old_folder_back(self, tmp_path, monkeypatch, error):
        real = Path.rename

        def fails(self, target):
            if self.name == "data":
                raise error
            return real(self, target)

        for content in (b"old", b"new"):
            with suppress(CheckpointError, KeyboardInterrupt), replace_folder(tmp_path / "folder") as beside:
                (beside / "file").write_bytes(content)
            monkeypatch.setattr(Path, "rename", fails)
        assert (tmp_path / "folder" / "file").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_system_without_locks_is_written_to_and_nothing_is_taken_for_left_over(old, monkeypatch):
    def unsupported(_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(temporary, "lock", unsupported)
    with replace_file(old) as beside:
        beside.write_bytes(b"first")
        write_whole(old, b"second")
    assert old.read_bytes() == b"first"
    assert list(old.parent.iterdir()) == [old]
