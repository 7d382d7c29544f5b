"""Command line ``lqlora``: each command parses its options, calls the library and prints or writes the result."""

from __future__ import annotations

import sys

from lqlora.errors import LQLoRAError

__all__ = ["main"]


def main() -> None:
    """Run the command line; print errors of the library on one line and exit with code 2."""
    try:
        from lqlora.cli.app import app  # noqa: PLC0415 - needs packages of the demo extra

        app()
    except LQLoRAError as error:
        sys.stderr.write(f"lqlora: {error}\n")
        sys.exit(2)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"lqlora: this command needs {error.name}: pip install 'lqlora[demo]'.\n")
        sys.exit(2)
