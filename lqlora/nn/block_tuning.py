"""Training of a quantized block on its own output: rounding and scales of its layers by signs of gradients, factors by Adam."""

from __future__ import annotations

import dataclasses
import functools
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch.nn import functional

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._messages import given
from lqlora._options import require_choice, require_integer, require_number
from lqlora._printable import printable
from lqlora.codebooks import Trellis
from lqlora.errors import InvalidArgumentError
from lqlora.nn.weight import QuantizedWeight
from lqlora.quantized._decoding import decode_scales, zero_point_codes
from lqlora.quantized._layout import blocks_last, in_shape, layout_of
from lqlora.quantized._rotation import as_rotated, as_stored, rotated
from lqlora.quantized._scales import with_scale_format
from lqlora.quantized.quantization import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lqlora.formats import BlockFormat
    from lqlora.nn.linear import LQLinear
    from lqlora.quantized import QuantizedArray

__all__ = ["BlockTuning", "TunedPart", "require_tunable", "tune_block"]

#: What can train.
TunedPart: TypeAlias = Literal["codes", "scales", "factors"]
_PARTS = ("codes", "scales", "factors")

#: Distance from the boundary of its cell, in widths of cells, that a weight starts with at least. Error feedback rounds some weights to
#: cells that they are far from: these start just inside of it, and a few small steps can take them back.
_MARGIN = 0.05

#: A step of a scale, relative to a step of a weight in its cell. Scales stay within a factor of two.
_SCALE_SHARE, _LEAST, _MOST = 0.25, 0.5, 2.0


@dataclasses.dataclass(frozen=True)
class BlockTuning:
    """Training of each block right after :func:`quantize_blocks` has quantized it.

    The output of the quantized block is brought near that of the dense block, for the same text. Unlike :func:`distill` this needs the
    memory of one block, and can train codes.

    Parameters
    ----------
    steps : int, default 50
        Steps for each block.
    train : sequence of {"codes", "scales", "factors"}, default ("codes", "scales")
        What trains. Codes of trellis formats cannot. Scales are rounded to their storage at the end.
    batch : int, default 4
        Parts of batches for one step, as the model runs them: each batch without padding is one part.
    learning_rate : float, optional
        Largest step of a weight in the cell that rounds to its level, in widths of the cell. Scales move by a quarter of it, relative to
        themselves. By default it is ``1 / steps``.
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
    and become shorter linearly. After all steps the block keeps what it had before, unless its error is lower now.

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

    @annotated
    def __post_init__(self) -> None:
        require_integer(self.steps, "steps", 1)
        require_integer(self.batch, "batch", 1)
        require_integer(self.seed, "seed")
        if isinstance(self.train, str) or not self.train:
            raise InvalidArgumentError(f"train must be a sequence of {', '.join(_PARTS)}, got {given(self.train)}.")
        for part in self.train:
            require_choice(part, "train", _PARTS)
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
        self.offset: torch.Tensor | None = None
        if "codes" in train:
            self._start(dense)
        else:
            self.values = self._lines(dequantize(self.stored))
        self.lora_A, self.lora_B = (
            own.detach().clone().requires_grad_("factors" in train and layer.rank > 0)
            for own in (layer.lora_A, layer.lora_B)
        )

    def _lines(self, matrix: torch.Tensor) -> torch.Tensor:
        return blocks_last(matrix, self.layout.axis).reshape(self.layout.lines, self.layout.length)

    def _by_weight(self, by_block: torch.Tensor) -> torch.Tensor:
        return by_block.repeat_interleave(self.layout.block_size, dim=1)[:, : self.layout.length]

    def _start(self, dense: torch.Tensor) -> None:
        """Set levels, the position of each weight among them, and the width of its cell."""
        device, layout, layer = self.scales.device, self.layout, self.layer
        # What the codes stand for is the weight without its low-rank part, and rotated.
        target = dense.to(torch.float32) - layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
        if self.rotation is not None:
            target = rotated(target, self.rotation, "w", check_finite=False)
        levels = self.stored.levels
        if levels is None:
            levels = torch.from_numpy(layout.codebook.levels.copy()).to(device)[None, :]
        else:
            levels = levels[layout.sets_of(slice(0, layout.count), levels)]
        self.levels, self.bounds = levels, (levels[:, 1:] + levels[:, :-1]) / 2
        points = zero_point_codes(self.stored)
        self.zeros = None if points is None else self._by_weight(points.to(torch.float32).reshape(self.scales.shape))
        scales = self._by_weight(self.scales)
        position = self._lines(target) / torch.where(scales == 0, math.inf, scales)
        if self.zeros is not None:
            position += self.zeros
        # The cell of a level ends half way to its neighbors; at the ends cells are as wide as the gap beside them.
        gaps = levels[:, 1:] - levels[:, :-1]
        gaps = torch.cat([gaps[:, :1], gaps, gaps[:, -1:]], dim=1)
        codes = self._lines(self.stored.codes).to(torch.int64)
        center = self._of_codes(levels, codes)
        below, above = (self._of_codes(own, codes) / 2 for own in (gaps[:, :-1], gaps[:, 1:]))
        self.width = below + above
        inner = 1 - 2 * _MARGIN
        self.position = torch.minimum(torch.maximum(position, center - inner * below), center + inner * above)
        self.offset = torch.zeros_like(self.position, requires_grad=True)

    @staticmethod
    def _of_codes(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return table[0][codes] if len(table) == 1 else table.gather(1, codes)

    def codes(self) -> torch.Tensor:
        """Return the code of each weight."""
        assert self.offset is not None
        position = self.position + self.offset.detach()
        codes = torch.zeros(position.shape, dtype=torch.int64, device=position.device)
        for index in range(self.bounds.shape[1]):
            codes += position > self.bounds[:, index : index + 1]
        return codes

    def matrix(self) -> torch.Tensor:
        """Return the stored matrix, through which gradients reach what trains."""
        if self.offset is None:
            values = self.values * self._by_weight(self.ratio)
        else:
            # A position between two levels passes its gradient on as if it was not rounded, one beyond the last level none.
            inside = torch.maximum(torch.minimum(self.position + self.offset, self.levels[:, -1:]), self.levels[:, :1])
            values = inside + (self._of_codes(self.levels, self.codes()) - inside).detach()
            if self.zeros is not None:
                values = values - self.zeros
            values = values * self._by_weight(self.scales * self.ratio)
        return cast("torch.Tensor", in_shape(values.reshape(-1), self.layout.axis, self.stored.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        seeds = {} if self.rotation is None else self.rotation.seeds
        y = functional.linear(ops.rotate_rows(x, seeds[-1]) if -1 in seeds else x, self.matrix().to(x.dtype))
        y = ops.rotate_rows(y, seeds[-2], inverse=True) if -2 in seeds else y
        if self.layer.rank:
            y = y + self.layer.scaling * ((x @ self.lora_A.T.to(x.dtype)) @ self.lora_B.T.to(x.dtype))
        return y if self.layer.bias is None else y + self.layer.bias.to(x.dtype)

    def quantized(self, name: str) -> QuantizedArray:
        """Return the array with the codes and scales of now, the scales rounded to their storage."""
        fmt = self.stored.format
        plain = dataclasses.replace(fmt, scales="float32")
        scales = (self.scales * self.ratio.detach()).reshape(-1)
        packed = self.stored.packed
        if self.offset is not None:
            packed = ops.pack_codes(self.codes().to(torch.uint8).reshape(-1), fmt.bits)
        found = dataclasses.replace(self.stored, packed=packed, scales=scales, format=plain)
        return as_rotated(with_scale_format(found, fmt.scales, name), self.array.format)

    def descend(self, rate: float, gradients: Mapping[int, torch.Tensor]) -> None:
        """Move offsets and scales by a step against the signs of their gradients."""
        with torch.no_grad():
            if self.offset is not None and id(self.offset) in gradients:
                step = rate * gradients[id(self.offset)].sign()
                self.offset.sub_(step * self.width)
                limit = self.width / 2
                torch.minimum(torch.maximum(self.offset, -limit, out=self.offset), limit, out=self.offset)
            if id(self.ratio) in gradients:
                self.ratio.sub_(rate * _SCALE_SHARE * gradients[id(self.ratio)].sign()).clamp_(_LEAST, _MOST)


def require_tunable(tuning: BlockTuning, formats: Mapping[str, BlockFormat]) -> None:
    """Raise if the codes of a layer cannot train.

    Parameters
    ----------
    tuning : BlockTuning
        Options.
    formats : mapping of str to BlockFormat
        Formats by layer.

    Raises
    ------
    InvalidArgumentError
        If codes are to train, and a format has trellis codes.
    """
    for name, fmt in formats.items() if "codes" in tuning.train else ():
        if isinstance(fmt.codebook, Trellis):
            raise InvalidArgumentError(
                f"tuning must not train codes of trellis formats, but {printable(name)!r} has {fmt}. Pass train=('scales',)."
            )


def tune_block(
    layers: Mapping[str, LQLinear],
    dense: Mapping[str, torch.Tensor],
    run: Callable[[int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    tuning: BlockTuning,
) -> tuple[float, float]:
    """Train the layers of a block so that its output is near that of the dense block, in place.

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
    trained = [
        own
        for weight in weights.values()
        for own in (weight.offset, weight.ratio)
        if own is not None and own.requires_grad
    ]
    factors = [own for weight in weights.values() for own in (weight.lora_A, weight.lora_B) if own.requires_grad]
    before = _error(run, targets)
    if not (trained or factors) or before == 0:
        return before, before
    optimizer = torch.optim.Adam(factors, lr=tuning.factor_learning_rate) if factors else None
    rate = 1 / tuning.steps if tuning.learning_rate is None else tuning.learning_rate
    order = _order(len(targets), tuning)
    with _replaced(weights), torch.enable_grad():
        for step in range(tuning.steps):
            left = 1 - step / tuning.steps
            sums: dict[int, torch.Tensor] = {}
            for index in next(order):
                loss = functional.mse_loss(run(index).float(), targets[index].float())
                found = torch.autograd.grad(loss, [*trained, *factors], allow_unused=True)
                for own, gradient in zip([*trained, *factors], found, strict=True):
                    if gradient is not None:
                        sums[id(own)] = sums[id(own)] + gradient if id(own) in sums else gradient
            for weight in weights.values():
                weight.descend(rate * left, sums)
            if optimizer is not None:
                for own in factors:
                    own.grad = sums.get(id(own))
                optimizer.param_groups[0]["lr"] = tuning.factor_learning_rate * left
                optimizer.step()
    new = {
        name: [*QuantizedWeight(own.quantized(name)).buffers(), own.lora_A.detach(), own.lora_B.detach()]
        for name, own in weights.items()
    }
    earlier = {name: [own.clone() for own in _values(layer)] for name, layer in layers.items()}
    _set(layers, new)
    after = _error(run, targets)
    if not after < before:  # NaN included
        _set(layers, earlier)
        return before, before
    return before, after


def _order(count: int, tuning: BlockTuning) -> Iterator[list[int]]:
    """Yield the parts of each step: all parts in a random order, then in another one."""
    generator, left = torch.Generator().manual_seed(tuning.seed), []
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
