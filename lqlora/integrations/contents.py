"""Content of a model file: its weight matrices, and the tensors that are left out, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lqlora._patterns import EMBEDDINGS, OUTPUT_HEADS, select

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from lqlora._patterns import Patterns

__all__ = ["LeftOut", "ModelContents"]


class LeftOut(NamedTuple):
    """Reason why a tensor is not among the weights, and its size in the file.

    Parameters
    ----------
    reason : str
        Noun phrase such as ``"of 3 dimensions"``.
    nbytes : int
        Bytes in the file.
    """

    reason: str
    nbytes: int


@dataclass(frozen=True)
class ModelContents:
    """Weight matrices of a model, and what else its files hold.

    Parameters
    ----------
    path : Path
        The file or folder that was opened.
    weights : dict of str to callable
        Loaders of the matrices by name. Each reads one matrix as float32, and can be pickled.
    left_out : dict of str to LeftOut
        Tensors that are not weight matrices, by name.
    files : tuple of Path
        Files that hold the tensors.
    unread : tuple of Path
        Files of the folder that look like models and were not read.
    """

    path: Path
    weights: dict[str, Callable[[], npt.NDArray[np.float32]]]
    left_out: dict[str, LeftOut]
    files: tuple[Path, ...]
    unread: tuple[Path, ...] = ()

    def select(
        self, include: Patterns = "*", exclude: Patterns = (*EMBEDDINGS, *OUTPUT_HEADS)
    ) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
        """Return the loaders of some of the weights.

        Parameters
        ----------
        include, exclude : str, compiled regular expression, callable, or several of them
            Patterns of names. The default leaves out embeddings and output heads.

        Returns
        -------
        dict of str to callable
            Loaders of the weights whose name one of ``include`` matches and none of ``exclude`` does.

        Raises
        ------
        InvalidArgumentError
            If no weight is selected.
        """
        names = select(self.weights, include, exclude, where=f" of {self.path}")
        return {name: self.weights[name] for name in names}

    def describe_left_out(self) -> str:
        """Return what was left out in one sentence.

        Returns
        -------
        str
            Number and bytes of the tensors by reason, with the first name of each; empty if nothing was left out.

        Examples
        --------
        >>> from pathlib import Path
        >>> left_out = {name: LeftOut("of 1 dimension", 36) for name in ("norm", "bias")}
        >>> ModelContents(Path("m.gguf"), {}, left_out, (Path("m.gguf"),)).describe_left_out()
        'Left out: 2 tensors of 1 dimension (72 bytes; norm, …).'
        """
        groups: dict[str, list[str]] = {}
        for name, (reason, _) in self.left_out.items():
            groups.setdefault(reason, []).append(name)
        parts = [self._describe(reason, names) for reason, names in groups.items()]
        if self.unread:
            several = len(self.unread) > 1
            parts.append(
                f"{len(self.unread)} {'files' if several else 'file'} not read ({self.unread[0].name}{', …' if several else ''})"
            )
        return f"Left out: {', '.join(parts)}." if parts else ""

    def _describe(self, reason: str, names: list[str]) -> str:
        size = sum(self.left_out[name].nbytes for name in names)
        tensors = "tensors" if len(names) > 1 else "tensor"
        return f"{len(names)} {tensors} {reason} ({size:,} bytes; {names[0]}{', …' if len(names) > 1 else ''})"
