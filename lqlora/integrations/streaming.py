"""Decomposition of model files matrix by matrix, for models that do not fit in memory."""

from __future__ import annotations

import functools
import inspect
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._annotations import annotated
from lqlora._documents import json_values
from lqlora._messages import shortened
from lqlora._options import require_choice, require_integer
from lqlora._parallel import map_matrices
from lqlora._patterns import list_names
from lqlora._progress import reported
from lqlora._threads import cores
from lqlora.checkpoint.file import stored_bytes
from lqlora.decomposition import decompose
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._streaming_folder import Folder, run_settings
from lqlora.integrations._streaming_tasks import DTYPES, check_strict, choose_tasks, decomposed, in_files, list_pieces
from lqlora.integrations.sources import open_model
from lqlora.integrations.streaming_report import CheckpointReport, StreamedMatrix

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Executor

    from lqlora._patterns import Pattern, Patterns
    from lqlora._typing import FloatName
    from lqlora.allocation import Plan
    from lqlora.formats import BlockFormat
    from lqlora.integrations._streaming_tasks import Piece, Task
    from lqlora.integrations.contents import ModelContents
    from lqlora.weighting import AbstractWeighting

__all__ = ["decompose_checkpoint"]

#: Options of ``decompose`` that are set for each matrix, that a folder cannot keep, or that make a result depend on the speed of the
#: machine.
_REFUSED = frozenset({"w", "fmt", "name", "start", "callback", "time_limit", "factor_format", "clip_rank"})

#: Bytes of memory for each byte of a matrix in float32 while it is decomposed, and of the interpreter with its libraries. Measured with
#: ``benchmarks/whole_model.py``.
_WORKSPACE, _INTERPRETER = 6, 2**28

#: Weights of the sample from which a dry run estimates the time.
_SAMPLE = 2**20


@annotated
def decompose_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    formats: BlockFormat | Mapping[Pattern, BlockFormat] | Callable[[str], BlockFormat] | Plan,
    *,
    rank: int | Mapping[Pattern, int] | Callable[[str], int] | None = None,
    include: Patterns = "*",
    exclude: Patterns | None = None,
    weighting: Mapping[str, AbstractWeighting | Callable[[], AbstractWeighting]] | None = None,
    factor_dtype: FloatName = "float32",
    shard_bytes: int = 2**29,
    seed: int = 0,
    executor: Executor | None = None,
    strict: bool = False,
    dry_run: bool = False,
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> CheckpointReport:
    """Decompose the matrices of a model file into a folder, with few of them in memory at a time.

    The folder is a checkpoint that :func:`load`, :func:`verify` and :func:`lqlora.nn.load_model` read. So does ``from_pretrained`` of
    transformers, after :func:`lqlora.integrations.transformers.register`. All other tensors of the model are copied as they are. If
    ``source`` is a folder, so are its configuration and tokenizer.

    Each finished matrix is written at once. If the process is killed, the same call continues with the matrices that are missing, and
    the files at the end are the same, byte for byte. A call for a folder that is complete compares the source with it, and returns the
    same report.

    Parameters
    ----------
    source : path-like
        Model file or folder, see :func:`lqlora.integrations.sources.open_model`.
    folder : path-like
        Folder to write. It must not exist, be empty, or hold what an earlier call with the same arguments has left.
    formats : BlockFormat, mapping of pattern to BlockFormat, callable, or Plan
        One format for all selected matrices, a function of the name, or formats by pattern. The keys of a mapping, and the names of
        a plan, select the matrices as ``include`` does. With ``fit="levels+scale"`` formats store levels for each matrix.
    rank : int, mapping of pattern to int, or callable, optional
        Rank of the low-rank parts. If it is not given, the plan's ranks are used. A rank above the smaller side of a matrix is clipped
        to it, and the report says so.
    include, exclude : str, compiled regular expression, callable, or several of them
        Patterns of names of matrices, each of which must match one. ``include`` is not used when ``formats`` selects the matrices.
        Without ``exclude``, embeddings, output heads, routers of experts, norms and biases are left out, and parameters whose tensors
        are not called ``weight`` in a model where others are. A matrix whose whole name is given is taken all the same.
    weighting : mapping of str to AbstractWeighting, or to a callable that returns one, optional
        Norm by name of the matrix; it is uniform for matrices that are not named. A callable is called when its matrix is decomposed,
        so that few norms are in memory at a time.
    factor_dtype : {"float32", "float16", "bfloat16"}
        Dtype of the stored factors. Errors of the report are those of the factors as stored.
    shard_bytes : int
        Largest number of bytes of tensors of one file; a larger tensor has a file of its own. One file is in memory while it is
        written.
    seed : int, default 0
        See :func:`lqlora.decompose`.
    executor : concurrent.futures.Executor, optional
        Executor with a task for each matrix; by default a thread for each core. Processes and other machines must be able to read
        ``source``. Only the calling process writes.
    strict : bool, default False
        Raise instead of clipping a rank, and if an array of floating-point numbers of two or more dimensions would stay dense though
        no pattern of ``exclude``, or of those that hold without it, matches its name.
    dry_run : bool, default False
        Write nothing, and return sizes with estimates of time and memory. About a million weights of each format and rank are
        decomposed for that, without error feedback and norms, which take longer.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`.
    **options
        Further options of :func:`lqlora.decompose`, such as ``fit``, ``quantizer``, ``init``, ``scaling`` or ``max_iter``, as text or
        numbers.

    Returns
    -------
    CheckpointReport
        Errors, sizes, and what was copied or left out. It is the same for every executor.

    Raises
    ------
    InvalidArgumentError
        If no matrix is selected, a pattern matches nothing, an option is not known or has a wrong value, or ``strict`` finds a fault.
    CheckpointError
        If a file cannot be read or written, the folder holds something else, another process works in it, or the source or the norms
        are not those that it was begun with. Matrices that are finished are kept.
    NonFiniteError
        If a weight is NaN or infinite. Matrices that are finished are kept.

    Examples
    --------
    >>> import numpy as np, lqlora as lq, tempfile
    >>> from safetensors.numpy import save_file
    >>> rng = np.random.default_rng(0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tensors = {f"layers.{i}.up.weight": rng.standard_normal((64, 128), dtype=np.float32) for i in range(2)}
    ...     save_file(tensors | {"norm.weight": np.ones(128, dtype=np.float32)}, f"{folder}/model.safetensors")
    ...     fmt = lq.BlockFormat.parse("nf3/64:u8/256:float32")
    ...     report = lq.decompose_checkpoint(f"{folder}/model.safetensors", f"{folder}/small", fmt, rank=4)
    ...     content = lq.verify(f"{folder}/small")
    >>> sorted(content.matrices), sorted(content.tensors), f"{report.bits_per_weight:.2f}"
    (['layers.0.up', 'layers.1.up'], ['norm.weight'], '3.13')
    """
    require_integer(shard_bytes, "shard_bytes", 1)
    require_choice(factor_dtype, "factor_dtype", tuple(DTYPES))
    options = _checked({**options, "seed": seed})
    norms = {} if weighting is None else weighting
    # Other processes, and callables of the caller, may have another working directory, or change it.
    contents = open_model(Path(source).absolute())
    tasks = choose_tasks(contents, formats, rank, include, exclude, norms, fit=options.get("fit", "absmax"))
    if options.get("quantizer") == "gptq" and (
        lacking := [name for name, own in tasks.items() if own.weighting is None]
    ):
        raise InvalidArgumentError(
            f"weighting must have a norm for each matrix with quantizer='gptq', but lacks {list_names(lacking)}."
        )
    if strict:
        check_strict(contents, tasks, exclude)
    pieces = list_pieces(contents, tasks, factor_dtype)
    files = in_files(pieces, int(shard_bytes))
    settings = run_settings(contents, tasks, factor_dtype, int(shard_bytes), options)
    if dry_run:
        sizes = {name: sum(own.nbytes for own in held) for name, held in files.items()}
        seconds, memory = _estimates(tasks, sizes, options, factor_dtype)
        return _report(contents, tasks, pieces, sizes, {}, seconds=seconds, memory_bytes=memory)
    target = Path(folder).absolute()
    work = functools.partial(decomposed, options=options, factor_dtype=factor_dtype)
    try:
        with Folder(target, settings, contents, tasks, files) as own:
            with reported(progress, "Decomposing", len(tasks), "matrix", len(own.inputs)) as report:
                own.write_full_files()
                map_matrices(work, own.items(), executor, collect=functools.partial(own.take, report=report))
            own.finish()
            return _report(contents, tasks, pieces, own.sizes(), own.errors)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}. Finished matrices are kept.")) from error


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of ``decompose`` as values of JSON, or raise."""
    known = inspect.signature(decompose).parameters.keys() - {"weighting"}
    for name in options:
        if name in _REFUSED or name not in known:
            raise InvalidArgumentError(f"{name} cannot be set for a whole checkpoint.")
    plain = {name: own.item() if isinstance(own, np.generic) else own for name, own in options.items()}
    for name, own in plain.items():
        if not (own is None or isinstance(own, str | int | float)):
            raise InvalidArgumentError(
                f"{name} must be text or a number for a whole checkpoint, got {type(own).__name__}."
            )
        if isinstance(own, float) and not math.isfinite(own):
            raise InvalidArgumentError(f"{name} must be finite, got {own}.")
    return json_values(plain, "options", InvalidArgumentError)


def _report(
    contents: ModelContents,
    tasks: Mapping[str, Task],
    pieces: Sequence[Piece],
    files: Mapping[str, int],
    errors: Mapping[str, float],
    **estimates: Any,
) -> CheckpointReport:
    sizes = {piece.name: piece.nbytes for piece in pieces if piece.tensor is None}
    matrices = {
        name: StreamedMatrix(
            task.format, task.shape, task.rank, task.clipped_from, stored_bytes(task.format, task.shape),
            sizes[name] - stored_bytes(task.format, task.shape), errors.get(name),
        )
        for name, task in tasks.items()
    }  # fmt: skip
    copied = {piece.name: piece.nbytes for piece in pieces if piece.tensor is not None}
    left_out = {name: own for name, own in contents.left_out.items() if name not in contents.tensors}
    return CheckpointReport(
        matrices, copied, left_out, sum(own.nbytes for own in contents.tensors.values()), dict(files), **estimates
    )


def _estimates(
    tasks: Mapping[str, Task], files: Mapping[str, int], options: dict[str, Any], factor_dtype: FloatName
) -> tuple[float, int]:
    """Return the seconds and the bytes of memory that a run would take."""
    workers = min(cores(), len(tasks))
    largest = max(math.prod(task.shape) for task in tasks.values())
    memory = _INTERPRETER + 4 * _WORKSPACE * workers * largest + max(files.values())
    pace: dict[Any, float] = {}
    seconds = 0.0
    for task in tasks.values():
        key = task.format, task.rank
        if key not in pace:
            pace[key] = _seconds_of_a_weight(task, options, factor_dtype)
        seconds += pace[key] * math.prod(task.shape) / workers
    return seconds, memory


def _seconds_of_a_weight(task: Task, options: dict[str, Any], factor_dtype: FloatName) -> float:
    """Return the time of a decomposition for each weight, from one of random numbers with as many columns."""
    rows = max(task.rank, min(task.shape[0], _SAMPLE // max(1, task.shape[1])))
    sample = np.random.default_rng(0).standard_normal((rows, task.shape[1]), dtype=np.float32)
    rank = min(task.rank, *sample.shape)
    own = task._replace(load=lambda: sample, shape=(rows, task.shape[1]), weighting=None, rank=rank)
    plain = {**options, "quantizer": "nearest"} if options.get("quantizer") == "gptq" else options
    start = time.perf_counter()
    decomposed(own, options=plain, factor_dtype=factor_dtype)
    return (time.perf_counter() - start) / max(1, sample.size)
