"""Dense models from checkpoints: the sum of both parts of each matrix in 16 or 32 bits, file by file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._annotations import annotated
from lqlora._options import require_choice, require_integer
from lqlora.integrations._gguf_files import Encoded, write_gguf
from lqlora.integrations._model_folders import join, open_parts, rounded, write_model
from lqlora.integrations._streaming_tasks import DTYPES

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import numpy.typing as npt

    from lqlora._typing import FloatName
    from lqlora.checkpoint import StoredMatrix

__all__ = ["merge_checkpoint"]


@annotated
def merge_checkpoint(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: FloatName = "bfloat16",
    shard_bytes: int = 2**32,
    progress: bool | Callable[[int, int], None] = True,
) -> dict[str, int]:
    """Write the dense model of a checkpoint: ``dequantize(Q) + scaling * lora_B @ lora_A`` in place of each matrix.

    Programs that know nothing of this library open the result: transformers, converters to GGUF, serving engines. It has the accuracy of
    the checkpoint, but for the rounding to ``dtype``, and the size of the original model.

    Parameters
    ----------
    path : path-like
        Folder of :func:`lqlora.decompose_checkpoint`, whose names and orientations are restored. Or a file of :func:`lqlora.save`, or
        a folder of ``save_pretrained`` of transformers: then a matrix ``m`` becomes a tensor ``m.weight`` of shape (outputs, inputs), which
        is not that of GPT-2. ``model.dequantize()`` of transformers, and :func:`lqlora.nn.dequantize_model`, restore every model.
    folder : path-like
        Folder to write, which must not exist or be empty. It appears when it is complete.
    like : path-like, optional
        GGUF file of the original model in any type, of architecture ``llama``. Then a file ``model.gguf`` is written in place of
        safetensors, with the settings and the vocabulary of this one, which llama.cpp runs and quantizes further.
    dtype : {"bfloat16", "float16", "float32"}
        Dtype of the matrices. Other tensors keep theirs.
    shard_bytes : int
        Largest number of bytes of tensors of one file; one file is in memory while it is written. A GGUF file is always one.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts tensors.

    Returns
    -------
    dict of str to int
        Bytes of each file with tensors.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, or the folder cannot be written or is not empty.
    InvalidArgumentError
        If ``dtype`` cannot hold a matrix: float16 ends at 65504. Also if ``like`` is a file of another model.
    MissingDependencyError
        If gguf is not installed and ``like`` is given.

    Examples
    --------
    >>> import numpy as np, lqlora as lq, tempfile
    >>> w = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    >>> d = lq.decompose(w, lq.BlockFormat.parse("nf3/64:u8/256:float32"), rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lq.save(f"{folder}/small.safetensors", {"up": d})
    ...     sizes = merge_checkpoint(f"{folder}/small.safetensors", f"{folder}/dense")
    >>> sizes["model.safetensors"] > 2 * w.size
    True
    """
    require_choice(dtype, "dtype", tuple(DTYPES))
    require_integer(shard_bytes, "shard_bytes", 1)
    own = Path(path).absolute()
    parts, origins = open_parts(own)
    itemsize = np.dtype(DTYPES[dtype]).itemsize

    if like is not None:
        return write_gguf(
            parts, origins, Path(folder).absolute(), Path(like), lambda matrix, name: _encoded(matrix, name, dtype), factors={}, copies_tables=False, title="Merging",
            progress=progress,
        )  # fmt: skip

    def make(name: str) -> dict[str, npt.NDArray[Any]]:
        """Return the dense tensor of a name."""
        dense = [
            rounded(np.asarray(parts.matrix(matrix).reconstruct()), matrix, dtype) for matrix in origins[name].matrices
        ]
        return {name: join(name, origins[name], dense)}

    return write_model(
        own, Path(folder).absolute(), "Merging", make, lambda matrix: itemsize * math.prod(matrix.quantized.shape),
        dtype=dtype, shard_bytes=int(shard_bytes), progress=progress,
    )  # fmt: skip


def _encoded(matrix: StoredMatrix, name: str, dtype: FloatName) -> Encoded:
    """Return the sum of both parts of a matrix as a tensor of a GGUF file."""
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return Encoded(kinds[dtype], matrix.quantized.shape, lambda: rounded(np.asarray(matrix.reconstruct()), name, dtype))
