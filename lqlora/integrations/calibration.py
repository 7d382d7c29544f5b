"""Statistics of models that are larger than the memory: block after block, from the files of the model."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lqlora._annotations import annotated
from lqlora._documents import Reader, Text
from lqlora._files import write_whole
from lqlora._messages import given, shortened, shown
from lqlora._optional import require
from lqlora._options import require_choice
from lqlora._patterns import list_names
from lqlora._progress import reported
from lqlora._warnings import warn
from lqlora.decomposition import decompose
from lqlora.errors import CheckpointError, DeadLayerWarning, InvalidArgumentError, NonFiniteError
from lqlora.integrations._block_states import BlockStates, writing
from lqlora.integrations._calibration_folder import CalibrationFolder, described, digest_of, mapped, source_digest
from lqlora.integrations._disk_models import DiskModel
from lqlora.integrations.statistics import open_statistics, read_entries, write_document, write_gradients, write_inputs
from lqlora.nn.block_calls import (
    BlockCall,
    BlockPass,
    collect_block_gram,
    evaluated,
    hidden_of,
    holder_of,
    record_calls,
    run_block,
    skipped_blocks,
)
from lqlora.nn.experts import split_for_a_while
from lqlora.nn.model import fast_array, quantize_model
from lqlora.nn.selection import LinearMaps
from lqlora.nn.statistics.batches import examples_of, parts_of, run_model
from lqlora.nn.statistics.losses import losses_of
from lqlora.weighting import InputGram

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from lqlora._patterns import Patterns
    from lqlora._typing import FloatName
    from lqlora.formats import BlockFormat
    from lqlora.integrations.statistics import Statistics

__all__ = ["calibrate_checkpoint"]


@annotated
@torch.inference_mode(mode=False)
def calibrate_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    gradients: bool = False,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    quantized: BlockFormat | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    blocks: str | None = None,
    model_class: Any = None,
    dtype: FloatName = "float32",
    device: str = "cpu",
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> Statistics:
    """Collect statistics of the layers of a model whose weights do not fit in memory, block after block.

    One block of the model is in memory at a time, and what is outside of the list of blocks, such as embeddings. The hidden states of
    all tokens are in files of ``folder`` meanwhile. If the process is killed, the same call continues after the last finished block, and
    the files at the end are the same. A call for a folder that is complete returns it.

    Parameters
    ----------
    source : path-like
        Folder of a model of transformers in safetensors files. Its body is a list of blocks that run one after another.
    folder : path-like
        Folder to write. It must not exist, be empty, or hold what an earlier call with the same arguments has left.
    batches : iterable
        Batches for calibration, as :func:`lqlora.nn.collect_gram` takes them. Padding is cut.
    gradients : bool, default False
        Also collect squared gradients at the outputs of layers. All blocks run a second time, backwards, and the hidden states before
        each of them stay in files: for each token ``blocks`` times ``hidden_size`` numbers.
    loss : callable, optional
        See :func:`lqlora.nn.collect_fisher`. It is used with ``gradients`` only.
    quantized : BlockFormat, optional
        Format in which each block is quantized after its statistics were collected, so that the next block sees what a quantized
        model would give it. By default it sees what the dense one gives.
    include, exclude : patterns
        Layers of the model, of those in the blocks: see :func:`lqlora.nn.select_linears`.
    blocks : str, optional
        Name of the list of blocks, such as ``"model.layers"``. By default it is the one list whose items hold the most layers.
    model_class : class, optional
        Class of transformers; by default ``AutoModelForCausalLM``.
    dtype : {"float32", "bfloat16", "float16"}
        Dtype of the computation. Processors without special units are slow in 16 bits.
    device : str, default "cpu"
        Device that blocks run on.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts runs of blocks.
    **options
        Options of :func:`lqlora.nn.quantize_model` for ``quantized``, such as ``rank`` or ``quantizer="gptq"``.

    Returns
    -------
    Statistics
        Second moments of the inputs by name of the matrix in the files, and squared gradients if they were asked for.

    Raises
    ------
    InvalidArgumentError
        If no layer of the blocks is selected, there is no batch, the list of blocks is not clear, or its items do not run one after
        another, once in each pass, on the output of the block before.
    CheckpointError
        If a file cannot be read or written, or the folder holds something else. Blocks that are finished are kept.
    NonFiniteError
        If an input, a loss or a gradient is NaN or infinite.
    MissingDependencyError
        If transformers or accelerate is not installed.

    Warns
    -----
    DeadLayerWarning
        If layers were not used in any batch, such as experts without tokens. They are left out.
    UserWarning
        If selected layers have no matrix in the files, such as those that the model puts together from several.

    Notes
    -----
    The statistics are those of :func:`lqlora.nn.collect_gram`, and diagonals of the first factor of
    :func:`lqlora.nn.collect_kronecker`. A pass of the model without the values of blocks, in which each block but the first returns its
    input, tells their other arguments, such as masks and positions. These stay in memory.

    References
    ----------
    GPTQ, arXiv 2210.17323, section 3.3, has one block in memory at a time.

    Examples
    --------
    >>> import tempfile, torch, transformers, lqlora as lq
    >>> from lqlora.integrations.calibration import calibrate_checkpoint
    >>> _ = torch.manual_seed(0)
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    ...     tokens = torch.randint(50, (4, 16))
    ...     statistics = calibrate_checkpoint(f"{folder}/model", f"{folder}/statistics", [tokens])
    ...     fmt = lq.BlockFormat.parse("nf3/32:float32")
    ...     report = lq.decompose_checkpoint(f"{folder}/model", f"{folder}/small", fmt, rank=4, weighting=statistics.weighting())
    >>> len(statistics.inputs), statistics.examples
    (14, 4)
    """
    require_choice(dtype, "dtype", ("float32", "bfloat16", "float16"))
    if gradients and quantized is not None:
        raise InvalidArgumentError("quantized must not be given with gradients, which are those of the dense model.")
    _check_options(quantized, options)
    if isinstance(batches, Mapping | torch.Tensor):
        raise InvalidArgumentError("batches must be several batches, such as a list, got one. Pass [batch].")
    place = _device(device)
    path, target = Path(source).absolute(), Path(folder).absolute()
    make = model_class or require("transformers", "demo", "Calibration of models in files").AutoModelForCausalLM
    if not (isinstance(make, type) and hasattr(make, "from_pretrained")):
        raise InvalidArgumentError(f"model_class must be a class of transformers, got {given(make)}.")
    own = list(batches)
    _check_batches(own)
    settings = {
        "source": source_digest(path), "batches": digest_of(own), "model_class": make.__name__, "blocks": blocks, "dtype": dtype,
        "include": described(include), "exclude": described(exclude), "gradients": gradients, "loss": described(loss),
        "quantized": "" if quantized is None else f"{quantized} {[(name, described(options[name])) for name in sorted(options)]}",
    }  # fmt: skip
    try:
        with CalibrationFolder(target, settings) as work:
            if work.is_complete:
                return open_statistics(target)
            disk = DiskModel(path, make, blocks, include, exclude, getattr(torch, dtype), work.weights)
            if gradients and getattr(disk.model.config, "output_router_logits", False):
                raise InvalidArgumentError(
                    "source must not have output_router_logits in its configuration with gradients, which the loss of routers would "
                    "not reach."
                )
            run = _Run(disk, work, list(_single(disk.model, own)) if gradients else own, place)
            with (
                evaluated(disk.model),
                reported(
                    progress, "Calibrating", len(disk.blocks) * (2 if gradients else 1), "block", run.done()
                ) as report,
            ):
                run.forwards(quantized, options, report, keep=gradients)
                if gradients:
                    run.backwards(loss, report)
            run.finish()
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}. Finished blocks are kept.")) from error
    return open_statistics(target)


def _check_options(quantized: BlockFormat | None, options: Mapping[str, Any]) -> None:
    """Raise unless options are those of ``quantize_model``."""
    known = inspect.signature(quantize_model).parameters.keys() | inspect.signature(decompose).parameters.keys()
    for name in options:
        if quantized is None:
            raise InvalidArgumentError(f"{name} needs quantized=, the format of the blocks.")
        if name in _SET or name not in known:
            raise InvalidArgumentError(f"{name} is not an option of lqlora.nn.quantize_model that can be set here.")


#: Options of ``quantize_model`` and ``decompose`` that are set for each block.
_SET = frozenset(
    {"model", "formats", "include", "exclude", "weighting", "embeddings", "progress", "w", "fmt", "name", "start"}
)


def _device(name: str) -> torch.device:
    """Return a device, or raise if torch cannot use it."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            shortened(f"device must be one that torch can use, got {shown(name)}: {error}")
        ) from error
    if found.type == "meta":
        raise InvalidArgumentError("device must be one that computes, got 'meta'.")
    return found


def _check_batches(batches: Sequence[Any]) -> None:
    """Raise unless there are batches with tokens."""
    if not batches:
        raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
    for batch in batches:
        for own in batch.values() if isinstance(batch, Mapping) else [batch]:
            if isinstance(own, torch.Tensor) and not own.numel():
                raise InvalidArgumentError(f"batches must have tokens, got a tensor of shape {tuple(own.shape)}.")


def _single(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the examples of batches one by one."""
    for batch in batches:
        if isinstance(batch, torch.Tensor) and batch.ndim:
            yield from batch.split(1)
        else:
            yield from parts_of(model, batch, one_by_one=True)


class _Pass(NamedTuple):
    """One pass of the model: part of a batch, calls of the blocks, and what later blocks take of the first one's output."""

    part: Any
    calls: list[BlockCall]
    shared: dict[int, torch.Tensor]


class _Run:
    """Statistics of the blocks of a model, forwards and backwards."""

    def __init__(self, disk: DiskModel, work: CalibrationFolder, batches: Sequence[Any], device: torch.device) -> None:
        self._disk, self._work, self._device = disk, work, device
        self._names = list(disk.blocks)
        self._passes: list[_Pass] = []
        self._shapes: list[tuple[int, ...]] = []
        self._record(batches)
        if disk.lost:
            warn(
                f"source has no matrices for {len(disk.lost)} layers of the model ({list_names(disk.lost)}), which have no statistics. It "
                "has them in another layout."
            )

    def _record(self, batches: Sequence[Any]) -> None:
        """Run the model without its blocks, and keep their arguments. The hidden states before the first block go to a file."""
        disk, known = self._disk, dict[str, torch.Tensor]()

        def once(value: Any) -> Any:
            """Return the same object for equal tensors, such as masks and positions of sequences of one length."""
            return (
                known.setdefault(digest_of([value]), value)
                if isinstance(value, torch.Tensor) and value.numel()
                else value
            )

        first = disk.block(self._names[0], torch.device("cpu"))
        modules = list(disk.blocks.values())
        is_begun = bool(self._work.positions("states"))
        with (
            skipped_blocks(modules, first) as output,
            _without_head(disk.model) as run,
            contextlib.nullcontext(_ignore) if is_begun else writing(self._work.states(0)) as write,
        ):
            for part, calls in _checked(record_calls(disk.model, disk.path, modules, batches, run)):
                hidden = calls[0].hidden
                self._dtype = hidden.dtype
                self._shapes.append(tuple(hidden.shape))
                write(hidden)
                shared = _shared(output[0], calls)
                plain = [own.with_hidden(hidden.new_empty(0)) for own in calls]
                kept = [BlockCall(mapped(own.args, once), mapped(own.kwargs, once)) for own in plain]
                self._passes.append(_Pass(part, kept, shared))

    def _calls(self, position: int, states: BlockStates) -> Iterator[BlockCall]:
        """Yield the calls of a block, on its device."""
        for index, own in enumerate(self._passes):
            call = own.calls[position].with_hidden(states[index])
            yield BlockCall(*mapped((call.args, call.kwargs), self._sent))

    def _sent(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value

    def _layers_of(self, name: str) -> list[str]:
        """Return the layers of a block that have matrices in the files."""
        return list(
            dict.fromkeys(
                own.layer
                for own in self._disk.matrices.values()
                if own.layer.startswith(f"{name}.") or own.layer == name
            )
        )

    def _states(self, path: Path) -> BlockStates:
        return BlockStates(path, self._shapes, self._dtype)

    def done(self) -> int:
        """Return the number of runs of blocks that are finished."""
        count = len(self._names)
        return self._work.finished() + count - min(self._work.positions("gradients"), default=count)

    def forwards(
        self,
        quantized: BlockFormat | None,
        options: Mapping[str, Any],
        report: Callable[[int], None],
        *,
        keep: bool,
    ) -> None:
        """Collect second moments of inputs, block after block.

        Parameters
        ----------
        quantized : BlockFormat or None
            Format of the blocks that feed the next ones.
        options : mapping
            Options of ``quantize_model``.
        report : callable
            Function that takes the number of finished blocks.
        keep : bool
            Whether the states before all blocks are kept.
        """
        for position in range(self._work.finished(), len(self._names)):
            self._forward(position, quantized, options)
            if not keep:
                self._work.states(position).unlink()
            report(position + 1)

    def _forward(self, position: int, quantized: BlockFormat | None, options: Mapping[str, Any]) -> None:
        name = self._names[position]
        block, names = self._disk.block(name, self._device), self._layers_of(name)
        states = self._states(self._work.states(position))
        with writing(self._work.states(position + 1)) as write:
            passes = iter(self._passes)

            def take(output: Any) -> None:
                self._check_shared(position, next(passes), output)
                hidden = hidden_of(output)
                if not bool(torch.isfinite(hidden).all()):
                    raise NonFiniteError(f"source gives NaN or infinity after {shown(name)}. Compute in a wider dtype.")
                write(hidden)

            if names:
                grams = collect_block_gram(
                    name, block, names, self._calls(position, states), take if quantized is None else _ignore
                )
                self._write_inputs(position, grams)
            if names and quantized is not None:
                holder, norms = holder_of(name, block), {key: InputGram(fast_array(own)) for key, own in grams.items()}
                settings = {"rank": 0, **options}
                quantize_model(holder, quantized, include=names, weighting=norms.get, progress=False, **settings)
                block = holder.get_submodule(name)
            if not names or quantized is not None:
                for call in self._calls(position, states):
                    take(run_block(block, call))

    def _check_shared(self, position: int, own: _Pass, output: Any) -> None:
        """Raise if a later block takes what this one returned, and it is not what the first one returned."""
        for place, expected in own.shared.items() if position else ():
            found = output[place] if isinstance(output, tuple) and len(output) > place else None
            if not (isinstance(found, torch.Tensor) and torch.equal(found.cpu(), expected)):
                raise InvalidArgumentError(
                    f"source must hold a model whose blocks pass on nothing but the hidden state, but {shown(self._names[position])} passes "
                    "on other results. Use lqlora.nn.collect_gram with the model in memory."
                )

    def _write_inputs(self, position: int, grams: Mapping[str, torch.Tensor]) -> None:
        arrays = {id(own): own.numpy() for own in grams.values()}
        found = {
            name: ((own.rows, own.columns), arrays[id(grams[own.layer])])
            for name, own in self._disk.matrices.items()
            if own.layer in grams
        }
        entries = write_inputs(self._work.folder / self._file("inputs", position), found) if found else {}
        write_whole(self._work.entries(position), f"{json.dumps(entries)}\n".encode())

    def _file(self, kind: str, position: int) -> str:
        return f"{kind}-{position + 1:05d}-of-{len(self._names):05d}.safetensors"

    def backwards(self, loss: Callable[[nn.Module, Any], torch.Tensor] | None, report: Callable[[int], None]) -> None:
        """Collect squared gradients at the outputs of layers, from the last block to the first.

        Parameters
        ----------
        loss : callable or None
            Function that returns the loss of an example.
        report : callable
            Function that takes the number of finished runs of blocks.
        """
        count = len(self._names)
        if not (done := self._work.positions("gradients")):
            self._last_gradients(loss)
        for position in reversed(range(min(done, default=count))):
            self._backward(position)
            report(2 * count - position)

    def _last_gradients(self, loss: Callable[[nn.Module, Any], torch.Tensor] | None) -> None:
        """Write the gradients of the losses after the last block."""
        disk, count = self._disk, len(self._names)
        states, current = self._states(self._work.states(count)), list[torch.Tensor]()
        first = disk.block(self._names[0], torch.device("cpu"))
        with (
            skipped_blocks([*disk.blocks.values()], first, lambda: current[-1]),
            writing(self._work.gradients(count)) as write,
        ):
            for index, own in enumerate(self._passes):
                current[:] = [states[index].requires_grad_()]
                with torch.enable_grad():
                    total = losses_of(disk.model, own.part, loss, index).sum()
                if not total.requires_grad:
                    raise InvalidArgumentError(
                        "loss must depend on the hidden state after the last block, but does not."
                    )
                write(torch.autograd.grad(total, current[0])[0])

    def _backward(self, position: int) -> None:
        name = self._names[position]
        block = self._disk.block(name, self._device)
        maps = LinearMaps(holder_of(name, block))
        layers = {key: maps.layers[key] for key in self._layers_of(name)}
        squares = {key: _SquaredGradients() for key in layers}
        states = self._states(self._work.states(position))
        after = self._states(self._work.gradients(position + 1))
        with (
            writing(self._work.gradients(position)) as write,
            split_for_a_while(maps.stacks_of({*layers.values()})),
            contextlib.ExitStack() as hooks,
        ):
            for key, layer in layers.items():
                hooks.callback(layer.register_forward_hook(squares[key], prepend=True).remove)
            for index, call in enumerate(self._calls(position, states)):
                hidden = call.hidden.requires_grad_()
                with torch.enable_grad():
                    output = hidden_of(run_block(block, call.with_hidden(hidden)))
                # autograd.grad would leave out layers that the hidden state does not reach.
                output.backward(after[index].to(self._device))
                if hidden.grad is None or not bool(torch.isfinite(hidden.grad).all()):
                    raise NonFiniteError(f"loss has gradients that are NaN or infinite at {shown(name)}.")
                write(hidden.grad)
            found = {key: own.total / len(self._passes) for key, own in squares.items() if own.total is not None}
            matrices = {
                matrix: found[own.layer][own.first : own.first + own.rows].astype(np.float32)
                for matrix, own in self._disk.matrices.items()
                if own.layer in found
            }
            if matrices:
                write_gradients(self._work.folder / self._file("output_gradients", position), matrices)
            write_whole(self._work.entries(position, "gradients"), f"{json.dumps([*matrices])}\n".encode())

    def finish(self) -> None:
        """Write the document, and remove what is not needed any more."""
        entries: dict[str, dict[str, Any]] = {}
        for position in range(len(self._names)):
            for kind in ("inputs", "gradients"):
                path = self._work.entries(position, kind)
                if not path.exists():
                    continue
                reader = Reader(f"{path} is damaged", CheckpointError)
                if kind == "inputs":
                    entries |= read_entries(reader, path.read_bytes())
                else:
                    for name in entries.keys() & set(reader.read(path.read_bytes(), list[Text])):
                        entries[name]["gradients"] = self._file("output_gradients", position)
        lacking = [name for name in self._disk.matrices if name not in entries]
        if not entries:
            raise InvalidArgumentError(
                f"include must select layers that the batches reach, but none of {len(lacking)} ({list_names(lacking)}) got an input."
            )
        if lacking:
            warn(
                f"include selects {len(lacking)} of {len(self._disk.matrices)} matrices whose layers never got an input "
                f"({list_names(lacking)}). The statistics leave them out. Exclude them, or pass batches that reach them.",
                DeadLayerWarning,
            )
        write_document(self._work.folder, entries, examples=sum(examples_of(own.part) for own in self._passes))
        self._work.clean()


class _SquaredGradients:
    """Forward hook of one layer that sums the squares of the gradients at its outputs."""

    def __init__(self) -> None:
        self.total: Any = None

    def __call__(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # of an input that gradients do not reach, such as the output of an encoder
            output = output.requires_grad_().clone()  # which may be changed in place
        output.register_hook(self._add)
        return output

    def _add(self, gradient: torch.Tensor) -> None:
        own = gradient.detach().reshape(-1, gradient.shape[-1]).double().square().sum(0).cpu().numpy()
        self.total = own if self.total is None else self.total + own


class _Done(Exception):  # noqa: N818 - no error
    """The output head was reached."""


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[Callable[[nn.Module, Any], None]]:
    """Yield a function that runs a model up to its output embedding, whose logits would take much memory."""

    def stop(*_: object) -> None:
        raise _Done

    def run(model: nn.Module, part: Any) -> None:
        with contextlib.suppress(_Done):
            run_model(model, part)

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = None if head is None else head.register_forward_pre_hook(stop)
    try:
        yield run
    finally:
        if handle is not None:
            handle.remove()


def _shared(output: Any, calls: Sequence[BlockCall]) -> dict[int, torch.Tensor]:
    """Return what later blocks take of the output of the first one, by its place there."""
    taken: set[int] = set()
    mapped([(own.args, own.kwargs) for own in calls[1:]], lambda own: taken.add(id(own)))
    others = enumerate(output[1:], start=1) if isinstance(output, tuple) else ()
    return {place: own for place, own in others if isinstance(own, torch.Tensor) and id(own) in taken}


def _checked(passes: Iterator[BlockPass]) -> Iterator[BlockPass]:
    """Yield passes of a model; say what is wrong with tokens that it does not have."""
    try:
        yield from passes
    except IndexError as error:
        raise InvalidArgumentError(
            shortened(f"batches must suit the model, which cannot run them: {error}.")
        ) from error


def _ignore(_: Any) -> None:
    """Take a result that is not needed."""
