"""Command ``lqlora compress``: from a dense language model and a text to a quantized model in one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lqlora.cli import console
from lqlora.cli.outputs import check_outputs
from lqlora.cli.parsing import parse_number, parse_pattern
from lqlora.errors import InvalidArgumentError
from lqlora.integrations.gguf import packaged_smollm2
from lqlora.recipes.text import packaged_text, read_text, split_sequences, token_sequences

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CompressOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Values of the options.

    Parameters
    ----------
    bits : str
        Budget in bits per weight, as it was typed.
    rank, iterations, tuning_steps : int
        See :func:`lqlora.recipes.compress`.
    codes : {"trellis", "scalar"}
        Kind of the codes.
    length, calibration, training, evaluation : int
        Tokens of a sequence, and numbers of sequences.
    include, exclude : tuple of str
        Patterns of names of layers; without ``include`` all linear layers of the blocks are taken.
    """

    bits: str
    rank: int
    iterations: int
    tuning_steps: int
    codes: Literal["trellis", "scalar"]
    length: int
    calibration: int
    training: int
    evaluation: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]


def run(
    model: Path | None,
    output: Path,
    options: CompressOptions,
    *,
    text: Path | None,
    checkpoint: Path | None,
    packaged: bool,
    force: bool,
) -> None:
    """Compress a model and write it.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, or the budget is infeasible. In this case the output is not written.
    """
    from lqlora.integrations.language_models import load_language_model  # noqa: PLC0415 - needs torch
    from lqlora.nn import save_model  # noqa: PLC0415
    from lqlora.recipes.compression import compress  # noqa: PLC0415

    if (model is None) == (not packaged):
        found = "neither" if model is None else "both"
        raise InvalidArgumentError(f"model must be a file or folder, or --packaged instead of it, got {found}.")
    bits = parse_number(options.bits, "--bits")
    include, exclude = ([parse_pattern(own) for own in texts] for texts in (options.include, options.exclude))
    source = model or packaged_smollm2()
    others = [source, *filter(None, [text])]
    check_outputs([output], force=force, others=[*others, *filter(None, [checkpoint])])
    with console.stage("Reading model and text"):
        language_model, tokenizer = load_language_model(source)
        most = getattr(language_model.config, "max_position_embeddings", None)
        if most is not None and options.length > most:
            raise InvalidArgumentError(
                f"length must be at most {most}, the positions of the model, got {options.length}."
            )
        sequences = token_sequences(tokenizer, packaged_text() if text is None else read_text(text), options.length)
        largest, known = int(sequences.max()), language_model.get_input_embeddings().num_embeddings
        if largest >= known:
            raise InvalidArgumentError(
                f"model must have an embedding for each token of the text, got {known} embeddings and token {largest}. Is the tokenizer "
                "that of this model?"
            )
        split = split_sequences(
            sequences, calibration=options.calibration, training=options.training, evaluation=options.evaluation
        )
    with console.stage("Compressing"):
        report = compress(
            language_model, split, bits, rank=options.rank, codes=options.codes, iterations=options.iterations, checkpoint=checkpoint,
            include=include or None, exclude=exclude, tuning_steps=options.tuning_steps,
        )  # fmt: skip
    save_model(output, language_model)
    for line in str(report).splitlines():
        console.say(line)
    console.say(f"Wrote {output} ({output.stat().st_size:,} bytes).")
