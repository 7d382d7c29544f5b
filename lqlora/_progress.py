"""Progress of long calls: a bar with the time left on a terminal, or a function of the caller."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from lqlora._messages import given
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Self

__all__ = ["Bar", "bars_hidden", "reported"]

#: An option: whether there is a bar, or a function of the number of finished items and the number of all.
Progress: TypeAlias = "bool | Callable[[int, int], None] | Callable[[int, int | None], None]"


@contextmanager
def reported(
    progress: Progress, title: str, total: int | None, unit: str, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Report the progress of the block as the caller of a public function asks for it.

    Parameters
    ----------
    progress : bool or callable
        The option of the public function. True is a bar, if standard error is a terminal, and False is silence. A function is
        called with the number of finished items and the number of all, which is None if it is not known.
    title : str
        Title of the bar.
    total : int or None
        Number of all items, if it is known.
    unit : str
        One item, in a word.
    done : int, default 0
        Number of items that were finished earlier. They do not count as work in the time left.

    Yields
    ------
    callable
        Call it after each finished item with the number of finished items, those of ``done`` included.

    Raises
    ------
    InvalidArgumentError
        If ``progress`` is neither.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise InvalidArgumentError(
            f"progress must be True, False or a function of the number done and the number of all, got {given(progress)}."
        )
    own = Bar(title) if progress is True else None
    show: Any = own or progress or (lambda *_: None)
    if isinstance(show, Bar):
        show.start(done, total, unit)
    with own or nullcontext():
        yield lambda done: show(done, total)


class Bar:
    """A line on a terminal with title, counts, and the time that has passed and is left; it is erased at the end.

    There is no line if standard error is not a terminal, tqdm is not installed, or the process is one of several on a machine and
    not the first. A terminal that fails ends the line, and nothing else.

    Parameters
    ----------
    title : str
        Printable text.
    """

    def __init__(self, title: str) -> None:
        self._line: Any = None
        if _is_on_terminal() and is_installed("tqdm"):
            from tqdm.std import tqdm  # noqa: PLC0415 - optional, and not needed without a terminal

            # Without the thread that tqdm starts to shorten large steps of the count: there are none.
            line = type("Line", (tqdm,), {"monitor_interval": 0, "refresh": _refresh})
            # Every count is shown unless the last one was shown a moment ago: layers differ in their times by orders of
            # magnitude. The time left is that of the mean item since the start (smoothing=0), for the same reason.
            with suppress(OSError, ValueError):
                self._line = line(
                    desc=title,
                    bar_format="{desc}",
                    file=sys.stderr,
                    leave=False,
                    miniters=1,
                    smoothing=0,
                    dynamic_ncols=True,
                )

    def start(self, done: int, total: int | None, unit: str) -> None:
        """Set the counts from which the pace is measured.

        Parameters
        ----------
        done : int
            Number of items that were finished earlier.
        total : int or None
            Number of all items.
        unit : str
            One item.
        """
        if self._line is not None:
            self._line.initial = self._line.n = done
            self._line.unit = f" {unit}"  # after a number
            self(done, total)
            self._try(lambda line: line.refresh())

    def __call__(self, done: int, total: int | None) -> None:
        """Show the number of finished items and the number of all."""
        if self._line is not None:
            self._line.total, self._line.bar_format = total, None
            self._try(lambda line: line.update(done - line.n))

    def _try(self, draw: Callable[[Any], object]) -> None:
        try:
            draw(self._line)
        except (OSError, ValueError):  # ValueError: standard error was closed
            with suppress(OSError, ValueError):
                self._line.close()
            self._line = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._try(lambda line: line.close())
            self._line = None


def _refresh(line: Any, nolock: bool = False, lock_args: tuple[Any, ...] | None = None) -> bool:  # noqa: ARG001, FBT001, FBT002 - as tqdm calls it
    """Draw a line in the lock of all bars, which is free again if the terminal fails.

    tqdm would keep it, and other threads that write to the terminal would wait for it without end.
    """
    if nolock:
        line.display()
    else:
        with line.get_lock():
            line.display()
    return True


def bars_hidden() -> AbstractContextManager[None]:
    """Erase the bars of the process while the block writes lines to the terminal, and draw them again afterwards.

    Returns
    -------
    context manager
        It does nothing if there is no bar.
    """
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    if tqdm is None or not _is_on_terminal():
        return nullcontext()
    return tqdm.external_write_mode(file=sys.stderr)  # type: ignore[no-any-return]


def _is_on_terminal() -> bool:
    """Return whether standard error is a terminal, in the first process of a machine if launchers have started several."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    with suppress(AttributeError, ValueError):  # there is no standard error, or it is closed
        return bool(sys.stderr.isatty())
    return False
