"""Blocks of a model: which list of modules they are, the arguments of their calls, and runs of single blocks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.nn.experts import Experts
from lqlora.nn.selection import LinearMaps
from lqlora.nn.statistics.batches import parts_of, run_model
from lqlora.nn.statistics.gram import input_moments
from lqlora.nn.statistics.hooks import warn_of_underflow

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "BlockCall", "BlockPass", "collect_block_gram", "evaluated", "find_blocks", "hidden_of", "holder_of", "record_calls", "run_block",
    "skipped_blocks",
]  # fmt: skip


class BlockCall(NamedTuple):
    """Arguments of one call of a block. The first one, of either kind, is the hidden state.

    Parameters
    ----------
    args : tuple
        Positional arguments.
    kwargs : dict of str to object
        Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Any:
        """The hidden state."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def with_hidden(self, hidden: torch.Tensor) -> BlockCall:
        """Return the same call with another hidden state.

        Parameters
        ----------
        hidden : Tensor
            The hidden state.

        Returns
        -------
        BlockCall
            The call.
        """
        if self.args:
            return BlockCall((hidden, *self.args[1:]), self.kwargs)
        return BlockCall((), {**self.kwargs, next(iter(self.kwargs)): hidden})


class BlockPass(NamedTuple):
    """One pass of a model over a part of a batch.

    Parameters
    ----------
    part : mapping or object
        Part of a batch, without padding.
    calls : list of BlockCall
        Call of each block. Only the first has a hidden state.
    """

    part: Any
    calls: list[BlockCall]


def find_blocks(
    modules: Mapping[str, nn.Module], names: Iterable[str], chosen: str | None
) -> tuple[str, dict[str, nn.Module]]:
    """Return the name of the list of blocks of a model, and its items.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        All modules of the model by name.
    names : iterable of str
        Names of selected layers.
    chosen : str or None
        Name of the list. By default it is the one whose items hold the most of the layers.

    Returns
    -------
    path : str
        Name of the list.
    items : dict of str to torch.nn.Module
        Blocks by their names in the list.

    Raises
    ------
    InvalidArgumentError
        If no layer is in a block, or it is not clear which list it is.
    """
    lists = {
        name: own for name, own in modules.items() if isinstance(own, nn.ModuleList) and not isinstance(own, Experts)
    }
    if chosen is not None and chosen not in lists:
        raise InvalidArgumentError(
            f"blocks must be the name of a torch.nn.ModuleList of the model, got {printable(chosen)!r}. There are {list_names(lists)}."
        )
    names = list(names)
    counts = {
        name: sum(own.startswith(f"{name}.") for own in names) for name in (lists if chosen is None else [chosen])
    }
    most = max(counts.values(), default=0)
    if not most:
        raise InvalidArgumentError(
            f"include must select a layer inside of a list of blocks, but none of {len(names)} ({list_names(names)}) is in one."
        )
    # A list inside of a block holds some of its layers; the outermost list holds all of them.
    best = [name for name, count in counts.items() if count == most]
    best = [name for name in best if not any(name.startswith(f"{other}.") for other in best)]
    if len(best) > 1:
        raise InvalidArgumentError(
            f"blocks must be given, because {list_names(best)} hold {most} layers each. Quantize them one after another."
        )
    return best[0], dict(lists[best[0]].named_children())


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore the modes of the modules that are left at the end.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Yields
    ------
    None
        Once.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():
            while name not in modes:  # a new part of a quantized layer
                name = name.rpartition(".")[0]  # noqa: PLW2901
            module.training = modes[name]


def record_calls(
    model: nn.Module,
    path: str,
    blocks: Sequence[nn.Module],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] = run_model,
) -> Iterator[BlockPass]:
    """Run a model, and yield the calls of all blocks for each part of each batch.

    Parameters
    ----------
    model : torch.nn.Module
        Model in evaluation mode.
    path : str
        Name of the list of blocks, for errors.
    blocks : sequence of torch.nn.Module
        All blocks.
    batches : iterable
        Batches as transformers has them.
    run : callable
        ``run(model, part)`` runs the model on a part of a batch.

    Yields
    ------
    BlockPass
        Part and calls.

    Raises
    ------
    InvalidArgumentError
        If the blocks do not run one after another.
    """
    calls: list[BlockCall] = []
    last: list[Any] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a block."""
        position = positions[block]
        call = BlockCall(tuple(map(_without_cache, args)), {key: _without_cache(own) for key, own in kwargs.items()})
        if position != len(calls) or (position and call.hidden is not last[-1]):
            raise InvalidArgumentError(
                f"model must run the blocks of {printable(path)!r} one after another, each once on the output of the one before, but not so "
                f"block {position}. Name another list of blocks, or use collect_gram and quantize_model."
            )
        if not isinstance(call.hidden, torch.Tensor):
            raise InvalidArgumentError(
                f"model must pass hidden states as the first argument of the blocks of {printable(path)!r}, got {type(call.hidden).__name__}."
            )
        calls.append(call.with_hidden(call.hidden.clone() if position == 0 else call.hidden.new_empty(0)))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        """Keep the hidden state after a block, which must be that before the next one."""
        last[:] = [hidden_of(output)]

    positions = {block: position for position, block in enumerate(blocks)}
    handles = [own for block in blocks for own in (
        block.register_forward_pre_hook(before, with_kwargs=True, prepend=True), block.register_forward_hook(after),
    )]  # fmt: skip
    try:
        for batch in batches:
            for part in parts_of(model, batch):
                calls = []
                run(model, part)
                if len(calls) != len(blocks):
                    raise InvalidArgumentError(
                        f"model must run all {len(blocks)} blocks of {printable(path)!r}, but ran {len(calls)}."
                    )
                last.clear()
                yield BlockPass(part, calls)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipped_blocks(
    blocks: Sequence[nn.Module], first: nn.Module, final: Callable[[], torch.Tensor] | None = None
) -> Iterator[list[Any]]:
    """Let blocks pass on hidden states as they are, so that a model runs though they have no values.

    Parameters
    ----------
    blocks : sequence of torch.nn.Module
        All blocks.
    first : torch.nn.Module
        The first block, with values. It runs, and the other blocks return what it returned beside the hidden state.
    final : callable, optional
        Function without arguments that returns the hidden state after all blocks.

    Yields
    ------
    list
        Its entry is the output of the first block in the last pass.
    """
    found: list[Any] = []

    def stand_in(position: int) -> Callable[..., Any]:
        """Return a forward method for a block."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            """Return the hidden state as it is, with what the first block returned beside it."""
            if position == 0:
                found[:] = [first(*args, **kwargs)]
            hidden = BlockCall(args, kwargs).hidden if position else hidden_of(found[0])
            if final is not None and position == len(blocks) - 1:
                hidden = final()
            return (hidden, *found[0][1:]) if isinstance(found[0], tuple) else hidden

        return forward

    for position, block in enumerate(blocks):
        vars(block)["forward"] = stand_in(position)
    try:
        yield found
    finally:
        for block in blocks:
            del vars(block)["forward"]


def _without_cache(value: Any) -> Any:
    """Return None for a cache of keys and values, which would grow with each call, and other arguments as they are."""
    return None if hasattr(value, "get_seq_length") else value


def run_block(block: nn.Module, call: BlockCall) -> Any:
    """Return the output of a block for a call. The arguments stay as they are.

    Parameters
    ----------
    block : torch.nn.Module
        The block.
    call : BlockCall
        Its arguments.

    Returns
    -------
    object
        The output.
    """
    own = call.with_hidden(call.hidden.clone())  # a block may change its input in place
    return block(*own.args, **own.kwargs)


def hidden_of(output: Any) -> Any:
    """Return the hidden state in the output of a block.

    Parameters
    ----------
    output : object
        The hidden state, or a tuple that begins with it.

    Returns
    -------
    object
        The hidden state.
    """
    return output[0] if isinstance(output, tuple) else output


def holder_of(path: str, block: nn.Module) -> nn.Module:
    """Return a module that holds a block under its name in the model, and nothing else of the model.

    Parameters
    ----------
    path : str
        Name of the block.
    block : torch.nn.Module
        The block.

    Returns
    -------
    torch.nn.Module
        The holder. Errors then name layers as the model does, and a block that is a linear layer itself has a name.
    """
    around = holder = nn.Module()
    *parents, last = path.split(".")
    for part in parents:
        around.add_module(part, nn.Module())
        around = around.get_submodule(part)
    around.add_module(last, block)
    return holder


def collect_block_gram(
    path: str,
    block: nn.Module,
    names: Collection[str],
    calls: Iterable[BlockCall],
    take: Callable[[Any], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Return the second moments of the inputs of layers of a block. Layers that were not used are left out without a warning.

    Parameters
    ----------
    path : str
        Name of the block in the model.
    block : torch.nn.Module
        The block.
    names : collection of str
        Names of its layers in the model.
    calls : iterable of BlockCall
        Calls of the block.
    take : callable, optional
        Function that takes the output of each call, in order.

    Returns
    -------
    dict of str to Tensor of float32, shape (in_features, in_features)
        As of :func:`collect_gram`.
    """
    holder = holder_of(path, block)
    maps = LinearMaps(holder)
    linears = maps.choose([*names])
    means, lost = input_moments(
        holder, maps, linears, calls, lambda _, call: take(run_block(block, call)), progress=False
    )
    warn_of_underflow(lost, "inputs")
    return means
