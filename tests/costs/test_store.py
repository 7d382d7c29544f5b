"""Stores of costs: resuming, refusal of other inputs, and faults while a line is written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lqlora as lq
from lqlora.costs import CostStore, StoredRow
from lqlora.costs.store import NUMERICS
from lqlora.errors import InvalidArgumentError, StoreError
from lqlora.weighting import Elementwise, InputGram, RowColumn
from tests.costs.cases import FORMATS, NF2, NF4, matrices, same

if TYPE_CHECKING:
    from pathlib import Path

HEAD = {"seed": 0}
ROW = StoredRow("a", (2, 3), "c0ffee", "none", {"nf4/64:float16 rank 8": 0.1})


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "costs.jsonl"


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return matrices()


def counted(weights):
    """Return loaders of matrices, and the list of names of the loaders that were called."""
    calls = []

    def loader(name):
        return lambda: calls.append(name) or weights[name]

    return {name: loader(name) for name in weights}, calls


class TestResuming:
    @pytest.mark.parametrize("mode", ["exact", "fast"])
    def test_a_table_from_a_store_is_the_table(self, weights, path, mode):
        options = {"ranks": [0, 2], "mode": mode}
        plain = lq.cost_table(weights, FORMATS, **options)
        assert same(lq.cost_table(weights, FORMATS, store=path, **options), plain)
        before = path.read_bytes()
        assert same(lq.cost_table(weights, FORMATS, store=path, **options), plain)
        assert path.read_bytes() == before

    def test_rows_and_configurations_are_added_to_what_is_there(self, weights, path):
        few = {name: weights[name] for name in ["layers.1.q", "layers.0.up"]}
        lq.cost_table(few, FORMATS[:2], rank=2, store=path)
        found = lq.cost_table(weights, FORMATS, ranks=[2, 3], store=path)
        assert same(found, lq.cost_table(weights, FORMATS, ranks=[2, 3]))
        lines = [json.loads(line)["line"] for line in path.read_text().splitlines()[1:]]
        assert [len(line["costs"]) for line in lines if line["name"] in few] == [2, 2, 8, 8]

    def test_what_is_in_the_store_is_finished_from_the_beginning(self, weights, path):
        few = {name: weights[name] for name in list(weights)[:3]}
        lq.cost_table(few, FORMATS[:1], rank=1, store=path)
        seen = []
        lq.cost_table(weights, FORMATS[:1], rank=1, store=path, progress=lambda *own: seen.append(own))
        assert seen == [(4, 4)]
        lq.cost_table(weights, FORMATS[:2], rank=1, store=path, progress=lambda *own: seen.append(own))
        assert seen[1:] == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def test_an_error_leaves_what_was_finished(self, weights, path):
        def fail():
            raise OSError("shard 3")

        with pytest.raises(OSError, match="shard 3"):
            lq.cost_table({**weights, "lost": fail}, FORMATS[:1], rank=1, store=path)
        loaders, _ = counted(weights)
        assert same(
            lq.cost_table(loaders, FORMATS[:1], rank=1, store=path), lq.cost_table(weights, FORMATS[:1], rank=1)
        )

    @pytest.mark.parametrize("cut", [1, 7, 40])
    def test_a_torn_last_line_is_overwritten(self, weights, path, cut):
        plain = lq.cost_table(weights, FORMATS[:2], rank=2, store=path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        assert len(CostStore.read(path)) == (4 if cut == 1 else 3)  # a line without its break is whole
        assert same(lq.cost_table(weights, FORMATS[:2], rank=2, store=path), plain)
        assert len(CostStore.read(path)) == 4
        assert path.read_bytes().count(b"\n") == 5

    @pytest.mark.parametrize("length", [0, 1, 9, 12, -1])
    def test_a_store_that_was_begun_and_no_more_is_empty(self, path, length):
        CostStore(path, HEAD).close()
        path.write_bytes(path.read_bytes()[:length])
        with CostStore(path, HEAD) as store:
            assert store.rows == {}
            store.append(ROW)
        assert CostStore.read(path) == {"a": ROW}


def test_costs_are_those_of_the_version_of_the_numerics_that_stores_name():
    """Stored costs stay the same. A change of them must raise NUMERICS, or stores would mix old and new costs."""
    assert NUMERICS == 1
    exact, fast = (lq.cost_table(matrices(), FORMATS[1:4], rank=2, mode=mode).costs for mode in ("exact", "fast"))
    np.testing.assert_allclose(exact[:2], [[7.48182, 6.20262, 1.48125], [1.38886, 0.972479, 0.273722]], rtol=1e-4)
    np.testing.assert_allclose(fast[:2], [[7.48625, 6.20318, 1.48139], [1.38896, 0.973590, 0.273974]], rtol=1e-4)


class TestRefusing:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"seed": 1}, "seed is 0, not 1"),
            ({"max_iter": 3}, "max_iter is 2, not 3"),
            ({"init": "svd"}, "init is 'quantize', not 'svd'"),
            ({"fit": "scale"}, "fit is None, not 'scale'"),
            ({"mode": "fast"}, "mode is 'exact', not 'fast'"),
            ({"factor_format": NF4}, "factor_format is None, not 'nf4/32:float16'"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused_by_name(self, weights, path, options, said):
        lq.cost_table(weights, FORMATS[:1], rank=1, store=path)
        with pytest.raises(StoreError, match=said):
            lq.cost_table(weights, FORMATS[:1], rank=1, store=path, **options)

    def test_costs_that_were_shared_with_other_formats_are_refused(self, weights, path):
        lq.cost_table(weights, FORMATS[:2], rank=1, store=path, mode="fast")
        with pytest.raises(StoreError, match="configurations is"):
            lq.cost_table(weights, FORMATS, rank=1, store=path, mode="fast")

    def test_another_version_of_the_numerics_is_refused(self, path):
        CostStore(path, HEAD).close()
        head = json.dumps(json.loads(path.read_text())["line"] | {"numerics": NUMERICS + 1})
        checksum = hashlib.sha256(head.encode()).hexdigest()[:16]
        path.write_text(f'{{"sum": "{checksum}", "line": {head}}}\n')
        with pytest.raises(StoreError, match=f"costs of version {NUMERICS + 1} of the numerics"):
            CostStore(path, HEAD)

    def test_another_matrix_of_the_same_name_is_refused(self, weights, path):
        lq.cost_table(weights, FORMATS[:1], rank=1, store=path)
        changed = weights["layers.0.q"].copy()
        changed[3, 3] = np.nextafter(changed[3, 3], 1, dtype=np.float32)
        with pytest.raises(StoreError, match=r"entries of .*'layers\.0\.q'"):
            lq.cost_table({**weights, "layers.0.q": changed}, FORMATS[:1], rank=1, store=path)

    @pytest.mark.sampled(10)
    @pytest.mark.parametrize("first", [None, "ones", "row", "gram"])
    @pytest.mark.parametrize("second", [None, "ones", "twos", "column", "gram", "damped", "swept"])
    def test_another_weighting_is_refused(self, weights, path, first, second):
        ones = np.ones((16, 24), dtype=np.float32)
        norms = {
            "ones": Elementwise(ones),
            "twos": Elementwise(2 * ones),
            "swept": Elementwise(ones, sweeps=2),
            "row": RowColumn(np.ones(16, dtype=np.float32), None),
            "column": RowColumn(None, np.ones(24, dtype=np.float32)),
            "gram": InputGram(np.eye(24)),
            "damped": InputGram(np.eye(24), damping=0.1),
        }
        own = {"a": weights["layers.0.q"]}
        lq.cost_table(own, [NF2], rank=1, store=path, weighting={"a": norms[first]} if first else None)
        options = {"rank": 1, "store": path, "weighting": {"a": norms[second]} if second else None}
        if first == second:
            lq.cost_table(own, [NF2], **options)
        else:
            with pytest.raises(StoreError, match=r"weighting .*'a'"):
                lq.cost_table(own, [NF2], **options)

    def test_the_same_entries_of_another_library_are_the_same_matrix(self, weights, path, xp):
        lq.cost_table(weights, FORMATS[:1], rank=1, store=path)
        before = path.read_bytes()
        lq.cost_table({name: xp.asarray(w.copy()) for name, w in weights.items()}, FORMATS[:1], rank=1, store=path)
        lq.cost_table({name: np.asfortranarray(w) for name, w in weights.items()}, FORMATS[:1], rank=1, store=path)
        assert path.read_bytes() == before

    def test_a_quantizer_that_is_a_function_cannot_be_stored(self, weights, path):
        with pytest.raises(InvalidArgumentError, match=r"^quantizer "):
            lq.cost_table(weights, [NF2], rank=1, store=path, quantizer=lambda w, _: lq.quantize(w, NF2))
        assert not path.exists()

    @pytest.mark.parametrize("line", [0, 1, 2])
    @pytest.mark.parametrize("change", [(b"0", b"1"), (b"{", b"["), (b'"', b"'"), (b"sum", b"sun"), (b"line", b"lime")])
    def test_a_corrupt_line_is_named(self, path, line, change):
        with CostStore(path, HEAD) as store:
            store.append(ROW)
            store.append(StoredRow("b", (2, 3), "c0ffee", "none", {"x": 0.5}))
        lines = path.read_bytes().splitlines(keepends=True)
        lines[line] = lines[line].replace(*change)
        path.write_bytes(b"".join(lines))
        for read in (CostStore.read, lambda own: CostStore(own, HEAD)):
            with pytest.raises(StoreError, match=rf"costs\.jsonl, line {line + 1}, "):
                read(path)

    def test_a_missing_line_break_in_the_middle_is_corrupt(self, path):
        with CostStore(path, HEAD) as store:
            store.append(ROW)
        path.write_bytes(path.read_bytes().replace(b"\n", b"", 1))
        with pytest.raises(StoreError, match="line 1"):
            CostStore(path, HEAD)

    @pytest.mark.parametrize("cost", [float("nan"), 1, "cheap"])
    def test_what_is_no_cost_is_not_read_or_not_written(self, path, cost):
        with pytest.raises((StoreError, ValueError)), CostStore(path, HEAD) as store:  # noqa: PT012
            store.append(StoredRow("a", (2, 3), "c0ffee", "none", {"x": cost}))
            CostStore.read(path)

    @pytest.mark.parametrize(
        "text",
        [
            b"a note", b"a note\nand more of it", b'{"costs": 1}', b"[]\n{", b'{"sum": "12', b'{"sum": "12"}\n{"sum"',
            (1 << 40).to_bytes(8, "little") + b'{"w": 1}\n\0\0',
        ],
        ids=repr,
    )  # fmt: skip
    def test_a_file_that_is_not_a_store_is_left_as_it_is(self, path, text):
        path.write_bytes(text)
        with pytest.raises(StoreError, match=r"costs\.jsonl, line 1"):
            CostStore(path, HEAD)
        assert path.read_bytes() == text

    def test_two_at_once_are_refused(self, path):
        with CostStore(path, HEAD) as store:
            with pytest.raises(StoreError, match=r"costs\.jsonl is in use"):
                CostStore(path, HEAD)
            store.append(ROW)
        with CostStore(path, HEAD) as store:
            assert store.rows == {"a": ROW}

    def test_a_folder_that_is_not_there_is_named(self, path):
        with pytest.raises(StoreError, match="nowhere"):
            CostStore(path.parent / "nowhere" / "costs", HEAD)
        with pytest.raises(StoreError, match=r"costs\.jsonl"):
            CostStore.read(path)


FULL_DISK = """
import resource, sys
from lqlora.costs import CostStore, StoredRow
from lqlora.errors import StoreError

row = {name: StoredRow(name, (2, 3), "c0ffee", "none", {"nf4/64:float16 rank 8": 0.1}) for name in "abc"}
with CostStore(sys.argv[1], {"seed": 0}) as store:
    store.append(row["a"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 20, resource.RLIM_INFINITY))
    try:
        store.append(row["b"])
    except StoreError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.append(row["c"])
"""


class TestWriting:
    @pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are those of other systems")
    def test_on_a_full_disk_the_line_is_taken_back_and_later_ones_are_whole(self, path):
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60, check=True
        )
        assert "costs.jsonl cannot be written" in done.stdout
        assert list(CostStore.read(path)) == ["a", "c"]
        with CostStore(path, HEAD) as store:
            assert list(store.rows) == ["a", "c"]

    def test_an_interrupt_takes_the_line_back(self, path, monkeypatch):
        def interrupt(_):
            raise KeyboardInterrupt

        with CostStore(path, HEAD) as store:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    store.append(ROW)
            assert store.rows == {}
            store.append(ROW)
        assert CostStore.read(path) == {"a": ROW}

    @pytest.mark.parametrize("costs", [{"x": 2}, {"x": True}, {"x": float("inf")}, {1: 1.0}])
    def test_a_cost_that_could_not_be_read_is_not_written(self, path, costs):
        with CostStore(path, HEAD) as store:
            store.append(ROW)
            with pytest.raises(StoreError, match=r"costs of 'b' must"):
                store.append(StoredRow("b", (2, 3), "c0ffee", "none", costs))
        assert CostStore.read(path) == {"a": ROW}

    def test_a_store_of_other_settings_keeps_its_torn_line(self, path):
        with CostStore(path, HEAD) as store:
            store.append(ROW)
        path.write_bytes(path.read_bytes()[:-1])
        before = path.read_bytes()
        with pytest.raises(StoreError, match="seed"):
            CostStore(path, {"seed": 1})
        assert path.read_bytes() == before

    def test_a_last_line_without_its_break_is_kept(self, path):
        with CostStore(path, HEAD) as store:
            store.append(ROW)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert CostStore.read(path) == {"a": ROW}
        with CostStore(path, HEAD) as store:
            assert store.rows == {"a": ROW}
        assert path.read_bytes() == whole

    def test_a_torn_line_that_cannot_be_cut_is_said(self, path, monkeypatch):
        with CostStore(path, HEAD) as store:
            store.append(ROW)
        path.write_bytes(path.read_bytes()[:-9])

        class Uncut(io.FileIO):
            def truncate(self, *_: object) -> int:
                raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("lqlora.costs.store.open_unshared", Uncut)
        with pytest.raises(StoreError, match=r"costs\.jsonl cannot be written"):
            CostStore(path, HEAD)

    def test_a_closed_store_refuses_rows(self, path):
        store = CostStore(path, HEAD)
        store.close()
        with pytest.raises(StoreError, match=r"costs\.jsonl is closed"):
            store.append(ROW)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_a_forked_process_does_not_keep_the_lock(self, path):
        store, (reading, writing) = CostStore(path, HEAD), os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, b".")  # by now it has closed its copy
            time.sleep(60)
            os._exit(0)
        try:
            os.read(reading, 1)
            store.append(ROW)
            store.close()
            with CostStore(path, HEAD) as again:
                assert again.rows == {"a": ROW}
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            os.close(writing)


class TestMerging:
    def test_machines_that_did_a_part_each_make_one_table(self, weights, path, tmp_path):
        parts = [tmp_path / "first", tmp_path / "second", tmp_path / "third"]
        names = list(weights)
        shares = [names[:2], names[1:3], names[3:]]
        for part, share in zip(parts, shares, strict=True):
            lq.cost_table({name: weights[name] for name in share}, FORMATS, rank=2, store=part)
        CostStore.merge(parts, path)
        assert CostStore.read(path).keys() == weights.keys()
        before = path.read_bytes()
        assert same(lq.cost_table(weights, FORMATS, rank=2, store=path), lq.cost_table(weights, FORMATS, rank=2))
        assert path.read_bytes() == before
        assert sorted(own.name for own in tmp_path.iterdir()) == ["costs.jsonl", "first", "second", "third"]

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"costs": {"nf4/64:float16 rank 8": 0.2}}, "is 0.2, but 0.1"),
            ({"content": "beef"}, "entries"),
            ({"weighting": "beef"}, "weighting"),
        ],
    )
    def test_stores_that_disagree_are_not_merged(self, path, tmp_path, other, said):
        for name, change in (("first", {}), ("second", other)):
            with CostStore(tmp_path / name, HEAD) as store:
                store.append(StoredRow(**{**ROW.__dict__, **change}))
        with pytest.raises(StoreError, match=said):
            CostStore.merge([tmp_path / "first", tmp_path / "second"], path)
        assert not path.exists()

    def test_stores_of_other_settings_are_not_merged(self, path, tmp_path):
        for seed in (0, 1):
            CostStore(tmp_path / str(seed), {"seed": seed}).close()
        with pytest.raises(StoreError, match="seed is 1, not 0"):
            CostStore.merge([tmp_path / "0", tmp_path / "1"], path)

    def test_no_file_is_overwritten(self, path, tmp_path):
        with CostStore(tmp_path / "first", HEAD) as store:
            store.append(ROW)
        path.write_text("precious")
        with pytest.raises(StoreError, match=r"costs\.jsonl"):
            CostStore.merge([tmp_path / "first"], path)
        assert path.read_text() == "precious"
        with pytest.raises(StoreError, match=r"^paths "):
            CostStore.merge([], tmp_path / "other")
