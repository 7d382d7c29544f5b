"""Output of the commands: results, tables, progress, warnings, logs and errors. Beside it only bars print.

Names of matrices and files, and values of options, are printed as data. Nothing in them is read as markup. Characters that
cannot be printed, or that the encoding of a stream lacks, are printed as escapes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from lqlora._printable import printable
from lqlora._progress import Bar, bars_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from rich.console import Console

    from lqlora.reports.tables import Table

__all__ = ["complain", "complain_of", "flush", "routed_messages", "say", "say_json", "show_table", "stage"]

#: Least width of the first column of a table on a terminal.
_NAME_WIDTH = 12

#: Most rows of a table that is drawn. Rich takes about a millisecond for a row.
_MOST_ROWS = 500


def say(line: str) -> None:
    """Print a line of a result to standard output.

    Commands write their files before they say anything, because standard output may fail: a pipe may be closed, a disk
    full.

    Raises
    ------
    SystemExit
        If standard output cannot be written. Its code is 1.
    """
    _print(f"{_shown(line, sys.stdout)}\n")


def say_json(content: object) -> None:
    """Print a value as JSON to standard output. Other characters than those of ASCII are escapes of JSON.

    Raises
    ------
    SystemExit
        If standard output cannot be written. Its code is 1.
    """
    for line in json.dumps(content, indent=2, allow_nan=False).split("\n"):
        say(line)


def show_table(table: Table) -> None:
    """Print a table to standard output: drawn on a terminal, as Markdown elsewhere.

    A table with many rows, or one that is too wide for the terminal, is Markdown there too.

    Raises
    ------
    SystemExit
        If standard output cannot be written. Its code is 1.
    """
    drawing = None if sys.stdout is None else _drawn(table, _console(_Forgiving(sys.stdout)))
    if drawing is not None:
        _print(drawing)
    else:
        for line in table.markdown().split("\n"):
            say(line)


def complain(message: str) -> None:
    """Print a line to standard error; if that fails, the command goes on."""
    if sys.stderr is not None:
        stream = _Forgiving(sys.stderr)
        with bars_hidden():
            stream.write(f"{_shown(message, sys.stderr)}\n")
            stream.flush()


def complain_of(error: BaseException) -> None:
    """Print the traceback of an error that the command does not expect."""
    for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
        complain(line)


def flush() -> None:
    """Finish standard output.

    Raises
    ------
    SystemExit
        If standard output cannot be written. Its code is 1.
    """
    if sys.stdout is not None:
        _print("")


@contextmanager
def stage(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show the progress of a stage on standard error, and its time at the end.

    Yields
    ------
    callable
        Call it with the number of steps done and the number of all.
    """
    start = time.perf_counter()
    with Bar(_shown(title, sys.stderr)) as show:
        yield show
    complain(f"{title}: {time.perf_counter() - start:.0f} s")


@contextmanager
def routed_messages() -> Iterator[None]:
    """Print warnings and log records of all libraries by :func:`complain` inside the block.

    Texts that other libraries print themselves, such as the help of the commands, have escapes for what the encoding lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.lastResort  # prints the records that no other handler takes
    logging.lastResort = _Log(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
            yield
    finally:
        logging.lastResort = handler


class _Log(logging.Handler):
    """Handler that prints log records to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {record.getMessage()}")


class _Forgiving:
    """Text stream whose failures are ignored: no message is worth the loss of a result."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _shown(text: str, stream: TextIO | None) -> str:
    """Return a text with escapes for what cannot be printed and for what the encoding of a stream lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def _print(text: str) -> None:
    """Write a text to standard output, or end the process with code 1."""
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # `lqlora plan ... | head` closes the pipe on purpose
            complain(f"lqlora: standard output cannot be written: {error}. Files that the command writes are complete.")
        raise SystemExit(1) from error


def _discard(stream: TextIO | None) -> None:
    """Send what a stream that failed still holds to nowhere."""
    # Python flushes the standard streams once more at its end, and exits with code 120 if that fails again.
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def _console(stream: _Forgiving) -> Console:
    from rich.console import Console  # noqa: PLC0415 - of the demo extra, whose absence this module must be able to report

    return Console(file=stream, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]


def _drawn(table: Table, console: Console) -> str | None:
    """Return a table as a terminal shows it, or None if it is shown as Markdown."""
    if not console.is_terminal or len(table.rows) > _MOST_ROWS:
        return None
    from rich import box  # noqa: PLC0415 - see _console
    from rich.cells import cell_len  # noqa: PLC0415
    from rich.table import Table as Drawing  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows = [[_shown(cell, sys.stdout) for cell in row] for row in table.rows]
    columns = [[row[i] for row in rows] for i in range(len(table.head))]
    # Whole titles take what the names leave, and at least their longest word. Numbers are never cut. There is one space
    # left and one right of the table, and there are three between two columns.
    whole = [max(map(cell_len, (title, *cells))) for title, cells in zip(table.head, columns, strict=True)]
    least = [max(map(cell_len, (*title.split(), *cells))) for title, cells in zip(table.head, columns, strict=True)]
    room = console.width - 3 * len(columns) + 1 - sum(least[1:])
    if room < _NAME_WIDTH:
        return None
    widths = [min(whole[0], room)]
    room -= widths[0]
    for wide, narrow in zip(whole[1:], least[1:], strict=True):
        widths.append(min(wide, narrow + room))
        room -= widths[-1] - narrow
    # A cell is a Text, never a str: rich would look for markup, emoji and links in a str.
    drawing = Drawing(box=box.SIMPLE, pad_edge=False)
    for title, width in zip(table.head, widths, strict=True):
        drawing.add_column(Text(title), width=width, overflow="fold")
    for row in rows:
        drawing.add_row(*map(Text, row))
    with console.capture() as captured:
        console.print(drawing)
    return captured.get()
