"""Block formats: codebook, block size, axis and storage of scales; their spelling, and the arrays that they store.

Nothing here touches an array. A format has a one-line spelling (``str``, :meth:`BlockFormat.parse`) and a list of the
arrays that it stores (:meth:`BlockFormat.stored_arrays`). :mod:`lqlora.quantized` encodes and decodes. Code above that
package asks a format for its stored arrays and their bits, and never counts codes itself: other families need not have
one code per weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lqlora._annotations import annotated, annotated_class
from lqlora._messages import given
from lqlora._options import is_integer
from lqlora.codebooks import Codebook, by_name
from lqlora.errors import FormatError, InvalidArgumentError
from lqlora.ops import packed_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lqlora._typing import FloatName

__all__ = [
    "BlockFormat",
    "LevelSharing",
    "Offset",
    "Rotation",
    "RotationSide",
    "ScaleCodebook",
    "ScaleFormat",
    "StoredArrays",
    "codebook_name",
    "float_bits",
]

Offset: TypeAlias = Literal["min", "mean", "none"]
ScaleCodebook: TypeAlias = Literal["uint", "int", "dynamic", "log"]
LevelSharing: TypeAlias = Literal["codebook", "matrix"] | int
RotationSide: TypeAlias = Literal["in", "out", "both"]
#: Name of the dtype and shape of each stored array, by name and in the order of ``QuantizedArray.to_arrays``.
StoredArrays: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]

_FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_STORED_BITS = {"uint8": 8, **_FLOAT_BITS}
_MAX_DEPTH = 8  # depths of scales that a text may have, the dtype included; it bounds the recursion of _parse_scales
_OFFSET_BITS = 32  # one float32 per array of scales

#: For each codebook of scales: its letter in the spelling, the name of its levels, and its default offset. A spelling
#: leaves out the default offset, so a changed default would give the spellings in old files a new meaning.
_SCALE_CODEBOOKS: dict[str, tuple[str, str, Offset]] = {
    "uint": ("u", "uint{}", "min"),
    "int": ("i", "int{}", "none"),
    "dynamic": ("d", "dynamic{}", "mean"),
    "log": ("l", "log{}", "none"),
}
_SIGNED = ("int", "dynamic")

#: Axes that a rotation turns, by its side, and what is added to the seed for each: signs of sides of equal length must differ.
_SIDES: dict[str, dict[int, int]] = {"in": {-1: 0}, "out": {-2: 2**32}, "both": {-1: 0, -2: 2**32}}


class _Record:
    """Base class of frozen formats, which cache the values that they derive from their fields.

    Formats are keys of caches and are asked for the same things in every call, so the answers stay in ``__dict__``. A
    pickle holds the fields alone: the hash of a string differs from process to process.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def _make_plain(record: _Record, *names: str) -> None:
    """Make Python integers of those of NumPy, whose products overflow."""
    for name in names:
        value = getattr(record, name)
        if type(value) is not int and is_integer(value):
            object.__setattr__(record, name, int(value))


@annotated_class
@dataclass(frozen=True)
class ScaleFormat(_Record):
    """Format of quantized scales: the second level of a :class:`BlockFormat`, which may have a third.

    Parameters
    ----------
    bits : int
        Bits of a scale's code, 1 to 8.
    block_size : int
        Scales per second-level scale.
    dtype : {"float32", "float16", "bfloat16"} or ScaleFormat
        Storage of the second-level scales; another ScaleFormat quantizes those too, to any depth.
    offset : {"min", "mean", "none"}, optional
        Number that is subtracted from the scales before they are quantized and added to them when they are decoded. It
        is the smallest scale of the whole array (LQ-LoRA), the mean scale (QLoRA), or zero. The first two are stored as
        one float32. The default is ``"min"`` for ``"uint"``, ``"mean"`` for ``"dynamic"``, else ``"none"``.
    codebook : {"uint", "int", "dynamic", "log"}
        Levels of the codes. ``"uint"``: ``k / (2**bits - 1)``. ``"int"``: symmetric about zero, for scales that have a
        sign. ``"dynamic"``: the signed dynamic map of bitsandbytes, 8 bits. ``"log"``: zero and a geometric series over
        16 octaves, 3 to 8 bits; its relative error does not grow for small scales.

    Raises
    ------
    FormatError
        If a value is not one of those listed.

    Notes
    -----
    A scale above zero never decodes to zero or below: its code is the nearest that decodes to more than zero. A zero
    scale decodes to exactly zero under ``"min"`` and ``"none"``.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; double quantization and the mean offset are from QLoRA, arXiv 2305.14314,
    section 3.

    Examples
    --------
    >>> str(ScaleFormat(8, 256)), str(ScaleFormat(8, 256, codebook="dynamic"))
    ('u8/256:float32', 'd8/256:float32')
    """

    bits: int
    block_size: int
    dtype: FloatName | ScaleFormat = "float32"
    offset: Offset = None  # type: ignore[assignment]  # the codebook's own, filled in below
    codebook: ScaleCodebook = "uint"

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, str) or self.codebook not in _SCALE_CODEBOOKS:
            known = ", ".join(_SCALE_CODEBOOKS)
            raise FormatError(f"codebook of a ScaleFormat must be one of {known}, got {given(self.codebook)}.")
        if self.offset is None:
            object.__setattr__(self, "offset", _SCALE_CODEBOOKS[self.codebook][2])
        if not isinstance(self.offset, str) or self.offset not in ("min", "mean", "none"):
            raise FormatError(f"offset must be 'min', 'mean' or 'none', got {given(self.offset)}.")
        if self.offset == "mean" and self.codebook not in _SIGNED:
            # Scales below the mean become negative when it is subtracted.
            raise FormatError(f"offset='mean' needs a signed codebook, 'int' or 'dynamic', got {given(self.codebook)}.")
        _make_plain(self, "bits", "block_size")
        _ = self.format  # checks the other fields

    @cached_property
    def format(self) -> BlockFormat:
        """The scales' own block format: double quantization quantizes an array of scales like any other array."""
        return BlockFormat(self.levels, self.block_size, self.dtype)

    @cached_property
    def levels(self) -> Codebook:
        """Codebook that the scales are rounded to."""
        if not is_integer(self.bits):
            raise FormatError(f"bits of a ScaleFormat must be an int from 1 to 8, got {given(self.bits)}.")
        return by_name(_SCALE_CODEBOOKS[self.codebook][1].format(self.bits))

    @property
    def signed(self) -> bool:
        """True if scales of both signs keep their sign. An offset may move the smallest scales to the other sign."""
        return self.codebook in _SIGNED and self.offset == "none"

    @property
    def offset_bits(self) -> int:
        """Bits that the offset takes, once per array of scales."""
        return 0 if self.offset == "none" else _OFFSET_BITS

    def __str__(self) -> str:
        """Return the spelling that :meth:`BlockFormat.parse` reads."""
        letter, _, usual = _SCALE_CODEBOOKS[self.codebook]
        offset = "" if self.offset == usual else f"+{self.offset}"
        return f"{letter}{self.bits}{offset}/{self.block_size}:{self.dtype}"


@annotated_class
@dataclass(frozen=True)
class Rotation(_Record):
    r"""Rotation of a matrix by orthogonal matrices, before it is cut into blocks.

    A product with a rotated weight rotates its inputs, its outputs, or both: :math:`W = R_m^T W' R_n`. Rotated weights are nearly
    normal numbers of one size, without outliers.

    Parameters
    ----------
    side : {"in", "out", "both"}
        ``"in"``: the inputs, which are the last axis of an array. ``"out"``: the outputs, the axis before it.
    seed : int, default 0
        Seed of the signs, from 0 to 2**32 - 1.

    Raises
    ------
    FormatError
        If a value is not one of those listed.

    References
    ----------
    QuIP#, arXiv 2402.04396, section 3. :func:`lqlora.ops.rotate` says which matrices are used.

    Examples
    --------
    >>> str(Rotation()), str(Rotation("both", 7))
    ('~in', '~both7')
    """

    side: RotationSide = "in"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.side, str) or self.side not in _SIDES:
            raise FormatError(f"side of a Rotation must be {_or(_SIDES)}, got {given(self.side)}.")
        _make_plain(self, "seed")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**32:
            raise FormatError(f"seed of a Rotation must be an int from 0 to {2**32 - 1}, got {given(self.seed)}.")

    @cached_property
    def seeds(self) -> Mapping[int, int]:
        """Seed of each axis that is rotated: that of the inputs is -1, that of the outputs -2."""
        return MappingProxyType({axis: self.seed + own for axis, own in _SIDES[self.side].items()})

    def __str__(self) -> str:
        """Return the part of the spelling that :meth:`BlockFormat.parse` reads."""
        return f"~{self.side}{self.seed or ''}"


@dataclass(frozen=True)
class BlockFormat(_Record):
    """Storage of an array as codes of a codebook with one scale per block. Scales have a separate format.

    Parameters
    ----------
    codebook : Codebook
        Levels that the normalized weights are rounded to, and the normalization of a block.
    block_size : int, default 64
        Weights per scale, at least 1.
    scales : {"float32", "float16", "bfloat16"} or ScaleFormat
        Storage of the scales.
    axis : int, optional
        Axis that blocks follow. Blocks start anew at each line along it, and the last block of a line may be short:
        ``-1`` cuts each row into blocks, ``0`` each column. A block size of at least the length of a line gives one
        scale per channel. If not given, blocks follow the row-major order of the whole array.
    levels : {"codebook", "matrix"} or int
        ``"codebook"``: the levels are those of the codebook, known by name. ``"matrix"``: levels are fitted to the
        whole array; they are stored with it, and count as storage. An int: the number of lines along ``axis`` that
        share a fitted set.
    rotation : Rotation, optional
        Rotation of the array before it is cut into blocks. It takes no storage: its seed is part of the format.

    Raises
    ------
    FormatError
        If a value is not one of those listed, or the scales cannot hold the sign that the codebook needs.

    Examples
    --------
    >>> import lqlora as lq
    >>> fmt = BlockFormat(lq.normal_float(3), 64, ScaleFormat(8, 256, "float32"))
    >>> str(fmt), float(fmt.bits_per_weight)
    ('nf3/64:u8/256:float32', 3.126953125)
    """

    codebook: Codebook
    block_size: int = 64
    scales: FloatName | ScaleFormat = "float32"
    axis: int | None = None
    levels: LevelSharing = "codebook"
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, Codebook):
            raise FormatError(f"codebook must be a Codebook, such as lqlora.NF4, got {given(self.codebook)}.")
        _make_plain(self, "block_size", "axis", "levels")
        if not is_integer(self.block_size) or self.block_size < 1:
            raise FormatError(f"block_size must be an int of at least 1, got {given(self.block_size)}.")
        known_name = isinstance(self.scales, str) and self.scales in _FLOAT_BITS
        if not known_name and not isinstance(self.scales, ScaleFormat):
            raise FormatError(f"scales must be {_or(_FLOAT_BITS)} or a ScaleFormat, got {given(self.scales)}.")
        if self.axis is not None and not is_integer(self.axis):
            raise FormatError(f"axis must be an int, or None for row-major order, got {given(self.axis)}.")
        if self.rotation is not None and not isinstance(self.rotation, Rotation):
            raise FormatError(f"rotation must be a Rotation or None, got {given(self.rotation)}.")
        self._check_levels()
        if self.codebook.normalization == "signed" and isinstance(self.scales, ScaleFormat) and not self.scales.signed:
            raise FormatError(
                f"scales of {self.codebook.name} have both signs, which {self.scales} cannot hold. Choose a float dtype, "
                "or 'int' or 'dynamic' without an offset."
            )

    def _check_levels(self) -> None:
        if not isinstance(self.levels, str) and not (is_integer(self.levels) and self.levels >= 1):
            raise FormatError(f"levels must be 'codebook', 'matrix' or an int of at least 1, got {given(self.levels)}.")
        if self.levels == "codebook":
            return
        if isinstance(self.levels, str) and self.levels != "matrix":
            raise FormatError(f"levels must be 'codebook', 'matrix' or an int of at least 1, got {given(self.levels)}.")
        if self.levels != "matrix" and self.axis is None:
            raise FormatError(f"levels={self.levels} counts lines and needs an axis: pass axis=-1 to count rows.")
        if self.codebook.normalization in ("affine", "rms"):
            kind = "integers" if self.codebook.normalization == "affine" else "those of states"
            raise FormatError(
                f"levels of {self.codebook.name} are {kind} and cannot be fitted, got levels={self.levels!r}. "
                "Choose another codebook."
            )

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Return the hash of the fields, computed once: plans of layouts are looked up by format in every call."""
        return self._hash

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.codebook.bits

    @cached_property
    def unrotated(self) -> BlockFormat:
        """The same format without its rotation: that of the array which is stored."""
        return self if self.rotation is None else replace(self, rotation=None)

    @cached_property
    def couples_rows(self) -> bool:
        """True if no row of a matrix can be decoded alone: blocks run down its columns, or its outputs are rotated."""
        return self.axis in (0, -2) or (self.rotation is not None and -2 in self.rotation.seeds)

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits per weight of a large array of whole blocks: codes, zero points, scales and second-level scales.

        :meth:`storage_bits` counts the bits of an array of a given shape, with its padding, offsets and fitted levels.
        """
        # A weight has a code of b bits, and 1 / B of what its block of B weights stores: one scale, and one zero point
        # of b bits or more under an affine codebook. Scales are an array in their own format, so by the same rule each of them
        # takes S = b' + S' / B' bits, to any depth. For nf3/64:u8/256:float32 that is
        #     b + S / B = 3 + (8 + 32 / 256) / 64 = 3.126953125 .
        # It is the limit of storage_bits over the number of weights for one long line: padding to whole bytes, the last
        # short block, offsets, and one set of levels vanish there. What every line adds does not vanish with more
        # lines: a short block at the end of each, and a set of levels for every few of them.
        scale_bits = (
            self.scales.format.bits_per_weight
            if isinstance(self.scales, ScaleFormat)
            else Fraction(_FLOAT_BITS[self.scales])
        )
        return self.bits + (scale_bits + self.codebook.zero_point_bits) / self.block_size

    @annotated
    def lines(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the number and the length of the lines that are cut into blocks. No block crosses the end of a line.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.

        Returns
        -------
        tuple of int
            Without an axis, one line of all entries; else the lines along the axis.

        Raises
        ------
        InvalidArgumentError
            If a length is negative, or the array does not have the axis, or an axis that is rotated.

        Examples
        --------
        >>> BlockFormat.parse("nf4/64@0").lines((10, 100))
        (100, 10)
        """
        if any(not hasattr(length, "__index__") or length < 0 for length in shape):
            raise InvalidArgumentError(f"shape must have integer lengths of at least 0, got {given(tuple(shape))}.")
        if self.rotation is not None and len(shape) < max(-axis for axis in self.rotation.seeds):
            raise InvalidArgumentError(f"shape {tuple(shape)} has no axis for the rotation of the format {self}.")
        if self.axis is None:
            return 1, prod(shape)
        if not -len(shape) <= self.axis < len(shape):
            raise InvalidArgumentError(f"axis {self.axis} of the format {self} does not exist in shape {tuple(shape)}.")
        axis = self.axis % len(shape)
        return prod([*shape[:axis], *shape[axis + 1 :]]), shape[axis]

    def blocks(self, shape: Sequence[int]) -> int:
        """Return the number of blocks, which is the number of scales.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.

        Returns
        -------
        int
            Blocks of all lines; the last block of each line may be short.

        Examples
        --------
        >>> BlockFormat.parse("nf4/64@0").blocks((100, 10))
        20
        """
        # ceil(length / B) for each line, not ceil(count / B): each line begins a new block. The ceiling is taken in
        # integers, because lengths may be symbols of a tracing compiler, and a float quotient is wrong beyond 2^53.
        lines, length = self.lines(shape)
        return lines * -(-length // self.block_size)

    def level_sets(self, shape: Sequence[int]) -> int:
        """Return the number of fitted sets of levels that an array of a shape has.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.

        Returns
        -------
        int
            0 if the levels are those of the codebook.

        Examples
        --------
        >>> BlockFormat.parse("nf4+fit16/64@-1").level_sets((100, 640))
        7
        """
        if isinstance(self.levels, int):
            # The last set may serve fewer lines. It is stored as a whole set.
            return -(-self.lines(shape)[0] // self.levels)
        return 1 if self.levels == "matrix" else 0

    @annotated
    def stored_arrays(self, shape: Sequence[int], batch: Sequence[int] = ()) -> StoredArrays:
        """Return the dtype and shape of each array that the format stores.

        Storage bits, checks of files, the operands of torch operators and tensors without memory are all derived from
        this. Lengths may be symbols of a tracing compiler.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.
        batch : sequence of int, optional
            Leading dimensions of a stack, which every stored array gets in front.

        Returns
        -------
        dict of str to tuple of str and tuple of int
            Dtype and shape by name, in the order of :meth:`lqlora.QuantizedArray.to_arrays`: ``codes`` and ``scales``, then
            ``zero_points`` of an affine codebook, and fitted ``levels``. Double quantization
            replaces ``scales`` by ``scales.codes``, ``scales.scales`` and ``scales.offset``, to any depth.

        Raises
        ------
        InvalidArgumentError
            If a length is negative, or the array does not have the axis.

        Examples
        --------
        >>> BlockFormat.parse("nf3/64:float16").stored_arrays((3, 3))
        {'codes': ('uint8', (4,)), 'scales': ('float16', (1,))}
        >>> list(BlockFormat.parse("nf4/64:u8/256:float32").stored_arrays((64, 64)))
        ['codes', 'scales.codes', 'scales.scales', 'scales.offset']
        """
        # With N weights of b bits in n blocks, zero points of z bits, and L levels in each of k fitted sets, the bytes are
        #     codes ceil(N b / 8) ,  zero points ceil(n z / 8) ,  levels 4 L k ,
        #     scales 4 n or 2 n ,  or if they are quantized  ceil(n b' / 8) + second-level scales + 4 for the offset.
        # Codes are rounded up to whole bytes once an array, not once a block: the codes of a block may begin within a
        # byte. Scales are one line of n numbers whatever the axis of the weights. A second-level block may therefore
        # span several lines of weights, and all scales share the offset. Members of a stack are quantized one by one:
        # each has its own offset and begins at a whole byte, so a batch multiplies whole bytes.
        # Names and order are those of QuantizedArray.to_arrays, and `nest` reads the nested names back.
        lines, length = self.lines(shape)
        blocks = self.blocks(shape)
        stored: StoredArrays = {"codes": ("uint8", (*batch, packed_size(lines * length, self.bits)))}
        if isinstance(self.scales, ScaleFormat):
            inner = self.scales.format.stored_arrays((blocks,), batch)
            if self.scales.offset_bits:
                inner["offset"] = "float32", (*batch, 1)
            stored |= {f"scales.{name}": array for name, array in inner.items()}
        else:
            stored["scales"] = self.scales, (*batch, blocks)
        if self.codebook.normalization == "affine":
            stored["zero_points"] = "uint8", (*batch, packed_size(blocks, self.codebook.zero_point_bits))
        if self.levels != "codebook":
            stored["levels"] = "float32", (*batch, self.level_sets(shape), len(self.codebook))
        return stored

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Return the exact number of bits that an array takes: eight times the bytes of its stored arrays.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.

        Returns
        -------
        int
            Packed codes and zero points with their padding to whole bytes, scales, second-level scales, offsets and
            fitted levels. The levels of the codebook are not counted: they are known by name.

        Raises
        ------
        InvalidArgumentError
            If a length is negative, or the array does not have the axis.

        Examples
        --------
        >>> BlockFormat.parse("nf3/64:float16").storage_bits((3, 3))
        48
        """
        return sum(_STORED_BITS[dtype] * prod(own) for dtype, own in self.stored_arrays(shape).values())

    @cached_property
    def _spelling(self) -> str:
        fitted = {"codebook": "", "matrix": "+fit"}.get(str(self.levels), f"+fit{self.levels}")
        axis = "" if self.axis is None else f"@{self.axis}"
        return f"{self.codebook.name}{fitted}/{self.block_size}{axis}{self.rotation or ''}:{self.scales}"

    def __str__(self) -> str:
        """Return the spelling that :meth:`parse` reads."""
        return self._spelling

    @classmethod
    def parse(cls, text: str, codebook: Codebook | None = None) -> BlockFormat:
        """Read the one-line spelling that plans, reports and the command line use.

        Parameters
        ----------
        text : str
            ``codebook/block size:scales``. ``nf4+fit/64`` has fitted levels, ``nf4+fit16/64@-1`` a set of them for
            every 16 rows; ``@-1`` is the axis. ``~in``, ``~out`` or ``~both`` after it is a rotation, and a number behind that
            its seed. Scales are a float dtype, float32 if left out, or quantized scales such as
            ``u8/256:float32``: a letter (``u`` uint, ``i`` int, ``d`` dynamic, ``l`` log), bits, block size, and the dtype
            of the second level, which may be quantized again. ``u8+none/256:float32`` is a second level without offset.
        codebook : Codebook, optional
            Codebook to use, where :func:`lqlora.codebooks.by_name` does not know the name in the text.

        Returns
        -------
        BlockFormat
            Format whose ``str()`` is the text.

        Raises
        ------
        FormatError
            If the text is not a format.

        Examples
        --------
        >>> BlockFormat.parse("nf4/64:u8/256:float32").scales.bits
        8
        >>> BlockFormat.parse("nf2+fit/64@-1:float16").levels
        'matrix'
        >>> BlockFormat.parse("tcq2/64@0~in:float16").rotation
        Rotation(side='in', seed=0)
        """
        if not isinstance(text, str):
            raise FormatError(f"text must be a block format, such as 'nf4/64:u8/256:float32', got {given(text)}.")
        if codebook is not None and not isinstance(codebook, Codebook):
            raise FormatError(f"codebook must be a Codebook, such as lqlora.NF4, got {given(codebook)}.")
        return _parse_standard(text.strip()) if codebook is None else _parse_format(text.strip(), codebook)


def float_bits(dtype: FloatName) -> int:
    """Return the bits per number of a dtype that scales and factors can be stored in.

    Parameters
    ----------
    dtype : {"float32", "float16", "bfloat16"}
        Name of the dtype.

    Returns
    -------
    int
        32 or 16.

    Raises
    ------
    FormatError
        If the dtype is not one of the three.

    Examples
    --------
    >>> float_bits("bfloat16")
    16
    """
    if not isinstance(dtype, str) or dtype not in _FLOAT_BITS:
        raise FormatError(f"dtype must be {_or(_FLOAT_BITS)}, got {given(dtype)}.")
    return _FLOAT_BITS[dtype]


def codebook_name(text: str) -> str:
    """Return the name of the codebook in the spelling of a format.

    Parameters
    ----------
    text : str
        Spelling that :meth:`BlockFormat.parse` reads.

    Returns
    -------
    str
        The text before the options and the block size.

    Examples
    --------
    >>> codebook_name("nf4+fit/64:float32")
    'nf4'
    """
    return re.split("[+/]", text, maxsplit=1)[0]


def _or(names: Iterable[str]) -> str:
    """Join names for a message: ``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _parse_format(text: str, codebook: Codebook | None) -> BlockFormat:
    # The pattern bounds the digits: 18 of them stay below 2^63, and no text costs a long conversion. The class checks
    # the numbers, so that a text and arguments raise the same errors.
    head, *scales = text.split(":")
    match = re.fullmatch(
        r"([^/+\s]+)(\+fit([0-9]{0,18}))?/([0-9]{1,18})(?:@(-?[0-9]{1,2}))?(?:~([a-z]{1,4})([0-9]{0,18}))?", head
    )
    if match is None or len(scales) > _MAX_DEPTH:
        raise FormatError(
            f"text must be a block format, such as 'nf4/64:u8/256:float32', got {text[:80]!r}{_fault(head)}."
        )
    name, fitted, lines, block_size, axis, side, seed = match.groups()
    return BlockFormat(
        codebook or by_name(name),
        int(block_size),
        _parse_scales(scales or ["float32"]),
        None if axis is None else int(axis),
        "codebook" if fitted is None else int(lines) if lines else "matrix",
        None if side is None else Rotation(side, int(seed or 0)),  # type: ignore[arg-type]  # checked there
    )


def _fault(head: str) -> str:
    """Return what is wrong with the part of a format before the scales, as the end of a message."""
    name, slash, rest = head.partition("/")
    size, options = re.split("(?=[@~])", rest, maxsplit=1) if re.search("[@~]", rest) else (rest, "")
    if not name or name.startswith("+"):
        return ": a codebook must come first, as in 'nf4/64'"
    if not slash:
        return ": a block size must follow the codebook, as in 'nf4/64'"
    if not re.fullmatch(r"[^/+\s]+(\+fit[0-9]{0,18})?", name):
        return f": codebook {name[:40]!r} may be followed by '+fit' or '+fit' and a number of at most 18 digits only"
    if not re.fullmatch("[0-9]{1,18}", size):
        return f": block size {size[:40]!r} must be a positive integer of at most 18 digits"
    if options:
        return f": {options[:40]!r} must be an axis of at most two digits such as '@-1', a rotation such as '~both', or both in this order"
    return f": scales may be quantized {_MAX_DEPTH - 1} times at most"


@lru_cache(maxsize=1024)
def _parse_standard(text: str) -> BlockFormat:
    """Read a format with a standard codebook; a file with thousands of matrices has the same few texts."""
    return _parse_format(text, None)


def _parse_scales(depths: list[str]) -> FloatName | ScaleFormat:
    """Read the parts between colons: one for each depth of double quantization, then a dtype."""
    # Quantized scales need another part for their own scales, and a dtype ends the text. The two conditions on ``rest``
    # refuse "u8/256", whose second-level scales have no dtype, and "float32:u8/256", whose second part would be
    # dropped.
    head, *rest = depths
    letters = {letter: codebook for codebook, (letter, _, _) in _SCALE_CODEBOOKS.items()}
    match = re.fullmatch(r"([a-z])([0-9]{1,2})(?:\+(min|mean|none))?/([0-9]{1,18})", head)
    if match is not None and match[1] in letters and rest:
        codebook = letters[match[1]]
        return ScaleFormat(int(match[2]), int(match[4]), _parse_scales(rest), match[3], codebook)  # type: ignore[arg-type]
    if head in _FLOAT_BITS and not rest:
        return head  # type: ignore[return-value]
    wanted = f"{_or(_FLOAT_BITS)}, or quantized scales such as u8/256:float32"
    raise FormatError(f"scales in the text must be {wanted}, got {':'.join(depths)[:80]!r}.")
