"""Batches with attention masks and labels, against runs of the single examples without padding."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest

from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn import functional  # noqa: E402

from lqlora.nn import causal_lm_loss, collect_fisher, collect_gram, collect_kronecker  # noqa: E402
from tests.nn.statistics.layouts import MODELS, assert_close, by_example, make  # noqa: E402

LENGTHS = [3, 6, 2, 6]


class Causal(nn.Module):
    """Language model with sums over the past, in which a layer has one of several layouts."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.body = kind()
        self.head = nn.LazyLinear(20)

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        h = self.embed(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        logits = self.head(torch.tanh(self.body(h.cumsum(dim=1))))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class Translator(nn.Module):
    """Sequence-to-sequence model whose decoder has labels as its inputs."""

    config = SimpleNamespace(is_encoder_decoder=True)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.encoder, self.decoder, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 20)

    def forward(self, input_ids, labels, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = (self.encoder(self.embed(input_ids)) * mask[..., None]).sum(dim=1) / mask.sum(dim=1)[:, None]
        y = self.decoder(self.embed(labels.clamp(min=0)).cumsum(dim=1)) + h[:, None]
        return SimpleNamespace(loss=functional.cross_entropy(self.out(y).flatten(0, 1), labels.flatten()))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.score = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = torch.tanh(self.layer(self.embed(input_ids))) * mask[..., None]
        logits = self.score(h.sum(dim=1) / mask.sum(dim=1)[:, None])
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


def _sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 20, (length,), generator=generator) for length in LENGTHS]


def _padded(sequences, value=0, *, left=False):
    size = max(map(len, sequences))
    return torch.stack(
        [functional.pad(own, (size - len(own), 0) if left else (0, size - len(own)), value=value) for own in sequences]
    )


def _batch(sequences, *, left=False, labels=True):
    ids = _padded(sequences, left=left)
    batch = {"input_ids": ids, "attention_mask": _padded([torch.ones_like(own) for own in sequences], left=left)}
    return {**batch, "labels": ids} if labels else batch


def _make_causal(name):
    model = make(lambda: Causal(MODELS[name]), dtype=torch.float64)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))
    return model


def _check(model, batches, losses_of_examples):
    fisher, kronecker = by_example(model, losses_of_examples)
    assert_close(collect_fisher(model, batches), fisher)
    assert_close(collect_kronecker(model, batches), kronecker)
    assert_close(collect_gram(model, batches), {name: gram for name, (_, gram) in kronecker.items()})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", [True, False], ids=["own loss", "next token"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(name, labels, left):
    model, sequences = _make_causal(name), _sequences()
    batches = [_batch(sequences[:3], left=left, labels=labels), UserDict(_batch(sequences[3:], labels=labels))]
    _check(model, batches, [lambda m, x=x: m(x[None], labels=x[None]).loss for x in sequences])


def test_batches_without_padding_run_whole():
    model, sequences = _make_causal("experts"), [own[:2] for own in _sequences()]
    seen = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    collect_gram(model, [_batch(sequences)])
    collect_fisher(model, [_batch(sequences, labels=False)])
    collect_fisher(model, [_batch(sequences)])
    assert seen == [4, 4, 1, 1, 1, 1]


def test_examples_of_one_length_run_together():
    model, seen = _make_causal("flat"), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    collect_gram(model, [_batch(_sequences())])
    assert seen == [(1, 3), (2, 6), (1, 2)]


def test_a_loss_gets_the_parts():
    model, sequences = _make_causal("flat"), _sequences()
    batch = _batch(sequences)
    for collect in (collect_fisher, collect_kronecker):
        found = collect(model, [batch], loss=causal_lm_loss)
        assert_close(found, collect(model, [x[None] for x in sequences]))


def test_labels_of_a_decoder_are_cut_by_their_own_padding():
    model, sources, targets = make(Translator), _sequences(), _sequences(seed=1)[::-1]
    batch = {**_batch(sources, labels=False), "labels": _padded(targets, value=-100)}
    _check(
        model, [batch], [lambda m, x=x, y=y: m(x[None], y[None]).loss for x, y in zip(sources, targets, strict=True)]
    )
    mask = _padded([torch.ones_like(own) for own in targets])

    class Masked(Translator):
        def forward(self, input_ids, decoder_attention_mask, labels, attention_mask=None):
            assert bool(decoder_attention_mask.all())
            return super().forward(input_ids, labels, attention_mask)

    masked = make(Masked)
    masked.load_state_dict(model.state_dict())
    expected = collect_fisher(model, [batch])
    assert_close(collect_fisher(masked, [{**batch, "decoder_attention_mask": mask}]), expected)


def test_labels_of_classes_are_not_cut():
    sequences = _sequences()
    classes = torch.tensor([0, 2, 1, 2])
    _check(
        make(Classifier),
        [{**_batch(sequences), "labels": classes}],
        [lambda m, x=x, y=y: m(x[None], labels=y[None]).loss for x, y in zip(sequences, classes, strict=True)],
    )
    one_of_six = torch.eye(6, dtype=torch.float64)[[0, 2, 1, 5]]  # as many classes as tokens
    model = make(Classifier)
    model.score = nn.Linear(4, 6).double()
    _check(
        model,
        [{**_batch(sequences), "labels": one_of_six}],
        [lambda m, x=x, y=y: m(x[None], labels=y[None]).loss for x, y in zip(sequences, one_of_six, strict=True)],
    )


def test_other_entries_are_passed_on():
    model, sequences = _make_causal("flat"), _sequences()
    batch = _batch(sequences)
    expected = collect_fisher(model, [batch])
    more = {"token_type_ids": torch.zeros_like(batch["input_ids"]), "noise": [1, 2, 3, 4]}
    assert_close(collect_fisher(model, [{**batch, **more}]), expected)
    assert_close(collect_fisher(model, [{**batch, "noise": None}]), expected)
    assert_close(collect_fisher(model, [{**batch, "noise": torch.zeros(1, 7)}]), expected)
    assert_close(collect_fisher(model, [{**batch, "noise": torch.tensor(3.0)}]), expected)


MASK = _batch(_sequences())["attention_mask"]
BAD = {
    "holes": ({"attention_mask": MASK.index_fill(1, torch.tensor([1]), 0)}, r"attention_mask.*example 0.*0 and 2"),
    "no token": ({"attention_mask": MASK.index_fill(0, torch.tensor([2]), 0)}, r"attention_mask.*example 2"),
    "four axes": ({"attention_mask": MASK[:, None, None]}, r"attention_mask.*\(4, 1, 1, 6\)"),
    "a list": ({"attention_mask": MASK.tolist()}, "attention_mask.*list"),
    "additive": ({"attention_mask": (1.0 - MASK) * -1e9}, "attention_mask.*1 for tokens"),
    "of other tokens": ({"attention_mask": MASK[:, :-1]}, "attention_mask.*input_ids"),
    "other entry with as many elements": ({"noise": torch.ones(4, 6)}, r"'noise' of shape \(4, 6\)"),
    "other number of examples": ({"noise": torch.ones(3, 2)}, r"'noise' has shape \(3, 2\)"),
    "examples on the second axis": ({"position_ids": torch.ones(4, 4, 6)}, r"'position_ids' has shape"),
    "rows of labels": ({"decoder_attention_mask": MASK[:3]}, "decoder_attention_mask must have 4 rows"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("collect", [collect_fisher, collect_gram, collect_kronecker])
def test_batches_in_doubt_are_refused(name, collect):
    changes, message = BAD[name]
    with pytest.raises(InvalidArgumentError, match=message):
        collect(_make_causal("flat"), [{**_batch(_sequences()), **changes}])


def test_positions_of_answers_are_refused_with_padding_on_the_left():
    batch = {**_batch(_sequences(), left=True, labels=False), "start_positions": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(InvalidArgumentError, match=r"start_positions.*left of example 0"):
        collect_gram(_make_causal("flat"), [batch])


def test_a_model_without_a_loss_is_refused():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, **_):
            return SimpleNamespace(loss=None, logits=self.layer(x))

    x = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(InvalidArgumentError, match=r"model.*none in SimpleNamespace"):
        collect_fisher(Silent(), [{"x": torch.ones(2, 4), "labels": x}])


def test_labels_without_a_token_that_counts_name_the_example():
    x = torch.ones(3, 3, dtype=torch.int64)
    labels = x.index_fill(0, torch.tensor([1]), -100)
    with pytest.raises(NonFiniteError, match=r"loss.*nan for example 4\b"):
        collect_fisher(_make_causal("flat"), [{"input_ids": x, "labels": x}, {"input_ids": x, "labels": labels}])


class TestNextTokens:
    def test_masked_tokens_do_not_count(self):
        model, sequences = _make_causal("flat"), _sequences()
        expected = torch.cat([causal_lm_loss(model, x[None]) for x in sequences])
        for left in (True, False):
            found = causal_lm_loss(model, _batch(sequences, left=left))
            torch.testing.assert_close(found, expected)
        assert torch.equal(causal_lm_loss(model, {"input_ids": sequences[0][None]}), expected[:1])

    def test_an_example_without_a_next_token_is_named(self):
        batch = _batch(_sequences())
        batch["attention_mask"][2, 1] = 0
        with pytest.raises(InvalidArgumentError, match=r"attention_mask.*example 2"):
            causal_lm_loss(_make_causal("flat"), batch)

    @pytest.mark.parametrize("mask", [torch.ones(4, 5), [[1]]], ids=["shape", "list"])
    def test_masks_of_other_tokens_are_refused(self, mask):
        with pytest.raises(InvalidArgumentError, match=r"attention_mask.*\(4, 6\) of input_ids"):
            causal_lm_loss(_make_causal("flat"), {**_batch(_sequences()), "attention_mask": mask})

    def test_outputs_that_are_no_logits_of_the_tokens_are_refused(self):
        x = torch.ones(2, 3, dtype=torch.int64)
        with pytest.raises(InvalidArgumentError, match=r"model.*\(2, 3\).*loss="):
            causal_lm_loss(nn.Identity(), x)
        with pytest.raises(InvalidArgumentError, match=r"model.*dict"):
            causal_lm_loss(lambda _: {}, x)


@pytest.mark.parametrize("collect", [collect_fisher, collect_gram])
@pytest.mark.parametrize("batch", [torch.ones(2, 4), {"input": torch.ones(2, 4)}], ids=["tensor", "mapping"])
def test_one_batch_in_place_of_several_is_refused(collect, batch):
    # A tensor could be iterated over: each row would be taken for a batch.
    with pytest.raises(InvalidArgumentError, match=r"^batches must .* got one .*\[batch\]"):
        collect(nn.Sequential(nn.Linear(4, 2)), batch)
