"""Distillation of quantized models: the divergence, training, early stopping, and runs that go on after a break."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")

from lqlora.nn import PEQALinear, collect_outputs, distill, factors, freeze_scales, quantize_model, save_model  # noqa: E402
from lqlora.nn.distillation.teacher import divergence, fingerprint  # noqa: E402
from tests.nn.statistics.models import tiny_llama, tokens  # noqa: E402

NF2 = lq.BlockFormat.parse("nf2/16:u8/16:float32")
WORDS = 40


def _models(rank=2, fmt=NF2):
    """Return a small dense model whose outputs differ much between positions, and the same one quantized."""
    torch.manual_seed(0)
    layers = torch.nn.Embedding(WORDS, 32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, WORDS)
    teacher = torch.nn.Sequential(*layers)
    with torch.no_grad():
        teacher[0].weight *= 2
    model = copy.deepcopy(teacher)
    quantize_model(model, fmt, rank=rank, include=["1", "3"])
    return teacher, model


def _batches(count, start=0):
    return [torch.randint(WORDS, (2, 6), generator=torch.Generator().manual_seed(start + i)) for i in range(count)]


@torch.no_grad()
def _mean_divergence(model, teacher, batches):
    """Return the mean divergence over positions in float64, from all logits."""
    p, q = (
        torch.cat([torch.log_softmax(own(batch).double(), -1).flatten(0, -2) for batch in batches])
        for own in (teacher, model)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


class TestDivergence:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 30), st.floats(0.5, 4), st.integers(0, 10_000), st.floats(0.1, 8))
    def test_it_is_that_of_the_kept_classes_and_the_rest(self, top_k, temperature, seed, size):
        rng = np.random.default_rng(seed)
        given_p, given_q = (size * rng.standard_normal((3, 30)) for _ in range(2))

        def probabilities(logits):
            shares = np.exp(logits / temperature - np.max(logits / temperature, axis=1, keepdims=True))
            return shares / shares.sum(axis=1, keepdims=True)

        p, q = probabilities(given_p), probabilities(given_q)
        expected = 0.0
        for row in range(3):
            kept = np.argsort(-p[row])[:top_k]
            rest = np.setdiff1d(np.arange(30), kept)
            expected += float(np.sum(p[row, kept] * np.log(p[row, kept] / q[row, kept])))
            if len(rest):
                rest_p, rest_q = p[row, rest].sum(), q[row, rest].sum()
                expected += rest_p * np.log(rest_p / rest_q)
        full = float(np.sum(p * np.log(p / q)))

        outputs = collect_outputs(
            lambda_model(given_p), [torch.zeros(1, 3)], top_k=top_k, temperature=temperature, progress=False
        )
        ((kept,),) = outputs.batches.values()
        found = float(divergence(torch.tensor(given_q, dtype=torch.float32), kept, temperature)) / temperature**2
        assert found == pytest.approx(expected, rel=3e-3, abs=3e-3)  # outputs of the teacher are in half precision
        assert found <= full * (1 + 3e-3) + 3e-3

    def test_equal_models_do_not_differ(self):
        teacher, _ = _models()
        outputs = collect_outputs(teacher, _batches(1), top_k=5, progress=False)
        ((kept,),) = outputs.batches.values()
        logits = teacher(_batches(1)[0]).detach().flatten(0, 1)
        assert abs(float(divergence(logits, kept))) < 1e-3

    def test_classes_that_are_impossible_have_no_infinite_loss(self):
        logits = torch.tensor([[0.0, -1e30, -1e30], [3e4, 0.0, -3e4]])
        outputs = collect_outputs(lambda_model(logits), [torch.zeros(1, 2)], top_k=1, progress=False)
        ((kept,),) = outputs.batches.values()
        own = torch.zeros(2, 3, requires_grad=True)
        found = divergence(own, kept)
        found.backward()
        assert float(found.detach()) == pytest.approx(2 * math.log(3), rel=1e-3)
        assert bool(own.grad.isfinite().all())


class lambda_model(torch.nn.Module):  # noqa: N801 - used as a function
    """Returns the same logits for every batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, _):
        return self.logits[None]


class TestTraining:
    @pytest.mark.parametrize(
        ("spelling", "rank", "train"),
        [
            ("nf2/16:u8/16:float32", 4, ("factors",)),
            ("tcq2-6/16:float32", 4, ("factors",)),
            ("nf2/16:u8/16:float32", 4, ("factors", "scales")),
            ("nf2/16:u8/16:float32", 0, ("scales",)),
            ("tcq2-6/16:float32", 0, ("scales",)),
            ("affine2/16:float32", 0, ("scales",)),
        ],
    )
    def test_it_repairs_much_of_the_damage_also_on_other_batches(self, spelling, rank, train):
        teacher, model = _models(rank, lq.BlockFormat.parse(spelling))
        test = _batches(4, start=100)
        before = _mean_divergence(model, teacher, test)
        report = distill(
            model, teacher, _batches(16), held_out=test, train=train, epochs=6, learning_rate=5e-3, scale_learning_rate=1e-2,
            progress=False,
        )  # fmt: skip
        after = _mean_divergence(model, teacher, test)
        assert after < (0.85 if train == ("scales",) else 0.67) * before
        assert report.held_out[0] == pytest.approx(before, rel=5e-3, abs=1e-3)
        assert report.held_out[report.best_step] == pytest.approx(after, rel=5e-3, abs=1e-3)
        if "scales" in train:
            assert all(isinstance(model[i], PEQALinear) for i in (1, 3))
            freeze_scales(model)
            assert _mean_divergence(model, teacher, test) == pytest.approx(after, rel=1e-4)

    def test_what_does_not_train_stays(self, tmp_path):
        teacher, model = _models()
        model[0].weight.requires_grad_()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        model.train()
        model[2].eval()
        others = {name: own.clone() for name, own in model.state_dict().items() if "lora" not in name}
        flags = [own.requires_grad for own in model.parameters()]
        modes = [own.training for own in model.modules()]
        state = {name: own.clone() for name, own in teacher.state_dict().items()}
        distill(model, teacher, _batches(3), held_out=_batches(2, 50), checkpoint=tmp_path / "run", progress=False)
        assert all(torch.equal(own, model.state_dict()[name]) for name, own in others.items())
        assert flags == [own.requires_grad for own in model.parameters()]
        assert modes == [own.training for own in model.modules()]
        assert bool((model[0].weight.grad == 1).all())
        assert all(model[i].lora_A.grad is None for i in (1, 3))
        assert all(torch.equal(own, teacher.state_dict()[name]) for name, own in state.items())
        save_model(tmp_path / "model", model)

    def test_outputs_that_were_collected_before_give_the_same_result(self):
        teacher, model = _models()
        other = copy.deepcopy(model)
        batches = _batches(4)
        outputs = collect_outputs(teacher, batches, progress=False)
        first = distill(model, teacher, batches, progress=False)
        second = distill(other, outputs, batches, progress=False)
        assert first.losses == second.losses
        assert torch.equal(model[1].lora_A, other[1].lora_A)

    def test_padding_has_no_part(self):
        teacher = tiny_llama()
        model = copy.deepcopy(teacher)
        quantize_model(model, NF2, rank=2)
        ids = tokens(2)
        padded = {
            "input_ids": torch.cat([torch.full((2, 3), 7), ids], dim=1),
            "attention_mask": torch.tensor([[0] * 3 + [1] * 9] * 2),
        }
        plain = {"input_ids": ids, "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
        found = [distill(copy.deepcopy(model), teacher, [own], progress=False).losses for own in (padded, plain)]
        assert found[0] == pytest.approx(found[1], rel=1e-5)

    def test_autocast_is_close(self):
        teacher, model = _models()
        other = copy.deepcopy(model)
        wide = distill(model, teacher, _batches(4), progress=False)
        half = distill(other, teacher, _batches(4), dtype=torch.bfloat16, progress=False)
        assert half.losses == pytest.approx(wide.losses, rel=0.1)
        assert half.losses != wide.losses

    def test_signed_scales_keep_their_signs(self):
        teacher, model = _models(0, lq.BlockFormat.parse("bof4s-16/16:float32"))
        before = model[1].quantized.array.scales
        assert bool((torch.as_tensor(before) < 0).any())
        distill(model, teacher, _batches(2), train=("scales",), scale_learning_rate=1e-6, progress=False)
        torch.testing.assert_close(model[1].quantized.scales.detach(), torch.as_tensor(before), rtol=1e-4, atol=1e-6)

    def test_scales_of_zero_are_the_least(self):
        teacher, model = _models(0)
        distill(model, teacher, _batches(6), train=("scales",), scale_learning_rate=2.0, progress=False)
        assert float(model[1].quantized.scales.detach().min()) == 0
        freeze_scales(model)

    def test_inference_mode_of_the_caller(self):
        teacher, model = _models()
        other = copy.deepcopy(model)
        expected = distill(other, teacher, _batches(2), progress=False).losses
        with torch.inference_mode():
            assert distill(model, teacher, _batches(2), progress=False).losses == expected

    def test_factors_that_layers_share_train_once(self):
        class Unused(torch.nn.Sequential):
            def forward(self, x):
                return super().forward(x) if not hasattr(self, "twin") else torch.nn.Sequential(*list(self)[:4])(x)

        teacher, model = _models()
        model = Unused(*model)
        other = copy.deepcopy(model)
        model.twin = copy.deepcopy(model[1])
        model.twin.lora_A, model.twin.lora_B = model[1].lora_A, model[1].lora_B
        found, expected = (distill(own, teacher, _batches(2), progress=False) for own in (model, other))
        assert found.trainable == expected.trainable
        assert found.losses == expected.losses

    def test_experts_train(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, use_cache=False,
        )  # fmt: skip
        teacher = transformers.MixtralForCausalLM(config).eval()
        model = copy.deepcopy(teacher)
        quantize_model(model, NF2, rank=4)
        report = distill(model, teacher, [tokens(4)], epochs=30, learning_rate=1e-2, progress=False)
        assert report.losses[-1] < 0.7 * report.losses[0]

    def test_the_report_is_short(self):
        teacher, model = _models()
        report = distill(model, teacher, _batches(2), held_out=_batches(1, 50), progress=False)
        assert str(report).startswith("distilled: 400 parameters, 2 steps, ")
        assert len(str(report).splitlines()) == 3

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_factors_in_half_precision_train_in_float32(self, dtype, tmp_path):
        teacher, model = _models()
        teacher, model = teacher.to(dtype), model.to(dtype)
        before = factors(model)["1"].lora_A
        options = {"learning_rate": 2e-3, "checkpoint": tmp_path / "run", "progress": False}
        report = distill(model, teacher, _batches(12), held_out=_batches(2, 50), **options)
        after = factors(model)["1"].lora_A
        assert after.dtype == dtype
        assert bool(after.isfinite().all())
        assert float((after != before).float().mean()) > 0.5
        assert report.best_step > 0

    def test_averages_of_batch_normalization_stay(self):
        torch.manual_seed(0)
        layers = torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
        teacher = torch.nn.Sequential(*layers)
        model = copy.deepcopy(teacher).train()
        quantize_model(model, NF2, rank=2)
        before = {name: own.clone() for name, own in model[1].state_dict().items()}
        distill(model, teacher, [torch.randn(9, 16)], progress=False)
        assert all(torch.equal(own, before[name]) for name, own in model[1].state_dict().items())
        assert model[1].training

    def test_held_out_batches_of_several_lengths_count_by_position(self):
        teacher, model = _models()
        tests = [*_batches(1, 50), torch.randint(WORDS, (5, 11), generator=torch.Generator().manual_seed(3))]
        report = distill(model, teacher, _batches(1), held_out=tests, progress=False)
        with torch.no_grad():
            p, q = (torch.cat([own(x).flatten(0, -2) for x in tests]) for own in (teacher, model))
        if report.best_step:
            p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
            expected = float((p.exp() * (p - q)).sum(-1).mean())
            assert report.held_out[report.best_step] == pytest.approx(expected, rel=1e-3)


class Branching(torch.nn.Module):
    """Uses one of two layers, by the first word of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.a, self.b = (
            torch.nn.Embedding(WORDS, 32),
            torch.nn.Linear(32, WORDS),
            torch.nn.Linear(32, WORDS),
        )

    def forward(self, x):
        return (self.a if int(x.flatten()[0]) % 2 else self.b)(self.table(x))


class TestEarlyStopping:
    def test_a_run_that_changes_nothing_stops(self):
        teacher, model = _models()
        options = {"learning_rate": 1e-30, "evaluate_every": 2, "progress": False}
        report = distill(model, teacher, _batches(20), held_out=_batches(1, 50), **options)
        assert (len(report.losses), report.best_step) == (6, 0)

    def test_the_best_state_is_kept_and_patience_ends_the_run(self):
        teacher, model = _models()
        before = factors(model)
        # A rate that destroys the model at once.
        report = distill(
            model, teacher, _batches(20), held_out=_batches(2, 50), learning_rate=10.0, evaluate_every=2, patience=3, progress=False
        )  # fmt: skip
        assert report.best_step == 0
        assert list(report.held_out) == [0, 2, 4, 6]
        assert len(report.losses) == 6
        assert all(torch.equal(own.lora_B, factors(model)[name].lora_B) for name, own in before.items())

    def test_without_held_out_batches_the_last_state_stays(self):
        teacher, model = _models()
        report = distill(model, teacher, _batches(5), progress=False)
        assert (report.best_step, report.held_out) == (5, {})


class TestBreaks:
    @pytest.mark.parametrize("stop", [1, 4, 5, 7])
    @pytest.mark.parametrize("held_out", [False, True])
    @pytest.mark.parametrize("train", [("factors",), ("factors", "scales")])
    def test_a_run_goes_on_to_the_same_bits(self, stop, held_out, train, tmp_path):
        tests = _batches(2, 50) if held_out else []
        options = {"held_out": tests, "train": train, "epochs": 2, "evaluate_every": 2, "learning_rate": 3e-3}
        teacher, model = _models()
        whole, broken = copy.deepcopy(model), copy.deepcopy(model)
        expected = distill(whole, teacher, _batches(4), **options, progress=False)

        def interrupt(done, total):
            if total == 8 and done == stop:
                raise KeyboardInterrupt

        path = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            distill(broken, teacher, _batches(4), **options, checkpoint=path, progress=interrupt)
        fresh = copy.deepcopy(model)
        for _ in range(2):  # the second call finds a run that has ended
            found = distill(fresh, teacher, _batches(4), **options, checkpoint=path, progress=False)
            assert found.losses == expected.losses
            assert found.held_out == expected.held_out
            assert found.best_step == expected.best_step
            assert all(torch.equal(own, whole.state_dict()[name]) for name, own in fresh.state_dict().items())

    def test_layers_that_some_steps_do_not_use(self, tmp_path):
        teacher = Branching()
        model = copy.deepcopy(teacher)
        quantize_model(model, NF2, rank=2, include=["a", "b"])
        whole, broken = copy.deepcopy(model), copy.deepcopy(model)
        options = {"evaluate_every": 3, "learning_rate": 1e-2}
        expected = distill(whole, teacher, _batches(12), **options, progress=False)

        def interrupt(done, _):
            if done == 7:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            distill(broken, teacher, _batches(12), **options, checkpoint=tmp_path / "run", progress=interrupt)
        found = distill(model, teacher, _batches(12), **options, checkpoint=tmp_path / "run", progress=False)
        assert found.losses == expected.losses
        assert all(torch.equal(own, whole.state_dict()[name]) for name, own in model.state_dict().items())

    def test_an_interrupted_model_has_its_best_state(self):
        teacher, model = _models()
        before = factors(model)["1"].lora_B

        def interrupt(done, total):
            if total == 9 and done == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            distill(model, teacher, _batches(9), held_out=_batches(1, 50), learning_rate=10.0, progress=interrupt)
        assert torch.equal(factors(model)["1"].lora_B, before)
        assert model[1].lora_A.requires_grad

    def test_another_run_is_refused(self, tmp_path):
        teacher, model = _models()
        distill(model, teacher, _batches(2), checkpoint=tmp_path / "run", progress=False)
        for batches, options in (
            (_batches(3), {}),
            (_batches(2), {"learning_rate": 1e-3}),
            (_batches(2), {"epochs": 2}),
        ):
            with pytest.raises(CheckpointError, match="another run"):
                distill(model, teacher, batches, **options, checkpoint=tmp_path / "run", progress=False)
        few = collect_outputs(teacher, _batches(2), top_k=5, progress=False)
        with pytest.raises(CheckpointError, match="another run"):
            distill(model, few, _batches(2), checkpoint=tmp_path / "run", progress=False)
        _, other = _models(rank=3)
        with pytest.raises(CheckpointError, match="another run"):
            distill(other, teacher, _batches(2), checkpoint=tmp_path / "run", progress=False)

    def test_other_files_are_neither_read_nor_replaced(self, tmp_path):
        teacher, model = _models()
        path = tmp_path / "model"
        save_model(path, model)
        content = path.read_bytes()
        with pytest.raises(CheckpointError, match=r"lqlora\.nn\.distill did not write"):
            distill(model, teacher, _batches(2), checkpoint=path, progress=False)
        assert path.read_bytes() == content

    def test_a_damaged_file_is_refused(self, tmp_path):
        teacher, model = _models()
        path = tmp_path / "run"
        distill(model, teacher, _batches(2), checkpoint=path, progress=False)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="changed after it was written"):
            distill(model, teacher, _batches(2), checkpoint=path, progress=False)


class TestRefusals:
    def test_a_loss_that_is_not_finite_leaves_the_best_state(self):
        teacher, model = _models()
        before = factors(model)["1"].lora_A
        with pytest.raises(NonFiniteError, match=r"loss must be.*nan at step"):
            distill(model, teacher, _batches(8), learning_rate=1e38, progress=False)
        assert torch.equal(factors(model)["1"].lora_A, before)

    def test_a_gradient_that_is_not_finite_leaves_the_best_state(self):
        teacher, model = _models()
        before = factors(model)["1"].lora_B
        model[1].lora_B.register_hook(lambda own: own * math.inf)
        with pytest.raises(NonFiniteError, match=r"gradient of the loss must be.*(nan|inf) at step 0"):
            distill(model, teacher, _batches(1), progress=False)
        assert torch.equal(factors(model)["1"].lora_B, before)

    @pytest.mark.parametrize("held_out", [False, True])
    def test_a_late_loss_that_is_not_finite_leaves_a_late_state(self, held_out):
        teacher, model = _models()
        calls = []

        def spoil(_, __, output):
            calls.append(1)
            return output * math.nan if len(calls) > 6 else output

        outputs = collect_outputs(teacher, [*_batches(9), *_batches(1, 50)], progress=False)
        before = factors(model)["1"].lora_B
        model.register_forward_hook(spoil)
        tests = _batches(1, 50) if held_out else []
        options = {"learning_rate": 1e-2, "evaluate_every": 2, "progress": False}
        with pytest.raises(NonFiniteError, match=r"must be finite, got nan.* state after step [2-6]"):
            distill(model, outputs, _batches(9), held_out=tests, **options)
        assert not torch.equal(factors(model)["1"].lora_B, before)

    def test_the_teacher_is_not_the_model(self):
        _, model = _models()
        with pytest.raises(InvalidArgumentError, match=r"teacher must be another"):
            distill(model, model, _batches(1), progress=False)

    def test_models_with_one_class(self):
        teacher = torch.nn.Sequential(torch.nn.Linear(16, 1))
        with pytest.raises(InvalidArgumentError, match="at least 2 classes"):
            collect_outputs(teacher, [torch.randn(3, 16)], progress=False)

    def test_nested_batches_are_told_apart(self):
        first = {"x": [torch.zeros(2000)]}
        second = {"x": [torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1)]}
        assert fingerprint(first) != fingerprint(second)

    def test_a_folder_that_does_not_exist_is_found_before_the_work(self, tmp_path):
        teacher, model = _models()
        calls = []
        teacher.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(CheckpointError):
            distill(model, teacher, _batches(2), checkpoint=tmp_path / "none" / "run", progress=False)
        assert not calls

    def test_logits_of_a_teacher_that_are_not_finite(self):
        with pytest.raises(NonFiniteError, match=r"teacher must.*finite.*batch 0"):
            collect_outputs(lambda_model([[math.nan, 0.0]]), [torch.zeros(1, 1)], progress=False)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"train": "factors"}, "train must be a sequence"),
            ({"train": ()}, "train must be a sequence"),
            ({"train": ("levels",)}, "train must be 'factors' or 'scales', got 'levels'"),
            ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
            ({"temperature": math.nan}, "temperature must be above 0 and finite, got nan"),
            ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
            ({"dtype": torch.float64}, r"dtype must be .*, got torch\.float64"),
            ({"held_out": torch.zeros(2, 6)}, "held_out must be several batches"),
        ],
    )
    def test_options(self, options, sentence):
        teacher, model = _models()
        with pytest.raises(InvalidArgumentError, match=sentence):
            distill(model, teacher, _batches(2), **options, progress=False)

    def test_batches_and_teachers_that_do_not_fit(self):
        teacher, model = _models()
        with pytest.raises(InvalidArgumentError, match=r"batches must.*one batch"):
            distill(model, teacher, [], progress=False)
        outputs = collect_outputs(teacher, _batches(1), progress=False)
        with pytest.raises(InvalidArgumentError, match=r"held_out must be.*batch 0"):
            distill(model, outputs, _batches(1), held_out=_batches(1, 50), progress=False)
        with pytest.raises(InvalidArgumentError, match=r"temperature must be.*1\.0, got 2"):
            distill(model, outputs, _batches(1), temperature=2.0, progress=False)
        wide = torch.nn.Sequential(torch.nn.Embedding(WORDS, 32), torch.nn.Linear(32, WORDS + 1))
        with pytest.raises(InvalidArgumentError, match=r"teacher must have.*\(12, 40\)"):
            distill(model, wide, _batches(1), progress=False)

    def test_models_without_factors(self):
        teacher, model = _models(rank=0)
        with pytest.raises(InvalidArgumentError, match=r"model must have.* 2 quantized layers is 0"):
            distill(model, teacher, _batches(1), progress=False)
        with pytest.raises(InvalidArgumentError, match=r"model must.*a quantized layer"):
            distill(teacher, teacher, _batches(1), progress=False)
