"""Helpers that run the command line in the process of the tests."""

from __future__ import annotations

import sys

import pytest

from lqlora import cli


def run(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lqlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code or 0


def sentence(stderr: str) -> str:
    """Return the message of an error, which must be the last line and the only one, without a traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("lqlora: ")]
    assert len(lines) == 1
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0]
