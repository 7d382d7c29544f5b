"""Calibration block after block: inputs of each block, the same result as by hand, and what is refused."""

from __future__ import annotations

import copy

import pytest

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import import_quietly, require_module, require_or_skip

torch = require_module("torch")

from lqlora.nn import LQLinear, collect_gram, quantize_blocks, quantize_model  # noqa: E402
from lqlora.weighting import InputGram  # noqa: E402
from tests.nn.statistics.models import tiny_llama, tokens  # noqa: E402

NF2 = lq.BlockFormat.parse("nf2/8:float32")
WIDTH = 16


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(WIDTH, 24), torch.nn.Linear(24, WIDTH)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return x + scale * self.outer(torch.relu(self.drop(self.inner(x))))


class Model(torch.nn.Module):
    """Blocks whose second argument differs from block to block."""

    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.last = torch.nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.first(x)
        for position, block in enumerate(self.blocks):
            x = block(x, scale=1.0 + position)
        return self.last(x)


def _rows(seed=0):
    return [torch.randn(20, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]


def _by_hand(model, batches, names, rank):
    """Quantize block after block with the whole model, and collect the inputs of a block only when its turn has come."""
    for inside in names:
        grams = collect_gram(model, batches, include=inside, progress=False)
        norms = {name: InputGram(own.numpy()) for name, own in grams.items()}
        quantize_model(model, NF2, rank=rank, include=inside, weighting=norms, progress=False)
    return model


def _transformers(name):
    require_or_skip("transformers", is_installed("transformers"))
    return import_quietly("transformers"), name


def _gpt2():
    transformers, _ = _transformers("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _bert():
    transformers, _ = _transformers("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32
    )  # fmt: skip
    return transformers.BertModel(config)


def _mixtral():
    transformers, _ = _transformers("mixtral")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


class Linears(torch.nn.Module):
    """Blocks that are linear layers themselves, and one without a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class TestResult:
    def test_errors_name_layers_as_the_model_does(self):
        model = Model()
        with torch.no_grad():
            model.blocks[0].outer.bias[:] = torch.inf
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.inner"):
            quantize_blocks(model, NF2, _rows(), rank=1, progress=False)

    def test_blocks_may_be_linear_layers(self):
        model = Linears()
        expected = _by_hand(copy.deepcopy(model), _rows(), [["blocks.0"], ["blocks.2"]], 2)
        report = quantize_blocks(model, NF2, _rows(), rank=2, progress=False)
        assert list(report.layers) == ["blocks.0", "blocks.2"]
        x = _rows(9)[0]
        torch.testing.assert_close(model(x), expected(x))

    @pytest.mark.parametrize("rank", [0, 2])
    def test_it_is_that_of_steps_by_hand(self, rank):
        model = Model().train()
        model.blocks[1].drop.eval()
        modes = {name: own.training for name, own in model.named_modules()}
        expected = _by_hand(
            copy.deepcopy(model), _rows(), [[f"blocks.{i}.inner", f"blocks.{i}.outer"] for i in range(3)], rank
        )
        report = quantize_blocks(model, NF2, _rows(), rank=rank, progress=False)
        assert list(report.layers) == [f"blocks.{i}.{key}" for i in range(3) for key in ("inner", "outer")]
        assert report.dense["linear layers that were not selected"].layers == ("first", "last")
        x = _rows(9)[0]
        torch.testing.assert_close(model.eval()(x), expected.eval()(x))
        model.train()
        model.blocks[1].drop.eval()
        assert modes.items() <= {name: own.training for name, own in model.named_modules()}.items()

    def test_modes_are_restored(self):
        model = Model().train()
        model.blocks[1].drop.eval()
        modes = {name: own.training for name, own in model.named_modules()}
        quantize_blocks(model, NF2, _rows(), rank=1, progress=False)
        found = {name: own.training for name, own in model.named_modules()}
        assert modes.items() <= found.items()
        assert found["blocks.0.inner.quantized"]
        assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())

    @pytest.mark.parametrize("make", [tiny_llama, _gpt2, _bert, _mixtral])
    def test_models_of_transformers(self, make):
        model = make().eval()
        use_cache = model.config.use_cache
        batches = [
            {"input_ids": tokens(3), "attention_mask": torch.tensor([[1] * 9, [1] * 9, [1] * 5 + [0] * 4])},
            {"input_ids": tokens(2)},
        ]
        whole = copy.deepcopy(model)
        names = quantize_model(copy.deepcopy(model), NF2, rank=0, progress=False).layers
        path = next(
            own for own in ("model.layers", "transformer.h", "encoder.layer") if any(own in name for name in names)
        )
        inside = [[name for name in names if name.startswith(f"{path}.{i}.")] for i in range(2)]
        expected = _by_hand(whole, batches, inside, rank=1)
        report = quantize_blocks(model, NF2, batches, rank=1, held_out=batches, progress=False)
        for own in report.layers.values():  # the same batches give the same errors
            assert own.held_out_error == pytest.approx(own.relative_error, rel=1e-4)
        assert list(report.layers) == [name for block in inside for name in block]
        assert model.config.use_cache == use_cache
        with torch.no_grad():
            found, other = (own(input_ids=tokens(4)) for own in (model, expected))
        torch.testing.assert_close(found[0], other[0], rtol=1e-3, atol=1e-3)

    def test_the_norm_is_that_of_the_caller(self):
        seen = []

        def norm(gram):
            seen.append(gram.shape)
            return InputGram(gram, damping=0.5)

        model, other = Model(), Model()
        quantize_blocks(model, NF2, _rows(), rank=1, weighting=norm, progress=False)
        quantize_blocks(other, NF2, _rows(), rank=1, progress=False)
        assert seen == [(16, 16), (24, 24)] * 3
        assert not torch.equal(model.blocks[0].inner.lora_A, other.blocks[0].inner.lora_A)

    @pytest.mark.parametrize("rank", [0, 2])
    def test_errors_on_held_out_inputs(self, rank):
        model, other = Model(), Model()
        dense = copy.deepcopy(model)
        report = quantize_blocks(model, NF2, _rows(), rank=rank, held_out=_rows(7), progress=False)
        plain = quantize_blocks(other, NF2, _rows(), rank=rank, progress=False)
        for mine, same in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, same)  # held-out batches choose nothing
        assert {own.held_out_error for own in plain.layers.values()} == {None}
        assert "on held-out inputs" not in str(plain)
        # Block 1 sees what block 0 makes of the held-out rows.
        before = copy.deepcopy(model)
        for i in (1, 2):
            before.blocks[i] = copy.deepcopy(dense.blocks[i])
        gram = collect_gram(before, _rows(7), include="blocks.1.outer", progress=False)["blocks.1.outer"]
        error = dense.blocks[1].outer.weight - lq.nn.merged_weight(model.blocks[1].outer)
        norm = InputGram(gram.numpy())
        squares = [norm.squared_norm(own.detach().numpy()) for own in (error, dense.blocks[1].outer.weight)]
        found = report.layers["blocks.1.outer"].held_out_error
        assert found == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
        assert f"{max(own.held_out_error for own in report.layers.values()):.3g} (blocks" in str(report)

    def test_some_layers_formats_and_ranks_by_pattern(self):
        model = Model()
        nf3 = lq.BlockFormat.parse("nf3/8:float32")
        report = quantize_blocks(
            model, {"*.1.inner": nf3, "*.inner": NF2}, _rows(), rank={"*.0.*": 3, "*": 1}, exclude="*.2.*", progress=False
        )  # fmt: skip
        assert {name: (own.format, own.rank) for name, own in report.layers.items()} == {
            "blocks.0.inner": (NF2, 3),
            "blocks.1.inner": (nf3, 1),
        }
        assert type(model.blocks[2].inner) is torch.nn.Linear

    def test_progress_counts_blocks(self):
        calls = []
        quantize_blocks(Model(), NF2, _rows(), rank=0, progress=lambda done, total: calls.append((done, total)))
        assert calls == [(1, 3), (2, 3), (3, 3)]

    def test_an_error_in_a_later_block_leaves_the_model_as_it_was(self):
        model = Model()
        with torch.no_grad():
            model.blocks[1].outer.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.outer"):
            quantize_blocks(model, NF2, _rows(), rank=0, progress=False)
        assert not any(isinstance(own, LQLinear) for own in model.modules())
        assert all(own.requires_grad for own in model.parameters())
        assert model.training


class Twice(Model):
    def forward(self, x):
        return self.blocks[0](super().forward(x) @ torch.ones(3, WIDTH))


class Backwards(Model):
    def forward(self, x):
        x = self.first(x)
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Changing(Model):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = 2 * block(x)
        return x


class Skipping(Model):
    def forward(self, x):
        return self.blocks[0](self.first(x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (Twice, r"one after another.*not so block 0"),
            (Backwards, r"one after another.*not so block 2"),
            (Changing, r"one after another.*not so block 1"),
            (Skipping, "must run all 3 blocks of 'blocks', but ran 1"),
        ],
    )
    def test_blocks_that_do_not_run_one_after_another(self, make, sentence):
        model = make()
        with pytest.raises(InvalidArgumentError, match=sentence):
            quantize_blocks(model, NF2, _rows(), rank=0, progress=False)
        assert type(model.blocks[0].inner) is torch.nn.Linear
        assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())

    def test_lists_that_are_not_clear(self):
        model = torch.nn.ModuleDict({"a": Model(), "b": Model()})
        with pytest.raises(InvalidArgumentError, match=r"blocks must.*a\.blocks, b\.blocks hold 6"):
            quantize_blocks(model, NF2, _rows(), rank=0, progress=False)
        with pytest.raises(InvalidArgumentError, match=r"blocks must be the name .*'c'"):
            quantize_blocks(model, NF2, _rows(), rank=0, blocks="c", progress=False)
        with pytest.raises(InvalidArgumentError, match=r"include must .* list of blocks"):
            quantize_blocks(Model(), NF2, _rows(), rank=0, include="first", progress=False)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"batches": []}, "batches must hold at least one batch"),
            ({"batches": torch.zeros(2, 8)}, "batches must be several batches"),
            ({"held_out": torch.zeros(2, 8)}, "held_out must be several batches"),
            ({"embeddings": NF2}, "embeddings must be quantized by quantize_model"),
            ({"scaling": {"*": 1.0}}, "scaling must be one number"),
            ({"rank": None}, "rank must be given"),
        ],
    )
    def test_options(self, options, sentence):
        given = {"batches": _rows(), "rank": 0, "progress": False, **options}
        with pytest.raises(InvalidArgumentError, match=sentence):
            quantize_blocks(Model(), NF2, given.pop("batches"), **given)
