"""Text, token sequences, and their split into disjoint parts."""

from __future__ import annotations

import pytest

from lqlora import recipes
from lqlora.errors import InvalidArgumentError, MissingDependencyError
from tests.requirements import require_module

torch = require_module("torch")


def characters(text, verbose):
    """Tokenize into the numbers of characters, as a tokenizer of transformers returns them."""
    return {"input_ids": [ord(character) for character in text]}


def test_the_packaged_text_is_english():
    text = recipes.packaged_text()
    assert text.count(" the ") > 1000


class TestReadText:
    def test_utf_8_is_read(self, tmp_path):
        (tmp_path / "t.txt").write_bytes("Größe".encode())
        assert recipes.read_text(tmp_path / "t.txt") == "Größe"

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"nowhere\.txt"):
            recipes.read_text(tmp_path / "nowhere.txt")

    def test_another_encoding_is_refused(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
        with pytest.raises(InvalidArgumentError, match=r"latin\.txt.*UTF-8"):
            recipes.read_text(tmp_path / "latin.txt")


class TestTokenSequences:
    def test_tokens_are_cut_in_order_and_the_rest_is_dropped(self):
        found = recipes.token_sequences(characters, "abcdefgh", 3)
        assert found.dtype == torch.int64
        assert found.tolist() == [[97, 98, 99], [100, 101, 102]]

    def test_a_text_of_one_sequence_is_enough(self):
        assert recipes.token_sequences(characters, "abc", 3).shape == (1, 3)

    def test_a_shorter_text_is_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"text .*4.*got 3"):
            recipes.token_sequences(characters, "abc", 4)

    @pytest.mark.parametrize("length", [0, -1, 1.5, "3", None])
    def test_other_lengths_are_refused(self, length):
        with pytest.raises(InvalidArgumentError, match=r"length must be"):
            recipes.token_sequences(characters, "abc", length)


class TestSplitSequences:
    @pytest.mark.parametrize(("calibration", "training", "evaluation"), [(2, 3, 4), (0, 9, 0), (3, 0, 6), (1, 1, 1)])
    def test_parts_are_disjoint_and_in_order(self, calibration, training, evaluation):
        sequences = torch.arange(9)[:, None]
        parts = recipes.split_sequences(sequences, calibration=calibration, training=training, evaluation=evaluation)
        assert [len(part) for part in parts] == [calibration, training, evaluation]
        joined = torch.cat(parts).flatten().tolist()
        assert joined == sorted(set(joined))

    def test_evaluation_is_the_end_and_training_is_spread(self):
        parts = recipes.split_sequences(torch.arange(100)[:, None], calibration=10, training=4, evaluation=10)
        assert parts.training.flatten().tolist() == [10, 30, 50, 70]
        assert parts.evaluation.flatten().tolist() == list(range(90, 100))

    def test_too_few_sequences_are_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"sequences .*6.*got 5"):
            recipes.split_sequences(torch.zeros(5, 4), calibration=2, training=2, evaluation=2)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match=r"'lqlora.recipes'.*'perplexities'"):
        _ = recipes.perplexities


@pytest.mark.parametrize("name", ["perplexity", "fine_tune"])
def test_without_torch_the_error_has_the_command(monkeypatch, name):
    from lqlora import _optional

    monkeypatch.setattr(_optional, "is_installed", lambda module: module != "torch")
    with pytest.raises(MissingDependencyError, match=f"recipes.{name} needs torch: pip install"):
        getattr(recipes, name)
