"""English text, cut into disjoint parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora.recipes.settings import Settings

__all__ = ["Parts", "read_text", "split_tokens"]


class Parts(NamedTuple):
    """Token numbers, int64 of shape (sequences, length); no token is in two parts."""

    calibration: torch.Tensor
    training: torch.Tensor
    evaluation: torch.Tensor


def read_text(path: Path | None) -> str:
    """Return the text of a file, or the documentation of the language that every Python carries.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be read as UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics  # noqa: PLC0415 - 700 KB of text, only for the demo

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"Cannot read the text {path}: {error}.") from error


def split_tokens(tokenizer: Any, text: str, settings: Settings) -> Parts:
    """Tokenize, cut into sequences, and deal them out: calibration first, evaluation last.

    Raises
    ------
    InvalidArgumentError
        If the text is too short.
    """
    needed = settings.length * (settings.calibration + settings.steps * settings.batch + settings.evaluation)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < needed:
        raise InvalidArgumentError(f"The text has {len(ids)} tokens; the demo needs {needed}.")
    rows = ids[: len(ids) - len(ids) % settings.length].view(-1, settings.length)
    training = rows[settings.calibration : len(rows) - settings.evaluation]
    # Spread the training sequences over the whole part: neighbors resemble each other.
    stride = len(training) // (settings.steps * settings.batch)
    return Parts(
        rows[: settings.calibration],
        training[::stride][: settings.steps * settings.batch],
        rows[len(rows) - settings.evaluation :],
    )
