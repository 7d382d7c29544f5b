"""Strategies for the problems of each property of backends. Each property varies one thing and leaves the rest easy.

Easy means float32, 4 bits, whole blocks of 64 weights of ordinary size, no zero points, and levels of NormalFloat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lqlora.testing._verdicts import NotApplicableError
from lqlora.testing.backends._cases import Blocks, Product
from lqlora.testing.strategies import formats, largest_for, weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora.formats import BlockFormat
    from lqlora.testing.backends._subject import BackendSubject

Inputs: TypeAlias = SearchStrategy[dict[str, Any]]

_SEEDS = st.integers(0, 2**16)
_BITS = st.integers(1, 8)
_WHOLE = st.integers(1, 4).map(lambda blocks: 64 * blocks)

#: Block sizes around the sizes at which loops are split, and counts that end within a block, a byte or a vector.
_BLOCK_SIZES = (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 256, 257)
_COUNTS = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 129, 190, 257]) | st.integers(1, 300)

#: Bits, block sizes and counts that overrides split into pieces or among threads.
_LARGE = (
    (1, 3, 32767), (2, 64, 32769), (3, 63, 70_001), (4, 64, 262_147), (5, 32, 100_000), (6, 4096, 131_073),
    (7, 32_769, 65_537), (8, 64, 300_003), (4, 1, 65_536), (3, 100_000, 70_001),
)  # fmt: skip


def _case(**parts: Any) -> Inputs:
    parts = {name: part if isinstance(part, SearchStrategy) else st.just(part) for name, part in parts.items()}
    return st.fixed_dictionaries({"case": st.builds(Blocks, seed=_SEEDS, **{"count": _WHOLE, **parts})})


def _of(**parts: Any) -> Callable[[BackendSubject], Inputs]:
    def inputs(_: BackendSubject) -> Inputs:
        return _case(**parts)

    return inputs


ordinary = _of()
all_bits = _of(bits=_BITS, count=st.integers(1, 8).map(lambda bytes_: 64 * bytes_))
tails = _of(bits=_BITS, count=_COUNTS)
empty = _of(count=0, bits=_BITS, block_size=st.sampled_from([1, 64]), zero_points=st.booleans())
zero_points = _of(bits=_BITS, zero_points=True)
any_levels = _of(bits=_BITS, any_levels=True)
boundaries = _of(bits=_BITS, values="boundaries", zero_points=st.booleans(), count=st.just(256))
special = _of(bits=st.sampled_from([4, 8]), values="special", zero_points=st.booleans())
unused_bits = _of(bits=_BITS, count=_COUNTS, unused_bits=True)


def all_dtypes(subject: BackendSubject) -> Inputs:
    """Draw every floating-point dtype that the library has."""
    return _case(dtype=st.sampled_from(subject.dtypes), bits=st.sampled_from([4, 8]))


def block_sizes(_: BackendSubject) -> Inputs:
    """Draw block sizes around powers of two, and around the number of weights."""
    counts = st.sampled_from([64, 128, 256])
    near = st.tuples(counts, st.sampled_from([-1, 0, 1])).map(lambda pair: (pair[0], pair[0] + pair[1]))
    pairs = st.tuples(counts, st.sampled_from(_BLOCK_SIZES)) | near
    return st.fixed_dictionaries({"case": st.tuples(_SEEDS, pairs).map(_with_block_size)})


def _with_block_size(drawn: tuple[int, tuple[int, int]]) -> Blocks:
    seed, (count, block_size) = drawn
    return Blocks(seed, block_size=block_size, count=count)


def combinations(subject: BackendSubject) -> Inputs:
    """Draw all parts of a problem at once."""
    return _case(
        dtype=st.sampled_from(subject.dtypes),
        bits=_BITS,
        block_size=st.sampled_from(_BLOCK_SIZES) | st.integers(1, 300),
        count=_COUNTS,
        values=st.sampled_from(["noise", "boundaries", "special"]),
        zero_points=st.booleans(),
        any_levels=st.booleans(),
        unused_bits=st.booleans(),
    )


def large(_: BackendSubject) -> Inputs:
    """Draw one of a few large sizes."""
    cases = [Blocks(0, "float32", bits, size, count, zero_points=bits == 3) for bits, size, count in _LARGE]
    return st.fixed_dictionaries({"case": st.sampled_from(cases)})


def non_finite(subject: BackendSubject) -> Inputs:
    """Draw weights with NaN and infinity among them."""
    return _case(dtype=st.sampled_from(subject.dtypes), values="non-finite", count=_COUNTS, block_size=8)


def midpoints(subject: BackendSubject) -> Inputs:
    """Draw products midway between two numbers of 16 bits."""
    narrow = [name for name in subject.dtypes if name in ("float16", "bfloat16")]
    if not narrow:
        raise NotApplicableError("the library has no floating-point dtype of 16 bits")
    return _case(dtype=st.sampled_from(narrow), values="midpoints", block_size=st.integers(1, 4), count=256)


def layouts(subject: BackendSubject) -> Inputs:
    """Draw layouts that are not contiguous, aligned and writable."""
    words = ["every second", "reversed"]
    if subject.library == "numpy":
        words += ["unaligned", "read-only"]
    case = st.builds(Blocks, seed=_SEEDS, bits=_BITS, count=_WHOLE, zero_points=st.booleans())
    return st.fixed_dictionaries({"case": case, "layout": st.sampled_from(words)})


def _products(subject: BackendSubject, *, exact: bool) -> Inputs:
    case = st.builds(
        Product,
        seed=_SEEDS,
        dtype=st.sampled_from(subject.dtypes),
        bits=_BITS,
        block_size=st.sampled_from(_BLOCK_SIZES),
        rows=st.integers(0, 20),
        columns=st.integers(1, 130) | st.sampled_from([64, 128, 256]),
        batch=st.integers(0, 9),
        zero_points=st.booleans(),
        exact=st.just(exact),
    )
    return st.fixed_dictionaries({"case": case})


def integers(subject: BackendSubject) -> Inputs:
    """Draw products of integers, whose sums are exact."""
    return _products(subject, exact=True)


def products(subject: BackendSubject) -> Inputs:
    """Draw products of any numbers."""
    return _products(subject, exact=False)


def formatted(subject: BackendSubject) -> Inputs:
    """Draw a format, and weights in its range."""
    scales: Any = [name for name in ("float32", "float16", "bfloat16") if name in subject.dtypes]
    return formats(scales, axes=(None, 0, -1)).flatmap(_with_weights)


def _with_weights(fmt: BlockFormat) -> Inputs:
    dtypes = st.sampled_from([np.float32, np.float64])
    drawn = dtypes.flatmap(lambda dtype: weights(dtype, largest_for(fmt)))
    return drawn.map(lambda w: {"fmt": fmt, "w": w if fmt.axis is None else np.atleast_1d(w)})
