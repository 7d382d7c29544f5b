"""Layouts of other programs: every format is refused with a sentence, or its array is written and comes back with the same bits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.codebooks import by_name
from lqlora.errors import FormatError, LQLoRAError
from lqlora.integrations.bitsandbytes import from_bitsandbytes, layout_fault, to_bitsandbytes
from lqlora.integrations.compressed_tensors import compressed_fault, from_compressed_tensors, to_compressed_tensors
from lqlora.integrations.gguf_blocks import block_type, from_gguf_blocks, gguf_fault, to_gguf_blocks
from lqlora.integrations.gptq import from_gptq, gptq_fault, to_gptq
from lqlora.testing.strategies import formats

# Some formats cannot hold scales of some blocks, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")

#: Codebooks of which a layout holds some formats, and others.
FITTING = [
    by_name(name)
    for name in (
        "nf4",
        "fp4-bnb",
        "int4s",
        "int5s",
        "int8s",
        "affine2",
        "affine3",
        "affine4",
        "affine8",
        "affine2-4",
        "affine4-6",
        "nf3",
        "int4",
    )
]


def _gguf_again(q):
    kind = block_type(q)
    blocks = to_gguf_blocks(q)
    if is_installed("gguf"):
        import gguf

        read = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(read, lq.dequantize(q))
        if kind == "Q4_1":
            return read
    return lq.dequantize(from_gguf_blocks(blocks, kind))


#: Functions that say why an array does not fit, and that write it and read it back, by layout.
LAYOUTS = {
    "bitsandbytes": (layout_fault, lambda q: lq.dequantize(from_bitsandbytes(to_bitsandbytes(q)).quantized)),
    "compressed-tensors": (
        compressed_fault, lambda q: lq.dequantize(from_compressed_tensors(to_compressed_tensors(q), bits=q.format.codebook.bits)),
    ),
    "gguf": (gguf_fault, _gguf_again),
    **{
        kind: (
            functools.partial(gptq_fault, checkpoint_format=kind),
            lambda q, kind=kind: lq.dequantize(from_gptq(to_gptq(q, checkpoint_format=kind), checkpoint_format=kind)),
        )
        for kind in ("gptq", "gptq_v2")
    },
}  # fmt: skip

usual = st.builds(
    lq.BlockFormat,
    st.sampled_from(FITTING),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["float32", "float16"]),
    st.sampled_from([None, -1, 0, 1]),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    fmt=usual | formats(axes=[None, -1, 0], fitted=True, rotated=True),
    shape=st.tuples(st.sampled_from([1, 8, 32, 40]), st.sampled_from([32, 48, 64, 128])),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_every_format_is_refused_or_comes_back(layout, fmt, shape, seed):
    fault, again = LAYOUTS[layout]
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    try:
        q = lq.quantize(w, fmt)
    except LQLoRAError:  # a rotation of a side that has none
        return
    if sentence := fault(q):
        with pytest.raises(FormatError) as caught:
            again(q)
        assert str(caught.value) == sentence
    else:
        np.testing.assert_array_equal(again(q), lq.dequantize(q))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_formats_fit(layout):
    """So the test above compares values."""
    fault, again = LAYOUTS[layout]
    w = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    fitting = [
        q
        for codebook in FITTING
        for size in (32, 64)
        for scales in ("float16", "float32")
        for q in [lq.quantize(w, lq.BlockFormat(codebook, size, scales))]
        if not fault(q)
    ]
    assert len(fitting) >= 2
    for q in fitting:
        np.testing.assert_array_equal(again(q), lq.dequantize(q))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["affine2-4", "affine4-6", "affine4-8"])
def test_zero_points_between_levels_are_refused(layout, name):
    # Codes of 2 and 4 bits in the blocks that these layouts have, so nothing but the zero points is in the way. All are one code.
    w = np.tile(np.linspace(-1, 1, 32, dtype=np.float32), (32, 2))
    q = lq.quantize(w, lq.BlockFormat(by_name(name), 32, "float16", -1))
    assert LAYOUTS[layout][0](q).startswith("codebook must be")
