"""Print the registers of every kernel on every architecture as a Markdown table, for the documentation.

Run it by hand, because it takes several minutes: ``python -m tests.backends.registers``.
"""

from __future__ import annotations

import sys

from lqlora.backends.cuda.kernel_text import OPTIONS, source
from tests.backends.kernels import KERNELS
from tests.backends.nvrtc import compile_for
from tests.backends.test_nvrtc import ARCHITECTURES, OLDEST


def family(name: str) -> str:
    """Return the template of a kernel; for products also the number of inputs, whose sums take registers."""
    template, _, arguments = name.partition("<")
    return f"{template}, up to {arguments.split(', ')[2][:-1]}" if template == "matmul_packed" else template


def span(registers: list[int]) -> str:
    """Return the smallest and the largest number of registers; one number if they are equal."""
    return " to ".join(map(str, sorted({min(registers), max(registers)}))) if registers else ""


def batched(names: list[str]) -> list[list[str]]:
    """Cut a list into short ones: the compiler takes much memory for many kernels at once."""
    return [names[first : first + 9] for first in range(0, len(names), 9)]


def main() -> None:
    table: dict[str, dict[int, list[int]]] = {family(name): {} for names in KERNELS.values() for name in names}
    for module, names in KERNELS.items():
        for architecture in (number for number in ARCHITECTURES if number >= OLDEST.get(module, 0)):
            for some in batched(names):
                for name, usage in compile_for(architecture, source(module), OPTIONS, some).usage.items():
                    assert usage.spilled == 0, (name, architecture)
                    table[family(name)].setdefault(architecture, []).append(usage.registers)
    heads = [f"sm_{architecture}" for architecture in ARCHITECTURES]
    lines = [f"| kernel | instances | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for name, found in table.items():
        cells = [span(found.get(architecture, [])) for architecture in ARCHITECTURES]
        lines.append(f"| `{name}` | {len(found[ARCHITECTURES[-1]])} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
