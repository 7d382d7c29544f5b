"""Training of blocks on their own output: less error for every format and part, what is stored, and what is refused."""

from __future__ import annotations

import copy
import logging

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")

from lqlora.nn import BlockTuning, LQLinear, quantize_blocks  # noqa: E402
from lqlora.nn.block_tuning import _Weight  # noqa: E402
from tests.nn.statistics.models import tiny_llama, tokens  # noqa: E402
from tests.nn.test_blocks import Linears, Model, _mixtral, _rows  # noqa: E402

#: Axes, ragged lines, rotations, zero points, several sets of fitted levels, signed and quantized scales.
SCALAR = (
    "nf2/8:float32", "nf2/7:float16", "nf2/5@-1:float32", "nf2/8:u8/256:float32", "affine2/8:float32", "affine2/8@0:float32",
    "affine2/6@-1~in3:float32", "nf2+fit/8:float32", "nf2+fit4/8@-1:float32", "nf2/8@-1~both:float32", "nf2/8@0~out:float32",
    "int3/8:float32", "bof3s-8/8:float32", "affine1/8:float16",
)  # fmt: skip
TRELLIS = "tcq2/8:float32", "tcq1/16@0~both:u8/256:float32"


def _converted(fmt, tuning, rank=0, **options):
    model = Model()
    report = quantize_blocks(
        model, lq.BlockFormat.parse(fmt), _rows(), rank=rank, include="blocks.0.*", tuning=tuning, progress=False, **options
    )  # fmt: skip
    return model, report


def _error(model):
    """Relative error of the output of the first block, on the rows for calibration."""
    dense = Model().eval()
    with torch.no_grad():
        x = torch.cat(_rows())
        expected = dense.blocks[0](dense.first(x))
        return float((model.eval().blocks[0](model.first(x)) - expected).norm() / expected.norm())


def _bytes(model):
    return [own.numpy().tobytes() for name, own in model.state_dict().items() if "quantized" in name or "lora" in name]


class Routed(torch.nn.Module):
    """A block whose layers run for some rows only, as experts do. One reads a weight without calling its layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.read = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = self.a(x) if x[0, 0] > 0 else self.b(x)
        return x + torch.nn.functional.linear(y, self.read.weight, self.read.bias)


class RoutedModel(torch.nn.Module):
    def __init__(self, block=Routed):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([block()])

    def forward(self, x):
        return self.blocks[0](x)


class Frozen(Routed):
    @torch.no_grad()
    def forward(self, x):
        return self.a(x) + self.b(x)


def _routed(first):
    """Rows that go to the first layer where the number is positive."""
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(5))
    rows[0, 0] = first
    return rows


@pytest.mark.filterwarnings("ignore:include selects")
class TestLayersThatAreNotReached:
    FORMAT = lq.BlockFormat.parse("nf2/8:float32")

    def _report(self, batches, model=None, **options):
        model = RoutedModel() if model is None else model
        return model, quantize_blocks(model, self.FORMAT, batches, rank=1, progress=False, **options)

    def test_by_held_out_batches(self):
        _, report = self._report([_routed(1), _routed(-1)], held_out=[_routed(2)])
        found = {name[-1]: own.held_out_error for name, own in report.layers.items()}
        assert found["a"] > 0
        assert found["b"] is None

    @pytest.mark.parametrize("rows", [[], [torch.zeros(0, 8)]])
    def test_by_held_out_batches_without_rows(self, rows):
        _, report = _converted("nf2/8:float32", BlockTuning(steps=2), held_out=rows)
        assert {own.held_out_error for own in report.layers.values()} == {None}

    def test_in_tuning(self):
        with pytest.warns(UserWarning, match=r"tuning left 2 layers .*blocks\.0\.b, blocks\.0\.read"):
            model, report = self._report([_routed(1)], tuning=BlockTuning(steps=20))
        dense = RoutedModel().blocks[0].b.weight.detach()
        found = lq.relative_error(dense, lq.nn.merged_weight(model.blocks[0].b))  # without inputs in the Frobenius norm
        assert report.layers["blocks.0.b"].relative_error == pytest.approx(found, rel=1e-5)

    def test_parts_that_do_not_reach_what_trains(self):
        batches = [_routed(1), _routed(-1)]
        model, _ = self._report(batches, include="*.a", tuning=BlockTuning(steps=30, batch=1))
        plain, _ = self._report(batches, include="*.a")
        assert _bytes(model) != _bytes(plain)

    def test_blocks_without_gradients(self):
        with pytest.warns(UserWarning, match="tuning left 2 layers"):
            self._report([_routed(1)], RoutedModel(Frozen), tuning=BlockTuning(), exclude="*.read")


class TestResult:
    @pytest.mark.parametrize("text", SCALAR)
    def test_less_error_in_every_format(self, text):
        fit = {"fit": "levels+scale"} if "+fit" in text else {}
        (plain, before), (model, after) = (
            _converted(text, tuning, **fit) for tuning in (None, BlockTuning(steps=30, batch=2))
        )
        assert _error(model) < _error(plain)
        for name, own in after.layers.items():
            assert (own.format, own.nbytes) == (before.layers[name].format, before.layers[name].nbytes)
        layer = model.blocks[0].inner
        assert not torch.equal(layer.quantized.codes, plain.blocks[0].inner.quantized.codes)
        dense = Model().blocks[0].inner.weight.detach()
        norm = lq.weighting.InputGram(
            lq.nn.collect_gram(Model(), _rows(), include="blocks.0.inner", progress=False)["blocks.0.inner"]
        )
        found = lq.relative_error(dense, lq.nn.merged_weight(layer), norm)
        assert after.layers["blocks.0.inner"].relative_error == pytest.approx(found, rel=1e-4)

    @pytest.mark.parametrize("text", [*SCALAR, *TRELLIS])
    @pytest.mark.parametrize("train", [("scales",), ("factors",), ("scales", "factors")])
    def test_scales_and_factors_of_every_format(self, text, train):
        fit = {"fit": "levels+scale"} if "+fit" in text else {}
        tuning = BlockTuning(steps=30, batch=3, train=train, factor_learning_rate=0.01)
        (plain, _), (model, _) = (_converted(text, own, rank=2, **fit) for own in (None, tuning))
        assert _error(model) < _error(plain)
        pair = plain.blocks[0].outer, model.blocks[0].outer
        assert torch.equal(*(own.quantized.codes for own in pair))
        assert torch.equal(*(own.lora_A for own in pair)) == ("factors" not in train)

    @pytest.mark.parametrize("text", ["nf2+fit/8:float32", "nf3+fit4/8@-1:float16", "nf2+fit/8@0~both:u8/256:float32"])
    @pytest.mark.parametrize("train", [("levels",), ("levels", "codes", "scales")])
    def test_fitted_levels(self, text, train):
        (plain, _), (model, _) = (
            _converted(text, own, fit="levels+scale") for own in (None, BlockTuning(steps=30, batch=3, train=train))
        )
        assert _error(model) < _error(plain)
        for own in (model.blocks[0].inner, model.blocks[0].outer):
            assert bool((own.quantized.levels.diff(dim=1) > 0).all())
        pair = plain.blocks[0].outer.quantized, model.blocks[0].outer.quantized
        assert not torch.equal(*(own.levels for own in pair))
        assert torch.equal(*(own.codes for own in pair)) == ("codes" not in train)

    @pytest.mark.parametrize("text", SCALAR)
    @pytest.mark.parametrize("rank", [0, 3])
    def test_training_starts_from_the_codes(self, text, rank):
        fit = {"fit": "levels+scale"} if "+fit" in text else {}
        model, _ = _converted(text, None, rank=rank, **fit)
        dense = Model().blocks[0].inner.weight.detach()
        layer = model.blocks[0].inner
        for train in (("codes", "scales"), ("scales",), ("levels",), ("codes", "levels")):
            weight = _Weight(layer, dense, train)
            torch.testing.assert_close(weight.matrix(), lq.dequantize(weight.stored), rtol=1e-5, atol=1e-6)
            x = torch.randn(3, 16)
            torch.testing.assert_close(weight.forward(x), layer(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(_Weight(layer, dense, ("codes",)).quantized("w").packed, layer.quantized.codes)

    def test_positions_are_those_of_the_weight_without_its_low_rank_part(self):
        model, _ = _converted("int4/8@-1:float32", None, rank=3, scaling=2.0)
        dense, layer = Model().blocks[0].inner.weight.detach(), model.blocks[0].inner
        weight = _Weight(layer, dense, ("codes",))
        rest = dense - 2.0 * layer.lora_B.detach() @ layer.lora_A.detach()
        found = weight.position * weight.scales.repeat_interleave(8, dim=1)
        # The factors were refitted after the rounding, so that some weights have left their cells.
        assert float(((found - rest).abs() < 1e-5).float().mean()) > 0.5

    @pytest.mark.parametrize("text", ["affine2/6@-1:float32", "nf2/8@0:float32", "tcq2/8:float32"])
    def test_the_gradient_of_scales(self, text):
        model, _ = _converted(text, None)
        weight = _Weight(model.blocks[0].inner, Model().blocks[0].inner.weight.detach(), ("scales",))
        (found,) = torch.autograd.grad(weight.matrix().square().sum() / 2, weight.ratio)
        # The matrix is proportional to each ratio, so that the gradient of half of its square is the energy of the block.
        index = torch.arange(weight.layout.count)
        blocks = weight.layout.blocks_at(index)
        energy = torch.zeros(weight.layout.blocks).index_add_(0, blocks, weight.values.reshape(-1).square())
        torch.testing.assert_close(found.reshape(-1), energy)

    def test_steps_that_help_nothing_leave_all_as_it_was(self):
        tuning = BlockTuning(steps=2, learning_rate=1e4, train=("codes", "scales", "factors"), factor_learning_rate=1e4)
        (plain, before), (model, after) = (_converted("nf2/8:u8/256:float32", own, rank=1) for own in (None, tuning))
        assert _bytes(model) == _bytes(plain)
        for name, own in after.layers.items():
            assert own.relative_error == pytest.approx(before.layers[name].relative_error, rel=1e-4)

    def test_the_seed_decides(self):
        found = [_bytes(_converted("nf2/8:float32", BlockTuning(steps=9, batch=2, seed=own))[0]) for own in (0, 0, 1)]
        assert found[0] == found[1] != found[2]

    def test_layers_with_and_without_fitted_levels(self):
        formats = {
            "*.inner": lq.BlockFormat.parse("nf2+fit/8:float32"),
            "*.outer": lq.BlockFormat.parse("tcq2/8:float32"),
        }
        plain, model = Model(), Model()
        for own, tuning in ((plain, None), (model, BlockTuning(steps=20, train=("levels",)))):
            quantize_blocks(own, formats, _rows(), rank=0, tuning=tuning, progress=False)
        for key, same in (("inner", False), ("outer", True)):
            pair = (own.blocks[0].get_submodule(key).quantized.dequantize() for own in (plain, model))
            assert torch.equal(*pair) == same

    def test_nothing_is_left_behind(self, caplog):
        with caplog.at_level(logging.INFO, "lqlora"):
            model, _ = _converted("nf2/8:float32", BlockTuning(steps=5), rank=1)
        assert sum("after tuning" in own.message for own in caplog.records) == 1
        layers = [own for own in model.modules() if isinstance(own, LQLinear)]
        assert len(layers) == 2
        for own in layers:
            assert "forward" not in vars(own)
            assert own.lora_A.grad is None
            assert own.lora_A.requires_grad
        model(_rows()[0]).sum().backward()
        assert layers[0].lora_B.grad is not None

    def test_blocks_that_are_linear_layers(self):
        plain, model = Linears(), Linears()
        dense = copy.deepcopy(model)
        fmt, rows = lq.BlockFormat.parse("nf2/8:float32"), _rows()
        for own, tuning in ((plain, None), (model, BlockTuning(steps=30, batch=3))):
            quantize_blocks(own, fmt, rows, rank=0, tuning=tuning, progress=False)
        x = torch.cat(rows)
        with torch.no_grad():
            errors = [float((own(x) - dense(x)).norm()) for own in (plain, model)]
        assert errors[1] < errors[0]

    def test_layers_of_half_precision(self):
        model = Model().to(torch.bfloat16)
        rows = [own.to(torch.bfloat16) for own in _rows()]
        report = quantize_blocks(
            model, lq.BlockFormat.parse("nf2/8:float32"), rows, rank=1, progress=False, held_out=rows,
            tuning=BlockTuning(steps=20, train=("codes", "scales", "factors")),
        )  # fmt: skip
        assert len(report.layers) == 6
        assert model(rows[0]).dtype == torch.bfloat16

    @pytest.mark.parametrize("train", [("codes", "scales"), ("factors",)])
    def test_small_numbers_of_half_precision(self, train):
        # Mean squares of these outputs are 1e-7, and their gradients below the numbers of float16.
        rows, found = [1e-3 * own.half() for own in _rows()], []
        for tuning in (None, BlockTuning(steps=40, train=train, factor_learning_rate=0.01)):
            model, fmt = Model().half(), lq.BlockFormat.parse("nf2/8:float32")
            for name, own in model.named_parameters():
                if "bias" in name:
                    torch.nn.init.zeros_(own)
            quantize_blocks(
                model, fmt, rows, rank=2 * ("factors" in train), include="blocks.0.*", tuning=tuning, progress=False
            )
            found.append(_bytes(model))
        assert found[0] != found[1]

    def test_scales_at_the_end_of_their_range(self):
        model = Model()
        with torch.no_grad():
            model.blocks[0].inner.weight.mul_(65000 / model.blocks[0].inner.weight.abs().max())
        quantize_blocks(
            model, lq.BlockFormat.parse("nf2/8:float16"), _rows(), rank=0, include="blocks.0.*", tuning=BlockTuning(), progress=False
        )  # fmt: skip
        assert bool(model.blocks[0].inner.quantized.scales.isfinite().all())

    def test_eight_bits(self):
        model, _ = _converted("int8/8:float32", BlockTuning(steps=3))
        assert _error(model) < 0.02

    def test_a_language_model(self):
        batches = [{"input_ids": tokens(3)} for _ in range(4)]
        models = [tiny_llama().eval() for _ in range(3)]
        for model, tuning in ((models[1], None), (models[2], BlockTuning(steps=40, batch=2))):
            quantize_blocks(
                model, lq.BlockFormat.parse("nf2/8:float32"), batches, rank=0, tuning=tuning, progress=False
            )
        with torch.no_grad():
            outputs = [torch.cat([own.model(**batch).last_hidden_state for batch in batches]) for own in models]
        assert (outputs[2] - outputs[0]).norm() < (outputs[1] - outputs[0]).norm()

    def test_experts_stay_as_they_were_quantized(self):
        batches, found = [{"input_ids": tokens(2)}, {"input_ids": tokens(3)}], []
        for tuning in (None, BlockTuning(steps=5, batch=2)):
            model = _mixtral().eval()
            quantize_blocks(
                model, lq.BlockFormat.parse("nf2/8:float32"), batches, rank=0, tuning=tuning, progress=False
            )
            found.append(
                {
                    name: own
                    for name, own in model.state_dict().items()
                    if name.endswith("codes") and "layers.0." in name
                }
            )
        same = {name: torch.equal(own, found[1][name]) for name, own in found[0].items()}
        assert all(own for name, own in same.items() if "experts" in name)
        assert not all(same.values())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"steps": 0}, "steps must"),
            ({"batch": 0}, "batch must"),
            ({"seed": -1}, "seed must"),
            ({"seed": 2**63}, "seed must"),
            ({"train": "codes"}, "train must be a sequence"),
            ({"train": ()}, "train must be a sequence"),
            ({"train": 1}, "train must be a sequence"),
            ({"train": {"codes"}}, "train must be a sequence"),
            ({"train": ("biases",)}, "train must"),
            ({"learning_rate": 0.0}, "learning_rate must"),
            ({"factor_learning_rate": float("inf")}, "factor_learning_rate must"),
        ],
    )
    def test_options(self, options, sentence):
        with pytest.raises(InvalidArgumentError, match=sentence):
            BlockTuning(**options)

    @pytest.mark.parametrize("text", TRELLIS)
    def test_trellis_codes_do_not_train(self, text):
        with pytest.raises(InvalidArgumentError, match=r"trellis formats, but 'blocks\.0\.inner' has tcq"):
            _converted(text, BlockTuning())

    @pytest.mark.parametrize("train", [("levels",), ("factors",), ("factors", "levels")])
    def test_nothing_to_train(self, train):
        with pytest.raises(InvalidArgumentError, match="tuning must train a part"):
            _converted("nf2/8:float32", BlockTuning(train=train))

    def test_an_interrupt_leaves_the_model_as_it_was(self, monkeypatch):
        model, calls = Model(), []

        def interrupted(*_):
            calls.append(1)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return plain(*_)

        plain = _Weight.descend
        monkeypatch.setattr(_Weight, "descend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_blocks(
                model, lq.BlockFormat.parse("nf2/8:float32"), _rows(), rank=0, tuning=BlockTuning(), progress=False
            )
        assert not any(isinstance(own, LQLinear) for own in model.modules())
        for mine, own in zip(model.parameters(), Model().parameters(), strict=True):
            assert torch.equal(mine, own)
