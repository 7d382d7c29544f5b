"""Schemas of JSON of other programs: 4-bit weights of bitsandbytes, adapters of PEFT, and the index of a model in parts."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from lqlora._documents import LONGEST, Length, Number, Text

__all__ = ["MOST_DIMENSIONS", "BlockSize", "Dtype", "Index", "LoraSettings", "NestedState", "State"]

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


#: Rank of an adapter.
Rank = Annotated[int, Meta(ge=1, le=LONGEST)]


class LoraSettings(Struct, frozen=True):
    """Settings of a LoRA adapter that say what is added to a weight. The reader looks at other fields itself."""

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: Number = 8
    use_rslora: bool = False
    rank_pattern: dict[Text, Rank] | None = None
    alpha_pattern: dict[Text, Number] | None = None
    init_lora_weights: bool | Text = True
