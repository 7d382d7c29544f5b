"""What a run of the properties found."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Finding", "Report"]

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """What one property found.

    Parameters
    ----------
    name : str
        Name of the property.
    statement : str
        What it promises, in one line.
    result : {"passed", "failed", "error", "skipped"}
        "failed" if what was tested broke the promise or raised; "error" if the property could not be tried;
        "skipped" if it does not apply.
    message : str
        The smallest example found and what came of it; or why the property was skipped. Empty if it passed.
    counterexample : mapping of str to object, optional
        The smallest example found, as the property was given it: usually an array ``w``.

    Examples
    --------
    >>> Finding("shape", "The shape is kept.", "passed").result
    'passed'
    """

    name: str
    statement: str
    result: Literal["passed", "failed", "error", "skipped"]
    message: str = ""
    counterexample: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """Findings of all properties that were selected; printing it gives a table.

    Parameters
    ----------
    findings : tuple of Finding
        One for each property.

    Examples
    --------
    >>> report = Report((Finding("shape", "The shape is kept.", "failed", "w = [1.0]: shape (1,) became ()."),))
    >>> report.passed, report.failed
    (False, ('shape',))
    >>> print(report)
    shape  FAILED  The shape is kept.
                   w = [1.0]: shape (1,) became ().
    1 failed.
    """

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True if no property failed, or could not be tried."""
        return all(finding.result in ("passed", "skipped") for finding in self.findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the properties that failed, or could not be tried."""
        return tuple(finding.name for finding in self.findings if finding.result in ("failed", "error"))

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of a property."""
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        """Return a table: a line for each property, and under it what is to be said of it."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = []
        for finding in self.findings:
            result = finding.result if finding.result in ("passed", "skipped") else finding.result.upper()
            lines.append(f"{finding.name:{width}s}  {result:7s} {finding.statement}")
            indent = " " * (width + 10)
            lines += textwrap.wrap(
                finding.message, max(_WIDTH, width + 40), initial_indent=indent, subsequent_indent=indent
            )
        counts = Counter(finding.result for finding in self.findings)
        lines.append(", ".join(f"{count} {result}" for result, count in counts.items()) + ".")
        return "\n".join(lines)
