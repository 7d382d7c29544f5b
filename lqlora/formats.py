"""Block formats: which codebook, how many weights per scale, how the scales are stored. No arrays here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

from lqlora.codebooks import Codebook, by_name, normal_float
from lqlora.errors import FormatError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora._typing import FloatName

__all__ = [
    "BlockFormat",
    "LevelSharing",
    "Offset",
    "ScaleCodebook",
    "ScaleFormat",
    "codebook_name",
    "float_bits",
    "paper_grid",
]

Offset: TypeAlias = Literal["min", "mean", "none"]
ScaleCodebook: TypeAlias = Literal["uint", "int", "dynamic", "log"]
LevelSharing: TypeAlias = Literal["codebook", "matrix"] | int

_FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_MAX_DEPTH = 8  # levels of scales that text may spell; one is usual, two are rare
_OFFSET_BITS = 32  # one float32 per array of scales
_LEVEL_BITS = 32  # fitted levels are float32

#: Per codebook of scales: its letter in the spelling, the name of its levels, the offset it has unless told otherwise.
_SCALE_CODEBOOKS: dict[str, tuple[str, str, Offset]] = {
    "uint": ("u", "uint{}", "min"),
    "int": ("i", "int{}", "none"),
    "dynamic": ("d", "dynamic{}", "mean"),
    "log": ("l", "log{}", "none"),
}
_SIGNED = ("int", "dynamic")


@dataclass(frozen=True)
class ScaleFormat:
    """How the scales of a :class:`BlockFormat` are quantized themselves.

    Parameters
    ----------
    bits : int
        Bits of a scale's code, 1 to 8.
    block_size : int
        Scales per second-level scale.
    dtype : {"float32", "float16", "bfloat16"} or ScaleFormat
        Storage of the second-level scales; another ScaleFormat quantizes those too, to any depth.
    offset : {"min", "mean", "none"}, optional
        What is subtracted from the scales before they are quantized and added back after, kept as one float32: the
        smallest scale of the whole array (LQ-LoRA), their mean (QLoRA), or nothing. The default is ``"min"`` for
        ``"uint"``, ``"mean"`` for ``"dynamic"``, else ``"none"``.
    codebook : {"uint", "int", "dynamic", "log"}
        Levels of the codes. ``"uint"``: ``k / (2**bits - 1)``. ``"int"``: symmetric about zero, for scales that have a
        sign. ``"dynamic"``: the signed dynamic map of bitsandbytes, 8 bits. ``"log"``: zero and a geometric series over
        16 octaves, 3 to 8 bits, whose relative error does not grow for small scales.

    Raises
    ------
    FormatError
        If a value is not one of those.

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
        if self.codebook not in _SCALE_CODEBOOKS:
            known = ", ".join(_SCALE_CODEBOOKS)
            raise FormatError(f"The codebook of scales is one of {known}, not {self.codebook!r}.")
        if self.offset is None:
            object.__setattr__(self, "offset", _SCALE_CODEBOOKS[self.codebook][2])
        if self.offset not in ("min", "mean", "none"):
            raise FormatError(f"The offset of scales is 'min', 'mean' or 'none', not {self.offset!r}.")
        if self.offset == "mean" and self.codebook not in _SIGNED:
            raise FormatError(
                f"Scales below their mean need a signed codebook ('int', 'dynamic'), not {self.codebook!r}."
            )
        _ = self.format  # checks the rest

    @property
    def format(self) -> BlockFormat:
        """The same as a block format: double quantization is recursion."""
        return BlockFormat(self.levels, self.block_size, self.dtype)

    @property
    def levels(self) -> Codebook:
        """The codebook that the scales are rounded to."""
        if not isinstance(self.bits, int) or isinstance(self.bits, bool):
            raise FormatError(f"The bits of a scale are an int, not {self.bits!r}.")
        return by_name(_SCALE_CODEBOOKS[self.codebook][1].format(self.bits))

    @property
    def signed(self) -> bool:
        """Whether scales of both signs keep their sign: with an offset the smallest may come out on its other side."""
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


@dataclass(frozen=True)
class BlockFormat:
    """One way to store an array: codes of a codebook, one scale per block, the scales in a format of their own.

    Parameters
    ----------
    codebook : Codebook
        Levels that the normalized weights are rounded to, and how a block is normalized.
    block_size : int, default 64
        Weights per scale, at least 1.
    scales : {"float32", "float16", "bfloat16"} or ScaleFormat
        Storage of the scales.
    axis : int, optional
        Blocks follow this axis and start anew at each of its lines, the last of a line may be short: ``-1`` cuts each
        row into blocks (with a block size of at least its length: one scale per output channel), ``0`` each column.
        Not given, blocks follow the row-major order of the whole array.
    levels : {"codebook", "matrix"} or int
        ``"codebook"``: the levels are those of the codebook, known by name. ``"matrix"``: the array has levels of its
        own, which are stored with it and counted. An int: each so many lines along ``axis`` have levels of their own.

    Raises
    ------
    FormatError
        If a value is not one of those, or the scales cannot hold the sign that the codebook needs.

    Examples
    --------
    >>> fmt = BlockFormat(normal_float(3), 64, ScaleFormat(8, 256, "float32"))
    >>> str(fmt), float(fmt.bits_per_weight)
    ('nf3/64:u8/256:float32', 3.126953125)
    """

    codebook: Codebook
    block_size: int = 64
    scales: FloatName | ScaleFormat = "float32"
    axis: int | None = None
    levels: LevelSharing = "codebook"

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, Codebook):
            raise FormatError(f"A format needs a Codebook, not {type(self.codebook).__name__}.")
        if not _is_int(self.block_size) or self.block_size < 1:
            raise FormatError(f"A block holds at least 1 weight, not {self.block_size!r}.")
        known_name = isinstance(self.scales, str) and self.scales in _FLOAT_BITS
        if not known_name and not isinstance(self.scales, ScaleFormat):
            known = ", ".join(_FLOAT_BITS)
            raise FormatError(f"Scales are stored as {known} or by a ScaleFormat, not {self.scales!r}.")
        if self.axis is not None and not _is_int(self.axis):
            raise FormatError(f"The axis of blocks is an int or None, not {self.axis!r}.")
        self._check_levels()
        if self.codebook.normalization == "signed" and isinstance(self.scales, ScaleFormat) and not self.scales.signed:
            raise FormatError(f"{self.codebook.name} has scales of both signs, which {self.scales} cannot hold.")

    def _check_levels(self) -> None:
        if self.levels == "codebook":
            return
        if self.levels != "matrix" and not (_is_int(self.levels) and int(self.levels) >= 1):
            raise FormatError(f"Levels are shared by 'codebook', 'matrix' or a number of lines, not {self.levels!r}.")
        if self.levels != "matrix" and self.axis is None:
            raise FormatError("Levels for so many lines need an axis, such as -1 for rows.")
        if self.codebook.normalization == "affine":
            raise FormatError(f"{self.codebook.name} has integer levels, which cannot be fitted.")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.codebook.bits

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits per weight of a very large array: codes, scales and second-level scales.

        :meth:`storage_bits` counts what an array of a given shape takes, with its padding and offsets.
        """
        scale_bits = (
            self.scales.format.bits_per_weight
            if isinstance(self.scales, ScaleFormat)
            else Fraction(_FLOAT_BITS[self.scales])
        )
        zero_point_bits = self.bits if self.codebook.normalization == "affine" else 0
        return self.bits + (scale_bits + zero_point_bits) / self.block_size

    def lines(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return number and length of the lines that blocks follow without a break.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.

        Returns
        -------
        tuple of int
            One line of all entries without an axis, else the lines along it.

        Raises
        ------
        InvalidArgumentError
            If a length is negative, or the array does not have the axis.

        Examples
        --------
        >>> BlockFormat(normal_float(4), 64, axis=0).lines((10, 100))
        (100, 10)
        """
        if any(length < 0 for length in shape):
            raise InvalidArgumentError(f"A shape has no negative lengths: {tuple(shape)}.")
        if self.axis is None:
            return 1, prod(shape)
        if not -len(shape) <= self.axis < len(shape):
            raise InvalidArgumentError(f"Blocks along axis {self.axis} need such an axis; the shape is {tuple(shape)}.")
        axis = self.axis % len(shape)
        return prod([*shape[:axis], *shape[axis + 1 :]]), shape[axis]

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
        >>> BlockFormat(normal_float(4), 64, axis=-1, levels=16).level_sets((100, 640))
        7
        """
        if isinstance(self.levels, int):
            return -(-self.lines(shape)[0] // self.levels)
        return 1 if self.levels == "matrix" else 0

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Bits that an array of a shape takes, exactly: eight times the bytes of its stored arrays.

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
        >>> BlockFormat(normal_float(3), 64, "float16").storage_bits((3, 3))
        48
        """
        lines, length = self.lines(shape)
        blocks = lines * -(-length // self.block_size)
        bits = _whole_bytes(lines * length * self.bits) + self.level_sets(shape) * len(self.codebook) * _LEVEL_BITS
        if self.codebook.normalization == "affine":
            bits += _whole_bytes(blocks * self.bits)
        if isinstance(self.scales, ScaleFormat):
            return bits + self.scales.format.storage_bits((blocks,)) + self.scales.offset_bits
        return bits + blocks * _FLOAT_BITS[self.scales]

    def __str__(self) -> str:
        """Return the spelling that :meth:`parse` reads."""
        fitted = {"codebook": "", "matrix": "+fit"}.get(str(self.levels), f"+fit{self.levels}")
        axis = "" if self.axis is None else f"@{self.axis}"
        return f"{self.codebook.name}{fitted}/{self.block_size}{axis}:{self.scales}"

    @classmethod
    def parse(cls, text: str, codebook: Codebook | None = None) -> BlockFormat:
        """Read the one-line spelling used in plans, reports and on the command line.

        Parameters
        ----------
        text : str
            ``codebook/block size:scales``. ``nf4+fit/64`` has fitted levels, ``nf4+fit16/64@-1`` a set of them for
            every 16 rows; ``@-1`` is the axis. Scales are a float dtype, float32 if left out, or such as
            ``u8/256:float32``: a letter (``u`` uint, ``i`` int, ``d`` dynamic, ``l`` log), bits, block size and dtype of
            the second level, which may be scales again. ``u8+none/256:float32`` is a second level without an offset.
        codebook : Codebook, optional
            The codebook, where the text spells one that :func:`lqlora.codebooks.by_name` does not know.

        Returns
        -------
        BlockFormat
            ``str()`` of it gives the text back.

        Raises
        ------
        FormatError
            If the text does not spell a format.

        Examples
        --------
        >>> BlockFormat.parse("nf4/64:u8/256:float32").scales.bits
        8
        >>> BlockFormat.parse("nf2+fit/64@-1:float16").levels
        'matrix'
        """
        head, *scales = text.strip().split(":")
        match = re.fullmatch(r"([^/+\s]+)(\+fit([0-9]{0,18}))?/([0-9]{1,18})(?:@(-?[0-9]{1,2}))?", head)
        if match is None or len(scales) > _MAX_DEPTH:
            raise FormatError(f"{text[:80]!r} is no block format: expected such as 'nf4/64:u8/256:float32'.")
        name, fitted, lines, block_size, axis = match.groups()
        return cls(
            codebook or by_name(name),
            int(block_size),
            _parse_scales(scales or ["float32"]),
            None if axis is None else int(axis),
            "codebook" if fitted is None else int(lines) if lines else "matrix",
        )


def float_bits(dtype: FloatName) -> int:
    """Return the bits of a floating-point dtype that scales and factors are stored as.

    Parameters
    ----------
    dtype : {"float32", "float16", "bfloat16"}
        The dtype.

    Returns
    -------
    int
        32 or 16.

    Raises
    ------
    FormatError
        If it is none of those.

    Examples
    --------
    >>> float_bits("bfloat16")
    16
    """
    if dtype not in _FLOAT_BITS:
        raise FormatError(f"Numbers are stored as {', '.join(_FLOAT_BITS)}, not as {dtype!r}.")
    return _FLOAT_BITS[dtype]


def codebook_name(text: str) -> str:
    """Return the name of the codebook in the spelling of a format.

    Parameters
    ----------
    text : str
        As :meth:`BlockFormat.parse` reads it.

    Returns
    -------
    str
        What is written before the options and the block size.

    Examples
    --------
    >>> codebook_name("nf4+fit/64:float32")
    'nf4'
    """
    return re.split("[+/]", text, maxsplit=1)[0]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole_bytes(bits: int) -> int:
    return 8 * -(-bits // 8)


def _parse_scales(levels: list[str]) -> FloatName | ScaleFormat:
    head, *rest = levels
    letters = {letter: codebook for codebook, (letter, _, _) in _SCALE_CODEBOOKS.items()}
    match = re.fullmatch(r"([a-z])([0-9]{1,2})(?:\+(min|mean|none))?/([0-9]{1,18})", head)
    if match is not None and match[1] in letters and rest:
        codebook = letters[match[1]]
        return ScaleFormat(int(match[2]), int(match[4]), _parse_scales(rest), match[3], codebook)  # type: ignore[arg-type]
    if head in _FLOAT_BITS and not rest:
        return head  # type: ignore[return-value]
    wanted = "float32, float16, bfloat16 or such as u8/256:float32"
    raise FormatError(f"{':'.join(levels)[:80]!r} spells no scales: expected {wanted}.")


def paper_grid(which: Literal["code", "paper"] = "code") -> list[BlockFormat]:
    """All configurations that LQ-LoRA searches.

    Parameters
    ----------
    which : {"code", "paper"}
        The 432 of the published code (codes of 2, 3, 4 or 8 bits) or the 243 of the paper's table (2, 3 or 4 bits).

    Returns
    -------
    list of BlockFormat
        NormalFloat codes, blocks of 16, 32 or 64, scales of as many bits as codes may have in blocks of 16, 64 or 256,
        second-level scales as bfloat16, float16 or float32.

    Raises
    ------
    InvalidArgumentError
        If ``which`` is another word.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, table 1.

    Examples
    --------
    >>> len(paper_grid("code")), len(paper_grid("paper"))
    (432, 243)
    """
    widths = {"code": (2, 3, 4, 8), "paper": (2, 3, 4)}.get(which)
    if widths is None:
        raise InvalidArgumentError(f"The grid is 'code' or 'paper', not {which!r}.")
    dtypes: tuple[FloatName, ...] = ("bfloat16", "float16", "float32")
    return [
        BlockFormat(normal_float(b0), size0, ScaleFormat(b1, size1, dtype))
        for b0, size0, b1, size1, dtype in product(widths, (16, 32, 64), widths, (16, 64, 256), dtypes)
    ]
