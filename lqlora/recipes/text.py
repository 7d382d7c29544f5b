"""English text, and its tokens as sequences of equal length that are split into disjoint parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora._annotations import annotated
from lqlora._messages import given, shortened
from lqlora._optional import require
from lqlora._options import require_integer
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import os

    import torch

__all__ = ["Split", "check_sequences", "packaged_text", "read_text", "split_sequences", "token_sequences"]


class Split(NamedTuple):
    """Token sequences in three disjoint parts.

    Parameters
    ----------
    calibration : Tensor of int64, shape (sequences, tokens)
        Sequences for statistics of the model, such as Fisher information.
    training : Tensor of int64, shape (sequences, tokens)
        Sequences for fine-tuning.
    evaluation : Tensor of int64, shape (sequences, tokens)
        Sequences for perplexity.
    """

    calibration: torch.Tensor
    training: torch.Tensor
    evaluation: torch.Tensor


def packaged_text() -> str:
    """Return the English text that every Python carries: the language reference behind ``help()``.

    Returns
    -------
    str
        About half a million characters, topics in alphabetical order. They differ a little between versions of Python.

    Examples
    --------
    >>> len(packaged_text()) > 400_000
    True
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 - a large module that only this function needs

    # Sorted, because the order of the dictionary is not documented: the parts of a split must be the same in each run.
    return "\n\n".join(topics[name] for name in sorted(topics))


@annotated
def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file.

    Parameters
    ----------
    path : path-like
        File to read.

    Returns
    -------
    str
        Its text.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or a path with a zero byte
        raise InvalidArgumentError(shortened(f"{path} cannot be read as UTF-8 text: {error}.")) from error


def token_sequences(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    """Tokenize a text and cut it into sequences of equal length.

    Parameters
    ----------
    tokenizer : callable
        Called with the text and ``verbose=False``, as a tokenizer of transformers; returns a mapping with
        ``"input_ids"``.
    text : str
        Any text.
    length : int
        Tokens per sequence, at least 1.

    Returns
    -------
    Tensor of int64, shape (sequences, length)
        Consecutive parts of the text. Fewer than ``length`` tokens at the end are dropped.

    Raises
    ------
    InvalidArgumentError
        If the text has fewer than ``length`` tokens, or the length is below 1.
    """
    require_integer(length, "length", 1)
    library = require("torch", "pip install torch", "lqlora.recipes.token_sequences")
    # The whole text is tokenized at once, so that no word is cut at a border. verbose=False keeps the tokenizer of
    # transformers from warning that the text is longer than the context of the model.
    ids = library.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=library.int64)
    if len(ids) < length:
        raise InvalidArgumentError(f"text must have at least {length} tokens (one sequence), got {len(ids)} tokens.")
    return ids[: len(ids) - len(ids) % length].view(-1, length)  # type: ignore[no-any-return] # torch was required


@annotated
def split_sequences(sequences: torch.Tensor, *, calibration: int, training: int, evaluation: int) -> Split:
    """Split token sequences into disjoint parts for calibration, training and evaluation.

    Parameters
    ----------
    sequences : Tensor of int64, shape (sequences, tokens)
        Consecutive parts of a text, from :func:`token_sequences`.
    calibration, training, evaluation : int
        Number of sequences of each part.

    Returns
    -------
    Split
        Calibration has the first sequences and evaluation the last ones. Training takes sequences at equal distances
        from those between, because neighbors in a text resemble each other.

    Raises
    ------
    InvalidArgumentError
        If there are fewer sequences than the three parts need.

    Examples
    --------
    >>> import torch
    >>> parts = split_sequences(torch.arange(10)[:, None], calibration=2, training=3, evaluation=1)
    >>> [part.flatten().tolist() for part in parts]
    [[0, 1], [2, 4, 6], [9]]
    """
    for name, part in (("calibration", calibration), ("training", training), ("evaluation", evaluation)):
        require_integer(part, name)
    count, needed = len(sequences), calibration + training + evaluation
    if count < needed:
        raise InvalidArgumentError(
            f"sequences must be at least {given(needed)} (calibration {given(calibration)}, training {given(training)}, "
            f"evaluation {given(evaluation)}), got {count}. Use a longer text or shorter sequences."
        )
    # The stride is rounded down, so at least `training` sequences remain; the slice drops any beyond.
    between = sequences[calibration : count - evaluation]
    stride = len(between) // training if training else 1
    return Split(sequences[:calibration], between[::stride][:training], sequences[count - evaluation :])


def check_sequences(sequences: torch.Tensor) -> None:
    """Check that there is something to predict in token sequences.

    Parameters
    ----------
    sequences : Tensor, shape (sequences, tokens)
        Token ids.

    Raises
    ------
    InvalidArgumentError
        If there is no sequence, or a sequence has fewer than two tokens.
    """
    shape = tuple(sequences.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise InvalidArgumentError(f"sequences must have a shape of at least (1, 2), got {shape}.")
