"""Command ``lqlora compress``: from a dense language model and a text to a folder that transformers opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lqlora.cli import console
from lqlora.cli.parsing import parse_number, parse_pattern
from lqlora.errors import InvalidArgumentError
from lqlora.integrations.gguf import packaged_smollm2
from lqlora.recipes.text import packaged_text, read_text, split_sequences, token_sequences

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora.recipes.text import Split

__all__ = ["CompressOptions", "TextOptions", "run", "token_split"]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Text, and how it is cut into sequences.

    Parameters
    ----------
    text : Path, optional
        UTF-8 text; by default Python's own documentation.
    length, calibration, training, evaluation : int
        Tokens of a sequence, and numbers of sequences.
    """

    text: Path | None
    length: int
    calibration: int
    training: int = 0
    evaluation: int = 0


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Values of the options.

    Parameters
    ----------
    bits : str
        Budget in bits per weight, as it was typed.
    rank, iterations : int
        See :func:`lqlora.recipes.compress_checkpoint`.
    codes : {"trellis", "scalar"}
        Kind of the codes.
    include, exclude : tuple of str
        Patterns of names of layers; without ``include`` all linear layers of the blocks are taken.
    work : Path, optional
        Folder of the results of the stages.
    """

    bits: str
    rank: int
    iterations: int
    codes: Literal["trellis", "scalar"]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    work: Path | None


def run(
    model: Path | None,
    output: Path | None,
    options: CompressOptions,
    text: TextOptions,
    *,
    packaged: bool,
    as_json: bool,
) -> None:
    """Compress a model, write it, and print the numbers.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, or the budget is infeasible. Results of finished stages are kept.
    """
    from lqlora.recipes.checkpoints import compress_checkpoint  # noqa: PLC0415 - needs torch

    if packaged and output is None:
        model, output = None, model
    if output is None or (model is None) == (not packaged):
        found = ", ".join(str(own) for own in (model, output) if own is not None) or "nothing"
        raise InvalidArgumentError(
            f"source and folder must be given, or the folder alone with --packaged, got {found}{' and --packaged' if packaged else ''}."
        )
    folder = output
    bits = parse_number(options.bits, "--bits")
    include, exclude = ([parse_pattern(own) for own in texts] for texts in (options.include, options.exclude))
    source = model or packaged_smollm2()
    split = token_split(source, text)
    with console.stage("Compressing") as show:
        report = compress_checkpoint(
            source, folder, bits, split, work=options.work, rank=options.rank, codes=options.codes, iterations=options.iterations,
            include=include or None, exclude=exclude, progress=show,
        )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if as_json:
        console.say_json(_as_json(report) | {"folder_bytes": size})
        return
    for line in str(report).splitlines():
        console.say(line)
    console.say(f"Wrote {folder} ({size:,} bytes).")


def token_split(source: Path, options: TextOptions) -> Split:
    """Return the token sequences of a text for a model.

    Parameters
    ----------
    source : Path
        GGUF file or folder of the model.
    options : TextOptions
        Text and numbers.

    Returns
    -------
    Split
        Sequences.

    Raises
    ------
    LQLoRAError
        If model or text cannot be read, or the numbers do not suit them.
    """
    from lqlora.integrations.language_models import load_tokenizer  # noqa: PLC0415 - needs torch

    with console.stage("Reading text"):
        tokenizer, most, known = load_tokenizer(source)
        if most is not None and options.length > most:
            raise InvalidArgumentError(
                f"length must be at most {most}, the positions of the model, got {options.length}."
            )
        words = packaged_text() if options.text is None else read_text(options.text)
        sequences = token_sequences(tokenizer, words, options.length)
        if (largest := int(sequences.max())) >= known:
            raise InvalidArgumentError(
                f"model must have an embedding for each token of the text, got {known} embeddings and token {largest}. Is the tokenizer "
                "that of this model?"
            )
        needed = options.calibration + options.training + options.evaluation
        if needed > len(sequences):
            raise InvalidArgumentError(
                f"text must have at least {needed} sequences of {options.length} tokens, all parts together, got {len(sequences)}. Take a "
                "longer text, shorter sequences, or fewer of them."
            )
        if options.calibration < 1:
            raise InvalidArgumentError(f"calibration must be at least 1 sequence, got {options.calibration}.")
        return split_sequences(
            sequences, calibration=options.calibration, training=options.training, evaluation=options.evaluation
        )


def _as_json(report: Any) -> dict[str, Any]:
    quantized = report.quantization
    return {
        "matrices": {name: {"format": str(own.format), "rank": own.rank, "relative_error": own.relative_error} for name, own in quantized.matrices.items()},
        "bits_per_weight": quantized.bits_per_weight,
        "perplexities": report.perplexities,
    }  # fmt: skip
