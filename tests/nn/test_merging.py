"""Merging of factors: the sum of both parts, rounded once, and the errors of requantization."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import (  # noqa: E402
    LQLinear,
    RequantizedLayer,
    dequantize_model,
    load_model,
    merged_weight,
    quantize_model,
    requantize_model,
    save_model,
    select_linears,
    train_scales,
    weight_arrays,
)
from tests.nn.structures import STRUCTURES, WIDTH, Conv1D, Sandwich, Words  # noqa: E402

NF4 = lq.BlockFormat.parse("nf4/8:float32")
FORMATS = ["nf4/8:float32", "nf3/7:bfloat16", "nf3/8:u8/16:float16", "affine4/8:float32", "nf2+fit/8:float16"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _layer(fmt: str = "nf4/8:float32", shape=(12, 20), rank=3, scaling=0.5, seed=0) -> LQLinear:
    generator = torch.Generator().manual_seed(seed)
    fmt = lq.BlockFormat.parse(fmt)
    q = lq.quantize(torch.randn(shape, generator=generator), fmt, fit="levels+scale" if "fit" in str(fmt) else "absmax")
    factors = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return LQLinear(q, *factors, scaling, torch.randn(shape[0], generator=generator))


def _trained(structure, seed=0) -> nn.Module:
    """Return a quantized model whose factors have moved."""
    model = structure.make(seed)
    quantize_model(model, NF4, rank=2, scaling=0.5)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LQLinear):
                layer.lora_B.add_(0.05 * torch.randn(layer.lora_B.shape))
    return model


class TestMergedWeight:
    @given(
        fmt=st.sampled_from(FORMATS),
        shape=st.tuples(st.integers(1, 9), st.integers(1, 20)),
        rank=st.integers(0, 4),
        scaling=st.sampled_from([1.0, 0.5, -3.0, 0.0]),
        dtype=st.sampled_from(DTYPES),
    )
    def test_it_is_the_exact_sum_rounded_once(self, fmt, shape, rank, scaling, dtype):
        layer = _layer(fmt, shape, rank, scaling)
        inner, outer = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        low_rank = scaling * outer @ inner
        expected = layer.quantized.dequantize().double() + low_rank
        found = merged_weight(layer, dtype)
        assert found.dtype == dtype
        assert not found.requires_grad
        # Half a unit in the last place, that of subnormal numbers included, and the rounding of sums in float64.
        info = torch.finfo(dtype)
        bound = 0.5 * info.eps * expected.abs() + info.smallest_normal * info.eps + 1e-14 * (1 + low_rank.abs().sum())
        assert bool(((found.double() - expected).abs() <= bound).all())

    def test_products_are_those_of_the_layer(self):
        layer, x = _layer(), torch.randn(5, 20)
        torch.testing.assert_close(
            nn.functional.linear(x, merged_weight(layer), layer.bias), layer(x), rtol=1e-5, atol=1e-5
        )

    def test_rows_are_summed_in_parts(self, monkeypatch):
        layer = _layer()
        whole = merged_weight(layer)
        for entries in (1, 70):  # below a row, and three rows
            monkeypatch.setattr("lqlora.nn.merging._CHUNK_ON_HOST", entries)
            assert torch.equal(merged_weight(layer), whole)

    def test_what_it_refuses(self):
        layer = _layer()
        with pytest.raises(InvalidArgumentError, match=r"dtype.*int8"):
            merged_weight(layer, torch.int8)
        with pytest.raises(InvalidArgumentError, match=r"layer.*meta"):
            merged_weight(copy.deepcopy(layer).to("meta"))
        with torch.no_grad():
            layer.lora_A.fill_(3e5)
        assert bool(torch.isfinite(merged_weight(layer, torch.bfloat16)).all())
        with pytest.raises(NonFiniteError, match=r"float16.*6\.55e\+04"):
            merged_weight(layer, torch.float16)


@pytest.fixture(params=STRUCTURES, ids=str)
def structure(request):
    return STRUCTURES[request.param]


class TestDequantizeModel:
    def test_outputs_are_those_of_the_quantized_model(self, structure):
        model, x = _trained(structure).eval(), structure.inputs()
        with torch.no_grad():
            expected = model(x)
            dequantize_model(model)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert not any(isinstance(module, LQLinear) for module in model.modules())
        for name in structure.taken:
            first = type(structure.make().get_submodule(name))
            assert type(model.get_submodule(name)) is (nn.Linear if issubclass(first, nn.Linear) else first)

    def test_heads_keep_training_and_the_body_is_frozen(self, structure):
        model = _trained(structure)
        dequantize_model(model)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trains == set(structure.trains)
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_model_keeps_its_dtype_and_runs(self, dtype):
        model = _trained(STRUCTURES["tied head"]).to(dtype)
        dequantize_model(model)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
        assert model(STRUCTURES["tied head"].inputs()).dtype == dtype

    def test_the_dtype_is_that_of_the_bias_or_of_most_other_parameters(self):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, bias=False), "norm": nn.LayerNorm(8)})
        quantize_model(model, NF4, rank=1)
        model["norm"].to(torch.float16)
        dequantize_model(model)
        assert (model["a"].weight.dtype, model["b"].weight.dtype) == (torch.float32, torch.float16)

    def test_a_model_without_other_parameters_becomes_float32(self):
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        quantize_model(model, NF4, rank=1)
        dequantize_model(model)
        assert model[0].weight.dtype == torch.float32

    def test_another_dtype(self):
        model = _trained(STRUCTURES["plain"])
        dequantize_model(model, torch.bfloat16)
        assert model.up.weight.dtype == model.up.bias.dtype == torch.bfloat16

    def test_hooks_and_attributes_are_carried_over(self):
        model = _trained(STRUCTURES["plain"])
        seen = []
        handle = model.up.register_forward_hook(lambda module, *_: seen.append(type(module)))
        model.up._is_hf_initialized = True
        dequantize_model(model)
        model(STRUCTURES["plain"].inputs())
        handle.remove()
        assert seen == [nn.Linear]
        assert model.up._is_hf_initialized
        assert not hasattr(model.up, "scaling")

    def test_shared_layers_and_biases_stay_shared(self):
        model = Words("lm_head", tied=True, bias=True)
        model.again = model.up
        quantize_model(model, {"lm_head": NF4, "up": NF4}, rank=1)
        dequantize_model(model)
        assert model.lm_head.bias is model.bias
        assert model.again is model.up
        assert model.lm_head.weight is not model.embed.weight

    def test_a_16_bit_model_with_a_quantized_embedding_alone_beside_its_layers_stays_one(self):
        model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16, bias=False)).bfloat16()
        quantize_model(model, NF4, rank=2, max_iter=1, embeddings=NF4, include="1")
        model[1].float()
        dequantize_model(model)
        assert {own.dtype for own in model.parameters()} == {torch.bfloat16}

    def test_a_16_bit_model_of_quantized_layers_alone_stays_one(self):
        model = nn.Sequential(nn.Linear(16, 16, bias=False)).bfloat16()
        quantize_model(model, NF4, rank=2, max_iter=1)
        dequantize_model(model)
        assert model[0].weight.dtype == torch.bfloat16

    def test_the_state_is_that_of_a_dense_model(self):
        model, fresh = _trained(STRUCTURES["plain"]), STRUCTURES["plain"].make()
        dequantize_model(model)
        fresh.load_state_dict(model.state_dict())
        quantize_model(model, NF4, rank=1)

    def test_a_transposed_layer_that_reads_its_sizes(self):
        class Reading(Conv1D):
            def __init__(self, nf, nx):
                super().__init__(nf, nx)
                self.out_features = nf
                del self.nf

            def forward(self, x):
                return (x @ self.weight + self.bias).view(*x.shape[:-1], self.out_features)

        Reading.__name__ = "Conv1D"
        model = Sandwich(Reading(6, WIDTH))
        quantize_model(model, NF4, rank=2, max_iter=1)
        x = torch.randn(2, WIDTH)
        expected = model(x)
        dequantize_model(model)
        torch.testing.assert_close(model(x), expected)

    @pytest.mark.parametrize("change", [requantize_model, train_scales, None], ids=["requantized", "scales", "loaded"])
    def test_transposed_layers_come_back(self, change, tmp_path):
        structure = STRUCTURES["transposed"]
        model, fresh = structure.make(), structure.make(seed=1)
        quantize_model(model, NF4, rank=2)
        if change is None:
            save_model(tmp_path / "m", model)
            model = structure.make(seed=1)
            load_model(tmp_path / "m", model)
        else:
            change(model)
        expected = model(structure.inputs())
        dequantize_model(model)
        assert vars(model.part).keys() - {"in_features", "out_features"} == vars(fresh.part).keys()
        fresh.load_state_dict(model.state_dict())
        for own in (model, fresh):
            torch.testing.assert_close(own(structure.inputs()), expected, rtol=1e-4, atol=1e-4)

    def test_an_error_leaves_the_model_unchanged(self):
        model = _trained(STRUCTURES["plain"])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            before["part.lora_A"] = model.part.lora_A.fill_(float("nan")).clone()
        with pytest.raises(NonFiniteError, match=r"'part'"):
            dequantize_model(model)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)

    def test_models_without_quantized_layers_are_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"model.*got none"):
            dequantize_model(STRUCTURES["plain"].make())
        with pytest.raises(InvalidArgumentError, match=r"model.*Sequential"):
            dequantize_model(_layer())

    def test_a_compiled_model(self):
        model = _trained(STRUCTURES["plain"])
        dequantize_model(torch.compile(model, backend="eager"))
        assert type(model.up) is nn.Linear


def _wide(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    nn.init.normal_(model[0].weight)
    return model


class TestRequantizeModel:
    def test_the_gain_of_the_factors_is_lost_and_said_so(self, tmp_path):
        model, dense = _wide(), _wide()
        quantize_model(model, NF4, rank=4)
        merged, original = merged_weight(model[0]), dense[0].weight.detach()
        with pytest.warns(UserWarning, match="1 of 1 layers lost"):
            own = requantize_model(model, weight_arrays(select_linears(dense)))["0"]
        found, alone = model[0].quantized.dequantize(), lq.dequantize(lq.quantize(original, NF4, fit="scale"))
        assert own.format == model[0].quantized.format == NF4
        for error, matrix in [
            (own.error_before, merged),
            (own.error_after, found),
            (own.error_without_factors, alone),
        ]:
            assert error == pytest.approx(float((matrix - original).norm() / original.norm()), rel=1e-5)
        assert 0 <= own.gain_kept < 0.5
        assert model[0].rank == 0
        save_model(tmp_path / "m", model)
        load_model(tmp_path / "m", dense)
        assert torch.equal(dense[0].quantized.dequantize(), found)

    def test_without_originals_errors_are_those_from_the_sums(self):
        model = _wide()
        quantize_model(model, NF4, rank=4)
        merged = merged_weight(model[0])
        own = requantize_model(model)["0"]
        assert own.error_after == pytest.approx(
            float((model[0].quantized.dequantize() - merged).norm() / merged.norm())
        )
        assert (own.error_before, own.error_without_factors, own.gain_kept) == (0, None, None)

    @pytest.mark.parametrize("fmt", FORMATS)
    def test_each_format_is_kept(self, fmt):
        layer = _layer(fmt)
        model = nn.Sequential(layer).eval()
        errors = requantize_model(model)
        assert errors["0"].format == model[0].quantized.format == layer.quantized.format
        assert errors["0"].error_after < 0.7
        assert not model[0].training
        assert model[0].bias is layer.bias

    def test_gains(self):
        assert RequantizedLayer(NF4, 0.1, 0.15, 0.2).gain_kept == pytest.approx(0.5)
        assert RequantizedLayer(NF4, 0.1, 0.3, 0.2).gain_kept == 0
        assert RequantizedLayer(NF4, 0.1, 0.05, 0.2).gain_kept == 1
        assert RequantizedLayer(NF4, 0.2, 0.3, 0.2).gain_kept == 1

    def test_zero_matrices(self):
        def make(value):
            q = lq.quantize(torch.full((4, 8), value), NF4)
            return nn.Sequential(LQLinear(q, torch.zeros(1, 8), torch.zeros(4, 1)))

        assert requantize_model(make(0.0)) == {"0": RequantizedLayer(NF4, 0.0, 0.0)}
        inf = float("inf")
        assert requantize_model(make(1.0), {"0": torch.zeros(4, 8)}) == {"0": RequantizedLayer(NF4, inf, inf, 0.0)}

    @pytest.mark.parametrize(
        ("originals", "says"),
        [({}, "originals.*'0'.*none"), ({"0": torch.ones(8, 4)}, r"originals.*\(12, 20\).*\(8, 4\)")],
    )
    def test_originals_that_do_not_fit_are_refused(self, originals, says):
        model = nn.Sequential(_layer())
        with pytest.raises(InvalidArgumentError, match=says):
            requantize_model(model, originals)
        assert model[0].rank == 3

    def test_an_error_leaves_the_model_unchanged(self):
        model = _trained(STRUCTURES["plain"])
        with torch.no_grad():
            model.part.lora_A.fill_(float("inf"))
        with pytest.raises(NonFiniteError, match=r"'part'"):
            requantize_model(model)
        assert model.up.rank == 2
