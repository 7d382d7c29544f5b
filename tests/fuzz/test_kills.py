"""Kills, full disks, read-only folders and several writers at once: nothing finished is lost, and nothing is left over."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.requirements import require_module

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are those of other systems")

if sys.platform != "win32":
    from lqlora.costs import CostStore
    from lqlora.costs.store import _whole_lines
    from tests.fuzz.killing import ROOT, Children

#: Works that replace a whole file or folder.
WHOLE = ["save", "save_model", "save_factors", "save_scales", "merge", "demo"]
#: What each needs beside NumPy.
NEEDS = {
    "save_model": ["torch"],
    "save_factors": ["torch"],
    "save_scales": ["torch"],
    "demo": ["torch", "gguf", "transformers", "matplotlib"],
    "costs": ["typer"],
    "calibration": ["torch", "transformers", "accelerate"],
}

#: Errors that a file system may give at any call.
FAULTS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def started():
    """Processes by the name of their work, which stay for all tests of this file: some import much."""
    found: dict[str, Children] = {}
    yield found
    for children in found.values():
        children.close()


@pytest.fixture
def prepare(started):
    """A function that returns the process of a work, which is to write in a folder."""

    def prepare(work: str, folder: Path) -> Children:
        for package in NEEDS.get(work, ()):
            require_module(package)
        if work not in started:
            started[work] = Children(work)
        started[work].folder = folder
        return started[work]

    return prepare


def _visible(folder: Path) -> dict[str, bytes]:
    """Return the files that a user sees."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".m")}


def _is_clean(folder: Path) -> bool:
    """Return whether nothing is left over, in the folder or in an output folder."""
    return not [
        path for path in folder.rglob("*") if path.name.startswith(".m") or path.suffix in (".partial", ".lock")
    ]


def _points(events: int, largest: int, seconds: float, count: int) -> list[dict[str, float]]:
    """Return points of kills: a third each before a call, in the middle of a write, and at a random time."""
    chance = random.Random(0)
    calls = [{"event": int(i * events / (count // 3))} for i in range(count // 3)]
    writes = [{"bytes": chance.randrange(largest)} for _ in range(count // 3)]
    times = [{"seconds": chance.uniform(0, seconds)} for _ in range(count - 2 * (count // 3))]
    points = calls + writes + times
    chance.shuffle(points)
    return points


def _assert_ours(ended: dict[str, object]) -> None:
    assert "raw" not in ended, ended["raw"]
    assert not ended["hung"]
    if error := str(ended.get("error", "")):
        assert len(error) <= 400
        assert error.isprintable()
        assert "/m" in error


def _kill_whole(children: Children, work: str, count: int) -> None:
    """Kill a work that replaces something, and compare with runs that were not killed."""
    killed, folder = 0, children.folder
    states = []
    for version in range(3):
        ended = children.run(version)
        _assert_ours(ended)
        states.append(_visible(folder))
    assert states[0] != states[1] != states[2]
    largest = max(map(len, states[1].values()))
    for number, point in enumerate(_points(ended["events"], largest, ended["seconds"], count)):
        shutil.rmtree(folder)
        folder.mkdir()
        if number % 3:
            children.run(0)
        before = _visible(folder)
        versions = [1, 2][: 2 if number % 4 == 3 else 1]  # some are killed twice
        for version in versions:
            ended = children.run(version, **point)
            _assert_ours(ended)
            killed += version == 1 and ended["status"] < 0
            found = _visible(folder)
            # A folder may be away for a moment, and comes back; a merge begins without a file.
            assert found in (before, *states[1 : version + 1]) or (work in ("merge", "demo") and not found)
        if work == "demo":
            children.run(-1)  # it is refused if there is a folder
            assert _visible(folder) in ([before] if before else []) + states[1 : version + 1]
        _assert_ours(children.run(1))
        assert _visible(folder) == states[1]
        assert _is_clean(folder)
    assert killed >= count / 2


def _kill_costs(children: Children, count: int) -> None:
    """Kill a command that continues a store, and compare with a run that was not killed."""
    killed, folder = 0, children.folder
    store, table = folder / "m.jsonl", folder / "m.json"
    ended = children.run(0)
    _assert_ours(ended)
    expected, rows, length = table.read_bytes(), CostStore.read(store), store.stat().st_size
    for point in _points(ended["events"], length, ended["seconds"], count):
        for file in (store, table):
            file.unlink()
        ended = children.run(0, **point)
        _assert_ours(ended)
        killed += ended["status"] < 0
        finished = _whole_lines(store.read_bytes()) if store.exists() else b""
        if finished:
            assert CostStore.read(store).items() <= rows.items()
        assert not table.exists() or table.read_bytes() == expected
        _assert_ours(children.run(0))
        assert table.read_bytes() == expected
        assert store.read_bytes().startswith(finished)
        assert CostStore.read(store) == rows
        assert store.read_bytes().count(b"\n") == 1 + len(rows)  # no row was computed twice
        assert sorted(path.name for path in folder.iterdir()) == ["m.json", "m.jsonl"]
    assert killed >= count / 2


def _kill_folder(children: Children, count: int) -> None:
    """Kill a work that writes a folder piece by piece, and compare what the next one writes with a run that was not killed."""
    killed, folder = 0, children.folder
    ended = children.run(0)
    _assert_ours(ended)
    expected = _all(folder)
    largest = max(map(len, expected.values()))
    for number, point in enumerate(_points(ended["events"], largest, ended["seconds"], count)):
        shutil.rmtree(folder)
        folder.mkdir()
        for _ in range(2 if number % 4 == 3 else 1):  # some are killed twice
            ended = children.run(0, **point)
            _assert_ours(ended)
            killed += ended["status"] < 0
        ended = children.run(0)
        _assert_ours(ended)
        assert "error" not in ended, ended
        assert _all(folder) == expected
    assert killed >= count / 2


def _all(folder: Path) -> dict[str, bytes]:
    """Return all files, hidden ones included, and empty folders."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in paths.items()}


def test_a_file_survives_nine_kills(prepare, folder):
    _kill_whole(prepare("save", folder), "save", 9)


@pytest.mark.slow
@pytest.mark.parametrize("work", WHOLE)
def test_what_is_written_survives_sixty_kills(prepare, work, folder):
    _kill_whole(prepare(work, folder), work, 60)


@pytest.mark.slow
def test_a_store_and_a_table_survive_sixty_kills(prepare, folder):
    _kill_costs(prepare("costs", folder), 60)


@pytest.mark.parametrize("count", [9, pytest.param(60, marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_written_piece_by_piece_survives_kills(prepare, folder, count):
    _kill_folder(prepare("checkpoint", folder), count)


@pytest.mark.slow
def test_statistics_that_are_written_block_by_block_survive_sixty_kills(prepare, folder):
    _kill_folder(prepare("calibration", folder), 60)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["checkpoint", "calibration"])
def test_a_fault_of_the_file_system_keeps_what_is_finished(prepare, folder, work):
    children = prepare(work, folder)
    ended = children.run(0)
    expected, refused = _all(folder), 0
    largest = max(map(len, expected.values()))
    faults = [{"fault": call, "errno": FAULTS[call % len(FAULTS)]} for call in range(ended["events"])]
    faults += [{"full": size} for size in (0, 1, largest // 2, largest - 1)]
    for fault in faults:
        shutil.rmtree(folder)
        folder.mkdir()
        ended = children.run(0, **fault)
        _assert_ours(ended)
        refused += "error" in ended
        ended = children.run(0)
        _assert_ours(ended)
        assert "error" not in ended, (fault, ended)
        assert _all(folder) == expected
    assert refused >= 5


@pytest.mark.slow
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can become another user")
def test_a_checkpoint_in_a_folder_that_cannot_be_written_is_one_sentence(prepare):
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "folder"
        folder.mkdir()
        Path(above).chmod(0o755)
        children = prepare("checkpoint", folder)
        folder.chmod(0o555)
        ended = children.run(0, user=65534)
        _assert_ours(ended)
        assert "Permission denied" in ended["error"]
        assert not _all(folder)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["save", "merge", "demo"])
def test_a_fault_of_the_file_system_at_any_call_is_one_sentence(prepare, work, folder):
    children = prepare(work, folder)
    states = []
    for version in (0, 1):
        ended = children.run(version)
        states.append(_visible(folder))
    largest, refused = max(map(len, states[1].values())), 0
    faults = [{"fault": call, "errno": FAULTS[call % len(FAULTS)]} for call in range(ended["events"])]
    faults += [{"full": size} for size in (0, 1, largest // 2, largest - 1)]
    for fault in faults:
        children.run(0)
        ended = children.run(1, **fault)
        _assert_ours(ended)
        refused += "error" in ended
        if "m-2" in str(ended.get("error")):  # the old folder could not be read at the end: the results are beside it
            assert _visible(folder / "m-2") == {name[2:]: data for name, data in states[1].items()}
            shutil.rmtree(folder / "m-2")
        allowed = [states[0]] if "error" in ended else [states[1]]
        assert _visible(folder) in allowed + ([{}] if work == "merge" else [])
        _assert_ours(children.run(1))
        assert _visible(folder) == states[1]
        assert _is_clean(folder)
    assert refused >= 5


@pytest.mark.slow
def test_a_fault_of_the_file_system_keeps_the_rows_of_a_store(prepare, folder):
    store, table = folder / "m.jsonl", folder / "m.json"
    children = prepare("costs", folder)
    ended = children.run(0)
    expected, rows, length = table.read_bytes(), CostStore.read(store), store.stat().st_size
    faults = [{"fault": call, "errno": FAULTS[call % len(FAULTS)]} for call in range(ended["events"])]
    faults += [{"full": size} for size in (0, 1, length // 2, length - 1)]
    for fault in faults:
        for file in (store, table):
            file.unlink(missing_ok=True)
        ended = children.run(0, **fault)
        _assert_ours(ended)
        finished = _whole_lines(store.read_bytes()) if store.exists() else b""
        assert table.exists() == ("error" not in ended)
        _assert_ours(children.run(0))
        assert (table.read_bytes(), CostStore.read(store)) == (expected, rows)
        assert store.read_bytes().startswith(finished)
        assert sorted(path.name for path in folder.iterdir()) == ["m.json", "m.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["save", "save_model", "costs", "demo"])
def test_a_full_disk_is_one_sentence(prepare, work, folder):
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        children = prepare(work, folder)
        children.run(0)
        before = _visible(folder)
        for free in (0, 4096, 8192):
            if work == "costs":
                (folder / "m.jsonl").unlink(missing_ok=True)
                before = {"m.json": before["m.json"]}
            _fill(folder / "filler", free)
            ended = children.run(0 if work == "costs" else 1)
            _assert_ours(ended)
            assert free or "No space" in ended["error"]
            (folder / "filler").unlink()
            found = _visible(folder)
            found.pop("m.jsonl", None)
            assert "error" not in ended or found == before
            _assert_ours(children.run(0))
            assert _visible(folder).items() >= before.items()
            assert _is_clean(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(path: Path, free: int) -> None:
    """Write a file that leaves so many bytes of a disk free."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - free))


@pytest.mark.slow
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can become another user")
@pytest.mark.parametrize("work", ["save", "save_model", "costs", "demo"])
def test_a_folder_that_cannot_be_written_is_one_sentence(prepare, work):
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "folder"
        folder.mkdir()
        Path(above).chmod(0o755)
        children = prepare(work, folder)
        children.run(0)
        before = _visible(folder)
        folder.chmod(0o555)
        ended = children.run(1, user=65534)
        _assert_ours(ended)
        assert "Permission denied" in ended["error"]
        assert _visible(folder) == before
        assert _is_clean(folder)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["save", "demo"])
def test_of_four_writers_one_wins_and_the_others_leave_nothing(prepare, work, folder):
    chance = random.Random(0)
    children = prepare(work, folder)
    states = []
    for version in range(4):
        seconds = children.run(version)["seconds"]
        states.append(_visible(folder))
    for number in range(20):
        jobs = [{"version": version} for version in range(4)]
        for job in jobs[: number % 4]:  # so many are killed
            job["seconds"] = chance.uniform(0, 2 * seconds)
        for ended in children.together(*jobs):
            _assert_ours(ended)
            assert "error" not in ended
        assert _visible(folder) in states
        assert number % 4 or _is_clean(folder)
        children.run(0)
        assert _visible(folder) == states[0]
        assert _is_clean(folder)


@pytest.mark.slow
def test_of_four_writers_of_a_store_one_has_it_and_the_others_are_told(prepare, folder):
    children = prepare("costs", folder)
    children.run(0)
    expected = (folder / "m.json").read_bytes()
    for _ in range(5):
        for file in ("m.json", "m.jsonl"):
            (folder / file).unlink()
        ended = children.together(*[{"version": 0}] * 4)
        for own in ended:
            _assert_ours(own)
            assert "in use" in own.get("error", "in use")
        assert any("error" not in own for own in ended)
        assert _visible(folder).keys() == {"m.json", "m.jsonl"}
        assert (folder / "m.json").read_bytes() == expected
        assert _is_clean(folder)


@pytest.mark.parametrize("forks", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_processes_that_are_forked_while_eight_threads_work_do_not_hang(forks):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.fuzz.forking", str(forks)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"ended": {"0": forks}, "wrong": []}, done.stderr[-3000:]
