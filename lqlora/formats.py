"""Block formats: which codebook, how many weights per scale, how the scales are stored. No arrays here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

from lqlora.codebooks import Codebook, by_name, normal_float, uniform
from lqlora.errors import FormatError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora._typing import FloatName

__all__ = ["BlockFormat", "Offset", "ScaleFormat", "paper_grid"]

Offset: TypeAlias = Literal["min", "none"]

_FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_MAX_DEPTH = 8  # levels of scales that text may spell; one is usual, two are rare
_OFFSET_BITS = 32  # one float32 per array of scales


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
    offset : {"min", "none"}
        What is subtracted from the scales before they are quantized and added back after: the smallest scale of the
        whole array, as LQ-LoRA does, or nothing. Kept as one float32.
    codebook : {"uint"}
        Levels of the codes: ``k / (2**bits - 1)``.

    Raises
    ------
    FormatError
        If a value is not one of those.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; double quantization is from QLoRA, arXiv 2305.14314, section 3.

    Examples
    --------
    >>> str(ScaleFormat(8, 256))
    'u8/256:float32'
    """

    bits: int
    block_size: int
    dtype: FloatName | ScaleFormat = "float32"
    offset: Offset = "min"
    codebook: Literal["uint"] = "uint"

    def __post_init__(self) -> None:
        if self.codebook != "uint":
            raise FormatError(f"Scales take the codebook 'uint', not {self.codebook!r}.")
        if self.offset not in ("min", "none"):
            raise FormatError(f"The offset of scales is 'min' or 'none', not {self.offset!r}.")
        _ = self.format  # checks the rest

    @property
    def format(self) -> BlockFormat:
        """The same as a block format: double quantization is recursion."""
        return BlockFormat(uniform(self.bits, signed=False), self.block_size, self.dtype)

    @property
    def offset_bits(self) -> int:
        """Bits that the offset takes, once per array of scales."""
        return 0 if self.offset == "none" else _OFFSET_BITS

    def __str__(self) -> str:
        """Return the spelling that :meth:`BlockFormat.parse` reads."""
        offset = "" if self.offset == "min" else f"+{self.offset}"
        return f"u{self.bits}{offset}/{self.block_size}:{self.dtype}"


@dataclass(frozen=True)
class BlockFormat:
    """One way to store a matrix: codes of a codebook, one scale per block, the scales in a format of their own.

    Parameters
    ----------
    codebook : Codebook
        Levels that the normalized weights are rounded to.
    block_size : int, default 64
        Weights per scale, at least 1; blocks follow the row-major order of the whole array.
    scales : {"float32", "float16", "bfloat16"} or ScaleFormat
        Storage of the scales.

    Raises
    ------
    FormatError
        If a value is not one of those.

    Examples
    --------
    >>> fmt = BlockFormat(normal_float(3), 64, ScaleFormat(8, 256, "float32"))
    >>> str(fmt), float(fmt.bits_per_weight)
    ('nf3/64:u8/256:float32', 3.126953125)
    """

    codebook: Codebook
    block_size: int = 64
    scales: FloatName | ScaleFormat = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, Codebook):
            raise FormatError(f"A format needs a Codebook, not {type(self.codebook).__name__}.")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 1:
            raise FormatError(f"A block holds at least 1 weight, not {self.block_size!r}.")
        known_name = isinstance(self.scales, str) and self.scales in _FLOAT_BITS
        if not known_name and not isinstance(self.scales, ScaleFormat):
            known = ", ".join(_FLOAT_BITS)
            raise FormatError(f"Scales are stored as {known} or by a ScaleFormat, not {self.scales!r}.")

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
        return self.bits + scale_bits / self.block_size

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Bits that an array of a shape takes, exactly: eight times the bytes of its stored arrays.

        Parameters
        ----------
        shape : sequence of int
            Shape of the array of weights.

        Returns
        -------
        int
            Packed codes, scales, second-level scales and offsets, including the padding of codes to whole bytes. The
            levels of the codebook are not counted: they are known by name.

        Raises
        ------
        InvalidArgumentError
            If a length is negative.

        Examples
        --------
        >>> BlockFormat(normal_float(3), 64, "float16").storage_bits((3, 3))
        48
        """
        if any(length < 0 for length in shape):
            raise InvalidArgumentError(f"A shape has no negative lengths: {tuple(shape)}.")
        count = prod(shape)
        blocks = -(-count // self.block_size)
        code_bits = 8 * -(-count * self.bits // 8)
        if isinstance(self.scales, ScaleFormat):
            return code_bits + self.scales.format.storage_bits((blocks,)) + self.scales.offset_bits
        return code_bits + blocks * _FLOAT_BITS[self.scales]

    def __str__(self) -> str:
        """Return the spelling that :meth:`parse` reads."""
        return f"{self.codebook.name}/{self.block_size}:{self.scales}"

    @classmethod
    def parse(cls, text: str, codebook: Codebook | None = None) -> BlockFormat:
        """Read the one-line spelling used in plans, reports and on the command line.

        Parameters
        ----------
        text : str
            ``codebook/block_size:scales``, where scales are a float dtype or ``u<bits>/<block size>:<dtype>``. Left
            out, the scales are float32. ``u8+none/256:float32`` is a second level without an offset.
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
        """
        head, *levels = text.strip().split(":")
        match = re.fullmatch(r"([^/\s]+)/([0-9]{1,18})", head)
        if match is None or len(levels) > _MAX_DEPTH:
            raise FormatError(f"{text[:80]!r} is no block format: expected such as 'nf4/64:u8/256:float32'.")
        return cls(codebook or by_name(match[1]), int(match[2]), _parse_scales(levels or ["float32"]))


def _parse_scales(levels: list[str]) -> FloatName | ScaleFormat:
    head, *rest = levels
    match = re.fullmatch(r"u([0-9]{1,2})(?:\+(min|none))?/([0-9]{1,18})", head)
    if match is not None and rest:
        try:
            return ScaleFormat(int(match[1]), int(match[3]), _parse_scales(rest), match[2] or "min")  # type: ignore[arg-type]
        except InvalidArgumentError as error:
            raise FormatError(f"{':'.join(levels)!r} spells no scales: {error}") from None
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
