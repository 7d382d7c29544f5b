"""Headers of Llama models in GGUF files, compared with each other, and tensors in the layout of transformers."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from lqlora._messages import about_file, shown
from lqlora._optional import require
from lqlora.errors import CheckpointError
from lqlora.integrations._gguf_header import Header, StoredTensor, read_header
from lqlora.integrations._parts import all_parts, number_and_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from lqlora.integrations._gguf_header import Setting

Number = TypeVar("Number", bound=np.generic)

__all__ = [
    "COMPUTED",
    "Llama",
    "LlamaSettings",
    "open_headers",
    "permuted",
    "read_blocks",
    "read_header_of",
    "read_integers",
]

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.")
_MOST = 2**24
_MOST_BLOCKS = 2**12

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
#: Tensors that llama.cpp reads and transformers computes: the factors of rotary frequencies.
COMPUTED = frozenset({"rope_freqs.weight"})

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Llama(NamedTuple):
    """Checked headers of a Llama model: its files, settings and tensors.

    ``tensors`` has the file and the place of each tensor by its name in the file, ``names`` has this name by that in
    transformers.
    """

    path: Path
    files: tuple[Path, ...]
    settings: LlamaSettings
    tensors: dict[str, tuple[Path, StoredTensor]]
    names: dict[str, str]

    def loaders(self) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
        """Return a loader for each tensor by its name in transformers."""
        return {
            own: functools.partial(_read, self.tensors[name][0], name, self.settings.heads_of(name))
            for own, name in self.names.items()
        }


class LlamaSettings(NamedTuple):
    """Settings of a Llama model, checked."""

    blocks: int
    embedding_length: int
    feed_forward_length: int
    context_length: int
    heads: int
    kv_heads: int
    epsilon: float
    rope_base: float

    def heads_of(self, name: str) -> int:
        """Return how many heads the rows of a tensor are permuted in, or 0 if they are not permuted."""
        # A rotary embedding acts on queries and keys only.
        kind = name.split(".")[2] if _BLOCK.match(name) else ""
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(kind, 0)


def open_headers(path: Path) -> Llama:
    """Check the headers of a model; the values of tensors stay on the disk.

    Parameters
    ----------
    path : Path
        The file, or one of its parts.

    Returns
    -------
    Llama
        Headers that agree.

    Raises
    ------
    CheckpointError
        If a file is missing or invalid, of another architecture, or contradicts another one.
    """
    parts = _parts(path)
    first = read_header_of(parts[0])
    settings = first.settings
    kind = settings.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(about_file(parts[0], f"must hold a model, but its general.type is {shown(kind)}."))
    if (architecture := settings.get("general.architecture")) != "llama":
        raise CheckpointError(about_file(parts[0], f"must be of architecture 'llama', got {shown(architecture)}."))
    tensors: dict[str, tuple[Path, StoredTensor]] = {}
    for file in parts:
        own = read_header_of(file).tensors
        if twice := next((name for name in own if name in tensors), None):
            raise CheckpointError(
                about_file(file, f"has the tensor {shown(twice)}, which another part of the model has, too.")
            )
        tensors |= {name: (file, tensor) for name, tensor in own.items()}
    stated = settings.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and stated != len(tensors):
        raise CheckpointError(
            about_file(
                parts[0], f"states split.tensors.count {shown(stated)}, but the parts have {len(tensors)} tensors."
            )
        )
    checked = _check_settings(parts[0], settings, tensors)
    names: dict[str, str] = {}
    for name in tensors:
        own_name = _torch_name(name)
        if own_name in names:
            raise CheckpointError(about_file(parts[0], f"has two tensors called {shown(own_name)}."))
        names[own_name] = name
    return Llama(parts[0], parts, checked, tensors, names)


def _parts(path: Path) -> tuple[Path, ...]:
    """Return the files of a model, of which one is given."""
    count = read_header_of(path).settings.get("split.count", 1)
    own = number_and_count(path)
    number, by_name = own or (1, 1)
    if own is None and count != 1:
        raise CheckpointError(
            about_file(
                path,
                f"is one of {shown(count)} parts (split.count). Its name must end in -00001-of-0000N.gguf to find the others.",
            )
        )
    if count != by_name:
        raise CheckpointError(
            about_file(path, f"is one of {by_name} parts by its name, but its split.count is {shown(count)}.")
        )
    if not 1 <= number <= by_name:
        raise CheckpointError(about_file(path, f"is part {number} of {by_name} by its name; parts are counted from 1."))
    if by_name == 1:
        return (path,)
    parts = all_parts(path)
    for number, part in enumerate(parts, 1):
        settings = read_header_of(part).settings
        found = settings.get("split.no"), settings.get("split.count")
        if found != (number - 1, by_name):
            raise CheckpointError(
                about_file(
                    part,
                    f"must have split.no {number - 1} and split.count {by_name}, got {shown(found[0])} and {shown(found[1])}.",
                )
            )
    return parts


def read_header_of(path: Path) -> Header:
    """Return the header of a file, which is read once.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Header
        Settings and tensors.

    Raises
    ------
    CheckpointError
        If the file cannot be read or its header is not valid.
    """
    try:
        state = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(about_file(path, "does not exist.")) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(about_file(path, f"is not a readable GGUF file: {error}.")) from error
    return _header_as_of(path, state.st_mtime_ns, state.st_size)


# Each loader needs the header of its file. Time and size are keys, so that a file that was replaced is read again.
@functools.lru_cache(maxsize=16)
def _header_as_of(path: Path, time: int, size: int) -> Header:  # noqa: ARG001 - keys of the cache
    gguf = require("gguf", "demo", "Reading GGUF files")
    return read_header(path, gguf.GGML_QUANT_SIZES)


def _read(path: Path, name: str, heads: int) -> npt.NDArray[np.float32]:
    """Read and dequantize one tensor, with its rows in the order of transformers."""
    # Tensors are decoded by gguf, not taken over as codes and scales, because the layouts differ. Q4_0, for instance, has
    # 18 bytes for 32 weights: a float16 scale, then 16 bytes whose low halves are weights 0 to 15 and whose high halves
    # are weights 16 to 31. Here two neighbors share a byte, and scales are an array of their own. Q4_0 decodes to
    # scale * (code - 8): its zero is in the middle of the codes, and 8 is the same for all blocks.
    gguf = require("gguf", "demo", "Reading GGUF files")
    tensor = _place(path, name)
    try:
        data = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
        rows = data.reshape(*tensor.shape[:-1], -1)
        # Scales of a damaged file may be NaN or infinite; whoever uses the values refuses them.
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind))
        return _unpermute(values.astype(np.float32, copy=False), heads)
    except (NotImplementedError, OSError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error


def read_blocks(path: Path, name: str, heads: int) -> npt.NDArray[np.uint8]:
    """Read the bytes of one matrix, with its rows in the order of transformers.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        Name of the tensor in the file.
    heads : int
        See :meth:`LlamaSettings.heads_of`.

    Returns
    -------
    ndarray of uint8, shape (rows, bytes)
        Blocks of its type.

    Raises
    ------
    CheckpointError
        If the file has no such tensor any more, or cannot be read.
    """
    tensor = _place(path, name)
    try:
        return _unpermute(
            np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset).reshape(tensor.shape[0], -1), heads
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error


def _place(path: Path, name: str) -> StoredTensor:
    tensor = read_header_of(path).tensors.get(name)
    if tensor is None:
        raise CheckpointError(about_file(path, f"lacks the tensor {shown(name)}, which it had when it was opened."))
    return tensor


def read_integers(path: Path, name: str, dtype: str) -> npt.NDArray[Any]:
    """Read one tensor of integers.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        Name of the tensor in the file.
    dtype : str
        Its dtype.

    Returns
    -------
    ndarray
        The values.

    Raises
    ------
    CheckpointError
        If the file has no such tensor any more, or cannot be read.
    """
    tensor = _place(path, name)
    try:
        return np.fromfile(path, dtype, math.prod(tensor.shape), offset=tensor.offset).reshape(tensor.shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error


def _check_settings(
    path: Path, settings: Mapping[str, Setting], tensors: Mapping[str, tuple[Path, StoredTensor]]
) -> LlamaSettings:
    """Return the settings that matrices and configuration need; raise if one is out of range or contradicts a tensor."""

    def integer(key: str, default: int | None = None, most: int = _MOST) -> int:
        value = _needed(path, settings, key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                about_file(path, f"must have an integer from 1 to {most} as {key}, got {shown(value)}.")
            )
        return value

    def number(key: str, default: float | None = None) -> float:
        value = _needed(path, settings, key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(about_file(path, f"must have a finite number above 0 as {key}, got {shown(value)}."))
        return float(value)

    heads = integer("llama.attention.head_count")
    kv_heads = integer("llama.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CheckpointError(
            about_file(path, f"has llama.attention.head_count {heads}, which head_count_kv {kv_heads} does not divide.")
        )
    checked = LlamaSettings(
        integer("llama.block_count", most=_MOST_BLOCKS),
        integer("llama.embedding_length"),
        integer("llama.feed_forward_length"),
        integer("llama.context_length", most=2**31 - 1),
        heads,
        kv_heads,
        number("llama.attention.layer_norm_rms_epsilon"),
        number("llama.rope.freq_base", 10000.0),
    )
    blocks = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    if blocks != set(range(checked.blocks)):
        last = f", the last is {max(blocks)}" if blocks else ""
        raise CheckpointError(
            about_file(path, f"has llama.block_count {checked.blocks}, but tensors of {len(blocks)} blocks{last}.")
        )
    for name, (file, tensor) in tensors.items():
        per_row = 2 * checked.heads_of(name)
        if per_row and tensor.shape and tensor.shape[0] % per_row:
            raise CheckpointError(
                about_file(
                    file,
                    f"has {tensor.shape[0]} rows in {shown(name)}, which must be a multiple of {per_row}, two for each head.",
                )
            )
    return checked


def _needed(path: Path, settings: Mapping[str, Setting], key: str, default: float | None) -> object:
    value = settings.get(key, default)
    if value is None:
        raise CheckpointError(about_file(path, f"lacks the entry {key!r}."))
    return value


def _torch_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.match(name)
    module, _, end = name[match.end() :].partition(".") if match else ("", "", "")
    if match is None or module not in _MODULES or end not in ("weight", "bias"):
        return name
    return f"model.layers.{match[1]}.{_MODULES[module]}.{end}"


def _unpermute(values: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """Return the rows of query and key weights in the order of transformers; with 0 heads the values themselves.

    A rotary embedding rotates pairs of rows of a head. transformers pairs row ``i`` with row ``i + d / 2`` of the ``d``
    rows of a head, and GGUF stores the two of a pair side by side.
    """
    if not heads:
        return values
    # (head, pair, half, columns) in GGUF; (head, half, pair, columns) in transformers.
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def permuted(values: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """Return rows of query and key weights in the order of GGUF; with 0 heads the values themselves.

    Parameters
    ----------
    values : ndarray, shape (rows, ...)
        Rows in the order of transformers.
    heads : int
        Number of heads, see :meth:`LlamaSettings.heads_of`.

    Returns
    -------
    ndarray
        The same rows in another order.
    """
    if not heads:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
