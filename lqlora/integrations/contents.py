"""Content of a model file: its weight matrices, and the tensors that are left out, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora._patterns import DENSE_BY_NAME, select

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from lqlora._patterns import Patterns

__all__ = ["LeftOut", "ModelContents", "SourceTensor"]


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


class SourceTensor(NamedTuple):
    """A tensor of a model, which is read when it is needed.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : str
        NumPy's name of the dtype that ``load`` returns, such as ``"bfloat16"``. Codes are decoded to float32.
    nbytes : int
        Bytes in the file. For a 4-bit weight of bitsandbytes these are the bytes of all its parts.
    load : callable
        Function without arguments that reads the tensor. It can be pickled.
    matrices : tuple of str
        Names of the weight matrices that the tensor holds: one, or one for each expert. Empty for other tensors.
    is_transposed : bool
        Whether the matrices have the shape (inputs, outputs) in the tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    load: Callable[[], npt.NDArray[Any]]
    matrices: tuple[str, ...] = ()
    is_transposed: bool = False


@dataclass(frozen=True)
class ModelContents:
    """Weight matrices of a model, and what else its files hold.

    Every tensor of the files is one of ``tensors``, a part of one of them, or one of ``left_out``. Tensors that belong to the model and
    are not matrices are in both.

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
    tensors : dict of str to SourceTensor
        All tensors of the model by name, in the order of the files. Factors of adapters are not among them.
    """

    path: Path
    weights: dict[str, Callable[[], npt.NDArray[np.float32]]]
    left_out: dict[str, LeftOut]
    files: tuple[Path, ...]
    unread: tuple[Path, ...] = ()
    tensors: dict[str, SourceTensor] = field(default_factory=dict)

    def select(
        self, include: Patterns = "*", exclude: Patterns = DENSE_BY_NAME
    ) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
        """Return the loaders of some of the weights.

        Parameters
        ----------
        include, exclude : str, compiled regular expression, callable, or several of them
            Patterns of names. The default leaves out embeddings, output heads and routers of experts.

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
