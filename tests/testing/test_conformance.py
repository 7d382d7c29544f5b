"""The library's quantizer passes every property that applies to a format, on every array library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import lqlora as lq
from lqlora.testing import assert_quantizer_conforms, check_quantizer

#: Options for scales of half precision: the error of their rounding, and the range of float16.
HALF = {"scale_tolerance": 2**-8, "exclude": ["huge"]}
FLOAT16 = {**HALF, "smallest": 2**-8, "largest": 2**14}

FORMATS = {
    "nf4/64:float32": {},
    "nf3/7:float32": {},
    "nf8/20:float32": {},
    "int4/32:float32": {},
    "int4s/32:float32": {},
    "bof4s-64/64:float32": {},
    "nf2/1:float32": {},
    "uint4/16:float32": {"exclude": ["idempotence"]},  # a negative weight of largest size has no level
    "nf4/64:float16": FLOAT16,
    "nf4/64:bfloat16": HALF,
    "nf4/64:u8/256:float32": {"independent_blocks": False, "scale_tolerance": 2**-7},
    "nf4/16:u4+none/4:float16": {**FLOAT16, "independent_blocks": False, "scale_tolerance": 2**-3},
}


def conforms(text, adapt=None, examples=20):
    fmt = lq.BlockFormat.parse(text)
    return assert_quantizer_conforms(
        lambda w: lq.quantize(w, fmt), lq.dequantize, adapt=adapt,
        block_size=fmt.block_size, levels=fmt.codebook, ties_to="lower", max_examples=examples, **FORMATS[text],
    )  # fmt: skip


def skipped(report):
    return {finding.name for finding in report.findings if finding.result == "skipped"} - {"sign_symmetry", "huge"}


#: Formats that are checked in the fast suite: a plain one, a ragged one, and double quantization.
QUICK = ("nf4/64:float32", "nf3/7:float32", "nf4/64:u8/256:float32")


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=() if text in QUICK else pytest.mark.slow) for text in FORMATS]
)
def test_our_quantizer_conforms_on_numpy(text):
    coupled = {"locality", "idempotence"}
    allowed = {"nf2/1:float32": {"ragged_tail", "tie_direction"}, "uint4/16:float32": {"idempotence"}}
    expected = coupled if "/256:" in text or "/4:" in text else allowed.get(text, set())
    assert skipped(conforms(text, examples=8 if text in QUICK else 20)) == expected


@pytest.mark.slow
def test_our_quantizer_conforms_on_torch(torch):
    def adapt(w):
        if w.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(w.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(w)

    assert skipped(conforms("nf3/7:float32", adapt)) == set()
    assert skipped(conforms("nf4/64:bfloat16", adapt)) == set()


@pytest.mark.slow
def test_our_quantizer_conforms_on_a_strict_library(strict):
    assert skipped(conforms("nf3/7:float32", strict.asarray)) == {"float16", "bfloat16"}


@pytest.mark.slow
def test_a_custom_codebook_conforms():
    ternary = lq.Codebook([-3, 0, 3], name="ternary")
    fmt = lq.BlockFormat(ternary, 5)
    report = assert_quantizer_conforms(
        lambda w: lq.quantize(w, fmt), lq.dequantize, block_size=5, levels=ternary, max_examples=30
    )
    assert report["nearest_level"].result == "passed"


@pytest.mark.parametrize(
    ("rounding", "failed"), [(np.rint, ()), (np.floor, ("nearest_level",))], ids=["nearest", "down"]
)
def test_scales_of_both_signs_are_found_and_wrong_rounding_still_fails(rounding, failed):
    levels = lq.uniform(4, normalization="signed")

    def quantize(w):
        blocks = w.reshape(-1, 32).astype(np.float64)
        peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
        scales = np.where(peaks == 0, 1, peaks) / 8
        return np.clip(rounding(blocks / scales), -7, 8), scales, w.shape

    report = check_quantizer(
        quantize,
        lambda q: (q[0] * q[1]).reshape(q[2]),
        block_size=32,
        levels=levels,
        only=["nearest_level"],
        max_examples=20,
    )
    assert report.failed == failed
