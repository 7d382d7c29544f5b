"""Statistics of tiny random models of transformers for padded batches, against runs of single examples without padding."""

from __future__ import annotations

import warnings

import pytest

from lqlora.errors import DeadLayerWarning
from tests.requirements import require_module

torch = require_module("torch")
require_module("transformers")
from torch.nn.functional import pad  # noqa: E402 - needs torch

from lqlora.nn import collect_fisher, collect_gram, collect_kronecker  # noqa: E402
from tests.nn.architectures import ARCHITECTURES  # noqa: E402
from tests.nn.statistics.layouts import assert_close, by_example  # noqa: E402

pytestmark = pytest.mark.slow

LENGTHS = (4, 7, 5)


def _sequences(seed):
    generator = torch.Generator().manual_seed(seed)
    own = [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]
    for x in own:
        x[-1] = 1  # the end of a sequence, for heads of T5
    return own


def _padded(sequences, value=0):
    return torch.stack([pad(x, (0, max(LENGTHS) - len(x)), value=value) for x in sequences])


def _labels(name):
    """Return labels of padded batches and of single examples."""
    kind = ARCHITECTURES[name].model
    if "SequenceClassification" in kind:
        classes = torch.tensor([0, 1, 1])
        return classes, list(classes)
    sequences = _sequences(1)[::-1] if "ConditionalGeneration" in kind else _sequences(0)
    return _padded(sequences, -100), sequences


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "tied llama",
        "llama classifier",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen2 experts",
        "qwen3 experts",
        "gpt-oss",
        "gpt2",
        "falcon",
        "bloom",
        "mamba",
        "bert",
        "bert classifier",
        "roberta classifier",
        "deberta classifier",
        "t5",
        "t5 classifier",
        "switch",
    ],
)
def test_padded_batches_have_the_statistics_of_their_examples(name):
    model = ARCHITECTURES[name].make().double()
    model.config._experts_implementation = "eager"  # the grouped products have no float64
    sequences = _sequences(0)
    batched, single = _labels(name)
    mask = _padded([torch.ones_like(x) for x in sequences])
    batch = {"input_ids": _padded(sequences), "attention_mask": mask, "labels": batched}
    fisher, kronecker = by_example(
        model,
        [lambda m, x=x, y=y: m(input_ids=x[None], labels=y[None]).loss for x, y in zip(sequences, single, strict=True)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadLayerWarning)  # experts that no token chose
        found = collect_fisher(model, [batch])
        assert_close(found, {layer: fisher[layer] for layer in found})
        assert all("expert" in layer for layer in fisher.keys() - found.keys())
        assert_close(collect_kronecker(model, [batch]), {layer: kronecker[layer] for layer in found})
        assert_close(collect_gram(model, [batch]), {layer: gram for layer, (_, gram) in kronecker.items()})
        together = collect_fisher(
            model,
            [[{"input_ids": x[None], "labels": y[None]} for x, y in zip(sequences, single, strict=True)]],
            loss=lambda m, parts: torch.stack([m(**part).loss for part in parts]),
        )
        assert_close(together, {layer: fisher[layer] for layer in found})


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_batches_without_padding_have_the_statistics_of_their_examples(name):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.make().double(), architecture.batch(torch.float64)
    batch = {**inputs, "labels": torch.tensor([0, 1]) if name == "vit" else inputs["decoder_input_ids"]}
    examples = [{key: values[i : i + 1] for key, values in batch.items()} for i in range(2)]
    fisher, kronecker = by_example(model, [lambda m, own=own: m(**own).loss for own in examples])
    assert_close(collect_fisher(model, [batch]), fisher)
    assert_close(collect_kronecker(model, [batch]), kronecker)
    assert_close(collect_gram(model, [batch]), {layer: gram for layer, (_, gram) in kronecker.items()})
