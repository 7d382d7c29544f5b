"""Schemas of JSON of other programs: descriptions of 4-bit weights of bitsandbytes, and the index of a model in parts."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from lqlora._documents import Length, Text

__all__ = ["MOST_DIMENSIONS", "BlockSize", "Dtype", "Index", "NestedState", "State"]

#: Sizes of blocks that bitsandbytes has.
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

#: Dtypes that bitsandbytes decodes to.
Dtype = Literal["float32", "float16", "bfloat16"]

#: Largest number of dimensions of a weight.
MOST_DIMENSIONS = 32

_FLOAT32_MAX = 3.4028234663852886e38


class State(Struct, frozen=True, forbid_unknown_fields=True):
    """Description of a weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: BlockSize
    dtype: Dtype
    shape: Annotated[list[Length], Meta(min_length=1, max_length=MOST_DIMENSIONS)]


class NestedState(State, frozen=True, forbid_unknown_fields=True):
    """Description of a weight with double quantization."""

    nested_blocksize: Literal[256]
    nested_dtype: Literal["float32"]
    nested_offset: Annotated[float, Meta(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]


class Index(Struct, frozen=True):
    """Index of a model in parts: the file of each tensor. Other fields are ignored."""

    weight_map: Annotated[dict[Text, Text], Meta(min_length=1)]
