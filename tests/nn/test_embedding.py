"""Quantized embeddings: looked-up rows, tied output embeddings, conversion, files, and what others do to them."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest

import lqlora as lq
from lqlora.errors import (
    CheckpointError,
    InvalidArgumentError,
    LQLoRAError,
    MixedArraysError,
    NonFiniteError,
    UnsupportedArrayError,
)
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import (  # noqa: E402
    LQLinear,
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedTensor,
    QuantizedWeight,
    dequantize_model,
    load_model,
    operands,
    quantize_model,
    requantize_model,
    save_model,
)
from lqlora.nn import operators as nn_operators  # noqa: E402
from tests.nn.structures import WIDTH, WORDS, Words  # noqa: E402

NF4, DOUBLE = lq.BlockFormat.parse("nf4/8:float32"), lq.BlockFormat.parse("nf3/8:u8/16:float16")
IDS = torch.tensor([[0, 3, 10], [7, 7, 1]])


def _table(fmt=DOUBLE, rows=WORDS, columns=WIDTH):
    return lq.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), fmt)


class GemmaLike(nn.Embedding):
    """Rounds its factor to the dtype of the weight, as Gemma does."""

    def __init__(self, *args, scale=3.3):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class BartLike(nn.Embedding):
    embed_scale = 1.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


class Counting(nn.Embedding):
    def counted(self):
        return len(self.weight)


def _bart_like(*args):
    embedding = BartLike(*args)
    embedding.embed_scale = 2.7
    return embedding


def _words(embedding=nn.Embedding, *, tied=True, bias=False, head="lm_head", dtype=torch.float32):
    torch.manual_seed(0)
    model = Words(head, tied=False, bias=bias)
    model.embed = embedding(WORDS, WIDTH)
    if tied:
        getattr(model, head).weight = model.embed.weight
    return model.to(dtype)


def _quantized(model, embeddings=DOUBLE, **options):
    report = quantize_model(model, NF4, rank=2, embeddings=embeddings, max_iter=1, **options)
    return model, report


class TestLookups:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_have_the_bits_of_the_decoded_table(self, dtype):
        q = _table()
        layer = QuantizedEmbedding(q).to(dtype)
        assert torch.equal(layer(IDS), lq.dequantize(q)[IDS].to(dtype))
        assert torch.equal(layer(IDS[0].int()), layer(IDS[0]))
        assert layer(IDS[:0]).shape == (0, 3, WIDTH)
        assert layer(IDS[0, 0]).shape == (WIDTH,)

    def test_a_table_is_never_decoded_as_a_whole(self, monkeypatch):
        layer = QuantizedEmbedding(_table())
        monkeypatch.setattr(nn_operators, "dequantize", None)
        assert layer(IDS).shape == (2, 3, WIDTH)

    def test_scale_and_padding(self):
        q = _table()
        layer = QuantizedEmbedding(q, padding_idx=1, scale=0.5)
        assert torch.equal(layer(IDS), 0.5 * lq.dequantize(q)[IDS])
        assert (layer.padding_idx, layer.num_embeddings, layer.embedding_dim) == (1, WORDS, WIDTH)
        assert repr(layer).startswith("QuantizedEmbedding(\n  11, 8, padding_idx=1, scale=0.5\n")

    @pytest.mark.parametrize(
        ("ids", "error", "match"),
        [
            (torch.tensor([WORDS]), InvalidArgumentError, "from 0 to 10, got 11"),
            (torch.tensor([-1]), InvalidArgumentError, "got -1"),
            (torch.tensor([1.0]), UnsupportedArrayError, "ids must be int32 or int64"),
            (torch.tensor([1], device="meta"), MixedArraysError, "one device"),
        ],
    )
    def test_wrong_ids_are_refused(self, ids, error, match):
        with pytest.raises(error, match=match):
            QuantizedEmbedding(_table())(ids)

    def test_wrong_tables_are_refused(self):
        with pytest.raises(InvalidArgumentError, match="blocks along its rows"):
            QuantizedEmbedding(_table(lq.BlockFormat.parse("nf4/8@0:float32")))
        with pytest.raises(InvalidArgumentError, match="must be a matrix"):
            QuantizedEmbedding(lq.quantize(torch.ones(4), NF4))
        with pytest.raises(InvalidArgumentError, match="QuantizedArray"):
            QuantizedEmbedding(torch.ones(4, 4))
        with pytest.raises(InvalidArgumentError, match="weight must be a matrix"):
            torch.ops.lqlora.embedding(IDS, *operands(lq.quantize(torch.ones(4), NF4)))

    def test_padding_and_biases_that_do_not_fit(self):
        layer = QuantizedEmbedding(_table(), padding_idx=-1)
        assert layer.padding_idx == nn.Embedding(WORDS, WIDTH, padding_idx=-1).padding_idx
        for wrong in (WORDS, -WORDS - 1, 1.5):
            with pytest.raises(InvalidArgumentError, match=f"padding_idx .*{wrong}"):
                QuantizedEmbedding(_table(), padding_idx=wrong)
        for size in (1, WORDS + 1):
            with pytest.raises(InvalidArgumentError, match=rf"bias must have shape \(11,\), got \({size},\)"):
                QuantizedHead(layer.quantized, torch.ones(size))

    @pytest.mark.parametrize("text", ["nf3/8:u8/16:float16", "affine4/7:float16", "nf2+fit2/8@-1:float32"])
    @pytest.mark.slow
    def test_opcheck(self, text):
        q = _table(lq.BlockFormat.parse(text))
        torch.library.opcheck(torch.ops.lqlora.embedding.default, (IDS, *operands(q)), {"dtype": torch.bfloat16})

    @pytest.mark.slow
    def test_compiled_models(self):
        torch._dynamo.reset()
        model, _ = _quantized(_words())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS), model(IDS))

    def test_the_weight_is_a_quantized_tensor(self):
        layer = QuantizedEmbedding(_table())
        weight = layer.weight
        assert isinstance(weight, QuantizedTensor)
        assert not weight.requires_grad
        assert torch.equal(weight.dequantize()[IDS], layer(IDS))
        assert torch.equal(nn.functional.embedding(IDS, weight), layer(IDS))
        assert torch.equal(nn.functional.embedding(IDS, weight, 3), layer(IDS))
        for wrong in (layer.weight.T, LQLinear(_table(), torch.ones(1, WIDTH), torch.ones(WORDS, 1)).weight):
            with pytest.raises(InvalidArgumentError, match="QuantizedTensor"):
                nn.functional.embedding(IDS, wrong)
        assert torch.equal(weight[:2].dequantize(), layer(torch.tensor([0, 1])))


class TestTransposedProduct:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_a_large_table_is_decoded_in_steps(self, monkeypatch, dtype):
        q = _table(rows=50, columns=24)
        x = torch.randn(3, 2, 50).to(dtype)
        expected = torch.ops.lqlora.matmul(x, *operands(q), adjoint=True)
        monkeypatch.setattr(nn_operators, "_LARGE", 100)
        monkeypatch.setattr(nn_operators, "_STEP", 170)  # 7 rows
        monkeypatch.setattr(nn_operators, "dequantize", None)
        found = torch.ops.lqlora.matmul(x, *operands(q), adjoint=True)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


class TestConversion:
    @pytest.mark.parametrize("bias", [False, True])
    def test_a_tied_head_uses_the_table(self, bias):
        dense = _words(bias=bias)
        model, report = _quantized(copy.deepcopy(dense))
        assert isinstance(model.embed, QuantizedEmbedding)
        assert isinstance(model.lm_head, QuantizedHead)
        assert model.lm_head.quantized is model.embed.quantized
        table = lq.dequantize(lq.quantize(dense.embed.weight.detach(), DOUBLE))
        assert torch.equal(model.embed(IDS), table[IDS])
        x = torch.randn(2, WIDTH, requires_grad=True)
        y = model.lm_head(x)
        expected = nn.functional.linear(x, table, dense.lm_head.bias)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(own.square().sum(), x)[0] for own in (y, expected)))
        assert report.tables["embed"].modules == ("embed", "lm_head")

    def test_an_untied_head_stays_dense_unless_it_is_chosen(self):
        model, report = _quantized(_words(tied=False))
        assert type(model.lm_head) is nn.Linear
        assert report.tables["embed"].modules == ("embed",)
        model, _ = _quantized(_words(tied=False), include=["up", "lm_head"])
        assert isinstance(model.lm_head, LQLinear)

    def test_a_tied_head_that_is_chosen_gets_a_weight_of_its_own(self):
        model, report = _quantized(_words(), include=["up", "lm_head"])
        assert isinstance(model.lm_head, LQLinear)
        assert isinstance(model.embed, QuantizedEmbedding)
        assert report.tables["embed"].modules == ("embed",)

    def test_only_factors_train_and_nothing_dense_is_left(self):
        model, _ = _quantized(_words())
        model(IDS).square().sum().backward()
        trained = {name for name, own in model.named_parameters() if own.grad is not None}
        assert trained == {"up.lora_A", "up.lora_B"}
        assert not [own for own in (*model.parameters(), *model.buffers()) if own.shape == (WORDS, WIDTH)]

    def test_embeddings_stay_dense_by_default(self):
        model, report = _quantized(_words(), None)
        assert type(model.embed) is nn.Embedding
        assert report.tables == {}
        assert report.table_bytes == 0

    def test_the_report_counts_every_byte_once(self):
        model, report = _quantized(_words())
        state = {id(own): own for own in model.state_dict(keep_vars=True).values()}
        assert report.total_bytes == sum(own.nbytes for own in state.values())
        assert report.table_bytes == model.embed.quantized.array.nbytes
        table = report.tables["embed"]
        assert (table.shape, table.format, table.size) == ((WORDS, WIDTH), DOUBLE, WORDS * WIDTH)
        dense = _words().embed.weight.detach()
        error = torch.linalg.norm(model.embed.quantized.dequantize() - dense) / torch.linalg.norm(dense)
        assert table.relative_error == pytest.approx(float(error))
        assert "embeddings: nf3/8:u8/16:float16" in str(report)
        assert "1 table " in str(report)
        assert not any(part.layers for part in report.dense.values())

    def test_a_table_of_zeros_has_no_error(self):
        model = _words(tied=False)
        nn.init.zeros_(model.embed.weight)
        assert _quantized(model, NF4)[1].tables["embed"].relative_error == 0

    def test_a_finished_table_is_logged(self, caplog):
        with caplog.at_level(logging.INFO, "lqlora"):
            _quantized(_words())
        assert "embed: nf3/8:u8/16:float16, embedding, relative error" in caplog.text

    def test_names_choose_embeddings(self):
        model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(4, WIDTH))
        _, report = _quantized(model, {"2": NF4})
        assert list(report.tables) == ["2"]
        assert type(model[0]) is nn.Embedding
        assert _quantized(copy.deepcopy(_words()), {"embed": NF4})[1].tables["embed"].format == NF4

    @pytest.mark.parametrize("make", [GemmaLike, _bart_like])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_embeddings_that_multiply_their_rows(self, make, dtype):
        dense = _words(make, dtype=dtype)
        model, _ = _quantized(copy.deepcopy(dense))
        other = copy.deepcopy(dense)
        other.embed.weight = nn.Parameter(model.embed.quantized.dequantize(dtype))
        assert isinstance(model.embed, QuantizedEmbedding)
        assert torch.equal(model.embed(IDS), other.embed(IDS))
        assert torch.equal(model.bfloat16().embed(IDS), other.bfloat16().embed(IDS))
        assert list(model.embed.state_dict()) == [f"quantized.{key}" for key in model.embed.quantized.state_dict()]
        dequantize_model(model)
        assert torch.equal(model.embed(IDS), other.embed(IDS))
        assert model.lm_head.weight is model.embed.weight

    def test_a_rounded_number_stays_one_after_a_second_conversion(self):
        model, _ = _quantized(_words(GemmaLike))
        dequantize_model(model)
        _quantized(model, NF4)
        assert (model.embed.scale, model.embed.rounds_scale) == (pytest.approx(3.3), True)

    def test_the_fit_is_that_of_the_layers(self):
        dense = _words().embed.weight.detach()
        model, report = _quantized(_words(), fit="levels+scale")
        expected = lq.quantize(dense, DOUBLE, fit="levels+scale")
        assert torch.equal(model.embed(IDS), lq.dequantize(expected)[IDS])
        assert report.tables["embed"].format == expected.format

    def test_hooks_and_attributes_move(self):
        model = _words()
        model.embed.register_forward_hook(lambda _, __, y: 2 * y)
        model.embed.mark = 5
        _quantized(model)
        assert torch.equal(model.embed(IDS), 2 * model.embed.quantized.dequantize()[IDS])
        assert model.embed.mark == 5

    def test_several_embeddings_share_a_table(self):
        model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(WORDS, WIDTH))
        model[2].weight = model[0].weight
        _, report = _quantized(model)
        assert model[2].quantized is model[0].quantized
        assert report.tables["0"].modules == ("0", "2")
        assert torch.equal(model[2](IDS), model[0](IDS))

    def test_a_second_conversion_keeps_the_table(self):
        model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        _quantized(model, include="1")
        report = quantize_model(model, NF4, rank=1)
        assert isinstance(model[0], QuantizedEmbedding)
        assert "layers that were quantized before" in report.dense

    def test_a_model_without_dense_embeddings(self):
        with pytest.raises(InvalidArgumentError, match="embeddings must be None"):
            _quantized(nn.Sequential(nn.Linear(WIDTH, WIDTH)))

    @pytest.mark.parametrize("tied", [False, True])
    def test_embeddings_are_quantized_after_all_layers(self, tied):
        together, _ = _quantized(_words(tied=tied))
        model, _ = _quantized(_words(tied=tied), None)
        factors = dict(model.up.named_parameters())
        report = quantize_model(model, NF4, embeddings=DOUBLE)
        assert torch.equal(model(IDS), together(IDS))
        assert {name: own.requires_grad for name, own in factors.items()} == {
            "lora_A": True,
            "lora_B": True,
            "bias": False,
        }
        assert model.up.lora_A is factors["lora_A"]
        assert (report.layers, list(report.tables)) == ({}, ["embed"])
        assert math.isnan(report.bits_per_weight)
        text = str(report)
        assert "embeddings: nf3/8:u8/16:float16" in text
        assert "dense: layers that were quantized before" in text
        assert "1 table " in text
        assert "relative error" not in text

    def test_what_is_left_to_quantize_after_a_conversion_is_said(self):
        model, _ = _quantized(_words(), None)
        with pytest.raises(InvalidArgumentError, match="quantized already: 1"):
            quantize_model(model, NF4, rank=1)
        with pytest.raises(InvalidArgumentError, match=r"'up' selects none .*quantized already"):
            quantize_model(model, {"up": NF4}, rank=1, embeddings=NF4)
        quantize_model(model, NF4, embeddings=NF4)
        with pytest.raises(InvalidArgumentError, match=r"embeddings must be None .*quantized already"):
            quantize_model(model, NF4, embeddings=NF4)

    @pytest.mark.parametrize("which", ["formats", "embeddings"])
    def test_formats_without_levels_to_fit_are_refused_before_the_work(self, which, monkeypatch):
        affine, model = lq.BlockFormat.parse("affine4/8:float32"), _words()
        monkeypatch.setattr("lqlora.nn.model.map_matrices", None)
        with pytest.raises(LQLoRAError, match=r"affine4.* cannot be fitted") as error:
            quantize_model(model, **{"formats": NF4, "embeddings": NF4, which: affine}, rank=1, fit="levels+scale")
        assert ("'embed'" in str(error.value)) == (which == "embeddings")

    @pytest.mark.parametrize("make", [nn.Embedding, GemmaLike])
    def test_options_of_the_dense_embedding_come_back(self, make, tmp_path):
        def build():
            model = _words(make)
            model.embed.padding_idx, model.embed.sparse, model.embed.norm_type = 3, True, 1.0
            model.embed.scale_grad_by_freq = True
            return model

        before = build().embed
        model, _ = _quantized(build())
        save_model(tmp_path / "model", model)
        loaded = build()
        load_model(tmp_path / "model", loaded)
        for own in (model, loaded):
            dequantize_model(own)
            for key in before.__constants__:
                assert getattr(own.embed, key) == getattr(before, key), key


def _max_norm():
    return _words(lambda *shape: nn.Embedding(*shape, max_norm=1.0))


def _own_forward():
    model = _words()
    plain = model.embed.forward
    model.embed.forward = lambda ids: 2 * plain(ids)
    return model


def _held():
    model = _words()
    model.others = [model.embed]
    return model


def _read_elsewhere():
    model = _words(tied=False)
    model.table = model.embed.weight
    return model


def _half_integers():
    model = _words(tied=False)
    model.embed.weight = nn.Parameter(model.embed.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def _meta():
    model = _words(tied=False)
    model.embed.to("meta")
    return model


FAULTS = {
    "max_norm": (_max_norm, "has max_norm"),
    "another class": (lambda: _words(Shifted), "is of a class"),
    "further method": (lambda: _words(Counting), "is of a class"),
    "own forward": (_own_forward, "forward method of its own"),
    "held": (_held, "is also held by attribute 'others'"),
    "read elsewhere": (_read_elsewhere, "shares its weight with '.table'"),
    "8 bits": (_half_integers, "not a plain matrix"),
    "meta": (_meta, "on the meta device"),
}


class TestRefusals:
    @pytest.mark.parametrize("make", [own[0] for own in FAULTS.values()], ids=FAULTS)
    def test_an_embedding_that_cannot_be_quantized(self, make, request):
        match = FAULTS[request.node.callspec.id][1]
        for embeddings in (NF4, {"embed": NF4}):
            model = make()
            with pytest.raises(InvalidArgumentError, match=match):
                _quantized(model, embeddings)
            assert type(model.up) is nn.Linear

    def test_one_of_several_stays_dense_and_is_reported(self):
        model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), Shifted(WORDS + 2, WIDTH))
        _, report = _quantized(model)
        assert list(report.tables) == ["0"]
        assert report.dense["embeddings of other classes"].size == (WORDS + 2) * WIDTH

    @pytest.mark.parametrize("embeddings", [3, {}, "nf4", {"embed": "nf4/8"}, lq.BlockFormat.parse("nf4/8@0:float32")])
    def test_options_of_another_kind(self, embeddings):
        with pytest.raises(InvalidArgumentError, match="embeddings"):
            _quantized(_words(), embeddings)

    def test_a_name_that_matches_nothing(self):
        with pytest.raises(InvalidArgumentError, match="an embedding, but 'nothing'"):
            _quantized(_words(), {"nothing": NF4})

    def test_the_name_of_a_module_that_shares_a_table(self):
        with pytest.raises(InvalidArgumentError, match=r"'lm_head' shares .*'embed'"):
            _quantized(_words(), {"lm_head": NF4})
        assert "embed" in _quantized(_words(), {"*": NF4})[1].tables

    def test_values_that_are_not_finite(self):
        model = _words()
        with torch.no_grad():
            model.embed.weight[3, 3] = torch.nan
        with pytest.raises(NonFiniteError, match="weight of 'embed'"):
            _quantized(model)
        assert type(model.up) is nn.Linear

    def test_another_weight(self):
        model, _ = _quantized(_words())
        for module in (model.embed, model.lm_head):
            with pytest.raises(InvalidArgumentError, match="weight of a quantized"):
                module.weight = nn.Parameter(torch.randn(WORDS, WIDTH))
            with pytest.raises(InvalidArgumentError, match="reset_parameters"):
                module.reset_parameters()
        model.lm_head.weight = model.embed.weight  # tied already


class TestState:
    def test_copies_keep_the_shared_table(self):
        model, _ = _quantized(_words(bias=True))
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again.lm_head.quantized is again.embed.quantized
            assert again.embed.quantized is not model.embed.quantized
            assert torch.equal(again(IDS), model(IDS))

    def test_a_head_without_the_owner_of_its_table(self, tmp_path):
        model, _ = _quantized(_words())
        model.embed = nn.Embedding(WORDS, WIDTH)
        for use in (dequantize_model, lambda own: save_model(tmp_path / "m", own)):
            with pytest.raises(InvalidArgumentError, match=r"owns .* 'lm_head', got none"):
                use(model)
        assert isinstance(model.up, LQLinear)
        assert not list(tmp_path.iterdir())

    def test_a_state_dict_has_the_table_once(self):
        model, _ = _quantized(_words())
        state = model.state_dict()
        assert {name for name in state if name.startswith(("embed", "lm_head"))} == {
            f"embed.quantized.{name}" for name in ("codes", "scales.codes", "scales.scales", "scales.offset")
        }
        other, _ = _quantized(Words("lm_head", tied=True))
        assert not torch.equal(other(IDS), model(IDS))
        other.load_state_dict(state)
        assert torch.equal(other(IDS), model(IDS))

    def test_casts_change_the_rows_and_not_the_table(self):
        model, _ = _quantized(_words())
        before = [own.clone() for own in model.embed.quantized.operands.tensors]
        rows = model.embed(IDS)
        model.bfloat16()
        assert torch.equal(model.embed(IDS), rows.bfloat16())
        assert all(map(torch.equal, before, model.lm_head.quantized.operands.tensors))
        assert model(IDS).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert model.float()(IDS).dtype == torch.bfloat16


class TestFiles:
    @pytest.mark.parametrize("options", [{}, {"bias": True}, {"tied": False}], ids=str)
    @pytest.mark.parametrize("make", [nn.Embedding, GemmaLike])
    def test_a_loaded_model_has_the_same_bits(self, tmp_path, make, options):
        model, _ = _quantized(_words(make, **options))
        save_model(tmp_path / "m", model)
        fresh = _words(make, **options)
        content = load_model(tmp_path / "m", fresh)
        assert torch.equal(fresh(IDS), model(IDS))
        assert {name: own.tolist() for name, own in fresh.state_dict().items()} == {
            name: own.tolist() for name, own in model.state_dict().items()
        }
        assert set(content.matrices) == {"embed", "up"}
        assert {name for name, own in fresh.named_parameters() if own.requires_grad} == {"up.lora_A", "up.lora_B"}
        save_model(tmp_path / "again", fresh)
        assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()

    @pytest.mark.parametrize("value", [0.0, float("nan")])
    def test_the_values_of_the_model_do_not_matter(self, tmp_path, value):
        model, _ = _quantized(_words(GemmaLike))
        save_model(tmp_path / "m", model)
        fresh = _words(GemmaLike)
        nn.init.constant_(fresh.embed.weight, value)
        load_model(tmp_path / "m", fresh)
        assert (fresh.embed.scale, fresh.embed.rounds_scale) == (model.embed.scale, True)
        assert torch.equal(fresh(IDS), model(IDS))

    def test_a_tied_file_fits_a_model_without_ties(self, tmp_path):
        model, _ = _quantized(_words())
        save_model(tmp_path / "m", model)
        fresh = _words(tied=False)
        load_model(tmp_path / "m", fresh)
        assert fresh.lm_head.quantized is fresh.embed.quantized
        assert torch.equal(fresh(IDS), model(IDS))

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: _words(head="project"), "'lm_head' uses the table of 'embed'"),
            (lambda: _words(Shifted), "'embed' is of a class"),
            (lambda: _words(lambda rows, columns: nn.Embedding(rows + 1, columns)), "'embed' is .12, 8. in the model"),
            (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)), "'lm_head' uses the table of 'embed'"),
        ],
        ids=["another head", "another class", "another shape", "no embedding"],
    )
    def test_another_model_is_refused_and_unchanged(self, tmp_path, make, match):
        model, _ = _quantized(_words())
        save_model(tmp_path / "m", model)
        fresh = make()
        with pytest.raises(CheckpointError, match=match):
            load_model(tmp_path / "m", fresh)
        assert not any(isinstance(own, LQLinear | QuantizedEmbedding) for own in fresh.modules())

    @pytest.mark.parametrize(
        ("matrix", "tied", "match"),
        [
            (lq.decompose(torch.ones(WORDS, WIDTH), NF4, 1), {}, "'embed' has low-rank factors"),
            (lq.BlockFormat.parse("nf4/8@0:float32"), {}, "'embed' has blocks along its col"),
            (NF4, {"up.bias": "embed"}, "'up.bias' uses the table of 'embed'"),
            (NF4, {"lm_head.weight": "up"}, "'lm_head.weight' uses the table of 'up'"),
        ],
        ids=["factors", "columns", "a bias", "another matrix"],
    )
    def test_files_of_another_kind_are_refused(self, tmp_path, matrix, tied, match):
        model, _ = _quantized(_words(tied=False))
        save_model(tmp_path / "m", model)
        content = lq.load(tmp_path / "m")
        if isinstance(matrix, lq.BlockFormat):
            table = lq.quantize(torch.ones(WORDS, WIDTH), matrix)
            matrix = lq.checkpoint.StoredMatrix(table, torch.empty(0, WIDTH), torch.empty(WORDS, 0))
        tensors = {name: own for name, own in content.tensors.items() if name not in tied}
        lq.save(tmp_path / "m", {**content.matrices, "embed": matrix}, tensors, {"tied": tied})
        fresh = _words(tied=False)
        with pytest.raises(CheckpointError, match=match):
            load_model(tmp_path / "m", fresh)
        assert type(fresh.embed) is nn.Embedding
        assert fresh.up.weight.requires_grad


class TestDenseAgain:
    @pytest.mark.parametrize("bias", [False, True])
    def test_the_model_computes_the_same_and_is_tied(self, bias):
        model, _ = _quantized(_words(bias=bias))
        before = model(IDS)
        dequantize_model(model)
        assert type(model.embed) is nn.Embedding
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.embed.weight
        torch.testing.assert_close(model(IDS), before)
        assert not any(own.requires_grad for own in model.parameters())

    def test_another_dtype(self):
        model, _ = _quantized(_words())
        dequantize_model(model, torch.float16)
        assert model.embed.weight.dtype == torch.float16

    def test_requantization_keeps_the_table(self):
        model, _ = _quantized(_words())
        rows = model.embed(IDS)
        requantize_model(model)
        assert torch.equal(model.embed(IDS), rows)

    def test_a_held_module_and_lost_values_are_refused(self):
        model, _ = _quantized(_words(), NF4)
        model.others = [model.embed]
        with pytest.raises(InvalidArgumentError, match="'embed' is also held"):
            dequantize_model(model)
        del model.others
        model.embed.quantized.scales.fill_(1e6)
        with pytest.raises(NonFiniteError, match="'embed'"):
            dequantize_model(model, torch.float16)
        model.embed.to("meta")
        with pytest.raises(InvalidArgumentError, match="'embed' must hold values"):
            dequantize_model(model)
        assert isinstance(model.embed.quantized, QuantizedWeight)


def _llama(transformers, *, tied=True):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0)
    )


def _sequence_to_sequence(transformers, name, **settings):
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in LAYERS.items()}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=60, d_model=16, pad_token_id=0, decoder_start_token_id=0, **sizes, **settings
    )
    return getattr(transformers, f"{name}{'MTModel' if name == 'Marian' else 'ForConditionalGeneration'}")(config)


SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
#: Models of transformers, with the modules that share a table.
MODELS = {
    "llama, tied": (_llama, ("model.embed_tokens", "lm_head")),
    "llama": (lambda tf: _llama(tf, tied=False), ("model.embed_tokens",)),
    "gemma3": (
        lambda tf: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8)),
        ("model.embed_tokens", "lm_head"),
    ),
    "gpt2": (
        lambda tf: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
        ("transformer.wte", "lm_head"),
    ),
    "bert": (
        lambda tf: tf.BertForMaskedLM(tf.BertConfig(**SMALL)),
        ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ),
    "bart": (
        lambda tf: _sequence_to_sequence(tf, "Bart", scale_embedding=True),
        ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    ),
    "mamba": (
        lambda tf: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
        ),
        ("backbone.embeddings", "lm_head"),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestModelsOfTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_conversion_training_files_and_back(self, tmp_path, name):
        transformers = require_module("transformers")
        build, modules = MODELS[name]
        torch.manual_seed(0)
        model = build(transformers).eval()
        dense = copy.deepcopy(model)
        ids = torch.randint(3, 59, (2, 5))
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        report = quantize_model(model, NF4, rank=2, max_iter=1, embeddings=DOUBLE)
        assert [own.modules for own in report.tables.values()] == [modules]
        y = model(**inputs).logits
        y.square().mean().backward()
        assert all(own.grad is not None for own in model.parameters() if own.requires_grad)
        save_model(tmp_path / "m", model)
        load_model(tmp_path / "m", dense)
        assert torch.equal(dense(**inputs).logits, y)
        if name != "bert":  # its tie_weights looks for parameters
            model.tie_weights()
            assert torch.equal(model(**inputs).logits, y)
        if model.can_generate():
            assert model.generate(input_ids=ids[:1], max_new_tokens=2, do_sample=False).shape[0] == 1
        dequantize_model(model)
        torch.testing.assert_close(model(**inputs).logits, y)

    def test_a_vocabulary_of_another_size_is_refused_and_the_model_stays(self):
        transformers = require_module("transformers")
        model = _llama(transformers)
        quantize_model(model, NF4, rank=2, max_iter=1, embeddings=DOUBLE)
        ids = torch.tensor([[3, 4]])
        before = model(input_ids=ids).logits
        assert model.resize_token_embeddings(60) is model.model.embed_tokens
        with pytest.raises(TypeError, match="QuantizedEmbedding"):
            model.resize_token_embeddings(64)
        assert torch.equal(model(input_ids=ids).logits, before)
        dequantize_model(model)
        assert model.resize_token_embeddings(64).num_embeddings == 64

    def test_the_trainer_saves_and_resumes_to_the_bit(self, tmp_path):
        transformers = require_module("transformers")
        require_module("accelerate")
        model = _llama(transformers)
        quantize_model(model, NF4, rank=2, max_iter=1, embeddings=DOUBLE)
        start, found = lq.nn.factors(model), []
        examples = [{"input_ids": row, "labels": row} for row in torch.randint(0, 60, (8, 6))]
        settings = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        for name, resumed in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-2"))):
            lq.nn.set_factors(model, start)
            arguments = transformers.TrainingArguments(output_dir=str(tmp_path / name), report_to=[], **settings)
            transformers.Trainer(model=model, args=arguments, train_dataset=examples).train(
                resume_from_checkpoint=resumed
            )
            found.append(lq.nn.factors(model))
        assert all(torch.equal(found[0][name].lora_B, found[1][name].lora_B) for name in start)
