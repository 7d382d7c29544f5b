"""Runs of the blocks of a model one after another: forwards for second moments of inputs, backwards for gradients."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lqlora._documents import Reader, Text
from lqlora._files import write_whole
from lqlora._messages import shortened, shown
from lqlora._patterns import list_names
from lqlora._warnings import warn
from lqlora.errors import CheckpointError, DeadLayerWarning, InvalidArgumentError, NonFiniteError
from lqlora.integrations._block_states import BlockStates, writing
from lqlora.integrations._calibration_folder import digest_of, mapped
from lqlora.integrations.statistics import read_entries, write_document, write_gradients, write_inputs
from lqlora.nn.block_calls import (
    BlockCall,
    collect_block_gram,
    hidden_of,
    holder_of,
    record_calls,
    run_block,
    skipped_blocks,
)
from lqlora.nn.experts import split_for_a_while
from lqlora.nn.model import fast_array, quantize_model
from lqlora.nn.selection import LinearMaps
from lqlora.nn.statistics.batches import examples_of, run_model
from lqlora.nn.statistics.losses import losses_of
from lqlora.weighting import InputGram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from lqlora.formats import BlockFormat
    from lqlora.integrations._calibration_folder import CalibrationFolder
    from lqlora.integrations._disk_models import DiskModel
    from lqlora.nn.block_calls import BlockPass

__all__ = ["BlockRuns"]


class _Pass(NamedTuple):
    """One pass of the model: part of a batch, calls of the blocks, and what later blocks take of the first one's output."""

    part: Any
    calls: list[BlockCall]
    shared: dict[int, torch.Tensor]


class BlockRuns:
    """Statistics of the blocks of a model, forwards and backwards. Making it runs the model without its blocks.

    Parameters
    ----------
    disk : DiskModel
        The model.
    work : CalibrationFolder
        Folder for what is found.
    batches : sequence
        Batches.
    device : torch.device
        Device that blocks run on.
    """

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
            contextlib.nullcontext(_ignore) if is_begun else writing(self._work.file("states", 0)) as write,
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
        """Return the number of runs of blocks that are finished.

        Returns
        -------
        int
            The number.
        """
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
                self._work.file("states", position).unlink()
            report(position + 1)

    def _forward(self, position: int, quantized: BlockFormat | None, options: Mapping[str, Any]) -> None:
        name = self._names[position]
        block, names = self._disk.block(name, self._device), self._layers_of(name)
        states = self._states(self._work.file("states", position))
        with writing(self._work.file("states", position + 1)) as write:
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
        states, current = self._states(self._work.file("states", count)), list[torch.Tensor]()
        first = disk.block(self._names[0], torch.device("cpu"))
        with (
            skipped_blocks([*disk.blocks.values()], first, lambda: current[-1]),
            writing(self._work.file("gradients", count)) as write,
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
        states = self._states(self._work.file("states", position))
        after = self._states(self._work.file("gradients", position + 1))
        with (
            writing(self._work.file("gradients", position)) as write,
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
