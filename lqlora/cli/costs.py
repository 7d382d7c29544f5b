"""Command ``lqlora costs``: build the cost table of a model file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import lqlora as lq
from lqlora._patterns import list_names
from lqlora.cli import console
from lqlora.cli.outputs import check_outputs, list_outputs, write_outputs
from lqlora.cli.parsing import parse_formats, parse_integers, parse_pattern
from lqlora.errors import InvalidArgumentError
from lqlora.integrations.gguf import packaged_smollm2
from lqlora.integrations.sources import open_model
from lqlora.integrations.statistics import norms_for, open_statistics

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CostsOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class CostsOptions:
    """Values of the options, as they were typed.

    Parameters
    ----------
    formats, ranks : str
        Comma-separated lists.
    include, exclude : tuple of str
        Patterns of names; without ``exclude``, embeddings and output heads are left out.
    mode : {"exact", "fast"}
        ``"exact"`` decomposes each matrix in every format, ``"fast"`` in about a tenth of a large grid.
    statistics : Path, optional
        Folder of statistics, which weight the errors.
    store : Path, optional
        File that keeps finished rows, so that a second run continues.
    seed, max_iter : int
        See :func:`lqlora.cost_table`.
    """

    formats: str = "few"
    ranks: str = "16"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mode: Literal["exact", "fast"] = "exact"
    statistics: Path | None = None
    store: Path | None = None
    seed: int = 0
    max_iter: int = 2


def run(model: Path | None, output: Path, options: CostsOptions, *, packaged: bool, force: bool) -> None:
    """Build the cost table of a model and write it.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid. In this case the table is not written, and rows in the store are kept.
    """
    if (model is None) == (not packaged):
        found = "neither" if model is None else "both"
        raise InvalidArgumentError(f"model must be a file or folder, or --packaged instead of it, got {found}.")
    source = model or packaged_smollm2()
    contents = open_model(source)
    check_outputs(
        [output], force=force, others=[source, *contents.files, *filter(None, [options.store, options.statistics])]
    )
    formats, ranks = parse_formats(options.formats), parse_integers(options.ranks, "--ranks")
    patterns = {"include": options.include, "exclude": options.exclude}
    chosen = {name: [parse_pattern(text) for text in texts] for name, texts in patterns.items() if texts}
    weights = contents.select(**chosen)
    weighting = None
    if options.statistics is not None:
        weighting = norms_for(open_statistics(options.statistics), weights)
        if lacking := [name for name in weights if name not in weighting]:
            raise InvalidArgumentError(
                f"statistics must be of all matrices, whose costs are compared, but lack {list_names(lacking)}. Leave them out with --exclude."
            )
    title = f"Cost table of {len(weights)} matrices x {len(formats)} formats x {len(ranks)} ranks"
    with console.stage(title) as show:
        table = lq.cost_table(
            weights,
            formats,
            ranks=ranks,
            seed=options.seed,
            max_iter=options.max_iter,
            mode=options.mode,
            weighting=weighting,
            store=options.store,
            progress=show,
        )
    files = {output: f"{table.to_json()}\n".encode()}
    write_outputs(files)
    list_outputs(files)
    if line := contents.describe_left_out():
        console.say(line)
