"""Training of a quantized block on its own output: rounding, scales and levels by signs of gradients, factors by Adam."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch.nn import functional

from lqlora import ops
from lqlora._messages import given
from lqlora._options import require_choice, require_integer, require_number
from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora._warnings import warn
from lqlora.codebooks import Trellis
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.weight import QuantizedWeight
from lqlora.quantized._decoding import decode_scales, zero_point_codes
from lqlora.quantized._layout import blocks_last, in_shape, layout_of
from lqlora.quantized._rotation import as_rotated, as_stored, rotated
from lqlora.quantized._scales import with_scale_format
from lqlora.quantized.quantization import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lqlora.formats import BlockFormat
    from lqlora.nn.linear import LQLinear
    from lqlora.quantized import QuantizedArray

__all__ = ["BlockTuning", "TunedPart", "require_tunable", "tune_block"]

#: What can train.
TunedPart: TypeAlias = Literal["codes", "scales", "levels", "factors"]
_PARTS = ("codes", "scales", "levels", "factors")

#: Distance from the boundary of its cell, in widths of cells, that a weight starts with at least. Error feedback rounds some weights to
#: cells that they are far from: these start just inside of it, and a few small steps can take them back.
_MARGIN = 0.05

#: Cells that a weight would pass in all steps, if each was of the first one's size.
_TRAVEL = 0.25

#: A step of a scale or a level, relative to a step of a weight in its cell. Scales stay within a factor of two, and levels within a
#: quarter of the distance to the next one, so that they keep their order.
_SHARE, _LEAST, _MOST, _LEVEL_LIMIT = 0.25, 0.5, 2.0, 0.25


@dataclasses.dataclass(frozen=True)
class BlockTuning:
    """Training of each block right after :func:`quantize_blocks` has quantized it.

    The output of the quantized block, on inputs from the quantized blocks before it, is brought near that of the dense model for the
    same text. So a block also makes up for errors of the blocks before it. Unlike :func:`distill` this needs the memory of one block,
    and can train codes. On SmolLM2-135M affine codes of two bits in blocks of 64 have a perplexity of 185 with error feedback, and
    of 99 after 50 steps for each block (``experiments/README.md``).

    Parameters
    ----------
    steps : int, default 50
        Steps for each block.
    train : sequence of {"codes", "scales", "levels", "factors"}, default ("codes", "scales")
        What trains. Codes of trellis formats cannot. Scales are rounded to their storage at the end. Levels train where they are
        fitted, and factors where the rank is above 0.
    batch : int, default 4
        Number of parts for one step. A batch is one part; one with padding is cut into a part for each length.
    learning_rate : float, optional
        Largest step of a weight in the cell that rounds to its level, in widths of the cell. Scales and levels move by a quarter of
        it, relative to themselves and to the distance of levels. By default it is ``0.25 / steps``. On SmolLM2-135M at two bits
        ``1 / steps`` left more error on the inputs for calibration.
    factor_learning_rate : float, default 5e-4
        Largest learning rate of factors.
    seed : int, default 0
        Seed of the order of the parts.

    Raises
    ------
    InvalidArgumentError
        If an option is out of its range.

    Notes
    -----
    A weight :math:`w` in a block of scale :math:`s` has the code of the level nearest to :math:`w / s + v`. The offset :math:`v` trains, at
    most half a cell in size. Rounding passes gradients through. Steps have the size of the learning rate and the sign of the gradient,
    and become shorter linearly. Scales stay between a half and the double of what they were, and levels within a quarter of the distance
    to the next one. After all steps the block keeps what it had before, unless its error is lower now. The logger ``lqlora`` gives both
    errors at level INFO.

    References
    ----------
    SignRound (AutoRound), arXiv 2309.05516, section 3, trains offsets and ranges in this way, from nearest rounding. Here it starts
    from any quantization, such as error feedback.

    Examples
    --------
    >>> BlockTuning(steps=20, train=("scales",)).train
    ('scales',)
    """

    steps: int = 50
    train: Sequence[TunedPart] = ("codes", "scales")
    batch: int = 4
    learning_rate: float | None = None
    factor_learning_rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer(self.steps, "steps", 1)
        require_integer(self.batch, "batch", 1)
        require_integer(self.seed, "seed")
        if self.seed >= 2**63:
            raise InvalidArgumentError(f"seed must be below 2**63, got {given(self.seed)}.")
        if isinstance(self.train, str) or not isinstance(self.train, Sequence) or not self.train:
            raise InvalidArgumentError(f"train must be a sequence of {', '.join(_PARTS)}, got {given(self.train)}.")
        for part in self.train:
            require_choice(part, "train", _PARTS)
        object.__setattr__(self, "train", tuple(self.train))
        rates = {"factor_learning_rate": self.factor_learning_rate}
        if self.learning_rate is not None:
            rates["learning_rate"] = self.learning_rate
        for name, rate in rates.items():
            require_number(rate, name, "above 0 and finite", lambda own: 0 < own < math.inf)


class _Weight:
    """The stored weight of a layer as a function of what trains. Matrices lie in block order, one row for each line of blocks."""

    def __init__(self, layer: LQLinear, dense: torch.Tensor, train: Sequence[str]) -> None:
        self.layer, self.array = layer, layer.quantized.array
        self.rotation = self.array.format.rotation
        self.stored = as_stored(self.array)
        self.layout = layout_of(self.stored.format, self.stored.shape)
        scales = decode_scales(self.stored.scales, self.stored.format.scales)
        self.scales = scales.reshape(self.layout.lines, self.layout.blocks_per_line)
        self.ratio = torch.ones_like(self.scales, requires_grad="scales" in train)
        self.levels: torch.Tensor | None = None
        self.offset: torch.Tensor | None = None
        if "codes" in train or ("levels" in train and self.stored.levels is not None):
            self._set_levels(trained="levels" in train and self.stored.levels is not None)
        if "codes" in train:
            self._set_positions(dense)
        if self.levels is None:
            self.values = self._lines(dequantize(self.stored))
        self.dense = self.matrix().detach()
        self.lora_A, self.lora_B = (
            own.detach().clone().requires_grad_("factors" in train and layer.rank > 0)
            for own in (layer.lora_A, layer.lora_B)
        )

    def _lines(self, matrix: torch.Tensor) -> torch.Tensor:
        lines: torch.Tensor = (
            blocks_last(matrix, self.layout.axis).reshape(self.layout.lines, self.layout.length).contiguous()
        )
        return lines

    def _by_weight(self, by_block: torch.Tensor) -> torch.Tensor:
        return by_block.repeat_interleave(self.layout.block_size, dim=1)[:, : self.layout.length]

    def _set_levels(self, *, trained: bool) -> None:
        """Set the levels, one row or one for each line, with the codes and zero points of now."""
        device, layout, levels = self.scales.device, self.layout, self.stored.levels
        if levels is None:
            levels = torch.from_numpy(layout.codebook.levels.copy()).to(device)[None, :]
        self.levels = levels.detach().clone().requires_grad_(trained)
        self.sets = None if len(levels) == 1 else layout.sets_of(slice(0, layout.count), levels)
        # The cell of a level ends half way to its neighbors; at the ends cells are as wide as the gap beside them.
        gaps = levels[:, 1:] - levels[:, :-1]
        self.gaps = torch.cat([gaps[:, :1], gaps, gaps[:, -1:]], dim=1)
        self.first_levels = levels.detach().clone()
        self.first_codes = self._lines(self.stored.codes)
        points = zero_point_codes(self.stored)
        self.zeros = None if points is None else self._by_weight(points.to(torch.float32).reshape(self.scales.shape))

    def _set_positions(self, dense: torch.Tensor) -> None:
        """Set the position of each weight among the levels, within the cell of its code, and the width of the cell."""
        # What the codes stand for is the weight without its low-rank part, and rotated.
        layer = self.layer
        target = dense.to(torch.float32) - layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
        if self.rotation is not None:
            target = rotated(target, self.rotation, "w", check_finite=False)
        scales = self._by_weight(self.scales)
        position = self._lines(target) / torch.where(scales == 0, math.inf, scales)
        if self.zeros is not None:
            position += self.zeros
        center = self._of_codes(self.first_levels, self.first_codes)
        below, above = (self._of_codes(own, self.first_codes) / 2 for own in (self.gaps[:, :-1], self.gaps[:, 1:]))
        self.width = below + above
        inner = 1 - 2 * _MARGIN
        self.position = torch.minimum(torch.maximum(position, center - inner * below), center + inner * above)
        self.offset = torch.zeros_like(self.position, requires_grad=True)

    def _of_lines(self, table: torch.Tensor) -> torch.Tensor:
        """Return the rows of a table of sets for all lines, or its only row."""
        return table if self.sets is None else table[self.sets]

    def _of_codes(self, table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the entry of each code in a table of sets."""
        codes = codes.to(torch.int64)
        return table[0][codes] if self.sets is None else table[self.sets].gather(1, codes)

    def codes(self) -> torch.Tensor:
        """Return the code of each weight."""
        if self.offset is None:
            return self.first_codes
        assert self.levels is not None
        position, levels = self.position + self.offset.detach(), self._of_lines(self.levels.detach())
        bounds = (levels[:, 1:] + levels[:, :-1]) / 2  # a position on a boundary has the code below it
        return torch.bucketize(position, bounds[0]) if self.sets is None else torch.searchsorted(bounds, position)

    def matrix(self) -> torch.Tensor:
        """Return the stored matrix, through which gradients reach what trains."""
        if self.levels is None:
            values = self.values * self._by_weight(self.ratio)
        else:
            values = self._of_codes(self.levels, self.codes())
            if self.offset is not None:
                # Rounding passes the gradient of a position between two levels on, and none of one beyond the last level.
                ends = self._of_lines(self.first_levels)
                inside = torch.maximum(torch.minimum(self.position + self.offset, ends[:, -1:]), ends[:, :1])
                values = values + (inside - inside.detach())
            if self.zeros is not None:
                values = values - self.zeros
            values = values * self._by_weight(self.scales * self.ratio)
        return cast("torch.Tensor", in_shape(values.reshape(-1), self.layout.axis, self.stored.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, with the dense matrix of this step."""
        seeds = {} if self.rotation is None else self.rotation.seeds
        y = functional.linear(ops.rotate_rows(x, seeds[-1]) if -1 in seeds else x, self.dense.to(x.dtype))
        y = ops.rotate_rows(y, seeds[-2], inverse=True) if -2 in seeds else y
        if self.layer.rank:
            y = y + self.layer.scaling * ((x @ self.lora_A.T.to(x.dtype)) @ self.lora_B.T.to(x.dtype))
        return y if self.layer.bias is None else y + self.layer.bias.to(x.dtype)

    def quantized(self, name: str) -> QuantizedArray:
        """Return the array with the codes and scales of now, the scales rounded to their storage."""
        fmt = self.stored.format
        plain = dataclasses.replace(fmt, scales="float32")
        scales = (self.scales * self.ratio.detach()).reshape(-1)
        packed, levels = self.stored.packed, self.stored.levels
        if self.offset is not None:
            packed = ops.pack_codes(self.codes().to(torch.uint8).reshape(-1), fmt.bits)
        if levels is not None and self.levels is not None:
            levels = self.levels.detach()
        found = dataclasses.replace(self.stored, packed=packed, scales=scales, levels=levels, format=plain)
        return as_rotated(with_scale_format(found, fmt.scales, name), self.array.format)

    def trained(self) -> list[torch.Tensor]:
        """Return what trains by signs of gradients."""
        return [own for own in (self.offset, self.levels, self.ratio) if own is not None and own.requires_grad]

    def descend(self, rate: float, gradient: torch.Tensor) -> None:
        """Move offsets, levels and scales by a step against the signs of their gradients, given that of the matrix."""
        trained = self.trained()
        found = torch.autograd.grad(self.matrix(), trained, gradient)
        signs = {id(own): part.sign_() for own, part in zip(trained, found, strict=True)}
        with torch.no_grad():
            if self.offset is not None:
                self.offset.sub_(rate * signs[id(self.offset)] * self.width)
                limit = self.width / 2
                torch.minimum(torch.maximum(self.offset, -limit, out=self.offset), limit, out=self.offset)
            if self.levels is not None and self.levels.requires_grad:
                below, above = self.gaps[:, :-1], self.gaps[:, 1:]
                self.levels.sub_(rate * _SHARE * signs[id(self.levels)] * torch.minimum(below, above))
                least, most = self.first_levels - _LEVEL_LIMIT * below, self.first_levels + _LEVEL_LIMIT * above
                torch.minimum(torch.maximum(self.levels, least, out=self.levels), most, out=self.levels)
            if self.ratio.requires_grad:
                self.ratio.sub_(rate * _SHARE * signs[id(self.ratio)]).clamp_(_LEAST, _MOST)


def require_tunable(
    tuning: BlockTuning, formats: Mapping[str, BlockFormat], ranks: Mapping[str, int], *, fits_levels: bool
) -> None:
    """Raise if the codes of a layer cannot train, or nothing would train.

    Parameters
    ----------
    tuning : BlockTuning
        Options.
    formats : mapping of str to BlockFormat
        Formats by layer.
    ranks : mapping of str to int
        Ranks by layer.
    fits_levels : bool
        Whether levels will be fitted.

    Raises
    ------
    InvalidArgumentError
        If codes are to train, and a format has trellis codes, or there are neither fitted levels nor factors, and only these train.
    """
    for name, fmt in formats.items() if "codes" in tuning.train else ():
        if isinstance(fmt.codebook, Trellis):
            raise InvalidArgumentError(
                f"tuning must not train codes of trellis formats, but {printable(name)!r} has {fmt}. Pass train=('scales',)."
            )
    possible = {
        "factors": any(ranks.values()), "levels": fits_levels or any(own.levels != "codebook" for own in formats.values()),
    }  # fmt: skip
    if not any(possible.get(part, True) for part in tuning.train):
        raise InvalidArgumentError(
            f"tuning must train a part that the layers have, but train is {given(tuple(tuning.train))}, and there are no "
            f"{' or '.join(tuning.train)}. Train codes or scales, pass a rank, or fit='levels+scale'."
        )


def tune_block(
    layers: Mapping[str, LQLinear],
    dense: Mapping[str, torch.Tensor],
    run: Callable[[int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    tuning: BlockTuning,
) -> tuple[float, float]:
    """Train the layers of a block so that its output is near to what it should be, in place.

    Parameters
    ----------
    layers : mapping of str to LQLinear
        Layers by name.
    dense : mapping of str to Tensor
        Their dense weights.
    run : callable
        Function that runs the block on the inputs of a number, and returns its output.
    targets : sequence of Tensor
        Outputs to come near to.
    tuning : BlockTuning
        Options.

    Returns
    -------
    tuple of float
        Relative error of the output before and after.
    """
    weights = {name: _Weight(layer, dense[name], tuning.train) for name, layer in layers.items()}
    factors = [own for weight in weights.values() for own in (weight.lora_A, weight.lora_B) if own.requires_grad]
    before = _error(run, targets)
    if not (factors or any(weight.trained() for weight in weights.values())) or before == 0:
        return before, before
    with _replaced(weights), torch.enable_grad():
        _descend(weights, factors, run, targets, tuning)
    try:
        new = {
            name: [*QuantizedWeight(own.quantized(name)).buffers(), own.lora_A.detach(), own.lora_B.detach()]
            for name, own in weights.items()
        }
    except NonFiniteError:  # scales have left the range of their storage
        return before, before
    earlier = {name: [own.clone() for own in _values(layer)] for name, layer in layers.items()}
    _set(layers, new)
    after = _error(run, targets)
    if not after < before:  # NaN included
        _set(layers, earlier)
        return before, before
    return before, after


def _descend(
    weights: Mapping[str, _Weight],
    factors: Sequence[torch.Tensor],
    run: Callable[[int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    tuning: BlockTuning,
) -> None:
    """Train weights and factors for all steps."""
    trained = {name: weight for name, weight in weights.items() if weight.trained()}
    optimizer = torch.optim.Adam(factors, lr=tuning.factor_learning_rate) if factors else None
    rate = _TRAVEL / tuning.steps if tuning.learning_rate is None else tuning.learning_rate
    order, unit, unreached = _order(len(targets), tuning), _unit(targets), set(trained)
    for step in range(tuning.steps):
        left = 1 - step / tuning.steps
        # All parts of a step share the matrices: their gradients add up, and pass through the rounding once, layer by layer.
        with torch.no_grad():
            for weight in trained.values():
                weight.dense = weight.matrix()
        leaves = [*(weight.dense.requires_grad_() for weight in trained.values()), *factors]
        sums: list[torch.Tensor | None] = [None] * len(leaves)
        for index in next(order):
            loss = (run(index).float() - targets[index].float()).square().sum() / unit
            found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
            sums = [
                own if total is None else total if own is None else total.add_(own)
                for total, own in zip(sums, found, strict=True)
            ]
        for (name, weight), gradient in zip(trained.items(), sums, strict=False):
            if gradient is not None:
                weight.descend(rate * left, gradient)
                unreached.discard(name)
        if optimizer is not None:
            for own, gradient in zip(factors, sums[len(trained) :], strict=True):
                own.grad = gradient
            optimizer.param_groups[0]["lr"] = tuning.factor_learning_rate * left
            optimizer.step()
    if unreached:
        warn(
            f"tuning left {len(unreached)} layers as they were ({list_names(sorted(unreached))}): the block reads their weights without "
            "calling them, or no part of the batches reaches them."
        )


def _unit(targets: Sequence[torch.Tensor]) -> float:
    """Return the unit of the squared error of a part."""
    # Signs of gradients have no unit. But in float16 gradients must neither underflow nor overflow: with mean squares their entries would
    # be as small as one over the number of outputs, and sums over that number as large. This is half way, for targets of any size.
    norm = sum(float(own.double().square().sum()) for own in targets)
    return (norm or 1.0) / math.sqrt(max(1, *(own.numel() for own in targets)) * len(targets))


def _order(count: int, tuning: BlockTuning) -> Iterator[list[int]]:
    """Yield the parts of each step: all parts in a random order, then in another one."""
    generator = torch.Generator().manual_seed(tuning.seed)
    left: list[int] = []
    while True:
        while len(left) < min(tuning.batch, count):
            left += torch.randperm(count, generator=generator).tolist()
        step, left = left[: tuning.batch], left[tuning.batch :]
        yield step


def _error(run: Callable[[int], torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
    """Return the relative error of the outputs of a block."""
    error = norm = 0.0
    with torch.no_grad():
        for index, target in enumerate(targets):
            error += float((run(index).double() - target.double()).square().sum())
            norm += float(target.double().square().sum())
    return math.sqrt(error / norm) if norm else 0.0


@contextmanager
def _replaced(weights: Mapping[str, _Weight]) -> Iterator[None]:
    """Let layers compute with weights that train, for the time of the ``with`` statement."""
    for own in weights.values():
        own.layer.forward = functools.partial(_Weight.forward, own)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for own in weights.values():
            vars(own.layer).pop("forward", None)


def _values(layer: LQLinear) -> list[torch.Tensor]:
    """Return the buffers of a quantized weight, and the factors."""
    return [*layer.quantized.buffers(), layer.lora_A.detach(), layer.lora_B.detach()]


def _set(layers: Mapping[str, LQLinear], values: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Set the values of layers in place, so that modules that share their tensors go on sharing them."""
    with torch.no_grad():
        for name, layer in layers.items():
            for own, new in zip(_values(layer), values[name], strict=True):
                own.copy_(new)
