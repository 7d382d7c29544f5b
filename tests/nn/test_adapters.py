"""Sets of factors: copies, exchange and restoration, and files that fit one quantized model only."""

from __future__ import annotations

import copy

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn.utils.parametrize import register_parametrization  # noqa: E402

from lqlora.nn import (  # noqa: E402
    Factors,
    LQLinear,
    factors,
    load_factors,
    quantize_model,
    save_factors,
    save_model,
    set_factors,
    using_factors,
)

NF3 = lq.BlockFormat.parse("nf3/8:u8/16:bfloat16")
X = torch.linspace(-1, 1, 24).view(3, 8)


def _model(seed: int = 0, rank: int = 2, fmt=NF3, width: int = 12, **options) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4, bias=False))
    quantize_model(model, fmt, rank=rank, **options)
    return model


def _moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """Change the factors of a model, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _state(model) -> dict:
    return {name: (t.tolist(), t.dtype, t.requires_grad, id(t)) for name, t in model.state_dict(keep_vars=True).items()}


def _others(rank: int, scaling: float = 2.0) -> dict[str, Factors]:
    """Return factors of another rank and scaling."""
    made = factors(_moved(_model(seed=3, rank=rank)))
    return {name: Factors(own.lora_A, own.lora_B, scaling) for name, own in made.items()}


class TestUsing:
    def test_the_reference_of_a_training_is_the_model_that_it_started_from(self):
        model = _model()
        start, before = factors(model), model(X)
        moved = _moved(model)(X)
        assert not torch.equal(moved, before)
        with using_factors(model, start):
            assert torch.equal(model(X), before)
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(model(X), moved)

    @pytest.mark.parametrize("rank", [0, 1, 2, 4])
    @pytest.mark.parametrize("mode", [False, True])
    def test_everything_is_restored_also_after_an_error(self, rank, mode):
        model, given = _model().train(mode), _others(rank)
        before = _state(model)
        inside = []
        with pytest.raises(ZeroDivisionError), using_factors(model, given):  # noqa: PT012 - the block is what is tested
            inside = [(layer.rank, layer.training) for layer in model if isinstance(layer, LQLinear)]
            raise ZeroDivisionError
        assert inside == [(rank, mode)] * 2
        assert _state(model) == before
        assert model.training == mode
        assert [layer.scaling for layer in model if isinstance(layer, LQLinear)] == [1.0, 1.0]

    def test_blocks_nest(self):
        model, first, second = _model(), _others(1), _others(3)
        with using_factors(model, first):
            outer = model(X)
            with using_factors(model, second):
                assert not torch.equal(model(X), outer)
            assert torch.equal(model(X), outer)

    def test_a_graph_that_was_recorded_before_stays_valid(self):
        """Policy forward, reference forward, then the backward pass: a step of DPO."""
        model = _moved(_model())
        start = factors(_model())
        model(X).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        loss = model(X).square().sum()
        with torch.no_grad(), using_factors(model, start):
            model(X)
        loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_an_optimizer_goes_on_afterwards(self):
        model = _model()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with using_factors(model, _others(1)):
            pass
        model(X).sum().backward()
        before = factors(model)
        optimizer.step()
        assert not torch.equal(factors(model)["0"].lora_B, before["0"].lora_B)

    def test_a_compiled_model(self):
        model = _model()
        compiled, start, before = torch.compile(model, backend="eager"), factors(model), model(X)
        moved = _moved(model)(X)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), moved)
            with using_factors(compiled, start):
                torch.testing.assert_close(compiled(X), before)

    def test_no_factor_is_copied(self):
        model, given = _model(), _others(2)
        with using_factors(model, given):
            assert model[0].lora_A.data_ptr() == given["0"].lora_A.data_ptr()


class TestSetting:
    def test_copies_come_back(self):
        model = _moved(_model())
        expected, kept = model(X), factors(model)
        set_factors(_moved(model, 2), kept)
        assert torch.equal(model(X), expected)
        _moved(model)
        assert torch.equal(kept["0"].lora_A, factors(_moved(_model()))["0"].lora_A)

    def test_parameters_of_one_rank_keep_their_identity(self):
        model = _model()
        before = [id(p) for p in model.parameters()]
        set_factors(model, _others(2))
        assert [id(p) for p in model.parameters()] == before
        assert model[0].scaling == 2.0

    def test_another_rank_makes_new_parameters_with_the_same_flags(self):
        model, given = _model(), _others(3)
        model[2].lora_A.requires_grad = False
        set_factors(model, given)
        assert (model[0].rank, model[0].lora_A.requires_grad, model[2].lora_A.requires_grad) == (3, True, False)
        with torch.no_grad():
            model[0].lora_A.zero_()
        assert bool(given["0"].lora_A.any())

    def test_factors_take_the_dtype_of_the_model(self):
        model, given = _model().to(torch.bfloat16), _others(2)
        set_factors(model, given)
        assert model[0].lora_A.dtype == torch.bfloat16
        assert torch.equal(model[0].lora_A, given["0"].lora_A.bfloat16())

    def test_casts_that_overflow_are_refused(self):
        model, given = _model().half(), _others(2)
        given["2"].lora_B[0, 0] = 1e6
        before = _state(model)
        for call in (set_factors, lambda *args: using_factors(*args).__enter__()):
            with pytest.raises(NonFiniteError, match=r"lora_B of '2'.*float16"):
                call(model, given)
        assert _state(model) == before

    def test_factors_that_diverged_are_passed_on(self):
        model, given = _model().half(), _others(2)
        given["2"].lora_B[0, 0] = float("nan")
        set_factors(model, given)
        assert bool(model[2].lora_B[0, 0].isnan())

    @pytest.mark.parametrize("call", [set_factors, lambda *args: using_factors(*args).__enter__()])
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda given: given.pop("2"), "lack 2"),
            (lambda given: given.update(up=given["0"]), "have up"),
            (
                lambda given: given.update({"2": given["0"]}),
                r"'2'.*\(4, rank\) and \(rank, 12\).*\(12, 2\) and \(2, 8\)",
            ),
        ],
    )
    def test_factors_that_do_not_fit_are_refused(self, call, change, says):
        model, given = _model(), _others(2)
        change(given)
        before = _state(model)
        with pytest.raises(InvalidArgumentError, match=f"factors.*{says}"):
            call(model, given)
        assert _state(model) == before

    def test_parametrized_factors_are_refused(self):
        model, given = _model(), _others(2)
        register_parametrization(model[0], "lora_A", nn.Identity())
        with pytest.raises(InvalidArgumentError, match=r"lora_A of '0'.*computed"):
            set_factors(model, given)

    def test_models_without_quantized_layers_are_refused(self):
        for call in (factors, lambda m: set_factors(m, {}), lambda m: save_factors("unused", m)):
            with pytest.raises(InvalidArgumentError, match=r"model.*got none"):
                call(nn.Sequential(nn.Linear(2, 2)))


class TestFiles:
    def test_a_fresh_model_with_the_same_base_gets_equal_outputs(self, tmp_path):
        trained = _moved(_model())
        save_factors(tmp_path / "f", trained, {"task": "sums", 3: (1, 2)})
        fresh = _model()
        assert load_factors(tmp_path / "f", fresh) == {"task": "sums", "3": [1, 2]}
        assert torch.equal(fresh(X), trained(X))
        assert {p.requires_grad for name, p in fresh.named_parameters() if "lora" in name} == {True}

    @pytest.mark.parametrize("rank", [0, 1, 3])
    def test_other_ranks_and_scalings(self, tmp_path, rank):
        trained = _model()
        set_factors(trained, _others(rank))
        save_factors(tmp_path / "f", trained)
        fresh = _model()
        load_factors(tmp_path / "f", fresh)
        assert (fresh[0].rank, fresh[0].scaling) == (rank, 2.0)
        assert torch.equal(fresh(X), trained(X))

    def test_half_precision_is_kept_bit_for_bit(self, tmp_path):
        trained = _moved(_model()).to(torch.bfloat16)
        save_factors(tmp_path / "f", trained)
        fresh = _model().to(torch.bfloat16)
        load_factors(tmp_path / "f", fresh)
        assert torch.equal(fresh[0].lora_A, trained[0].lora_A)

    def test_the_file_holds_the_factors_alone(self, tmp_path):
        model = _model(width=256)
        save_factors(tmp_path / "f", model)
        save_model(tmp_path / "m", model)
        expected = sum(p.nbytes for name, p in model.named_parameters() if "lora" in name)
        assert (tmp_path / "f").stat().st_size < expected + 1200 < (tmp_path / "m").stat().st_size

    def test_saving_twice_gives_the_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            save_factors(tmp_path / name, _moved(_model()), {"x": 1})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_inside_of_a_block_the_factors_in_use_are_saved(self, tmp_path):
        model, given = _model(), _others(1)
        with using_factors(model, given):
            save_factors(tmp_path / "f", model)
        load_factors(tmp_path / "f", model)
        assert torch.equal(model[0].lora_A, given["0"].lora_A)

    @pytest.mark.parametrize(
        ("other", "says"),
        [
            (lambda: _model(seed=5), "belongs to another quantized model.* in 0, 2"),
            (lambda: _model(fmt=lq.BlockFormat.parse("nf3/8:bfloat16")), "another quantized model"),
            (lambda: _model(width=13), "another quantized model"),
            (lambda: _model(include="0"), "'2' is not a quantized layer of the model"),
            (lambda: nn.Sequential(*_model(), nn.Linear(4, 8), *_model()), "'4' is not in the file"),
        ],
        ids=["seed", "format", "width", "fewer", "more"],
    )
    def test_another_base_is_refused(self, tmp_path, other, says):
        save_factors(tmp_path / "f", _moved(_model()))
        model = other()
        before = _state(model)
        with pytest.raises(CheckpointError, match=f"f .*{says}"):
            load_factors(tmp_path / "f", model)
        assert _state(model) == before

    def test_one_changed_code_is_another_base(self, tmp_path):
        save_factors(tmp_path / "f", _model())
        model = _model()
        model[2].quantized.codes[0] ^= 1
        with pytest.raises(CheckpointError, match=r"another quantized model.* in 2"):
            load_factors(tmp_path / "f", model)

    def test_copies_and_casts_have_the_same_base(self, tmp_path):
        model = _model()
        save_factors(tmp_path / "f", _moved(copy.deepcopy(model)))
        load_factors(tmp_path / "f", model.half())
        assert model[0].lora_A.dtype == torch.float16

    def test_a_codebook_without_a_standard_name_belongs_to_the_base(self, tmp_path):
        models = [_model(fmt=lq.BlockFormat(lq.Codebook([-1, level, 1], "own"), 8)) for level in (0, 0.5)]
        models[1].load_state_dict(models[0].state_dict())
        save_factors(tmp_path / "f", models[0])
        load_factors(tmp_path / "f", models[0])
        with pytest.raises(CheckpointError, match="another quantized model"):
            load_factors(tmp_path / "f", models[1])

    def test_factors_of_other_shapes_are_refused_with_the_name_of_the_file(self, tmp_path, monkeypatch):
        save_factors(tmp_path / "f", _model())
        monkeypatch.setattr("lqlora.nn.adapters.base_fingerprint", lambda _: "")
        monkeypatch.setattr("lqlora.checkpoint.factors.base_fingerprint", lambda _: "")
        save_factors(tmp_path / "f", _model())
        with pytest.raises(CheckpointError, match=r"does not fit.*'0'.*\(13, rank\)"):
            load_factors(tmp_path / "f", _model(width=13))
