"""Command ``lqlora plan``: choose formats and ranks from a cost table within a budget."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lqlora as lq
from lqlora._messages import shortened
from lqlora.cli import console
from lqlora.cli.outputs import check_outputs, list_outputs, write_outputs
from lqlora.cli.parsing import parse_bytes, parse_number, parse_pairs, parse_ties
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.reports.tables import plan_table

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora.allocation import Plan
    from lqlora.costs import CostTable

__all__ = ["PlanOptions", "PlanOutputs", "run"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Values of the options, as they were typed.

    Parameters
    ----------
    bits, bytes, max_error : str, optional
        The budget: exactly one of them is given.
    ties, fixed, minimum_bits : tuple of str
        Patterns of names; the last two with ``=`` and a value.
    solver : str
        Name of the solver: see :func:`lqlora.solvers.solve`.
    time_limit : float, optional
        Seconds that a solver may search.
    """

    bits: str | None = None
    bytes: str | None = None
    max_error: str | None = None
    ties: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    minimum_bits: tuple[str, ...] = ()
    solver: str = "auto"
    time_limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanOutputs:
    """Files to write.

    Parameters
    ----------
    output, png : Path, optional
        Plan as JSON, and PNG picture.
    force : bool
        Replace files that exist.
    dry_run : bool
        Print what would be written, and write nothing.
    """

    output: Path | None = None
    png: Path | None = None
    force: bool = False
    dry_run: bool = False


def run(table_file: Path, options: PlanOptions, outputs: PlanOutputs) -> None:
    """Make a plan, write the files that were asked for, and print its table by kind of matrix.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, or no plan meets the constraints. In this case nothing is written.
    """
    paths = [path for path in (outputs.output, outputs.png) if path is not None]
    check_outputs(paths, force=outputs.force, others=[table_file])
    table = _read_table(table_file)
    plan = lq.allocate(table, **_budget(options), **_constraints(options, table))
    files: dict[Path, bytes] = {}
    if outputs.output is not None:
        files[outputs.output] = f"{plan.to_json()}\n".encode()
    if outputs.png is not None:
        files[outputs.png] = _picture(plan)
    if not outputs.dry_run:
        write_outputs(files)
    _show(plan)
    list_outputs(files, dry_run=outputs.dry_run)


def _read_table(path: Path) -> CostTable:
    try:
        return lq.CostTable.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # invalid tables and invalid UTF-8 are ValueErrors
        raise CheckpointError(shortened(f"{path} is not a readable cost table: {error}")) from error


def _budget(options: PlanOptions) -> dict[str, Any]:
    given = {
        "bits_per_weight": options.bits and parse_number(options.bits, "--bits"),
        "total_bytes": options.bytes and parse_bytes(options.bytes),
        "max_error": options.max_error and float(parse_number(options.max_error, "--max-error")),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        options_given = " and ".join(given) or "none"
        raise InvalidArgumentError(f"budget must be one of --bits, --bytes and --max-error, got {options_given}.")
    return given


def _constraints(options: PlanOptions, table: CostTable) -> dict[str, Any]:
    return {
        "ties": parse_ties(options.ties, table.names),
        "fixed": {pattern: lq.BlockFormat.parse(text) for pattern, text in parse_pairs(options.fixed, "--fix").items()},
        "minimum_bits": {
            pattern: parse_number(text, "--minimum-bits")
            for pattern, text in parse_pairs(options.minimum_bits, "--minimum-bits").items()
        },
        "solver": options.solver,
        "time_limit": options.time_limit,
    }


def _picture(plan: Plan) -> bytes:
    buffer = io.BytesIO()
    lq.reports.plot(plan).savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _show(plan: Plan) -> None:
    console.show_table(plan_table(plan, by="kind"))
    for limit in plan.limits:
        console.say(f"{limit.describe()}.")
    factors = "" if plan.counts_factors else "not "
    console.say(
        f"Quantized parts: {float(plan.bits_per_weight):.4f} bits per weight, {plan.nbytes:,} bytes; "
        f"low-rank factors, {factors}counted: {-(-sum(plan.factor_bits.values()) // 8):,} bytes."
    )
    console.say(f"Weighted squared error: {plan.error:.6g}; {plan.status}, relative gap {plan.gap:.2g}.")
    if plan.note:
        console.say(plan.note)
