"""A quantized array on its way into an operator of torch, and back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import FormatError, InvalidArgumentError, MixedArraysError, ScaleUnderflowWarning
from lqlora.testing.strategies import codebooks
from tests.quantized.cases import KINDS, draw_case
from tests.requirements import require_module
from tests.strategies import on, stored

torch = require_module("torch")
from lqlora.nn import from_operands, operands  # noqa: E402 - needs torch

OWN = lq.Codebook([-1, -0.3, 0.2, 1], "own")


def _quantized(text="nf3/8:u8/4:float16", shape=(6, 10), codebook=None, **options):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return lq.quantize(w, lq.BlockFormat.parse(text, codebook), **options)


class TestThereAndBack:
    @given(st.data())
    def test_what_went_in_comes_out(self, data):
        w, fmt = draw_case(data, torch, fitted=data.draw(st.booleans()))
        batch_dims = data.draw(st.integers(0, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScaleUnderflowWarning)
            q = lq.quantize(on(torch, np.stack([w] * 2) if batch_dims else w), fmt, batch_dims=batch_dims)
        back = from_operands(*operands(q))
        assert (back.format, str(back.format), back.shape, back.batch_shape) == (fmt, str(fmt), q.shape, q.batch_shape)
        assert stored(back) == stored(q)

    @pytest.mark.parametrize("text", KINDS)
    def test_every_kind_of_format_decodes_to_the_same_bytes(self, text):
        q = _quantized(text)
        back = from_operands(*operands(q))
        assert torch.equal(lq.dequantize(back), lq.dequantize(q))
        assert all(one is other for one, other in zip(operands(back).tensors, operands(q).tensors, strict=True))

    @given(codebooks(16))
    def test_any_codebook_is_spelled_exactly(self, codebook):
        back = from_operands(*operands(lq.quantize(torch.zeros(2, 3), lq.BlockFormat(codebook, 4))))
        assert back.codebook == codebook  # bit for bit
        assert back.codebook.name == codebook.name

    def test_a_name_that_stands_for_other_levels_does_not_decide(self):
        impostor = lq.Codebook([-1, 0, 1], "nf4")
        found = operands(_quantized("nf4/8:float32", codebook=impostor))
        assert found.codebook == "absmax -1.0 0.0 1.0"
        assert from_operands(*found).codebook == impostor

    def test_a_codebook_with_a_name_needs_no_levels(self):
        assert operands(_quantized())[1:] == ("nf3/8:u8/4:float16", (6, 10), None)


class TestWhatIsRefused:
    def test_arrays_of_another_library(self):
        with pytest.raises(MixedArraysError, match=r"\.to\(torch\)"):
            operands(lq.quantize(np.ones((2, 2)), lq.BlockFormat(lq.NF4)))

    def test_tensors_too_few_or_too_many(self):
        tensors, *rest = operands(_quantized())
        names = r"\(codes, scales.codes, scales.scales, scales.offset\)"
        for wrong in ([], tensors[:-1], [*tensors, tensors[0]]):
            with pytest.raises(FormatError, match=rf"weight must be 4 .*{names}, got {len(wrong)}"):
                from_operands(wrong, *rest)

    @pytest.mark.parametrize("index", range(4))
    def test_tensors_of_another_shape_or_dtype(self, index):
        tensors, *rest = operands(_quantized())
        name = ("codes", "scales.codes", "scales.scales", "scales.offset")[index]
        for wrong in (tensors[index][:-1], tensors[index].to(torch.float64)):
            with pytest.raises(FormatError, match=f"'{name}' of format .* must be"):
                from_operands([*tensors[:index], wrong, *tensors[index + 1 :]], *rest)

    def test_a_shape_that_the_tensors_are_not_of(self):
        tensors, fmt, _, _ = operands(_quantized())
        with pytest.raises(FormatError, match="'codes'"):
            from_operands(tensors, fmt, (6, 11))
        with pytest.raises(InvalidArgumentError, match=r"shape .* \(-6, -10\)"):
            from_operands(tensors, fmt, (-6, -10))

    def test_a_stack_of_more_dimensions_than_the_array_has(self):
        stack = _quantized("nf4/8:float32", (2, 3, 4), batch_dims=2)
        with pytest.raises(InvalidArgumentError, match="batch_dims must be from 0 to 1"):
            from_operands(operands(stack).tensors, "nf4/8:float32", (24,))

    def test_tensors_on_two_devices(self):
        tensors, *rest = operands(_quantized())
        with pytest.raises(MixedArraysError, match="on cpu and meta"):
            from_operands([*tensors[:-1], tensors[-1].to("meta")], *rest)

    @pytest.mark.parametrize(
        "text", ["", "absmax", "absmax 1 zero", "sideways -1 0 1", "absmax 1 0 -1", "affine 1 2 3 4"]
    )
    def test_what_spells_no_codebook(self, text):
        with pytest.raises(FormatError, match=r"codebook must be .*absmax"):
            from_operands([torch.zeros(1)], "own/8:float32", (2,), text)

    def test_what_spells_no_format(self):
        with pytest.raises(FormatError, match=r"^codebook must be .*'own'"):
            from_operands([torch.zeros(1)], "own/8:float32", (2,))
