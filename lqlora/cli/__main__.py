"""Entry point of ``python -m lqlora.cli``, the same as the command ``lqlora``."""

from __future__ import annotations

from lqlora.cli import main

if __name__ == "__main__":
    main()
