"""Perplexity and the fine-tuning loop, against loops written out by hand."""

from __future__ import annotations

import math

import pytest

from lqlora import recipes
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")

WORDS = 20


def bigram_model(seed=0):
    """Return a model that predicts each token from the one before it."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(WORDS, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, WORDS))


def tokens(count, length=7, seed=0):
    return torch.randint(WORDS, (count, length), generator=torch.Generator().manual_seed(seed))


class TestPerplexity:
    def test_it_is_the_exponential_of_the_mean_over_predictions(self):
        model, sequences = bigram_model().eval(), tokens(5)
        with torch.no_grad():
            log_probabilities = model(sequences).double().log_softmax(dim=-1)
        picked = [
            float(log_probabilities[n, t - 1, sequences[n, t]]) for n in range(5) for t in range(1, sequences.shape[1])
        ]
        assert recipes.perplexity(model, sequences) == pytest.approx(math.exp(-sum(picked) / len(picked)), rel=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_the_batch_size_does_not_matter(self, batch_size):
        model, sequences = bigram_model(), tokens(5)
        expected = recipes.perplexity(model, sequences)
        assert recipes.perplexity(model, sequences, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)

    def test_it_evaluates_without_dropout_and_restores_the_modes(self):
        model = bigram_model().train()
        model[2].eval()
        assert recipes.perplexity(model, tokens(4)) == recipes.perplexity(model, tokens(4))
        assert [module.training for module in model] == [True, True, False]

    def test_hopeless_logits_give_infinity(self):
        model = bigram_model()
        with torch.no_grad():
            model[2].bias[0] = 1e5
        assert recipes.perplexity(model, tokens(3)) == math.inf

    @pytest.mark.parametrize("shape", [(0, 5), (3, 1), (5,)])
    def test_nothing_to_predict_is_refused(self, shape):
        with pytest.raises(InvalidArgumentError, match=r"sequences .*got \(\d"):
            recipes.perplexity(bigram_model(), torch.zeros(shape, dtype=torch.int64))


class TestFineTune:
    def test_it_is_adamw_with_a_linear_schedule_and_clipped_gradients(self):
        model, other = bigram_model().eval(), bigram_model().eval()
        other[0].requires_grad_(False)
        model[0].requires_grad_(False)
        losses = recipes.fine_tune(model, tokens(5), learning_rate=0.1, batch_size=2)
        optimizer = torch.optim.AdamW(other[2].parameters(), lr=0.1, weight_decay=0.0)
        expected = []
        for step, batch in enumerate(tokens(5).split(2)):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
            logits = other(batch)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(other[2].parameters(), 1.0)
            optimizer.step()
            expected.append(loss.item())
        assert losses == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(model[2].weight, other[2].weight, rtol=1e-4, atol=1e-5)

    def test_frozen_parameters_stay_and_no_gradient_is_kept(self):
        model = bigram_model()
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        recipes.fine_tune(model, tokens(3))
        assert torch.equal(model[0].weight, before)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_frozen_model_is_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"model .*gradient"):
            recipes.fine_tune(bigram_model().requires_grad_(False), tokens(3))

    def test_nothing_to_predict_is_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"sequences .*\(3, 1\)"):
            recipes.fine_tune(bigram_model(), tokens(3, length=1))
