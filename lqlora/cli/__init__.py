"""Command line ``lqlora``: each command parses its options, calls the library, writes its files, and shows the result."""

from __future__ import annotations

import sys

from lqlora._messages import MESSAGE_LENGTH, shortened
from lqlora.cli import console
from lqlora.errors import LQLoRAError

__all__ = ["main"]


def main() -> None:
    """Run the command line; print an error on one line and exit with code 2."""
    with console.routed_messages():
        code = _run()
        console.flush()
    sys.exit(code)


def _run() -> int:
    try:
        from lqlora.cli.app import app  # noqa: PLC0415 - needs packages of the demo extra

        return int(app(standalone_mode=False) or 0)
    except (LQLoRAError, OSError) as error:
        console.flush()  # an OSError may be one of standard output, to which Typer prints the help
        console.complain(f"lqlora: {shortened(str(error))}")
    except ModuleNotFoundError as error:
        console.complain(f"lqlora: this command needs {error.name}: pip install 'lqlora[demo]'.")
    except Exception as error:  # noqa: BLE001 - a traceback may hold names, too
        return _unexpected(error)
    return 2


def _unexpected(error: Exception) -> int:
    """Print a usage error of Typer on one line, or the traceback of any other error; return the exit code."""
    # Typer holds its own copy of click or imports click, as its version has it. Usage errors of both have this method.
    if not hasattr(error, "format_message"):
        console.complain_of(error)
        return 1
    context = getattr(error, "ctx", None)
    advice = f" Try '{context.command_path} --help'." if context is not None else ""
    if message := error.format_message():  # empty if Typer has printed the help in its place
        console.complain(f"lqlora: {shortened(message.rstrip('.'), MESSAGE_LENGTH - len(advice) - 1)}.{advice}")
    return int(getattr(error, "exit_code", 2))
