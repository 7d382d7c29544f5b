"""Command ``lqlora export``: a base model and an adapter of PEFT from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora.cli import console
from lqlora.cli.parsing import parse_bytes
from lqlora.integrations._gguf_files import ADAPTER_FILE
from lqlora.integrations.exporting import export_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora._typing import FloatName
    from lqlora.integrations.exporting import Base

__all__ = ["run"]


def run(
    checkpoint: Path,
    folder: Path,
    base: Base,
    like: Path | None,
    adapter: str,
    dtype: FloatName,
    shard_size: str,
    *,
    as_json: bool,
) -> None:
    """Write the base and the adapter.

    Raises
    ------
    LQLoRAError
        If the checkpoint cannot be read or exported, or the folder cannot be written. In this case it is not made.
    """
    with console.stage("Exporting") as show:
        sizes = export_checkpoint(
            checkpoint,
            folder,
            base,
            like=like,
            adapter=adapter,
            dtype=dtype,
            shard_bytes=parse_bytes(shard_size, "--shard-size"),
            progress=show,
        )
    written = next((own for own in (folder / adapter, folder / ADAPTER_FILE) if own.exists()), None)
    if as_json:
        console.say_json({"files": sizes, "adapter": None if written is None else str(written)})
        return
    size, count = sum(sizes.values()), f"{len(sizes)} file{'' if len(sizes) == 1 else 's'}"
    console.say(
        f"Wrote {folder} ({size:,} bytes in {count}){'' if written is None else f' and the adapter {written}'}."
    )
