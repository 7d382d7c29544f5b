"""Offloading: codes and scales of chosen layers in mapped files or pinned host memory, fetched for each product.

A buffer of an offloaded weight is an ordinary tensor in host memory, so that states, copies and files are made of it as ever.
Operators get an :class:`OffloadedTensor` in its place, which is on the device of the layer and has no memory there. Autograd saves
this tensor. So the backward pass fetches the weight again, and between the passes nothing of it is on the device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._messages import shortened
from lqlora._patterns import as_patterns, list_names, matches, select, shown_patterns
from lqlora._printable import printable
from lqlora.checkpoint import load, save
from lqlora.errors import InvalidArgumentError
from lqlora.nn.embedding import QuantizedEmbedding, QuantizedHead
from lqlora.nn.model import quantized_layers
from lqlora.nn.peqa.linear import ScaledWeight
from lqlora.nn.selection import unwrapped
from lqlora.nn.weight import QuantizedWeight

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Mapping

    from lqlora._patterns import Patterns
    from lqlora.nn.linear import LQLinear
    from lqlora.quantized import QuantizedArray

__all__ = [
    "Fetch",
    "OffloadedTensor",
    "OffloadedWeight",
    "Prefetcher",
    "offload_model",
    "offload_weight",
    "onload_model",
    "select_offloaded",
    "versions",
]

#: Bytes that one call asks the kernel to read ahead. Linux cuts a request at the read-ahead size of the disk, which is 128 KiB or more.
_READ_AHEAD = 1 << 17

#: Pairs of weights whose successor is remembered. Models of many experts have a new order in each pass.
_PAIRS = 1 << 14


class OffloadedTensor(torch.Tensor):
    """Tensor of an offloaded weight: it shows a device, and operators get a copy that is fetched to this device.

    Parameters
    ----------
    fetch : Fetch
        Access to all tensors of the weight.
    position : int
        Which of them this one is.
    """

    fetch: Fetch
    position: int

    @staticmethod
    def __new__(cls, fetch: Fetch, position: int) -> OffloadedTensor:  # noqa: PYI034 - torch makes the instance
        """Return the tensor, which has no memory."""
        host = fetch.hosts[position]
        found: OffloadedTensor = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - what torch documents for subclasses
            cls, host.shape, dtype=host.dtype, device=fetch.place
        )
        found.fetch, found.position = fetch, position
        return found

    @property
    def fetched(self) -> torch.Tensor:
        """Ordinary tensor on the device. On a CPU it is the one in host memory."""
        self.fetch.require_unchanged()
        return self.fetch.hosts[self.position].to(self.fetch.place)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what pickle stores: an ordinary tensor."""
        return self.fetched.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001 - documented for subclasses

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # torch types no argument
        """Show shape, dtype and device."""
        return f"OffloadedTensor({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch types it as a function
        cls, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on fetched tensors. All tensors of a weight are fetched at once, and no result shares their memory."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].fetch, args[0].position)
        schema = func._schema  # noqa: SLF001 - has no public name
        if schema.is_mutable:
            given = [
                *zip(schema.arguments, args, strict=False),
                *((own, kwargs.get(own.name)) for own in schema.arguments),
            ]
            if any(_is_written(argument) and _has_offloaded(value) for argument, value in given):
                raise InvalidArgumentError(f"{func} must not change an offloaded tensor. Call onload_model first.")
        fetched: dict[int, list[torch.Tensor]] = {}

        def here(value: Any) -> Any:
            if isinstance(value, OffloadedTensor):
                key = id(value.fetch)
                if key not in fetched:
                    value.fetch.require_unchanged()
                    fetched[key] = value.fetch.prefetcher.fetch(value.fetch)
                return fetched[key][value.position]
            return [here(own) for own in value] if isinstance(value, list | tuple) else value

        found = func(*map(here, args), **{name: here(own) for name, own in kwargs.items()})
        if not schema.is_mutable and any(own.alias_info is not None for own in schema.returns):
            return [own.clone() for own in found] if isinstance(found, list | tuple) else found.clone()
        return found


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _has_offloaded(value: Any) -> bool:
    return isinstance(value, OffloadedTensor) or (isinstance(value, list | tuple) and any(map(_has_offloaded, value)))


class Fetch(NamedTuple):
    """Access to the tensors of an offloaded weight as they are now.

    Parameters
    ----------
    hosts : list of Tensor
        Tensors in host memory.
    place : torch.device
        Device of the products.
    weight : weak reference to OffloadedWeight
        The weight, for the next prefetch of it.
    prefetcher : Prefetcher
        Shared by the layers that were offloaded together.
    versions : list of int
        How often torch has changed each tensor in place.
    """

    hosts: list[torch.Tensor]
    place: torch.device
    weight: weakref.ref[OffloadedWeight]
    prefetcher: Prefetcher
    versions: list[int]

    def require_unchanged(self) -> None:
        """Raise if the tensors have changed since, as autograd does for tensors that it has saved."""
        if self.versions != versions(self.hosts):
            raise InvalidArgumentError(
                "codes and scales of a quantized layer must not change while it is in use, and they were loaded or changed since "
                "the forward pass. Run the forward pass again."
            )


class _Copy(NamedTuple):
    """Copy of a weight that is on its way to a device."""

    hosts: list[torch.Tensor]
    versions: list[int]
    tensors: list[torch.Tensor]
    arrival: torch.cuda.Event


class Prefetcher:
    """Fetches weights, and starts to fetch the one that followed the last time.

    A weight follows the two before it, because the order is reversed in the backward pass: ``a, b, c`` are followed by ``c, b, a``,
    and what follows ``b`` depends on the weight before it. Wrong guesses cost time and nothing else, so threads need no lock.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] = (0, 0)
        self._next: dict[tuple[int, int], weakref.ref[OffloadedWeight]] = {}
        self._on_its_way: dict[int, _Copy] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[type[Prefetcher], tuple[()]]:
        """Return a new one for copies of the model, which learns the order of their weights."""
        return Prefetcher, ()

    def fetch(self, wanted: Fetch) -> list[torch.Tensor]:
        """Return the tensors of a weight on its device.

        Parameters
        ----------
        wanted : Fetch
            The weight.

        Returns
        -------
        list of Tensor
            Tensors that the current stream may read. On a CPU they are those in host memory.
        """
        found = self._arrived(wanted)
        if len(self._next) >= _PAIRS:
            self._next.clear()
        key = id(wanted.weight)  # weak references to one object are one object
        self._next[self._last] = wanted.weight
        self._last = last = self._last[1], key
        following = self._next.get(last)
        if following is not None and following is not wanted.weight:
            weight = following()
            if isinstance(weight, OffloadedWeight):  # it may be gone, or in memory again
                self._start(weight.fetch_now())
        return found

    def forget(self) -> None:
        """Drop what was prefetched, before host memory is changed."""
        for copy in self._on_its_way.values():
            copy.arrival.synchronize()
        self._on_its_way = {}

    def _arrived(self, wanted: Fetch) -> list[torch.Tensor]:
        copy = self._on_its_way.pop(id(wanted.weight), None)
        if (
            copy is None
            or any(map(_is_other, copy.hosts, wanted.hosts))
            or copy.versions != wanted.versions
            or copy.tensors[0].device != wanted.place
        ):
            return [host.to(wanted.place, non_blocking=True) for host in wanted.hosts]
        stream = torch.cuda.current_stream(wanted.place)
        stream.wait_event(copy.arrival)
        for tensor in copy.tensors:
            # It was allocated in the side stream: its memory must not be used again before this stream has read it.
            tensor.record_stream(stream)
        return copy.tensors

    def _start(self, wanted: Fetch) -> None:
        # A copy from memory that is not pinned would make the host wait, so the pages of a file are only read ahead.
        if wanted.place.type == "cuda" and all(host.is_pinned() for host in wanted.hosts):
            if wanted.place not in self._streams:
                self._streams[wanted.place] = torch.cuda.Stream(wanted.place)
            with torch.cuda.stream(self._streams[wanted.place]):
                tensors = [host.to(wanted.place, non_blocking=True) for host in wanted.hosts]
                arrival = self._streams[wanted.place].record_event()
            # One weight at a time is on its way: a wrong guess is dropped here.
            self._on_its_way = {id(wanted.weight): _Copy(wanted.hosts, wanted.versions, tensors, arrival)}
        else:
            for host in wanted.hosts:
                _read_ahead(host)


def _is_other(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is not second


def versions(tensors: list[torch.Tensor]) -> list[int]:
    """Return how often torch has changed tensors in place.

    Parameters
    ----------
    tensors : list of Tensor
        Tensors in memory.

    Returns
    -------
    list of int
        Numbers that grow with each change. Changes of tensors that were made in inference mode are not counted.
    """
    return [0 if own.is_inference() else own._version for own in tensors]  # noqa: SLF001 - has no public name


class OffloadedWeight(QuantizedWeight):
    """Quantized array whose buffers stay in host memory, and are fetched for each product.

    :func:`offload_model` makes one of a :class:`QuantizedWeight` by a change of its class, as ``fully_shard`` of torch does.

    Parameters
    ----------
    quantized : QuantizedArray
        See :class:`QuantizedWeight`.

    Attributes
    ----------
    place : torch.device
        Device of the products.
    prefetcher : Prefetcher
        Shared by the layers that were offloaded together.
    """

    place: torch.device
    prefetcher: Prefetcher

    @property
    def device(self) -> torch.device:
        """Device of the products."""
        return self.place

    def fetch_now(self) -> Fetch:
        """Return access to the buffers as they are now.

        Returns
        -------
        Fetch
            Tensors in host memory, and how to fetch them. Parameters are not among them.
        """
        hosts = [own for own in super()._tensors() if not isinstance(own, nn.Parameter)]
        return Fetch(hosts, self.place, weakref.ref(self), self.prefetcher, versions(hosts))

    def _tensors(self) -> list[torch.Tensor]:
        stored = super()._tensors()
        if torch.compiler.is_compiling():
            # A graph has the copy as a node, and its compiler decides what is kept for the backward pass.
            return [own.to(self.place) for own in stored]
        fetch = self.fetch_now()
        offloaded = iter([OffloadedTensor(fetch, position) for position in range(len(fetch.hosts))])
        return [own if isinstance(own, nn.Parameter) else next(offloaded) for own in stored]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> OffloadedWeight:  # noqa: FBT001, FBT002 - torch's signature
        buffers = {id(own) for own in self.buffers()}
        self.prefetcher.forget()
        self.place = fn(torch.empty(0, dtype=self.dtype, device=self.place)).device
        super()._apply(lambda tensor: tensor if id(tensor) in buffers else fn(tensor), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        # A page that is written to is a page in memory. Arrays that are equal already are not written again. Those of scales
        # that are quantized belong to a module inside, which torch gives the entries of the same dict.
        for name, own in self.named_buffers():
            given = state_dict.get(prefix + name)
            if given is not None and _is_same(own, given):
                state_dict[prefix + name] = own
        self.prefetcher.forget()
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)  # copies of earlier products may still read the host memory
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Show shape, format, and that the array is offloaded."""
        return f"{super().extra_repr()}, offloaded"


class OffloadedScaledWeight(OffloadedWeight, ScaledWeight):
    """The same for an array whose scales train: they stay on the device."""

    @property
    def array(self) -> QuantizedArray:
        """Quantized array in host memory, which shares the codes."""
        own = super().array
        return dataclasses.replace(own, scales=own.scales.to(own.packed.device))


@annotated
@torch.inference_mode(mode=False)  # the buffers stay in use outside of it
def offload_model(
    model: nn.Module, path: str | os.PathLike[str] | None = None, include: Patterns = "*", exclude: Patterns = ()
) -> list[str]:
    """Keep codes and scales of quantized layers in a file or in pinned host memory, and fetch them for each product, in place.

    Results and gradients stay the same, bit for bit. Factors, biases, and scales that train stay on the device. The weight that is
    used next is prefetched; the order is learned in the first pass, backward passes included. :func:`onload_model` is the inverse.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers.
    path : path-like, optional
        Checkpoint to map into memory. If there is none, it is written, with the codes and scales alone. A file that exists must hold
        the same codes and scales, such as one of :func:`save_model` of this model. The operating system reads its pages when they are
        used, and drops them when memory is short. Without a path the layers must be on a CUDA device, and their codes and
        scales move to pinned host memory.
    include, exclude : patterns
        Quantized layers, by name or pattern as in :func:`select_linears`. By default all.

    Returns
    -------
    list of str
        Names of the layers, in the order of the model.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer or is one itself, no layer or the table of an embedding is selected, a layer holds no values, a layer is not on a
        CUDA device and ``path`` is missing, or the file holds something else.
    CheckpointError
        If the file cannot be written, or is damaged.

    Notes
    -----
    Do not change the file while it is mapped. Writers of this library replace files, which leaves a mapped one as it is. A deep copy of
    the model has its codes in memory. What ``load_state_dict`` loads is in memory too, unless it is equal.

    Call this after ``model.to(device)``: later moves change where products are computed, and leave the codes on the host.

    Examples
    --------
    >>> import os, tempfile, torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 4))
    >>> report = lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/64:float32"), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     offload_model(model, os.path.join(folder, "codes.safetensors"))
    ...     onload_model(model)
    ['0', '1']
    """
    layers = quantized_layers(unwrapped(model))
    tables = [
        name for name, own in unwrapped(model).named_modules() if isinstance(own, QuantizedEmbedding | QuantizedHead)
    ]
    names = select_offloaded(list(layers), tables, include, exclude)
    chosen = {name: layers[name] for name in names}
    for name, layer in chosen.items():
        device = layer.quantized.device.type
        if "meta" in (device, layer.quantized.array.packed.device.type):
            raise InvalidArgumentError(
                f"model must hold values, but {printable(name)!r} is on the meta device. Load it first."
            )
        if path is None and device != "cuda":
            raise InvalidArgumentError(
                f"path must be given for layers that are not on a CUDA device, such as {printable(name)!r}, which is on {device}."
            )
        if not dict(layer.quantized.named_buffers()):
            raise InvalidArgumentError(
                f"model must have codes that are buffers, but make_shardable made those of {printable(name)!r} parameters. Load the "
                "model again."
            )
    stored: dict[str, dict[str, Any]] = {}
    if path is not None:
        if not Path(path).exists():
            save(path, {name: layer.quantized.array for name, layer in chosen.items()})
        stored = {name: own.quantized.to_arrays() for name, own in load(path, mapped=True).matrices.items()}
        _check_same(path, chosen, stored)
    prefetcher = Prefetcher()
    for name, layer in chosen.items():
        hosts = stored.get(name) or {key: own.cpu().pin_memory() for key, own in layer.quantized.named_buffers()}
        offload_weight(layer.quantized, hosts, prefetcher)
    return names


@annotated
@torch.inference_mode(mode=False)  # the buffers stay in use outside of it
def onload_model(model: nn.Module) -> None:
    """Bring the codes and scales of offloaded layers back into memory, on the devices of the layers, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Layers that are not offloaded stay as they are.

    Raises
    ------
    InvalidArgumentError
        If another library has taken away the values of a layer.
    """
    offloaded: dict[str, Any] = {
        name: own for name, own in unwrapped(model).named_modules() if isinstance(own, OffloadedWeight)
    }
    for name, weight in offloaded.items():
        if any(own.is_meta for own in weight.buffers()):
            raise InvalidArgumentError(
                f"model must hold its values, but those of {printable(name)!r} are on the meta device. Remove the hooks that took "
                "them away."
            )
    for weight in offloaded.values():
        weight.__class__ = ScaledWeight if isinstance(weight, ScaledWeight) else QuantizedWeight
        for inner in weight.modules():
            for name, host in inner.named_buffers(recurse=False):
                setattr(inner, name, host.to(weight.place, copy=True))
        del weight.prefetcher, weight.place


def select_offloaded(
    layers: Collection[str], tables: Collection[str], include: Patterns, exclude: Patterns = (), **described: str
) -> list[str]:
    """Return the names of layers to offload. Tables of embeddings stay in memory: single rows of them are decoded.

    Parameters
    ----------
    layers : collection of str
        Names of quantized layers.
    tables : collection of str
        Names of modules with quantized tables.
    include, exclude : patterns
        Patterns of names. One that matches layers and tables stands for the layers.
    **described : str
        Options ``where`` and ``parameter`` of :func:`lqlora._patterns.select`.

    Returns
    -------
    list of str
        Selected names, in the order of ``layers``.

    Raises
    ------
    InvalidArgumentError
        If no layer is selected, or a pattern matches tables alone.
    """
    parameter = described.get("parameter", "include")
    for pattern in as_patterns(include, parameter):
        wanted = [name for name in tables if matches(name, pattern)]
        if wanted and not any(matches(name, pattern) for name in layers):
            raise InvalidArgumentError(
                f"{parameter} must select quantized linear layers, but {shown_patterns(pattern)} selects {printable(wanted[0])!r}, which "
                "uses the table of an embedding. Tables stay in memory: leave it out."
            )
    return select(layers, include, exclude, what="quantized layer", **described)


def offload_weight(weight: QuantizedWeight, hosts: Mapping[str, Any], prefetcher: Prefetcher) -> None:
    """Make a weight use arrays in host memory that are equal to those it has.

    Parameters
    ----------
    weight : QuantizedWeight
        Weight to change; its device remains that of the products.
    hosts : mapping of str to array
        Arrays by the name of the buffer, of NumPy or torch.
    prefetcher : Prefetcher
        Shared by the layers that are offloaded together.
    """
    own: Any = weight
    place = weight.device
    for name, _ in list(weight.named_buffers()):
        owner, _, key = name.rpartition(".")
        setattr(weight.get_submodule(owner), key, ops.convert(hosts[name], torch))
    own.__class__ = OffloadedScaledWeight if isinstance(weight, ScaledWeight) else OffloadedWeight
    own.place, own.prefetcher = place, prefetcher


def _check_same(
    path: str | os.PathLike[str], layers: Mapping[str, LQLinear], stored: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise unless a file has the buffers of layers."""
    for name, layer in layers.items():
        own = dict(layer.quantized.named_buffers())
        if name not in stored:
            fault = f"has no matrix {printable(name)!r}, only {printable(list_names(stored, 2))}"
        elif not all(
            key in stored[name] and _is_same(tensor, ops.convert(stored[name][key], torch))
            for key, tensor in own.items()
        ):
            fault = f"has other codes or scales for {printable(name)!r}"
        else:
            continue
        raise InvalidArgumentError(
            shortened(f"path must be a new file, or have the codes and scales of the model, but {path} {fault}.")
        )


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes."""
    if first.dtype != second.dtype or first.shape != second.shape or second.is_meta:
        return False
    return torch.equal(*(own.detach().cpu().reshape(-1).view(torch.uint8) for own in (first, second)))


def _read_ahead(tensor: torch.Tensor) -> None:
    """Let the operating system read the pages of a mapped tensor, without waiting for them."""
    if _advise is not None and tensor.is_cpu:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.nbytes
        for address in range(start, end, _READ_AHEAD):
            _advise(address, min(_READ_AHEAD, end - address), mmap.MADV_WILLNEED)


def _advise_function() -> Callable[[int, int, int], int] | None:
    """Return madvise of the C library; None where there is none, and pages are read when they are used."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    # Not the method of mmap: arrays of NumPy and tensors of torch do not give it away. It changes nothing in memory of other kinds.
    found: Any = ctypes.CDLL(None).madvise
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return cast("Callable[[int, int, int], int]", found)


_advise = _advise_function()
