"""Decomposition of model files matrix by matrix, for models that do not fit in memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from lqlora._annotations import annotated
from lqlora._documents import json_values
from lqlora._files import lock, open_unshared, remove_left_over, write_whole
from lqlora._messages import given, shortened, shown
from lqlora._options import require_choice, require_integer
from lqlora._parallel import map_matrices
from lqlora._patterns import DENSE_BY_NAME, list_names, select, values_by_name
from lqlora._printable import printable
from lqlora._progress import bars_hidden, reported
from lqlora._threads import cores
from lqlora.allocation import Plan
from lqlora.checkpoint.file import StoredMatrix, read_file, save, stored_bytes
from lqlora.checkpoint.folder import DOCUMENT, INDEX, read_document_of, write_document
from lqlora.costs._digests import array_digest, format_key, settings_as_json, text_digest, weighting_digest
from lqlora.costs.store import NUMERICS
from lqlora.decomposition import decompose, relative_error
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.formats import BlockFormat, float_bits
from lqlora.integrations.quantization_config import MatrixFormat, describe_matrices
from lqlora.integrations.sources import open_model
from lqlora.integrations.streaming_report import CheckpointReport, StreamedMatrix
from lqlora.quantized.quantization import with_fitted_levels

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    import numpy.typing as npt

    from lqlora._patterns import Pattern, Patterns
    from lqlora._typing import FloatName
    from lqlora.integrations.contents import ModelContents, SourceTensor
    from lqlora.weighting import AbstractWeighting

__all__ = ["decompose_checkpoint"]

_log = logging.getLogger("lqlora")

#: Folder of the work that is not finished, with the settings of the run and a file for each finished matrix.
_UNFINISHED, _RUN, _LOCK = "unfinished", "run.json", "lock"

#: Files that are copied beside the weights: configurations, tokenizers, templates. Code of a model is not copied.
_COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe"})
_MOST_COPIED_BYTES = 2**28

#: Options of ``decompose`` that a folder cannot remember, or that make a result depend on the speed of the machine.
_REFUSED = frozenset({"name", "start", "callback", "time_limit", "factor_format", "clip_rank", "weighting"})

#: What settings that are kept as digests stand for.
_DIGESTS = {"matrices": "other matrices, formats or ranks", "source": "a model of other tensors", "numerics": "another version of lqlora"}

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

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

    The folder is a checkpoint that :func:`load`, :func:`verify` and :func:`lqlora.nn.load_model` read. All other tensors of the model
    are copied as they are, and so are configuration and tokenizer.

    Each finished matrix is written at once. If the process is killed, the same call continues with the matrices that are missing, and
    the files at the end are the same, byte for byte.

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
        Patterns of names of matrices. ``include`` is not used when ``formats`` selects the matrices. Without ``exclude``, embeddings,
        output heads and routers of experts are left out, unless a plan or mapping names matrices one by one.
    weighting : mapping of str to AbstractWeighting, or to a callable that returns one, optional
        Norm by name of the matrix; it is uniform for matrices that are not named. A callable is called when its matrix is decomposed,
        so that few norms are in memory at a time.
    factor_dtype : {"float32", "float16", "bfloat16"}
        Dtype of the stored factors. Errors of the report are those of the factors as stored.
    shard_bytes : int
        Largest number of bytes of tensors of one file; a larger tensor has a file of its own. One file is mapped into memory
        while it is written.
    seed : int, default 0
        See :func:`lqlora.decompose`.
    executor : concurrent.futures.Executor, optional
        Executor with a task for each matrix; by default a thread for each core. Processes and other machines must be able to read
        ``source``. Only the calling process writes.
    strict : bool, default False
        Raise instead of clipping a rank, and if arrays of floating-point numbers of two or more dimensions would stay dense though no
        pattern excludes them.
    dry_run : bool, default False
        Write nothing, and return sizes with estimates of time and memory. About a million weights of each format and rank are
        decomposed for that.
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
        If a file cannot be read or written, the folder holds something else, another process works in it, or the source is not the one
        that it was begun with. Matrices that are finished are kept.
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
    require_choice(factor_dtype, "factor_dtype", tuple(_DTYPES))
    if refused := sorted(_REFUSED & options.keys()):
        raise InvalidArgumentError(f"{', '.join(refused)} cannot be set for a whole checkpoint.")
    contents = open_model(source)
    tasks = _tasks(contents, formats, rank, include, exclude, weighting or {}, fit=options.get("fit", "absmax"))
    if strict:
        _check_strict(contents, tasks)
    pieces = _pieces(contents, tasks, factor_dtype)
    shards = _shards(pieces, int(shard_bytes))
    options = {**options, "seed": seed}
    if dry_run:
        return _estimated(contents, tasks, pieces, shards, options, factor_dtype)
    settings = _settings(contents, tasks, factor_dtype, int(shard_bytes), options)
    target = Path(folder)
    _check_target(target, contents)
    try:
        work = functools.partial(_decomposed, options=options, factor_dtype=factor_dtype)
        return _run(target, settings, contents, tasks, pieces, shards, work, executor, progress)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}. Finished matrices are kept.")) from error


def _run(
    folder: Path,
    settings: dict[str, Any],
    contents: ModelContents,
    tasks: Mapping[str, _Task],
    pieces: Sequence[_Piece],
    shards: Sequence[Sequence[_Piece]],
    work: Callable[[_Task], _Finished],
    executor: Executor | None,
    progress: bool | Callable[[int, int], None],
) -> CheckpointReport:
    """Decompose the matrices that are missing, and return the report of all."""
    with _Run(folder, settings, contents, tasks, pieces, shards) as run:
        if not run.is_complete:
            waiting = [task._replace(known=run.inputs.get(name)) for name, task in tasks.items()]
            with reported(progress, "Decomposing", len(tasks), "matrix", len(run.inputs)) as report:
                run.write_full_shards()
                map_matrices(work, waiting, executor, collect=functools.partial(run.take, report=report))
                run.finish()
        return run.report()


class _Task(NamedTuple):
    """Decomposition of one matrix. ``known`` is the digest of the inputs of a result that is stored already."""

    name: str
    load: Callable[[], npt.NDArray[np.float32]]
    shape: tuple[int, int]
    format: BlockFormat
    rank: int
    clipped_from: int | None
    weighting: AbstractWeighting | Callable[[], AbstractWeighting] | None
    known: str | None = None


class _Piece(NamedTuple):
    """What one file of the checkpoint holds whole: a matrix with its factors, or a tensor that is copied."""

    name: str
    nbytes: int
    tensor: SourceTensor | None


class _Finished:
    """Result of a task. The matrix is taken out when it is written, because results are kept to the end."""

    def __init__(self, name: str, inputs: str, matrix: StoredMatrix | None, error: float) -> None:
        self.name, self.inputs, self.matrix, self.error = name, inputs, matrix, error


def _decomposed(task: _Task, *, options: dict[str, Any], factor_dtype: FloatName) -> _Finished:
    """Decompose one matrix, or compare its inputs with those of a stored result."""
    matrix = task.load()
    weighting = task.weighting() if callable(task.weighting) else task.weighting
    inputs = f"{array_digest(matrix)} {weighting_digest(weighting)}"
    if task.known is not None:
        if task.known != inputs:
            raise CheckpointError(
                f"source has other values in {shown(task.name)}, or another norm, than when the folder was begun. Name another folder."
            )
        return _Finished(task.name, inputs, None, 0.0)
    found = decompose(
        matrix, task.format, task.rank, weighting=weighting, name=f"weight of {task.name!r}", **options
    )
    error = found.relative_error
    if factor_dtype != "float32":
        with np.errstate(over="ignore"):
            lora_A, lora_B = (own.astype(_DTYPES[factor_dtype]) for own in (found.lora_A, found.lora_B))
        if not (np.isfinite(lora_A).all() and np.isfinite(lora_B).all()):
            raise InvalidArgumentError(
                f"factor_dtype must hold the factors of {shown(task.name)}, which {factor_dtype} does not. Use bfloat16 or float32."
            )
        found = dataclasses.replace(found, lora_A=lora_A, lora_B=lora_B)
        widened = dataclasses.replace(found, lora_A=lora_A.astype(np.float32), lora_B=lora_B.astype(np.float32))
        error = relative_error(matrix, widened, weighting, name=task.name)
    stored = StoredMatrix(found.quantized, found.lora_A, found.lora_B, found.scaling)
    return _Finished(task.name, inputs, stored, error)


def _tasks(
    contents: ModelContents,
    formats: Any,
    rank: Any,
    include: Patterns,
    exclude: Patterns | None,
    weighting: Mapping[str, Any],
    *,
    fit: str,
) -> dict[str, _Task]:
    """Return the task of each selected matrix."""
    names, where, usual = list(contents.weights), f" of {contents.path}", DENSE_BY_NAME
    wanted: Any = formats.formats if isinstance(formats, Plan) else formats
    if isinstance(wanted, Mapping) and wanted:
        by_name: Mapping[str, Any] = values_by_name(wanted, names, parameter="formats", what="matrix")
        if any(isinstance(own, str) and own in contents.weights for own in wanted):
            usual = ()
        kept = select([*by_name], "*", usual if exclude is None else exclude, where=where)
        by_name = {name: by_name[name] for name in kept}
    elif isinstance(wanted, BlockFormat) or callable(wanted):
        chosen = select(names, include, usual if exclude is None else exclude, where=where)
        by_name = {name: wanted(name) if callable(wanted) else wanted for name in chosen}
    else:
        raise InvalidArgumentError(
            f"formats must be a BlockFormat, a Plan, a mapping of patterns to formats, or a function of names, got {given(formats)}."
        )
    for name, fmt in by_name.items():
        if not isinstance(fmt, BlockFormat):
            raise InvalidArgumentError(f"formats must give {shown(name)} a BlockFormat, got {given(fmt)}.")
    if unknown := sorted(set(weighting) - set(names)):
        raise InvalidArgumentError(f"weighting must name matrices of the source, got {list_names(unknown)}.")
    planned = formats.ranks if isinstance(formats, Plan) else {}
    ranks = _ranks(rank, list(by_name), planned)
    shapes = _shapes(contents)
    tasks = {}
    for name, fmt in by_name.items():
        if isinstance(formats, Plan) and formats.matrices[name].shape != shapes[name]:
            raise InvalidArgumentError(
                f"formats must be a plan of this model, but {shown(name)} has the shape {shapes[name]}, and "
                f"{formats.matrices[name].shape} in the plan."
            )
        most = min(shapes[name])
        tasks[name] = _Task(
            name,
            contents.weights[name],
            shapes[name],
            with_fitted_levels(fmt) if fit == "levels+scale" else fmt,
            min(ranks[name], most),
            ranks[name] if ranks[name] > most else None,
            weighting.get(name),
        )
    return tasks


def _ranks(rank: Any, names: Sequence[str], planned: Mapping[str, int]) -> dict[str, int]:
    """Return the rank of each matrix that was asked for."""
    found: dict[str, Any] = {**planned}
    if callable(rank) or isinstance(rank, Mapping):
        found |= values_by_name(rank, names, parameter="rank", what="matrix")
    elif rank is not None:
        found |= dict.fromkeys(names, rank)
    for name in names:
        if name not in found:
            raise InvalidArgumentError(f"rank must be given for {shown(name)}. Pass rank=, or a plan that has ranks.")
        require_integer(found[name], "rank")
    return {name: int(found[name]) for name in names}


def _shapes(contents: ModelContents) -> dict[str, tuple[int, int]]:
    """Return the shape of each matrix, (outputs, inputs)."""
    found = {}
    for tensor in contents.tensors.values():
        for name in tensor.matrices:
            rows, columns = tensor.shape[-2:]
            found[name] = (columns, rows) if tensor.is_transposed else (rows, columns)
    return found


def _check_strict(contents: ModelContents, tasks: Mapping[str, _Task]) -> None:
    """Raise if a rank is clipped, or an array that should perhaps be quantized stays dense."""
    if clipped := next((task for task in tasks.values() if task.clipped_from is not None), None):
        raise InvalidArgumentError(
            f"rank must be at most {min(clipped.shape)} for {shown(clipped.name)} of shape {clipped.shape}, got {clipped.clipped_from}."
        )
    dense = [
        name
        for name, tensor in contents.tensors.items()
        if not tensor.matrices and len(tensor.shape) > 1 and tensor.dtype in (*_DTYPES, "float64")
    ]
    if dense:
        size = sum(contents.tensors[name].nbytes for name in dense)
        raise InvalidArgumentError(
            f"source must have no arrays that stay dense with strict=True, but {list_names(dense)} ({size:,} bytes) are not matrices."
        )


def _pieces(contents: ModelContents, tasks: Mapping[str, _Task], factor_dtype: FloatName) -> list[_Piece]:
    """Return what the checkpoint holds, in the order of the source, with exact sizes."""
    pieces = []
    for name, tensor in contents.tensors.items():
        chosen = [own for own in tensor.matrices if own in tasks]
        if chosen and len(chosen) < len(tensor.matrices):
            missing = next(own for own in tensor.matrices if own not in tasks)
            raise InvalidArgumentError(
                f"include must select all matrices of {shown(name)} or none, but leaves out {shown(missing)}."
            )
        for own in chosen:
            task = tasks[own]
            factors = float_bits(factor_dtype) // 8 * task.rank * sum(task.shape)
            pieces.append(_Piece(own, stored_bytes(task.format, task.shape) + factors, None))
        if not chosen:
            try:
                dtype = np.dtype(getattr(ml_dtypes, tensor.dtype, tensor.dtype))
            except TypeError:
                raise CheckpointError(f"{contents.path} has {shown(name)} of {tensor.dtype}, which NumPy does not have.") from None
            pieces.append(_Piece(name, dtype.itemsize * math.prod(tensor.shape), tensor))
    return pieces


def _shards(pieces: Sequence[_Piece], most: int) -> list[list[_Piece]]:
    """Return the pieces of each file."""
    shards: list[list[_Piece]] = []
    size = 0
    for piece in pieces:
        if not shards or size + piece.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _settings(
    contents: ModelContents,
    tasks: Mapping[str, _Task],
    factor_dtype: FloatName,
    shard_bytes: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the files depend on, besides the values of matrices and norms."""
    tensors = [[name, own.dtype, list(own.shape)] for name, own in contents.tensors.items()]
    matrices = [[own.name, format_key(own.format), own.rank] for own in tasks.values()]
    return {
        "numerics": NUMERICS,
        "source": text_digest(json.dumps(tensors)),
        "matrices": text_digest(json.dumps(matrices)),
        "factor_dtype": factor_dtype,
        "shard_bytes": shard_bytes,
        **settings_as_json(options, "Leave it out."),
    }


def _check_target(target: Path, contents: ModelContents) -> None:
    """Raise if the folder is, or holds, or lies in what is read."""
    try:
        own = target.resolve()
        read = [path.resolve() for path in (contents.path, *contents.files)]
    except (OSError, ValueError) as error:
        raise CheckpointError(shortened(f"{str(target)!r} cannot be written: {error}.")) from error
    if any(path == own or path.is_relative_to(own) for path in read):
        raise CheckpointError(shortened(f"{target} holds the model that is read. Name another folder."))


class _Run:
    """Folder of a checkpoint that is written piece by piece.

    ``inputs`` has the digest of the inputs of each matrix that is finished, in its own file or in a file of the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        contents: ModelContents,
        tasks: Mapping[str, _Task],
        pieces: Sequence[_Piece],
        shards: Sequence[Sequence[_Piece]],
    ) -> None:
        self.folder, self._settings, self._contents, self._tasks, self._pieces = folder, settings, contents, tasks, pieces
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._shards = dict(zip(names, shards, strict=True))
        self._work = folder / _UNFINISHED
        self._numbers = {piece.name: number for number, piece in enumerate(pieces)}
        self.inputs: dict[str, str] = {}
        self._errors: dict[str, float] = {}
        self._fingerprints: dict[str, str] = {}
        self.is_complete = False
        self._lock: Any = None
        self._is_new = not folder.exists()

    def __enter__(self) -> _Run:
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise CheckpointError(f"{self.folder} is not a folder. Name another one.")
            if (self.folder / DOCUMENT).exists():
                self._read_complete()
                return self
            self._begin()
        except OSError as error:
            self._close()
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(shortened(f"{self.folder} cannot be written: {error}.")) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._lock is not None and not self.inputs:
            # No matrix is lost, and other options may be tried with the same folder.
            with suppress(OSError):
                for name in self._fingerprints:
                    (self.folder / name).unlink()
            self._clean()
            if self._is_new:
                with suppress(OSError):
                    self.folder.rmdir()
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read_complete(self) -> None:
        """Take over the numbers of a complete checkpoint of the same settings."""
        document = read_document_of(self.folder)
        run = document.metadata.get("run")
        self._compare(run if isinstance(run, dict) else {})
        self._fingerprints = dict(document.shards)
        for name in document.shards:
            self._read_numbers(self.folder / name)
        self.is_complete = True
        self._clean()

    def _begin(self) -> None:
        """Lock the folder, and find what an earlier run has finished."""
        if self.folder.exists() and not self._work.exists() and any(self.folder.iterdir()):
            raise CheckpointError(f"{self.folder} is not empty, and holds no unfinished checkpoint. Name another folder.")
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = open_unshared(self._work / _LOCK, "ab")
        try:
            lock(self._lock)
        except BlockingIOError as error:
            raise CheckpointError(f"{self.folder} is in use by another process. Wait for it, or name another folder.") from error
        except OSError:  # some network file systems have no locks
            pass
        own = self._work / _RUN
        is_begun = any(path.suffix == ".safetensors" for place in (self.folder, self._work) for path in place.iterdir())
        if own.exists() and is_begun:
            self._compare(self._read_json(own))
        elif is_begun:
            raise CheckpointError(f"{self.folder} has matrices, but no {_UNFINISHED}/{_RUN} that says how they were made. Name another folder.")
        else:
            write_whole(own, f"{json.dumps(self._settings)}\n".encode())
        for name in self._shards:
            remove_left_over(self.folder / name)
            if (self.folder / name).exists():
                self._fingerprints[name] = self._read_numbers(self.folder / name)
        self._remove_partial()
        for name, number in self._numbers.items():
            path = self._path_of(number)
            if path.exists():
                if name in self.inputs:  # its file of the checkpoint was written, and the process killed after that
                    path.unlink()
                else:
                    self._read_numbers(path)

    def _remove_partial(self) -> None:
        """Remove what killed processes left among the finished matrices. The lock of the run says that none of them is alive."""
        # One listing: a search for each of thousands of matrices would take time that grows with the square of their number.
        for path in list(self._work.iterdir()):
            if path.name.endswith(".partial"):
                shutil.rmtree(path, ignore_errors=True)

    def _read_json(self, path: Path) -> dict[str, Any]:
        from lqlora._documents import Reader  # noqa: PLC0415 - as in other modules

        found = Reader(f"{path} is damaged", CheckpointError).read(path.read_bytes(), dict[str, Any])
        return found

    def _compare(self, found: dict[str, Any]) -> None:
        """Raise if a checkpoint was begun with other settings."""
        own = json_values(self._settings, "settings", InvalidArgumentError)
        for name in [*own, *found]:
            if (name in own) != (name in found) or own[name] != found[name]:
                what = _DIGESTS.get(name, f"another {name}: {shown(found.get(name))} and not {shown(own.get(name))}")
                raise CheckpointError(shortened(f"{self.folder} was begun with {what}. Name another folder."))

    def _path_of(self, number: int) -> Path:
        return self._work / f"{number:06d}.safetensors"

    def _read_numbers(self, path: Path) -> str:
        """Take over the digests and errors of the matrices of a file, and return its fingerprint."""
        content, fingerprint = read_file(path, mapped=True)
        numbers = content.metadata.get("matrices")
        if not isinstance(numbers, dict) or numbers.keys() != content.matrices.keys():
            raise CheckpointError(shortened(f"{path} is not a file of this checkpoint. Name another folder."))
        for name, (inputs, error) in numbers.items():
            self.inputs[name], self._errors[name] = inputs, error
        return fingerprint

    def take(self, result: _Finished, report: Callable[[int], None]) -> None:
        """Write a finished matrix, and the files of the checkpoint that are full."""
        matrix, result.matrix = result.matrix, None
        if matrix is None:
            return
        numbers = {result.name: [result.inputs, result.error]}
        save(self._path_of(self._numbers[result.name]), {result.name: matrix}, metadata={"matrices": numbers})
        self.inputs[result.name], self._errors[result.name] = result.inputs, result.error
        del matrix
        if _log.isEnabledFor(logging.INFO):
            with bars_hidden():
                _log.info(
                    "%s: relative error %.4g, %d of %d",
                    printable(result.name), result.error, len(self.inputs), sum(own.tensor is None for own in self._pieces),
                )  # fmt: skip
        report(len(self.inputs))
        self.write_full_shards()

    def write_full_shards(self) -> None:
        """Write the files of the checkpoint whose matrices are finished."""
        for name, pieces in self._shards.items():
            if name not in self._fingerprints and all(own.tensor is not None or own.name in self.inputs for own in pieces):
                self._write_shard(name, pieces)

    def _write_shard(self, name: str, pieces: Sequence[_Piece]) -> None:
        paths = {own.name: self._path_of(self._numbers[own.name]) for own in pieces if own.tensor is None}
        matrices = {own: read_file(path, mapped=True)[0].matrices[own] for own, path in paths.items()}
        tensors = {own.name: own.tensor.load() for own in pieces if own.tensor is not None}
        numbers = {own: [self.inputs[own], self._errors[own]] for own in paths}
        save(self.folder / name, matrices, tensors, {"matrices": numbers})
        del matrices, tensors
        self._fingerprints[name] = read_file(self.folder / name, mapped=True)[1]
        for path in paths.values():
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write what makes the folder a checkpoint, the document last."""
        from safetensors import safe_open  # noqa: PLC0415 - save has imported it

        files: dict[str, str] = {}
        for name in self._shards:
            with safe_open(self.folder / name, framework="numpy") as file:
                files |= dict.fromkeys(file.keys(), name)
        index = {"metadata": {"total_size": sum(own.nbytes for own in self._pieces)}, "weight_map": files}
        write_whole(self.folder / INDEX, f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode())
        for path in _small_files(self._contents.path):
            data = path.read_bytes()
            write_whole(self.folder / path.name, self._marked(data) if path.name == "config.json" else data)
        # In the order of the files, and not in that in which they were finished.
        write_document(self.folder, {name: self._fingerprints[name] for name in self._shards}, {"run": self._settings})
        self._clean()

    def _marked(self, config: bytes) -> bytes:
        """Return a configuration of transformers that says how the matrices are stored."""
        # Without it transformers would look for dense weights, find none, and fill the layers with random numbers.
        try:
            found = json.loads(config)
        except (RecursionError, ValueError):
            return config
        if not isinstance(found, dict):
            return config
        scaling = float(self._settings.get("scaling", 1.0))
        rows = {own.name: MatrixFormat(own.format, own.rank, scaling) for own in self._tasks.values()}
        return f"{json.dumps({**found, 'quantization_config': describe_matrices(rows)}, indent=2)}\n".encode()

    def _clean(self) -> None:
        """Remove what is needed only while the checkpoint is not complete."""
        names = [path.name for path in _small_files(self._contents.path)]
        for name in (*self._shards, INDEX, DOCUMENT, *names):
            remove_left_over(self.folder / name)
        with suppress(OSError):
            self._remove_partial()
        self._close()
        with suppress(OSError):
            for path in (*map(self._path_of, self._numbers.values()), self._work / _RUN, self._work / _LOCK):
                path.unlink(missing_ok=True)
            self._work.rmdir()

    def report(self) -> CheckpointReport:
        """Return the numbers of all matrices and files."""
        sizes = {name: (self.folder / name).stat().st_size for name in self._shards}
        return _report(self._contents, self._tasks, self._pieces, sizes, self._errors)


def _small_files(source: Path) -> list[Path]:
    """Return the files beside the weights that a model needs, too."""
    if not source.is_dir():
        return []
    return sorted(
        path
        for path in source.iterdir()
        if path.suffix in _COPIED
        and not path.name.endswith(".index.json")
        and path.name not in ("adapter_config.json", DOCUMENT)
        and path.is_file()
        and path.stat().st_size <= _MOST_COPIED_BYTES
    )


def _report(
    contents: ModelContents,
    tasks: Mapping[str, _Task],
    pieces: Sequence[_Piece],
    files: Mapping[str, int],
    errors: Mapping[str, float],
    **estimates: Any,
) -> CheckpointReport:
    sizes = {piece.name: piece.nbytes for piece in pieces}
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


def _estimated(
    contents: ModelContents,
    tasks: Mapping[str, _Task],
    pieces: Sequence[_Piece],
    shards: Sequence[Sequence[_Piece]],
    options: dict[str, Any],
    factor_dtype: FloatName,
) -> CheckpointReport:
    """Return the report of a dry run."""
    workers = min(cores(), len(tasks))
    files = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": sum(own.nbytes for own in shard)
        for number, shard in enumerate(shards, start=1)
    }
    largest = max(math.prod(task.shape) for task in tasks.values())
    memory = _INTERPRETER + 4 * _WORKSPACE * workers * largest + max(files.values())
    pace: dict[Any, float] = {}
    seconds = 0.0
    for task in tasks.values():
        key = task.format, task.rank
        if key not in pace:
            pace[key] = _seconds_of_a_weight(task, options, factor_dtype)
        seconds += pace[key] * math.prod(task.shape) / workers
    return _report(contents, tasks, pieces, files, {}, seconds=seconds, memory_bytes=memory)


def _seconds_of_a_weight(task: _Task, options: dict[str, Any], factor_dtype: FloatName) -> float:
    """Return the time of a decomposition for each weight, from one of random numbers with as many columns."""
    rows = max(task.rank, min(task.shape[0], _SAMPLE // max(1, task.shape[1])))
    sample = np.random.default_rng(0).standard_normal((rows, task.shape[1]), dtype=np.float32)
    own = task._replace(load=lambda: sample, weighting=None, rank=min(task.rank, *sample.shape))
    plain = {**options, "quantizer": "nearest"} if options.get("quantizer") == "gptq" else options
    start = time.perf_counter()
    _decomposed(own, options=plain, factor_dtype=factor_dtype)
    return (time.perf_counter() - start) / max(1, sample.size)
