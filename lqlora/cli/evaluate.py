"""Command ``lqlora eval``: perplexity of a language model on a text, and its divergence from another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora.cli import console
from lqlora.errors import InvalidArgumentError
from lqlora.recipes.text import packaged_text, read_text, token_sequences

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["run"]


def run(model: Path, source: Path | None, text: Path | None, length: int, count: int, *, as_json: bool) -> None:
    """Evaluate a model on the first sequences of a text.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, or the text is too short.
    """
    from lqlora.integrations.language_models import load_language_model  # noqa: PLC0415 - needs torch
    from lqlora.recipes.evaluation import divergence, perplexity  # noqa: PLC0415

    words = packaged_text() if text is None else read_text(text)
    with console.stage("Reading model"):
        own, tokenizer = load_language_model(model, may_be_quantized=True)
    sequences = token_sequences(tokenizer, words, length)
    if not 1 <= count <= len(sequences):
        raise InvalidArgumentError(f"sequences must be from 1 to {len(sequences)}, those of the text, got {count}.")
    chosen = sequences[:count]
    found = {"tokens": chosen.numel()}
    with console.stage("Perplexity") as show:
        numbers = {"perplexity": perplexity(own, chosen, progress=show)}
    if source is not None:
        with console.stage("Reading source"):
            teacher, _ = load_language_model(source, may_be_quantized=True)
        with console.stage("Perplexity of the source") as show:
            numbers["source_perplexity"] = perplexity(teacher, chosen, progress=show)
        with console.stage("Divergence") as show:
            numbers["divergence"] = divergence(own, teacher, chosen, progress=show)
    if as_json:
        console.say_json(found | numbers)
        return
    console.say(f"{model}: perplexity {numbers['perplexity']:.4g} on {found['tokens']:,} tokens.")
    if source is not None:
        console.say(
            f"{source}: perplexity {numbers['source_perplexity']:.4g}. Divergence: {numbers['divergence']:.4g} nats a token."
        )
