"""Files of factors: what is read is what was written, or one error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint._container import digest
from lqlora.checkpoint.factors import base_fingerprint, read_factors, write_factors
from lqlora.errors import CheckpointError, InvalidArgumentError

FORMAT = lq.BlockFormat.parse("nf4/8:float32")
RNG = np.random.default_rng(0)


def _matrix(rank: int = 2, scaling: float = 0.5) -> StoredMatrix:
    w = RNG.standard_normal((6, 8)).astype(np.float32)
    factors = RNG.standard_normal((rank, 8)).astype(np.float32), RNG.standard_normal((6, rank)).astype(np.float16)
    return StoredMatrix(lq.quantize(w, FORMAT), *factors, scaling)


@pytest.fixture
def path(tmp_path):
    write_factors(tmp_path / "f", {"a": _matrix(), "a.b": _matrix(0, -1.0)}, {"note": "mine"})
    return tmp_path / "f"


def _rewrite(path, change, *, rehash: bool = True) -> None:
    """Change the tensors and the document of a file."""
    arrays = load_file(path)
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["lqlora_factors"])
    change(arrays, document)
    if rehash:
        document["sha256"] = digest(arrays, document)
    save_file(arrays, path, metadata={"lqlora_factors": json.dumps(document)})


class TestRoundTrip:
    def test_arrays_are_bit_equal(self, tmp_path):
        given = {"a": _matrix(), "": _matrix(0, 3.0), "löwe": _matrix(1)}
        write_factors(tmp_path / "f", given, {"note": ["mine", None]})
        content = read_factors(tmp_path / "f")
        assert content.metadata == {"note": ["mine", None]}
        assert content.factors.keys() == given.keys()
        for name, own in content.factors.items():
            for key in ("lora_A", "lora_B"):
                found, expected = getattr(own, key), getattr(given[name], key)
                assert found.dtype == expected.dtype
                assert np.array_equal(found, expected)
            assert own.scaling == given[name].scaling
            assert own.base == base_fingerprint(given[name].quantized)

    def test_equal_content_gives_equal_bytes(self, tmp_path):
        matrix = _matrix()
        for name in "ab":
            write_factors(tmp_path / name, {"m": matrix})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_a_failure_leaves_the_old_file(self, path, monkeypatch):
        before = path.read_bytes()

        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lqlora.checkpoint._container.save_file", fail)
        with pytest.raises(CheckpointError, match="No space"):
            write_factors(path, {"a": _matrix()})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


class TestFingerprint:
    def test_it_depends_on_codes_scales_format_and_shape(self):
        w = RNG.standard_normal((6, 8)).astype(np.float32)
        made = [
            lq.quantize(w, FORMAT),
            lq.quantize(2 * w, FORMAT),
            lq.quantize(w[::-1], FORMAT),
            lq.quantize(w.reshape(8, 6), FORMAT),
            lq.quantize(w, lq.BlockFormat.parse("nf4/16:float32")),
            lq.quantize(w, lq.BlockFormat.parse("nf4/8:u8/16:float32")),
        ]
        assert len({base_fingerprint(q) for q in made}) == len(made)
        assert base_fingerprint(lq.quantize(w.copy(), FORMAT)) == base_fingerprint(made[0])


class TestDamage:
    @pytest.mark.parametrize("rehash", [False, True])
    @pytest.mark.parametrize(
        ("change", "place"),
        [
            (lambda arrays, _: arrays["a.lora_A"].__setitem__((0, 0), np.nan), "a"),
            (lambda arrays, _: arrays.pop("a.lora_B"), "a"),
            (lambda arrays, _: arrays.update(more=np.ones(2)), "factors"),
            (lambda arrays, _: arrays.update({"a.lora_A": np.ones((3, 8))}), "a"),
            (lambda arrays, _: arrays.update({"a.lora_A": np.ones((2, 8), np.int32)}), "a"),
            (lambda arrays, _: arrays.update({"a.lora_A": np.ones(2)}), "a"),
            (lambda _, document: document["factors"]["a"].update(scaling="1"), "scaling"),
            (lambda _, document: document["factors"]["a"].pop("base"), "base"),
            (lambda _, document: document.update(factors=[]), "factors"),
            (lambda _, document: document.update(spec=2), "spec"),
            (lambda _, document: document.pop("metadata"), "metadata"),
        ],
        ids=[
            "nan",
            "missing",
            "more",
            "rank",
            "integers",
            "vector",
            "text",
            "no base",
            "list",
            "version",
            "no metadata",
        ],
    )
    def test_it_is_refused(self, path, change, place, rehash):
        _rewrite(path, change, rehash=rehash)
        with pytest.raises(CheckpointError, match=place if rehash else f"{place}|sha256") as caught:
            read_factors(path)
        assert str(path) in str(caught.value)

    def test_one_changed_byte(self, path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="sha256"):
            read_factors(path)

    def test_other_files(self, path, tmp_path):
        lq.save(tmp_path / "m", {"a": _matrix()})
        with pytest.raises(CheckpointError, match=r"lqlora\.nn\.save_factors did not write"):
            read_factors(tmp_path / "m")
        with pytest.raises(CheckpointError, match=r"lqlora\.save did not write"):
            lq.load(path)
        path.write_bytes(path.read_bytes()[:-9])
        for wrong in (path, tmp_path / "nowhere"):
            with pytest.raises(CheckpointError, match=str(wrong)):
                read_factors(wrong)


@pytest.mark.parametrize(
    ("matrices", "metadata", "place"),
    [
        ({"a": _matrix(scaling=float("inf"))}, {}, "inf"),
        ({"\ud800": _matrix()}, {}, "Unicode"),
        ({"a": _matrix()}, {"x": object()}, "metadata"),
        ({"a": StoredMatrix(_matrix().quantized, np.full((2, 8), np.inf), np.ones((6, 2)))}, {}, "lora_A"),
        ({"a": StoredMatrix(_matrix().quantized, np.ones((2, 8)), np.ones((6, 3)))}, {}, r"\(6, 3\)"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, matrices, metadata, place):
    with pytest.raises(InvalidArgumentError, match=place):
        write_factors(tmp_path / "f", matrices, metadata)
    assert list(tmp_path.iterdir()) == []
