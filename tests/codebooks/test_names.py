from __future__ import annotations

import json
import math

import pytest

from lqlora import NF4, BlockFormat, Codebook, affine, dynamic8, fp4, logarithmic, small_float, student_float, uniform
from lqlora.codebooks import (
    AF4,
    FP4_BNB,
    abnormal_float,
    block_optimal,
    by_name,
    check_work,
    codebook_from_json,
    codebook_from_text,
    codebook_to_json,
    codebook_to_text,
    is_standard,
)
from lqlora.errors import FormatError, InvalidArgumentError

#: One name for each spelling, and its codebook.
SPELLED = {
    "nf4": NF4,
    "int8": uniform(8),
    "int4s": uniform(4, normalization="signed"),
    "uint1": uniform(1, signed=False),
    "affine4": affine(4),
    "e4m3": small_float(4, 3),
    "fp4": fp4(),
    "fp4-bnb": FP4_BNB,
    "dynamic8": dynamic8(),
    "udynamic8": dynamic8(signed=False),
    "log8": logarithmic(8),
    "af4": AF4,
    "af3-128": abnormal_float(3, 128),
    "bof4-64": block_optimal(4, 64),
    "bof4s-64": block_optimal(4, 64, signed=True),
    "sf4": student_float(4),
    "sf3-7": student_float(3, 7),
}
FAMILIES = {"nf": 2, "int": 2, "uint": 1, "affine": 1, "log": 3, "sf": 2}


@pytest.mark.parametrize("name", SPELLED)
def test_names_give_their_codebooks(name):
    codebook = by_name(name)
    assert codebook == SPELLED[name]
    assert (codebook.name, SPELLED[name].name) == (name, name)
    assert is_standard(codebook)


@pytest.mark.parametrize("name", [f"{family}{bits}" for family, least in FAMILIES.items() for bits in range(least, 9)])
def test_families_are_known_for_all_their_bits(name):
    assert by_name(name).name == name


@pytest.mark.parametrize("name", SPELLED)
def test_formats_spell_every_name(name):
    assert str(BlockFormat.parse(f"{name}/64:float32")) == f"{name}/64:float32"


def test_the_table_of_af4_has_a_longer_name_too():
    assert by_name("af4-64") is AF4


def test_another_normalization_is_not_standard():
    signed = block_optimal(4, 64, signed=True)
    assert not is_standard(Codebook(signed.levels, name=signed.name))
    assert not is_standard(Codebook([-1, 0, 1], name="ternary"))


@pytest.mark.parametrize(
    "name",
    ["", "nf", "4", "nf9", "nf1", "int1", "uint0", "affine0", "log2", "NF4", "nf4 ", "nf-4", "nf" + "4" * 5000, "nf٤",
     "e4m4", "e0m3", "e2", "fp8", "fp4-", "dynamic4", "af3", "bof4", "bof4s", "bof4-1", "bof4-064", "bof4-9999999999",
     "bof4-" + "9" * 5000, "bof9-64", "sf4-0", "sf4-"],
)  # fmt: skip
def test_unknown_names_are_refused(name):
    with pytest.raises(FormatError, match=r"^codebook "):
        by_name(name)


def test_the_message_for_an_unknown_name_lists_the_families():
    with pytest.raises(FormatError, match=r"^codebook .*nf2…nf8, .*bof\{bits\}s-.* got 'what'"):
        by_name("what")


def test_the_message_for_a_number_out_of_range_has_the_range():
    with pytest.raises(InvalidArgumentError, match=r"^codebook 'nf9' .*: bits .*got 9\.$"):
        by_name("nf9")


#: Levels that decimal fractions do not hold, a name that stands for others, and another normalization.
OWN = [
    Codebook([-1, 1e-40, 0.1, 1 / 3], name="third"),
    Codebook([-1, 0, 1], name="nf4"),
    Codebook(block_optimal(4, 64, signed=True).levels, name="nf4", normalization="signed"),
]


class TestOwnCodebooks:
    @pytest.mark.parametrize("codebook", OWN, ids=lambda own: f"{own.name} {own.normalization}")
    def test_json_and_text_restore_every_bit(self, codebook):
        document = json.loads(json.dumps(codebook_to_json(codebook)))
        for again in (
            codebook_from_json(codebook.name, document | {"rank": 3}),
            codebook_from_text(codebook.name, codebook_to_text(codebook)),
        ):
            assert (again, again.name) == (codebook, codebook.name)
            assert again.levels.tobytes() == codebook.levels.tobytes()

    @pytest.mark.parametrize("name", SPELLED)
    def test_a_standard_codebook_needs_only_its_name(self, name):
        assert (codebook_to_json(SPELLED[name]), codebook_to_text(SPELLED[name])) == ({}, None)
        assert codebook_from_json(name, {"rank": 3}) is None
        assert codebook_from_text(name, None) is None

    @pytest.mark.parametrize(
        "document",
        [
            {"levels": [-1, 1]},
            {"normalization": "absmax"},
            {"levels": [-1, "1"], "normalization": "absmax"},
            {"levels": [False, True], "normalization": "absmax"},
            {"levels": "ab", "normalization": "absmax"},
            {"levels": [-1, math.nan], "normalization": "absmax"},
            {"levels": [1, -1], "normalization": "absmax"},
            {"levels": [-1, 1], "normalization": "l2"},
        ],
        ids=str,
    )
    def test_json_that_describes_no_codebook_is_refused(self, document):
        with pytest.raises(InvalidArgumentError):
            codebook_from_json("ternary", document)

    @pytest.mark.parametrize("text", ["", "absmax", "absmax a b", "l2 -1 1", "absmax 1 -1"])
    def test_text_that_describes_no_codebook_is_refused(self, text):
        with pytest.raises(FormatError, match="codebook"):
            codebook_from_text("ternary", text)


class TestWork:
    """Names of codebooks whose levels are computed, of which there are billions."""

    def test_a_few_for_each_block_size_are_accepted(self):
        check_work([f"{kind}{bits}-{2**size}" for kind in ("af", "bof") for bits in (2, 3, 4) for size in range(4, 13)])
        check_work(["nf4", "sf4-77", "no codebook", "bof9-0", *["bof8-64"] * 1000])

    @pytest.mark.parametrize("name", ["af8-{}", "bof8-{}", "bof8s-{}"])
    def test_many_are_refused(self, name):
        with pytest.raises(FormatError, match=r"^codebooks .*16 codebooks"):
            check_work(name.format(size) for size in range(2, 18))

    @pytest.mark.parametrize("family", [abnormal_float, block_optimal, student_float])
    def test_the_memory_for_results_is_bounded(self, family):
        assert 0 < family.cache_info().maxsize <= 256


@pytest.mark.parametrize("bits", [[4], {}, [0.5]])
def test_what_cannot_be_hashed_is_refused_by_the_constructor(bits):
    with pytest.raises(InvalidArgumentError, match=r"^bits must"):
        uniform(bits)
