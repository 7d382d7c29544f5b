"""The cost table of a model file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import lqlora as lq
from lqlora.cli import console
from lqlora.cli.outputs import check_outputs, write_outputs
from lqlora.cli.parsing import read_formats, read_numbers, read_pattern
from lqlora.errors import InvalidArgumentError
from lqlora.integrations.gguf import packaged_smollm2
from lqlora.integrations.sources import KEPT, open_weights

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CostsOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class CostsOptions:
    """Options of the command, as they were typed.

    Parameters
    ----------
    formats, ranks : str
        Lists separated by commas.
    include, exclude : tuple of str
        Patterns; no ``exclude`` leaves out embeddings and output heads.
    mode : {"exact", "fast"}
        Whether every format is decomposed.
    store : Path, optional
        File that keeps every finished row.
    seed, max_iter : int
        See :func:`lqlora.cost_table`.
    """

    formats: str = "few"
    ranks: str = "16"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mode: Literal["exact", "fast"] = "exact"
    store: Path | None = None
    seed: int = 0
    max_iter: int = 2


def run(model: Path | None, output: Path, options: CostsOptions, *, packaged: bool, force: bool) -> None:
    """Build the cost table of a model and write it.

    Raises
    ------
    LQLoRAError
        One sentence on what is missing or wrong. What the store holds is kept.
    """
    if (model is None) == (not packaged):
        raise InvalidArgumentError("Name a model file or folder, or give --packaged, and only one of the two.")
    check_outputs([output], force=force)
    formats, ranks = read_formats(options.formats), read_numbers(options.ranks)
    include = [read_pattern(text) for text in options.include or ("*",)]
    exclude = [read_pattern(text) for text in options.exclude or KEPT]
    weights = open_weights(model or packaged_smollm2(), include, exclude)
    title = f"Cost table of {len(weights)} matrices x {len(formats)} formats x {len(ranks)} ranks"
    with console.stage(title) as show:
        table = lq.cost_table(
            weights,
            formats,
            ranks=ranks,
            seed=options.seed,
            max_iter=options.max_iter,
            mode=options.mode,
            store=options.store,
            progress=lambda done, total, _: show(done, total),  # the bar has an estimate of its own
        )
    write_outputs({output: f"{table.to_json()}\n".encode()}, dry_run=False)
