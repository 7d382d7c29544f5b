"""Headers of GGUF files that are damaged or forged: one sentence, soon, and no more memory than the file has."""

from __future__ import annotations

import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest

from lqlora.errors import CheckpointError
from lqlora.integrations import gguf as reader
from lqlora.integrations._gguf_header import read_header
from tests.requirements import require_module

require_module("gguf")
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

U8, I32, F32, STRING, ARRAY, U64 = 0, 5, 6, 8, 9, 10


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def setting(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def elements(kind, count, raw=b""):
    return struct.pack("<IQ", kind, count) + raw


def tensor(name, lengths, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, kind, offset)


ARCHITECTURE = setting("general.architecture", STRING, text("llama"))


def file_of(settings=(ARCHITECTURE,), tensors=(), values=64, counts=None, begin=b"GGUF\3\0\0\0"):
    """Return the bytes of a file, whose counts may be wrong."""
    header = begin + struct.pack("<QQ", *(counts or (len(tensors), len(settings)))) + b"".join([*settings, *tensors])
    return header + bytes(-len(header) % 32 + values)


def key(name, value):
    return setting(name, U64, struct.pack("<Q", value))


#: Files that must be refused, and what the sentence names.
FAULTS = {
    "an array of 2**40 numbers": (file_of([setting("a.b", ARRAY, elements(I32, 2**40))]), "a.b.*4398046511104"),
    "an array of 2**63 bytes": (file_of([setting("a.b", ARRAY, elements(U8, 2**63))]), "a.b.*9223372036854775808"),
    "an array of 2**40 strings": (file_of([setting("a.b", ARRAY, elements(STRING, 2**40))]), "a.b.*1099511627776"),
    "strings beyond the file": (
        file_of([setting("a.b", ARRAY, elements(STRING, 2, text("x") + struct.pack("<Q", 2**62)))]),
        "a.b.*beyond the file",
    ),
    "nested arrays": (file_of([setting("a.b", ARRAY, elements(ARRAY, 1, elements(U8, 1, b"x")))]), "a.b.*type 9"),
    "a string of 2**62 bytes": (
        file_of([setting("a.b", STRING, struct.pack("<Q", 2**62))]),
        "a.b.*4611686018427387904",
    ),
    "a key of 2**62 bytes": (file_of([struct.pack("<Q", 2**62)]), "setting 0.*4611686018427387904"),
    "a key that is no text": (file_of([setting(b"\xff\xfe", U8, b"x")]), "setting 0.*UTF-8"),
    "a key used twice": (file_of([ARCHITECTURE, ARCHITECTURE]), "general.architecture.*twice"),
    "an unknown type of value": (file_of([setting("a.b", 13, b"")]), "a.b.*13"),
    "2**60 settings": (file_of(counts=(0, 2**60)), "1152921504606846976 settings"),
    "2**60 tensors": (file_of(counts=(2**60, 1)), "1152921504606846976 tensors"),
    "more tensors than bytes": (file_of(counts=(100, 1)), "100 tensors"),
    "a setting too many": (file_of(counts=(0, 3)), "setting .*twice"),
    "version 1": (file_of(begin=b"GGUF\1\0\0\0"), "version 1"),
    "version 4": (file_of(begin=b"GGUF\4\0\0\0"), "version 4"),
    "big-endian": (file_of(begin=b"GGUF\0\0\0\3"), "big-endian"),
    "another magic": (file_of(begin=b"GGML\3\0\0\0"), "GGUF"),
    "alignment 0": (file_of([key("general.alignment", 0)]), "general.alignment.*got 0"),
    "alignment 24": (file_of([key("general.alignment", 24)]), "general.alignment.*got 24"),
    "alignment 2**63": (file_of([key("general.alignment", 2**63)], [tensor("t", [4])]), "'t'.*9223372036854775808"),
    "an alignment that is a list": (
        file_of([setting("general.alignment", ARRAY, elements(U8, 1, b"x"))]),
        "general.alignment.*a list of 1",
    ),
    "a tensor beyond the file": (file_of(tensors=[tensor("t", [17])]), "'t'.*68 bytes"),
    "an offset beyond the file": (file_of(tensors=[tensor("t", [1], offset=2**63)]), "'t'.*beyond the file"),
    "an offset between alignments": (file_of(tensors=[tensor("t", [1], offset=4)]), "'t'.*multiple of 32, got 4"),
    "lengths whose product overflows": (
        file_of(tensors=[tensor("t", [2**32, 2**32])]),
        f"'t'.*{4 * 2**64} bytes",
    ),
    "a length of 0": (file_of(tensors=[tensor("t", [2**62, 0])]), "'t'.*at least 1"),
    "five dimensions": (file_of(tensors=[tensor("t", [1] * 5)]), "'t'.*got 5"),
    "2**32 - 1 dimensions": (file_of(tensors=[text("t") + b"\xff" * 40]), "'t'.*got 4294967295"),
    "an unknown type of tensor": (file_of(tensors=[tensor("t", [1], kind=99)]), "'t'.*type 99"),
    "a removed type of tensor": (file_of(tensors=[tensor("t", [32], kind=4)]), "'t'.*type 4"),
    "a row that is no whole block": (file_of(tensors=[tensor("t", [31], kind=8)]), "'t'.*multiple of 32.*31"),
    "a tensor used twice": (file_of(tensors=[tensor("t", [1]), tensor("t", [1], offset=32)]), "'t'.*twice"),
    "tensors that overlap": (file_of(tensors=[tensor("t", [16]), tensor("u", [1], offset=32)]), "'u'.*another tensor"),
    "a name with an escape": (file_of(tensors=[tensor("\x1b[2J\u202e", [17])]), r"x1b\[2J.*68 bytes"),
    "a name of 60,000 letters": (file_of(tensors=[tensor("n" * 60_000, [17])]), "n{50}.*68 bytes"),
}
FAULTS |= {
    f"{architecture!r:.20} instead of llama": (
        file_of([setting("general.architecture", STRING, text(architecture))]),
        "'llama'",
    )
    for architecture in ("gpt2", "\x1b[31m", "", "x" * 5000, "llama\0")
}


@pytest.mark.parametrize(("content", "named"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_one_sentence_that_names_the_file_the_place_and_the_value(tmp_path, content, named):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=rf"m\.gguf .*{named}") as caught:
        reader.linear_weights(path)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert len(message) <= 400
    assert message.isprintable()


def test_every_truncation_is_refused_without_a_warning(tmp_path):
    write_tiny_llama(tmp_path / "whole.gguf", change=lambda weights: [weights.pop(k) for k in list(weights)[3:]])
    whole = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in [*range(0, 200, 3), *range(200, len(whole) - 64, 2999)]:
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=r"m\.gguf"):
                reader.linear_weights(path)


@pytest.mark.parametrize("name", ["a folder", "missing", "zero\0byte", "n" * 300])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "a folder").mkdir()
    with pytest.raises(CheckpointError) as caught:
        reader.linear_weights(tmp_path / name)
    assert len(str(caught.value)) <= 400
    assert str(caught.value).isprintable()


def test_a_header_of_many_strings_takes_no_memory(tmp_path):
    # A reader that keeps an object for each element takes more than a hundred bytes for each of these.
    many = 40_000
    tokens = setting("tokenizer.ggml.tokens", ARRAY, elements(STRING, many, text("ab") * many))
    types = setting("tokenizer.ggml.token_type", ARRAY, elements(U8, 10 * many, bytes(10 * many)))
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of([ARCHITECTURE, tokens, types]))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count"):
        reader.linear_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**17


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("llama.block_count", [2**31, 2**62, 0, -1, 1, 3, "2", [2, 2], 2.0]),
            ("llama.attention.head_count", [0, -4, 2**40, [4, 4], "4", 4.0, 3]),
            ("llama.attention.head_count_kv", [0, 3, 8, [2, 2]]),
            ("llama.embedding_length", [0, 2**40, [32], 32.0]),
            ("llama.feed_forward_length", [0, 2**40, [64, 64]]),
            ("llama.context_length", [0, 2**31, "many"]),
            ("llama.attention.layer_norm_rms_epsilon", [float("nan"), float("inf"), 0.0, -1.0, "small", [1]]),
            ("llama.rope.freq_base", [float("nan"), float("-inf"), 0.0]),
            ("general.type", ["adapter", "imatrix", 5]),
        ],
    )
    def test_a_setting_of_another_value_is_named(self, tmp_path, name, values):
        for value in values:
            write_tiny_llama(tmp_path / "m.gguf", settings={name: value})
            with pytest.raises(CheckpointError, match=rf"m\.gguf .*({name}|head_count|rows)") as caught:
                reader.linear_weights(tmp_path / "m.gguf")
            assert len(str(caught.value)) <= 400

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"llama.embedding_length": 64}, "shape"),
            ({"llama.feed_forward_length": 2**24}, "16777216"),
            ({"llama.attention.head_count": 32, "llama.attention.head_count_kv": 16}, "rows|embedding_length"),
            ({"llama.rope.scaling.type": "yarn"}, "yarn"),
            ({"tokenizer.ggml.model": "no such model"}, "tokenizer"),
        ],
    )
    def test_settings_that_contradict_the_tensors_are_refused_before_a_model_is_made(self, tmp_path, settings, named):
        require_module("torch")
        require_module("transformers")
        write_tiny_llama(tmp_path / "m.gguf", settings=settings)
        with pytest.raises(CheckpointError, match=rf"m\.gguf .*({named})") as caught:
            reader.load_llama(tmp_path / "m.gguf")
        assert len(str(caught.value)) <= 400
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("name", ["blk.2.ffn_up.weight", "blk.7.ffn_up.weight", "blk.999999999.x"])
    def test_a_block_beyond_the_count_is_refused(self, tmp_path, name):
        extra = {f"model.layers.{name.split('.')[1]}.mlp.up_proj.weight": np.ones((64, 32), dtype=np.float32)}
        write_tiny_llama(tmp_path / "m.gguf", change=lambda weights: weights.update(extra))
        with pytest.raises(CheckpointError, match=r"llama\.block_count 2, .* 3 blocks"):
            reader.linear_weights(tmp_path / "m.gguf")

    def test_two_tensors_of_one_name_are_refused(self, tmp_path):
        extra = {
            "model.layers.0.x.y.weight": np.ones((4, 4), np.float32),
            "model.layers.0.x.y": np.ones((4, 4), np.float32),
        }
        write_tiny_llama(tmp_path / "m.gguf", change=lambda weights: weights.update(extra))
        with pytest.raises(CheckpointError, match=r"two matrices.*blk\.0\.x"):
            reader.linear_weights(tmp_path / "m.gguf")


class TestParts:
    @pytest.fixture
    def parts(self, tmp_path):
        """The weights of a model, and its files."""
        weights = write_tiny_llama(tmp_path / "m.gguf", tensors_per_part=8)
        return weights, sorted(tmp_path.glob("*.gguf"))

    def test_each_part_stands_for_the_model(self, parts):
        weights, files = parts
        assert [file.name for file in files] == [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
        expected = {name.removesuffix(".weight") for name, w in weights.items() if w.ndim == 2}
        for file in files:
            contents = reader.open_llama(file)
            assert contents.files == tuple(files)
            assert set(contents.weights) == expected
        for name, load in contents.weights.items():
            np.testing.assert_array_equal(load(), weights[f"{name}.weight"], err_msg=name)

    def test_a_model_in_parts_is_loaded_with_its_tokenizer(self, parts):
        require_module("torch")
        require_module("transformers")
        weights, files = parts
        model, tokenizer = reader.load_llama(files[1])
        for name, w in weights.items():
            np.testing.assert_array_equal(model.state_dict()[name].numpy(), w, err_msg=name)
        assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_a_missing_part_is_named(self, parts, missing):
        _, files = parts
        files[missing].unlink()
        with pytest.raises(
            CheckpointError, match=rf"part {missing + 1} is missing.*m-0000{missing + 1}-of-00003\.gguf"
        ):
            reader.linear_weights(files[missing - 1])

    def test_a_part_under_another_name_is_refused(self, parts):
        _, files = parts
        with pytest.raises(CheckpointError, match=r"single\.gguf.*3 parts"):
            reader.linear_weights(files[0].rename(files[0].with_name("single.gguf")))

    def test_a_part_in_the_place_of_another_is_refused(self, parts):
        _, files = parts
        files[1].write_bytes(files[2].read_bytes())
        with pytest.raises(CheckpointError, match=r"00002-of-00003.*split\.no 1.*got 2"):
            reader.linear_weights(files[0])

    @pytest.mark.parametrize("number", [0, 4])
    def test_a_part_beyond_the_count_is_refused(self, parts, number):
        _, files = parts
        with pytest.raises(CheckpointError, match=rf"part {number} of 3"):
            reader.linear_weights(files[1].rename(files[1].with_name(f"m-0000{number}-of-00003.gguf")))

    def test_a_whole_model_named_as_a_part_is_refused(self, tmp_path):
        write_tiny_llama(tmp_path / "m.gguf")
        path = (tmp_path / "m.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
        with pytest.raises(CheckpointError, match=r"2 parts.*split\.count is 1"):
            reader.linear_weights(path)
        assert reader.linear_weights(path.rename(tmp_path / "m-00001-of-00001.gguf"))

    def test_a_part_with_tensors_of_another_is_refused(self, parts):
        _, files = parts
        number = files[1].read_bytes().index(b"split.no") + 12  # behind the key and the type of the value
        raw = bytearray(files[0].read_bytes())
        at = raw.index(b"split.no") + 12
        raw[at : at + 2] = files[1].read_bytes()[number : number + 2]
        files[1].write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"00002-of-00003.*'token_embd\.weight'.*another part"):
            reader.linear_weights(files[0])

    def test_another_number_of_tensors_than_stated_is_refused(self, parts):
        _, files = parts
        raw = bytearray(files[0].read_bytes())
        at = raw.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
        raw[at] += 1
        files[0].write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"split\.tensors\.count 21, .* 20 tensors"):
            reader.linear_weights(files[0])

    @pytest.mark.parametrize("count", [0, -1, 2**40, "3", [3], 2.0])
    def test_another_count_of_parts_is_refused(self, tmp_path, count):
        write_tiny_llama(tmp_path / "m.gguf", settings={"split.count": count})
        with pytest.raises(CheckpointError, match=r"split\.count"):
            reader.linear_weights(tmp_path / "m.gguf")
        path = (tmp_path / "m.gguf").rename(tmp_path / "m-00001-of-00003.gguf")
        with pytest.raises(CheckpointError, match=r"split\.count"):
            reader.linear_weights(path)


def test_what_is_no_matrix_is_listed(tmp_path):
    extra = {"model.layers.0.experts.weight": np.ones((2, 4, 8), np.float32)}
    write_tiny_llama(tmp_path / "m.gguf", change=lambda weights: weights.update(extra))
    contents = reader.open_llama(tmp_path / "m.gguf")
    assert "model.layers.0.experts" not in contents.weights
    assert contents.left_out["blk.0.experts.weight"] == ("of 3 dimensions", 256)
    assert contents.describe_left_out().startswith("Left out: 5 tensors of 1 dimension (640 bytes; ")
    assert "1 tensor of 3 dimensions (256 bytes; blk.0.experts.weight)." in contents.describe_left_out()


def test_damaged_scales_decode_without_a_warning(tmp_path):
    path = tmp_path / "m.gguf"
    write_tiny_llama(path)
    place = read_header(path, {0: (1, 4), 8: (32, 34)}).tensors["blk.1.ffn_down.weight"]
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x00\x7c" + bytes(32))  # an infinite scale, and codes of zero
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = reader.linear_weights(path)["model.layers.1.mlp.down_proj"]()
    assert np.isnan(values[0, :32]).all()
    assert np.isfinite(values[1:]).all()
