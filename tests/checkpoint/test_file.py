"""Checkpoint files: exact round trips, atomic writes, and errors for damaged or inconsistent content."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import struct
import time
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.checkpoint import _container as container
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_or_skip

if TYPE_CHECKING:
    from lqlora.checkpoint import StoredMatrix

TERNARY = lq.Codebook([-1, 0, 1], name="ternary")
FORMATS = [
    lq.BlockFormat.parse("nf4/64"),
    lq.BlockFormat.parse("nf3/16:float16"),
    lq.BlockFormat.parse("nf2/7:bfloat16"),
    lq.BlockFormat.parse("int5/8:u8/16:float16"),
    lq.BlockFormat.parse("nf8/1:u3+none/4:u8/256:bfloat16"),
    lq.BlockFormat(TERNARY, 5, lq.ScaleFormat(8, 256)),
    lq.BlockFormat(lq.Codebook([-2.5, -1.0, 0.0, 0.75, 3.0], name="nf4"), 9),  # a borrowed name
]


def _same_array(first, second) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def _assert_same_matrix(found: StoredMatrix, expected) -> None:
    quantized = expected.quantized.to(np)
    assert (found.quantized.format, found.quantized.shape) == (quantized.format, quantized.shape)
    arrays, back = quantized.to_arrays(), found.quantized.to_arrays()
    assert arrays.keys() == back.keys()
    assert all(_same_array(back[key], arrays[key]) for key in arrays)
    assert _same_array(found.lora_A, np.asarray(expected.lora_A))
    assert _same_array(found.lora_B, np.asarray(expected.lora_B))
    assert found.scaling == expected.scaling


def _decomposition(shape=(6, 10), fmt=FORMATS[3], rank=2, scaling=1.0):
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return lq.decompose(w, fmt, rank, scaling=scaling, max_iter=1)


@pytest.fixture
def path(tmp_path):
    """Write a valid file with matrices in two formats, plain tensors and metadata."""
    file = tmp_path / "model.safetensors"
    matrices = {"a.q_proj": _decomposition(), "b": _decomposition((16, 8), FORMATS[5], 1)}
    lq.save(file, matrices, {"norm": np.arange(5, dtype=np.float32)}, {"seed": 3})
    return file


def _parts(file) -> tuple[dict, bytes]:
    """Return the header and the data of a safetensors file."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write_parts(file, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _rewrite(file, change) -> None:
    """Change the JSON document inside a file."""
    header, data = _parts(file)
    document = json.loads(header["__metadata__"]["lqlora"])
    change(document)
    header["__metadata__"]["lqlora"] = json.dumps(document)
    _write_parts(file, header, data)


def _replace_tensors(file, change) -> None:
    """Change the tensors inside a file, and keep its JSON document."""
    text = _parts(file)[0]["__metadata__"]["lqlora"]
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, metadata={"lqlora": text})


def _assert_refused(file) -> None:
    for read in (lq.load, lq.verify, functools.partial(lq.load, mapped=True)):
        with pytest.raises(CheckpointError):
            read(file)


class TestRoundTrip:
    @settings(max_examples=40, deadline=None)
    @pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
    @given(
        fmt=st.sampled_from(FORMATS),
        rows=st.integers(1, 9),
        columns=st.integers(1, 17),
        rank=st.integers(0, 3),
        scaling=st.sampled_from([1.0, 0.5, 2.0]),
        seed=st.integers(0, 99),
    )
    def test_matrices_come_back_bit_for_bit(self, tmp_path_factory, fmt, rows, columns, rank, scaling, seed):
        w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
        d = lq.decompose(w, fmt, min(rank, rows, columns), scaling=scaling, max_iter=1)
        file = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
        lq.save(file, {"m": d})
        _assert_same_matrix(lq.load(file).matrices["m"], d)
        _assert_same_matrix(lq.verify(file).matrices["m"], d)
        dense = lq.dequantize(lq.load(file).matrices["m"].quantized)
        assert dense.tobytes() == lq.dequantize(d.quantized).tobytes()

    @pytest.mark.parametrize("fmt", FORMATS, ids=str)
    def test_torch_input_gives_the_same_file_content(self, tmp_path, fmt):
        require_or_skip("torch", is_installed("torch"))
        import torch

        w = np.random.default_rng(4).standard_normal((6, 10)).astype(np.float32)
        d = lq.decompose(torch.from_numpy(w), fmt, 2, max_iter=1)
        lq.save(tmp_path / "t", {"m": d}, {"half": torch.arange(3, dtype=torch.bfloat16)})
        content = lq.verify(tmp_path / "t")
        _assert_same_matrix(content.matrices["m"], d)
        assert content.tensors["half"].dtype == ml_dtypes.bfloat16

    @pytest.mark.parametrize(
        "tensor",
        [
            np.array(2.5, dtype=np.float32),
            np.zeros((0, 3), dtype=np.float32),
            np.arange(6, dtype=np.float64).reshape(2, 3).T,
            np.arange(8, dtype=np.float16)[::2],
            np.arange(4).astype(ml_dtypes.bfloat16),
            np.array([True, False]),
            np.arange(-3, 3, dtype=np.int64),
            np.arange(4, dtype=np.uint8),
        ],
        ids=["scalar", "empty", "transposed", "strided", "bfloat16", "bool", "int64", "uint8"],
    )
    def test_plain_tensors_come_back_bit_for_bit(self, tmp_path, tensor):
        lq.save(tmp_path / "t", {}, {"x": tensor})
        assert _same_array(lq.verify(tmp_path / "t").tensors["x"], tensor)
        assert _same_array(lq.load(tmp_path / "t", mapped=True).tensors["x"], tensor)

    def test_a_tensor_in_foreign_byte_order_keeps_its_values(self, tmp_path):
        lq.save(tmp_path / "t", {}, {"x": np.arange(4, dtype=">f4")})
        np.testing.assert_array_equal(lq.verify(tmp_path / "t").tensors["x"], np.arange(4))

    @pytest.mark.parametrize("padding", range(5))
    def test_a_mapped_file_has_the_same_content(self, path, padding):
        header, data = _parts(path)
        text = json.dumps(header).encode() + b" " * padding  # numbers may begin at any byte
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        before, read, mapped = path.read_bytes(), lq.load(path), lq.load(path, mapped=True)
        assert mapped.metadata == read.metadata
        assert list(mapped.tensors) == list(read.tensors)
        assert list(mapped.matrices) == list(read.matrices)
        for name, matrix in mapped.matrices.items():
            _assert_same_matrix(matrix, read.matrices[name])
            for array in matrix.quantized.to_arrays().values():
                assert array.flags.aligned
                array[...] = 0
        assert path.read_bytes() == before

    def test_metadata_comes_back(self, path):
        assert lq.load(path).metadata == {"seed": 3}

    def test_rank_zero_keeps_the_shapes_of_the_factors(self, tmp_path):
        lq.save(tmp_path / "t", {"m": _decomposition(rank=0)})
        stored = lq.verify(tmp_path / "t").matrices["m"]
        assert (stored.lora_A.shape, stored.lora_B.shape) == ((0, 10), (6, 0))

    def test_what_was_loaded_can_be_saved_again(self, path, tmp_path):
        content = lq.load(path)
        lq.save(tmp_path / "again", content.matrices, content.tensors, content.metadata)
        for name, matrix in lq.verify(tmp_path / "again").matrices.items():
            _assert_same_matrix(matrix, content.matrices[name])

    def test_the_same_content_is_the_same_file(self, tmp_path):
        # Written several times, because an order that depends on hashing may be equal by chance.
        d = _decomposition()
        for i in range(12):
            lq.save(tmp_path / str(i), {"m": d}, {"norm": np.ones(3)}, {"seed": 1})
        assert len({(tmp_path / str(i)).read_bytes() for i in range(12)}) == 1

    def test_only_a_codebook_without_a_standard_name_is_stored(self, path):
        names = set(_parts(path)[0])
        assert "b.quantized.codebook" in names
        assert "a.q_proj.quantized.codebook" not in names

    def test_tensors_have_the_documented_names(self, path):
        names = {name for name in _parts(path)[0] if name.startswith("a.q_proj.")}
        ends = {"quantized.codes", "quantized.scales.codes", "quantized.scales.scales", "quantized.scales.offset"}
        assert names == {f"a.q_proj.{end}" for end in ends | {"lora_A", "lora_B"}}


class TestWriting:
    def test_two_tensors_of_one_name_are_refused(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"m\.lora_A"):
            lq.save(tmp_path / "t", {"m": _decomposition()}, {"m.lora_A": np.zeros(3)})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["m.quantized.extra", "m.quantized.codebook"])
    def test_a_tensor_with_a_name_reserved_for_a_matrix_is_refused(self, tmp_path, name):
        # load() would take the tensor for an array of the matrix, and refuse the file that save() wrote.
        with pytest.raises(InvalidArgumentError, match=re.escape(name)):
            lq.save(tmp_path / "t", {"m": _decomposition()}, {name: np.zeros(3)})

    def test_a_name_that_safetensors_reserves_is_refused(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"tensors.*__metadata__"):
            lq.save(tmp_path / "t", {"m": _decomposition()}, {"__metadata__": np.zeros(3)})
        assert list(tmp_path.iterdir()) == []

    def test_a_tensor_next_to_a_matrix_is_kept(self, tmp_path):
        lq.save(tmp_path / "t", {"m": _decomposition()}, {"m.bias": np.ones(6), "m.quantizeds": np.ones(2)})
        assert sorted(lq.load(tmp_path / "t").tensors) == ["m.bias", "m.quantizeds"]

    @pytest.mark.parametrize("value", [float("nan"), {1, 2}, np.float32(1), b"bytes"])
    def test_metadata_that_is_not_json_is_refused(self, tmp_path, value):
        with pytest.raises(InvalidArgumentError, match=r"metadata.*JSON"):
            lq.save(tmp_path / "t", {"m": _decomposition()}, metadata={"key": value})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("place", ["missing/file", "taken/file"])
    def test_a_folder_that_cannot_hold_the_file_is_an_error(self, tmp_path, place):
        (tmp_path / "taken").write_text("a file, not a folder")
        with pytest.raises(CheckpointError, match=place):
            lq.save(tmp_path / place, {"m": _decomposition()})
        assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]

    def test_a_folder_is_not_replaced_by_a_file(self, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(CheckpointError, match="folder"):
            lq.save(tmp_path / "folder", {"m": _decomposition()})
        assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
    @pytest.mark.parametrize("step", ["save_file", "replace", "fsync"])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, path, monkeypatch, step, error):
        before = path.read_bytes()

        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(container if step == "save_file" else os, step, fail)
        with pytest.raises(CheckpointError, match="No space left"):
            lq.save(path, {"m": _decomposition()})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_an_interrupt_leaves_the_old_file_and_nothing_else(self, path, monkeypatch):
        before = path.read_bytes()

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(container, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lq.save(path, {"m": _decomposition()})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_success_replaces_the_old_file_and_leaves_nothing_else(self, path):
        lq.save(path, {"new": _decomposition()})
        assert list(lq.verify(path).matrices) == ["new"]
        assert list(path.parent.iterdir()) == [path]


class TestDamage:
    def test_a_missing_file(self, tmp_path):
        _assert_refused(tmp_path / "nowhere.safetensors")

    def test_a_folder(self, tmp_path):
        _assert_refused(tmp_path)

    @pytest.mark.parametrize(
        "text", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", b"{}"]
    )
    def test_a_file_of_something_else(self, tmp_path, text):
        (tmp_path / "t").write_bytes(text)
        _assert_refused(tmp_path / "t")

    def test_a_git_lfs_pointer_is_recognized(self, tmp_path):
        (tmp_path / "t").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointError, match="git-lfs"):
            lq.load(tmp_path / "t")

    def test_a_safetensors_file_of_someone_else(self, tmp_path):
        save_file({"x": np.ones(3)}, tmp_path / "t")
        with pytest.raises(CheckpointError, match="lqlora"):
            lq.load(tmp_path / "t")

    @settings(max_examples=60, deadline=None)
    @given(share=st.floats(0, 1, exclude_max=True))
    def test_any_truncation_is_found(self, tmp_path_factory, share):
        file = tmp_path_factory.getbasetemp() / "truncated.safetensors"
        lq.save(file, {"m": _decomposition()}, {"x": np.ones(3)})
        raw = file.read_bytes()
        file.write_bytes(raw[: int(share * len(raw))])
        _assert_refused(file)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_a_flipped_byte_is_found_by_verify_and_harms_no_reader(self, tmp_path_factory, data):
        file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
        if not file.exists():
            lq.save(file, {"m": _decomposition((3, 5))}, {"x": np.ones(3)})
        raw = bytearray(file.read_bytes())
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] ^= data.draw(st.integers(1, 255))
        damaged = file.with_suffix(".damaged")
        damaged.write_bytes(raw)
        with contextlib.suppress(CheckpointError):
            lq.load(damaged)
        header_end = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        try:
            found = lq.verify(damaged)
        except CheckpointError:
            return
        # In the header a space may turn into a tab, which leaves the content unchanged.
        assert position < header_end
        original = lq.load(file)
        _assert_same_matrix(found.matrices["m"], original.matrices["m"])
        assert (found.metadata, list(found.tensors)) == (original.metadata, list(original.tensors))

    def test_a_changed_byte_of_the_data_is_found_by_verify(self, path):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        lq.load(path)  # a plausible value: only the fingerprint knows
        with pytest.raises(CheckpointError, match="SHA-256"):
            lq.verify(path)

    def test_bytes_that_move_from_a_tensor_into_a_name_change_the_fingerprint(self, tmp_path):
        def fingerprint(tensors):
            lq.save(
                tmp_path / "t.safetensors", {}, {name: np.frombuffer(own, np.uint8) for name, own in tensors.items()}
            )
            header, _ = _parts(tmp_path / "t.safetensors")
            return json.loads(header["__metadata__"]["lqlora"])["sha256"]

        names = ["x uint8 (5,)\nABCDEy", 'x", "uint8", [5]], ["y']
        found = [fingerprint({"x": b"ABCDE", "y": b"Z"}), *(fingerprint({name: b"Z"}) for name in names)]
        assert len(set(found)) == len(found)

    def test_a_changed_scaling_is_found_by_verify(self, path):
        _rewrite(path, lambda document: document["matrices"]["b"].update(scaling=3.0))
        with pytest.raises(CheckpointError):
            lq.verify(path)

    def test_a_trailing_byte_is_found(self, path):
        path.write_bytes(path.read_bytes() + b"\0")
        _assert_refused(path)

    @pytest.mark.parametrize("key", ["spec", "matrices", "metadata"])
    def test_a_description_without_a_key_is_refused(self, path, key):
        _rewrite(path, lambda document: document.pop(key))
        _assert_refused(path)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("spec", 1), ("spec", "2"), ("matrices", []), ("matrices", {"b": []}), ("metadata", [])],
        ids=str,
    )
    def test_a_description_of_another_kind_is_refused(self, path, key, value):
        _rewrite(path, lambda document: document.update({key: value}))
        _assert_refused(path)

    @pytest.mark.parametrize("key", ["format", "shape", "scaling"])
    def test_a_matrix_without_a_key_is_refused(self, path, key):
        _rewrite(path, lambda document: document["matrices"]["b"].pop(key))
        _assert_refused(path)

    @pytest.mark.parametrize("name", ["b.lora_A", "b.lora_B"])
    def test_a_missing_tensor_is_named(self, path, name):
        _replace_tensors(path, lambda arrays: arrays.pop(name))
        with pytest.raises(CheckpointError, match=rf"{name}.*missing"):
            lq.load(path)

    def test_a_matrix_without_tensors_is_refused(self, path):
        _rewrite(path, lambda document: document["matrices"].update(c=document["matrices"]["b"]))
        _assert_refused(path)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "nf4/0"),
            ("format", "nf4/64"),
            ("format", "nf4/8" + ":u8/1" * 20_000),
            ("format", None),
            ("shape", [8, 17]),
            ("shape", [128]),
            ("shape", [-16, -8]),
            ("shape", [16.0, 8.0]),
            ("shape", [2**60, 2**60]),
            ("shape", 16),
            ("scaling", "one"),
            ("scaling", float("nan")),
            ("scaling", float("inf")),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_a_description_that_does_not_fit_the_data_is_refused(self, path, key, value):
        _rewrite(path, lambda document: document["matrices"]["b"].update({key: value}))
        _assert_refused(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000], ids=lambda text: text[:4])
    def test_a_description_that_is_not_a_json_object_is_refused(self, path, text):
        header, data = _parts(path)
        header["__metadata__"]["lqlora"] = text
        _write_parts(path, header, data)
        _assert_refused(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda a: a.pop("b.quantized.codes"),
            lambda a: a.pop("b.quantized.scales.offset"),
            lambda a: a.pop("b.quantized.codebook"),
            lambda a: a.pop("b.lora_A"),
            lambda a: a.pop("b.lora_B"),
            lambda a: a.update({"b.quantized.more": np.ones(1)}),
            lambda a: a.update({"b.quantized.codes": a["b.quantized.codes"][:-1]}),
            lambda a: a.update({"b.quantized.codes": a["b.quantized.codes"].view(np.int8)}),
            lambda a: a.update({"b.quantized.codes": np.full_like(a["b.quantized.codes"], 255)}),
            lambda a: a.update({"b.quantized.scales.scales": a["b.quantized.scales.scales"].astype(np.float16)}),
            lambda a: a.update({"b.quantized.scales.codes": a["b.quantized.scales.codes"][None]}),
            lambda a: a.update({"b.quantized.codebook": a["b.quantized.codebook"][::-1].copy()}),
            lambda a: a.update({"b.quantized.codebook": np.array([-1, np.nan, 1], dtype=np.float32)}),
            lambda a: a.update({"b.lora_A": a["b.lora_A"][:, 1:].copy()}),
            lambda a: a.update({"b.lora_B": a["b.lora_B"][1:]}),
            lambda a: a.update({"b.lora_A": a["b.lora_A"].ravel()}),
            lambda a: a.update({"b.lora_A": a["b.lora_A"].astype(np.int8)}),
        ],
        ids=[
            "no codes",
            "no offset",
            "no levels",
            "no lora_A",
            "no lora_B",
            "one more",
            "codes too short",
            "signed codes",
            "code beyond the codebook",
            "scales of another dtype",
            "codes in two dimensions",
            "levels not sorted",
            "levels not finite",
            "lora_A too narrow",
            "lora_B too short",
            "lora_A flat",
            "lora_A of integers",
        ],
    )
    def test_tensors_that_do_not_fit_are_refused(self, path, change):
        _replace_tensors(path, change)
        _assert_refused(path)

    @pytest.mark.parametrize(
        "name", ["norm", "m.lora_A", "m.lora_B", "m.quantized.scales.scales", "m.quantized.scales.offset"]
    )
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_that_are_not_finite_are_named_by_verify(self, tmp_path, name, value):
        # save() accepts such values, because a user may want to inspect a model that diverged.
        d = _decomposition()
        arrays = {f"m.quantized.{key}": array.copy() for key, array in d.quantized.to_arrays().items()}
        arrays |= {"m.lora_A": d.lora_A.copy(), "m.lora_B": d.lora_B.copy(), "norm": np.ones(3, dtype=np.float32)}
        arrays[name].flat[0] = value
        stored = {key.removeprefix("m.quantized."): array for key, array in arrays.items() if ".quantized." in key}
        quantized = lq.QuantizedArray.from_arrays(stored, d.quantized.format, d.quantized.shape)
        matrix = lq.StoredMatrix(quantized, arrays["m.lora_A"], arrays["m.lora_B"])
        lq.save(tmp_path / "t", {"m": matrix}, {"norm": arrays["norm"]})
        with pytest.raises(CheckpointError, match=re.escape(name)):
            lq.verify(tmp_path / "t")

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I7"])
    def test_dtypes_without_a_numpy_equivalent_are_refused(self, path, dtype):
        header, data = _parts(path)
        header["norm"] = {
            "dtype": dtype,
            "shape": header["norm"]["shape"],
            "data_offsets": header["norm"]["data_offsets"],
        }
        size = header["norm"]["data_offsets"][1] - header["norm"]["data_offsets"][0]
        header["norm"]["shape"] = [2 * size if dtype == "F4" else size]
        _write_parts(path, header, data)
        _assert_refused(path)

    def test_more_dimensions_than_numpy_has_are_refused(self, path):
        header, data = _parts(path)
        header["norm"]["shape"] = [*header["norm"]["shape"], *[1] * 100]
        _write_parts(path, header, data)
        _assert_refused(path)


@pytest.mark.parametrize(
    "matrices",
    [
        {"a": lambda d: d, "a.quantized": lambda d: d},
        {"a": lambda d: lq.StoredMatrix(d.quantized, d.lora_A[:, 1:], d.lora_B)},
    ],
    ids=["names that run into each other", "factors that do not fit"],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, matrices):
    made = {name: make(_decomposition()) for name, make in matrices.items()}
    (tmp_path / "t").write_bytes(b"precious")
    with pytest.raises(InvalidArgumentError, match=r"matrices.*'a'"):
        lq.save(tmp_path / "t", made)
    assert (tmp_path / "t").read_bytes() == b"precious"


def test_quantized_arrays_are_stored_without_factors(tmp_path):
    q = lq.quantize(np.eye(6, 10, dtype=np.float32), FORMATS[3])
    lq.save(tmp_path / "m.safetensors", {"up": q, "down": _decomposition()})
    found = lq.load(tmp_path / "m.safetensors").matrices["up"]
    expected = lq.StoredMatrix(q, np.zeros((0, 10), np.float32), np.zeros((6, 0), np.float32))
    _assert_same_matrix(found, expected)
    assert np.array_equal(found.reconstruct(), lq.dequantize(q))


def test_a_stored_matrix_has_the_approximation_of_the_decomposition(tmp_path):
    d = _decomposition(scaling=0.5)
    lq.save(tmp_path / "m.safetensors", {"up": d})
    assert np.array_equal(lq.load(tmp_path / "m.safetensors").matrices["up"].reconstruct(), d.reconstruct())


@pytest.mark.parametrize(
    "wrong", [np.eye(4), None, "up", {"quantized": 5}, lq.quantize(np.ones(8, np.float32), FORMATS[0])], ids=repr
)
def test_what_is_no_matrix_is_not_saved(tmp_path, wrong):
    with pytest.raises(InvalidArgumentError, match="matrices must be"):
        lq.save(tmp_path / "m.safetensors", {"up": wrong})
    stack = lq.quantize(np.ones((2, 4, 8), np.float32), FORMATS[0], batch_dims=1)
    with pytest.raises(InvalidArgumentError, match="matrices must be"):
        lq.save(tmp_path / "m.safetensors", {"up": stack})
    assert list(tmp_path.iterdir()) == []


def test_numbers_as_keys_of_metadata_become_text(tmp_path):
    lq.save(tmp_path / "t", {"m": _decomposition()}, metadata={9: 1, 10: 2})
    assert lq.verify(tmp_path / "t").metadata == {"9": 1, "10": 2}


class TestNumberOfMatrices:
    @pytest.mark.parametrize("name", ["m.quantized.x", "a.quantized.m.quantized.x", "m.quantized.quantized.codes"])
    def test_a_tensor_that_would_be_a_part_of_a_matrix_is_refused(self, tmp_path, name):
        matrices = {"m": _decomposition(), "a.quantized.m": _decomposition()}
        with pytest.raises(InvalidArgumentError, match="reserved"):
            lq.save(tmp_path / "t", matrices, {name: np.ones(1)})
        lq.save(
            tmp_path / "t", matrices, {"m.quantize": np.ones(1), "x.m.quantized": np.ones(1), "quantized.x": np.ones(1)}
        )
        assert sorted(lq.load(tmp_path / "t").tensors) == ["m.quantize", "quantized.x", "x.m.quantized"]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("quantized.codes", 255),
            ("quantized.scales.offset", -1),
            ("quantized.scales.scales", -1),
            ("quantized.scales.scales", 3.4e38),
            ("quantized.levels", [[0, 2, 1, 3]]),
            ("lora_A", 3),
        ],
        ids=["code", "sign of the offset", "sign of a scale", "scales that overflow", "order of levels", "dtype"],
    )
    @pytest.mark.parametrize("is_finite", [True, False])
    def test_of_many_matrices_of_one_kind_the_one_with_a_fault_is_named(self, tmp_path, key, value, is_finite):
        spelling = "nf2+fit/5:u8/16:float32" if key.endswith("levels") else "int3/5:u8/16:float32"
        matrix = _decomposition(fmt=lq.BlockFormat.parse(spelling))
        matrices = {f"experts.{index}": matrix for index in range(9)}
        lq.save(tmp_path / "t", matrices | {"wide": _decomposition((2, 30), matrix.quantized.format)})

        def change(arrays):
            name = f"experts.5.{key}"
            arrays[name] = np.full_like(arrays[name], value, dtype=np.int8 if key == "lora_A" else None)
            if key.endswith("scales.scales"):
                arrays["experts.5.quantized.scales.offset"][:] = 3.4e38
            if not is_finite:
                arrays["experts.2.quantized.scales.scales"][:] = np.nan

        _replace_tensors(tmp_path / "t", change)
        with pytest.raises(CheckpointError, match=r"matrices\['experts\.5'\]"):
            lq.load(tmp_path / "t")

    def test_matrices_of_one_kind_come_back_bit_for_bit(self, tmp_path):
        matrices = {
            f"{fmt}.{index}": lq.decompose(np.eye(6, 10) * index, fmt, rank=1, max_iter=1)
            for index in range(1, 4)
            for fmt in FORMATS
        }
        lq.save(tmp_path / "t", matrices)
        for name, matrix in lq.verify(tmp_path / "t").matrices.items():
            _assert_same_matrix(matrix, matrices[name])

    def test_arrays_with_all_dimensions_of_numpy_are_not_joined(self, tmp_path):
        deep = np.ones((1,) * 64, dtype=np.float32)
        matrix = _decomposition()
        lq.save(tmp_path / "t", {"a": matrix, "b": matrix}, {"x": deep, "y": deep})
        assert _same_array(lq.verify(tmp_path / "t").tensors["y"], deep)
        codes = deep.astype(np.uint8)
        _replace_tensors(tmp_path / "t", lambda a: a.update({"a.quantized.codes": codes, "b.quantized.codes": codes}))
        _assert_refused(tmp_path / "t")

    def test_of_many_tensors_of_one_kind_the_one_that_is_not_finite_is_named(self, tmp_path):
        tensors = {f"norm.{index}": np.full(4, 1e38, dtype=np.float32) for index in range(9)}
        tensors["norm.5"][2] = np.inf
        lq.save(tmp_path / "t", {"m": _decomposition()}, tensors)
        with pytest.raises(CheckpointError, match=r"'norm\.5' has 1 non-finite value\(s\), the first at index \(2,\)"):
            lq.verify(tmp_path / "t")

    @pytest.mark.slow
    def test_time_grows_with_the_number_of_matrices_and_not_with_its_square(self, tmp_path):
        one, times = _decomposition(), {}
        for count in (1000, 4000):
            matrices = {f"layers.{i}.up": one for i in range(count)}
            tensors = {f"layers.{i}.norm.weight": np.ones(1) for i in range(count)}
            begin = time.process_time()
            lq.save(tmp_path / "t", matrices, tensors)
            assert len(lq.verify(tmp_path / "t").matrices) == count
            times[count] = time.process_time() - begin
        assert times[4000] < 8 * times[1000], times  # four times as many: 16 times as long if it were the square
