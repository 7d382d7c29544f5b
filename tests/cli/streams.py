"""Terminals, pipes and broken outputs in memory, in which the command line runs in the process of the tests."""

from __future__ import annotations

import io
import re
import sys

import pytest

from tests.cli.running import run

#: Sequences that rich writes for styles, and what progress bars write in a line and erase.
DRAWN = re.compile(r"\x1b\[(?:0|[1-9](?:;[0-9;]+)?|[39][0-7]|38;5;\d+)?m|[^\n]*\r")


class Stream(io.TextIOWrapper):
    """A text stream that keeps its bytes, and may claim to be a terminal."""

    def __init__(self, encoding: str, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self._terminal = terminal

    def isatty(self) -> bool:
        """Return whether the stream claims to be a terminal."""
        return self._terminal

    def text(self) -> str:
        """Return what was written so far; it must be valid in the encoding."""
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def run_in(stream: tuple[str, bool, int], *arguments: object) -> tuple[int, str, str]:
    """Run the command line in streams of an encoding; return its exit code, standard output and standard error."""
    encoding, terminal, columns = stream
    out, err = Stream(encoding, terminal=terminal), Stream(encoding, terminal=terminal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        code = run(*arguments)
    return code, out.text(), err.text()
