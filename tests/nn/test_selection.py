"""Selection by role: what is taken and left dense in many structures, and what still works afterwards."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import (  # noqa: E402
    LQLinear,
    collect_fisher,
    collect_gram,
    collect_kronecker,
    load_model,
    quantize_model,
    save_model,
    select_linears,
    weight_arrays,
)
from tests.nn.structures import STRUCTURES, WIDTH, Conv1D, Sandwich, Words  # noqa: E402

NF8 = lq.BlockFormat.parse("nf8/8:float32")
NF4 = lq.BlockFormat.parse("nf4/8:float32")


def _trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _quantized(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LQLinear)]


@pytest.fixture(params=STRUCTURES, ids=str)
def structure(request):
    return STRUCTURES[request.param]


class TestStructures:
    def test_layers_are_taken_by_their_role(self, structure):
        assert list(select_linears(structure.make())) == structure.taken

    def test_the_report_says_why_others_are_left_dense(self, structure):
        report = quantize_model(structure.make(), NF8, rank=1)
        assert list(report.layers) == structure.taken
        left = {name: group for group, part in report.dense.items() for name in part.layers}
        assert left == structure.left

    def test_outputs_stay_near(self, structure):
        model, dense, x = structure.make(), structure.make(), structure.inputs()
        quantize_model(model, NF8, rank=2)
        with torch.no_grad():  # where torch's own attention takes its fused path
            for mode in (False,) if structure.random else (False, True):
                torch.testing.assert_close(model.train(mode)(x), dense.train(mode)(x), rtol=0.1, atol=0.1)

    def test_only_factors_heads_and_adapters_train(self, structure):
        model = structure.make()
        quantize_model(model, NF8, rank=2)
        factors = {f"{name}.lora_{x}" for name in structure.taken for x in "AB"}
        assert _trainable(model) == factors | set(structure.trains)
        model(structure.inputs()).square().sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == _trainable(model)

    def test_saved_models_load_bit_equal(self, structure, tmp_path):
        model, x = structure.make().eval(), structure.inputs()
        quantize_model(model, NF4, rank=2)
        save_model(tmp_path / "m.safetensors", model)
        fresh = structure.make(seed=1).eval()
        load_model(tmp_path / "m.safetensors", fresh)
        assert torch.equal(fresh(x), model(x))
        assert _trainable(fresh) == _trainable(model)

    def test_layers_left_by_role_are_taken_by_name(self, structure, tmp_path):
        for name in structure.left:
            model, x = structure.make().eval(), structure.inputs()
            if name in structure.refused:
                with pytest.raises(InvalidArgumentError, match=f"include.*{re.escape(name)}"):
                    quantize_model(model, NF8, rank=1, include=["*", name])
                with pytest.raises(InvalidArgumentError, match=f"formats.*{re.escape(name)}"):
                    quantize_model(model, {name: NF8}, rank=1)
                continue
            before = model(x)
            quantize_model(model, {name: NF8}, rank=1)
            assert _quantized(model) == [name]
            torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)
            save_model(tmp_path / "m.safetensors", model)
            fresh = structure.make(seed=1).eval()
            load_model(tmp_path / "m.safetensors", fresh)
            assert torch.equal(fresh(x), model(x))


class TestTransposed:
    @pytest.fixture
    def models(self):
        """Return a model with a transposed layer, and one with a linear layer of the same matrix."""
        torch.manual_seed(0)
        one, other = Sandwich(Conv1D(6, WIDTH)), Sandwich(nn.Linear(WIDTH, 6))
        with torch.no_grad():
            other.up.load_state_dict(one.up.state_dict())
            other.part.weight.copy_(one.part.weight.T)
            other.part.bias.copy_(one.part.bias)
        return one, other

    def test_the_matrix_is_handed_out_transposed(self, models):
        one, other = (weight_arrays(select_linears(model))["part"]() for model in models)
        assert one.shape == (6, WIDTH)
        np.testing.assert_array_equal(one, other)

    def test_the_layer_equals_that_of_the_matrix(self, models):
        x = torch.randn(2, 5, WIDTH)
        for model in models:
            quantize_model(model, NF4, rank=2)
        assert torch.equal(models[0](x), models[1](x))
        assert models[0].part.weight.shape == (6, WIDTH)

    def test_statistics_are_those_of_the_matrix(self, models):
        batches = [torch.randn(3, 5, WIDTH)]

        def loss(model, batch):
            return model(batch).square().mean(dim=(1, 2))

        one, other = (collect_fisher(model, batches, loss=loss)["part"] for model in models)
        assert one.shape == (6, WIDTH)
        torch.testing.assert_close(one, other)
        one, other = (collect_gram(model, batches)["part"] for model in models)
        torch.testing.assert_close(one, other)
        for a, b in zip(*(collect_kronecker(model, batches, loss=loss)["part"] for model in models), strict=True):
            torch.testing.assert_close(a, b)


class TestPatterns:
    def test_the_end_of_a_name_takes_layers_of_the_body_alone(self):
        # "dense" names a layer of the body and one of the head, which stays dense.
        body, head = nn.ModuleDict({"dense": nn.Linear(8, 8)}), nn.ModuleDict({"dense": nn.Linear(8, 8)})
        model = nn.ModuleDict({"body": body, "classifier": head})
        assert list(select_linears(model, "dense")) == ["body.dense"]
        assert list(select_linears(model, ["dense", "classifier.dense"])) == ["body.dense", "classifier.dense"]

    def test_patterns_may_come_from_an_iterator(self):
        model = STRUCTURES["plain"].make()
        assert list(select_linears(model, iter(["up", "part"]), iter(["up"]))) == ["part"]
        with pytest.raises(InvalidArgumentError, match=r"include.*'typo'.*exclude=.*'up'"):
            select_linears(model, iter(["typo"]), iter(["up"]))

    def test_exclusions_win_over_names(self):
        model = STRUCTURES["classifier"].make()
        assert list(select_linears(model, ["*", "classifier"], ["classifier", "up"])) == ["part"]

    def test_a_function_is_shown_by_name(self):
        with pytest.raises(InvalidArgumentError, match=r"include.*str\.isupper"):
            select_linears(STRUCTURES["plain"].make(), str.isupper)

    def test_a_model_of_heads_is_refused_with_the_reason(self):
        model = nn.ModuleDict({"classifier": nn.Linear(8, 2)})
        with pytest.raises(InvalidArgumentError, match=r"include.*'classifier'.*head"):
            select_linears(model)
        assert list(select_linears(model, "classifier")) == ["classifier"]

    def test_a_model_without_linear_layers_is_refused(self):
        with pytest.raises(InvalidArgumentError, match="none"):
            select_linears(nn.Sequential(nn.ReLU()))

    def test_adapters_do_not_hide_the_name_of_a_layer(self):
        assert list(select_linears(STRUCTURES["adapters"].make(), "part")) == ["part.base_layer"]

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
    def test_wrappers_do_not_change_names(self, wrap, tmp_path):
        structure = STRUCTURES["plain"]
        model = structure.make().eval()
        wrapped, plain = wrap(model), structure.make().eval()
        assert list(select_linears(wrapped, ["up", "p*"])) == structure.taken
        reports = [quantize_model(own, NF4, rank=1) for own in (wrapped, plain)]
        assert reports[0] == reports[1]
        save_model(tmp_path / "m", wrapped)
        fresh = structure.make(seed=1).eval()
        load_model(tmp_path / "m", wrap(fresh))
        assert torch.equal(fresh(structure.inputs()), plain(structure.inputs()))


class TestUnusableLayers:
    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda: nn.Linear(8, 8, device="meta"), "meta device"),
            (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), "not a plain matrix"),
            (lambda: nn.Linear(0, 8), "not a plain matrix"),
        ],
        ids=["meta", "float8", "empty"],
    )
    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_weights_that_hold_no_matrix(self, make, sentence):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": make()})
        assert list(select_linears(model)) == ["a"]
        with pytest.raises(InvalidArgumentError, match=f"include.*'b'.*{sentence}"):
            select_linears(model, "b")

    def test_a_file_is_not_loaded_over_a_computed_weight(self, tmp_path):
        model = STRUCTURES["plain"].make()
        quantize_model(model, NF4, rank=1)
        save_model(tmp_path / "m", model)
        with pytest.raises(CheckpointError, match=r"'part' has a weight.*own parameter"):
            load_model(tmp_path / "m", STRUCTURES["parametrized"].make())


class TestSurgery:
    def test_hooks_and_attributes_are_carried_over(self):
        model, x = STRUCTURES["plain"].make(), STRUCTURES["plain"].inputs()
        seen = []
        handles = [
            model.up.register_forward_hook(lambda module, _, output: seen.append(type(module)) or 2 * output),
            model.up.register_forward_pre_hook(lambda *_: seen.append("pre"), with_kwargs=True),
            model.up.register_full_backward_hook(lambda *_: seen.append("back")),
        ]
        model.up._is_hf_initialized = True
        quantize_model(model, NF4, rank=1)
        assert model.up._is_hf_initialized
        doubled = model.part(torch.tanh(model.up(x.requires_grad_())))
        doubled.sum().backward()
        assert seen == ["pre", LQLinear, "back"]
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(doubled, model.part(torch.tanh(2 * model.up(x))))
        assert seen == ["pre", LQLinear, "back"]

    def test_a_shared_bias_stays_shared(self, tmp_path):
        model = Words("lm_head", tied=True, bias=True)
        quantize_model(model, {"lm_head": NF4}, rank=1)
        assert model.lm_head.bias is model.bias
        save_model(tmp_path / "m", model)
        fresh = Words("lm_head", tied=True, bias=True)
        load_model(tmp_path / "m", fresh)
        assert fresh.lm_head.bias is fresh.bias
        assert torch.equal(fresh.bias, model.bias)

    def test_a_second_conversion_keeps_the_first(self):
        model = STRUCTURES["plain"].make()
        first = quantize_model(model, NF4, rank=1, include="up")
        second = quantize_model(model, NF4, rank=2, include="part")
        assert _trainable(model) == {f"{name}.lora_{x}" for name in ("up", "part") for x in "AB"}
        assert second.total_bytes == sum(t.nbytes for t in model.state_dict().values())
        assert second.bytes_before == first.total_bytes
        before = second.dense["layers that were quantized before"]
        assert before.nbytes == first.total_bytes - sum(first.kept.values()) + model.up.bias.nbytes

    def test_a_model_in_distributed_data_parallel_is_refused(self):
        wrapped = nn.Module.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapped)
        wrapped.module = STRUCTURES["plain"].make()
        with pytest.raises(InvalidArgumentError, match=r"model.*DistributedDataParallel"):
            quantize_model(wrapped, NF4, rank=1)


class TestByPattern:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 4)}), "up": nn.Linear(8, 2)})

    def test_the_first_pattern_holds_and_names_are_preferred(self, model):
        report = quantize_model(
            model,
            {"q": NF8, "*": NF4},
            rank={"*.?": 3, "*": 1, "a.k": 2},
            scaling={"k": 0.5},
        )
        assert {name: (layer.format, layer.rank) for name, layer in report.layers.items()} == {
            "a.q": (NF8, 3),
            "a.k": (NF4, 2),
            "up": (NF4, 1),
        }
        assert [module.scaling for module in model.modules() if isinstance(module, LQLinear)] == [1.0, 0.5, 1.0]

    def test_functions_of_the_name(self, model):
        report = quantize_model(
            model,
            lambda name: NF8 if name == "up" else NF4,
            include="*",
            exclude="k",
            rank=len,
            scaling=lambda _: 2.0,
            weighting=lambda name: lq.weighting.Elementwise(np.ones((8, 8))) if name == "a.q" else None,
        )
        assert {name: (layer.format, layer.rank) for name, layer in report.layers.items()} == {
            "a.q": (NF4, 3),
            "up": (NF8, 2),
        }
        assert model["up"].scaling == 2.0

    @pytest.mark.parametrize("argument", ["formats", "rank", "scaling", "weighting"])
    def test_a_pattern_that_matches_nothing_is_refused(self, model, argument):
        good = {"formats": NF4, "rank": 1}
        with pytest.raises(InvalidArgumentError, match=f"{argument}.*'typo'"):
            quantize_model(model, **{**good, argument: {"*": good.get(argument), "typo": good.get(argument)}})
        assert _quantized(model) == []

    def test_layers_without_a_rank_are_refused(self, model):
        with pytest.raises(InvalidArgumentError, match=r"rank.*'a\.k'"):
            quantize_model(model, NF4, rank={"q": 1})

    def test_formats_of_another_kind_are_refused(self, model):
        with pytest.raises(InvalidArgumentError, match=r"formats.*'a\.q'.*nf4"):
            quantize_model(model, lambda _: "nf4", rank=1)
        with pytest.raises(InvalidArgumentError, match=r"weighting.*3"):
            quantize_model(model, NF4, rank=1, weighting=3)

    def test_ranks_above_the_smaller_side_are_clipped(self, model):
        report = quantize_model(model, NF4, rank=4)
        assert {name: (layer.rank, layer.clipped_from) for name, layer in report.layers.items()} == {
            "a.q": (4, None),
            "a.k": (4, None),
            "up": (2, 4),
        }
        assert "rank clipped to the smaller side of the matrix: up" in str(report)


class TestReport:
    def test_one_of_something_has_no_plural(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        formats = {"0": NF4, "*": lq.BlockFormat.parse("nf3/4:float32")}
        text = str(quantize_model(model, formats, rank={"0": 1, "*": 2}))
        assert "3 layers " in text
        assert "rank 2 (2 layers), 1 (1 layer)," in text
        assert re.search(r"formats: .* \(2 layers\), .* \(1 layer\),", text)
        assert re.search(r"quantized +1 layer ", str(quantize_model(nn.Sequential(nn.Linear(8, 8)), NF4, rank=1)))

    def test_the_text_has_shares_that_sum_to_the_whole(self, structure):
        model = structure.make()
        before = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
        report = quantize_model(model, NF4, rank=2)
        assert report.bytes_before == before
        assert report.total_bytes == sum(
            tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
        )
        assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        factors = sum(layer.factor_bytes // 4 for layer in report.layers.values())
        assert report.trainable == factors + sum(part.trainable for part in report.dense.values())
        lines = str(report).splitlines()
        assert len(lines) <= 15
        shares = [
            [float(share) for share in re.findall(r"([\d.]+)%", line)]
            for line in lines
            if " parameters " in line and "%" in line
        ]
        assert sum(own[0] for own in shares) == pytest.approx(100, abs=1)
        factors = 100 * report.factor_bytes / report.total_bytes
        assert sum(own[1] for own in shares) + factors == pytest.approx(100, abs=1)

    def test_experts_are_listed_with_their_share(self):
        report = quantize_model(STRUCTURES["experts"].make(), NF4, rank=1)
        assert report.dense["experts stored as one array"].size == 3 * WIDTH * WIDTH
        assert re.search(r"dense: experts stored as one array +192 parameters", str(report))

    def test_a_tied_output_embedding_is_said_to_be_shared(self):
        text = str(quantize_model(STRUCTURES["tied head"].make(), NF4, rank=1))
        assert re.search(r"dense: output embeddings +1 layer \(shared\) +0 parameters", text)

    def test_many_reasons_fit_into_fifteen_lines(self):
        report = quantize_model(STRUCTURES["plain"].make(), NF4, rank=2)
        part = report.dense["norms, biases and others"]
        many = {f"reason {i}": part for i in range(20)}
        text = str(lq.nn.QuantizationReport(report.layers, many, report.kept, 1, 1))
        assert len(text.splitlines()) <= 15
        assert f"{13 * part.size} parameters" in text

    def test_names_cannot_move_the_cursor(self):
        report = quantize_model(nn.ModuleDict({"a\x1b[2J": nn.Linear(8, 2)}), NF4, rank=4)
        assert "\x1b" not in str(report)
        assert "\\x1b[2J" in str(report)

    def test_no_arrays_are_kept_alive(self):
        report = quantize_model(STRUCTURES["plain"].make(), NF4, rank=1)
        for layer in report.layers.values():
            kinds = {type(value) for value in vars(layer).values()}
            assert kinds <= {lq.BlockFormat, tuple, int, float, type(None)}
            assert {type(error) for error in layer.errors} == {float}

    def test_each_layer_is_logged(self, caplog):
        with caplog.at_level(logging.INFO, "lqlora"):
            quantize_model(STRUCTURES["plain"].make(), NF4, rank=1)
        assert sorted(record.name for record in caplog.records) == ["lqlora"] * 2
        pattern = r"(up|part): nf4/8:float32, rank 1, relative error 0\.\d{4}, \d+\.\d\d s"
        assert all(re.fullmatch(pattern, message) for message in caplog.messages), caplog.messages


def test_a_model_without_dense_linear_layers_is_named():
    with pytest.raises(InvalidArgumentError, match=r"^model must have .* got none\.$"):
        quantize_model(nn.Sequential(nn.ReLU()), NF8, rank=1)
    model = nn.Sequential(nn.Linear(8, 8))
    quantize_model(model, NF8, rank=1)
    with pytest.raises(InvalidArgumentError, match=r"^model must have .* already: 1\."):
        quantize_model(model, NF8, rank=1)
