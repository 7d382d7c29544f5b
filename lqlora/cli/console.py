"""Console output of the commands: results, tables, and progress bars on a terminal or plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["say", "show_table", "stage"]

_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)


def say(line: str) -> None:
    """Print a line of a result to standard output."""
    _out.print(line, markup=False, highlight=False)


def show_table(markdown: str) -> None:
    """Print a Markdown table: rendered on a terminal, as Markdown elsewhere."""
    if _out.is_terminal:
        _out.print(Markdown(markdown))
    else:
        say(markdown)


@contextmanager
def stage(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a stage on standard error, and its time at the end.

    Yields
    ------
    callable
        Call it with the number of steps done and the number of all.
    """
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
    _err.print(f"{title}: {time.perf_counter() - start:.0f} s", markup=False, highlight=False)
