"""A correct quantizer, and quantizers with one fault each."""

from __future__ import annotations

import numpy as np

BLOCK = 16

#: Dyadic levels: midpoints between them are numbers of float32, so that ties are ties.
LEVELS = np.array([-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1], dtype=np.float32)


class Correct:
    """Absmax scales, nearest level, lower level at ties."""

    side = "left"

    def quantize(self, w):
        if not np.issubdtype(w.dtype, np.floating) and w.dtype.name != "bfloat16":
            raise TypeError("not floating-point")
        if not np.isfinite(w).all():
            raise ValueError("not finite")
        flat = np.ascontiguousarray(w).reshape(-1).astype(np.float32)
        blocks = np.append(flat, np.zeros(-flat.size % BLOCK, dtype=np.float32)).reshape(-1, BLOCK)
        scales = self.scales(blocks)
        divisors = np.where(scales == 0, np.float32(1), scales)
        return self.codes(blocks / divisors), scales, w.shape

    def scales(self, blocks):
        return np.abs(blocks).max(axis=1, keepdims=True)

    def codes(self, normalized):
        return np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, normalized, side=self.side)

    def dequantize(self, quantized):
        codes, scales, shape = quantized
        return (LEVELS[codes] * scales).reshape(-1)[: int(np.prod(shape))].reshape(shape)


class ForgetsTheShape(Correct):
    def dequantize(self, quantized):
        return super().dequantize(quantized).reshape(-1)


class WritesToTheInput(Correct):
    def quantize(self, w):
        quantized = super().quantize(w)
        if w.size > 2 * BLOCK and w.flags.writeable:
            w[0] *= 2
        return quantized


class RemembersTheLastCall(Correct):
    last = None

    def quantize(self, w):
        seen, self.last = self.last, w.tobytes()
        return super().quantize(w * w.dtype.type(0.5) if seen == self.last else w)


class DividesByZero(Correct):
    def quantize(self, w):
        codes, scales, shape = super().quantize(w)
        return codes, np.where(np.any(scales), scales, np.nan), shape


class TakesZeroForTheSmallestScale(Correct):
    """Decodes a scale of zero as the largest scale, as an offset may: only several blocks show it."""

    def scales(self, blocks):
        scales = super().scales(blocks)
        return np.where(scales == 0, scales.max(initial=0), scales)

    def codes(self, normalized):
        return np.where(np.abs(normalized).max(axis=1, keepdims=True) == 0, 2, super().codes(normalized))


class ReadsMemoryOrder(Correct):
    def quantize(self, w):
        order = "F" if w.flags.f_contiguous and not w.flags.c_contiguous else "C"
        return super().quantize(w.reshape(-1, order=order).reshape(w.shape))


class FloorsTheScale(Correct):
    def scales(self, blocks):
        scales = super().scales(blocks)
        return np.where(scales == 0, scales, np.maximum(scales, np.float32(1e-9)))


class TurnsSigns(Correct):
    """Decodes the scales of small blocks as negative, as signed quantized scales may."""

    def quantize(self, w):
        codes, scales, shape = super().quantize(w)
        return codes, np.where(scales < scales.max(initial=0) / 1024, -scales, scales), shape


class SharesAScale(Correct):
    def scales(self, blocks):
        scales = super().scales(blocks)
        return np.maximum(scales, np.roll(scales, 1, axis=0)) if len(scales) else scales


class LosesTheTail(Correct):
    """Ignores the last weight in the scale of a short last block."""

    def quantize(self, w):
        codes, scales, shape = super().quantize(w)
        used = w.size % BLOCK
        if used and used % 2 == 0:
            scales[-1] = np.abs(w.reshape(-1)[-used:-1]).max()
        return codes, scales, shape


class LosesTheLastOddCode(Correct):
    """Drops the last code of an odd number, as packing two codes in a byte may."""

    def dequantize(self, quantized):
        out = super().dequantize(quantized)
        if out.size % 2 and out.size > 1:
            out[-1] = 0
        return out


class NeedsTwoWeights(Correct):
    def quantize(self, w):
        if w.size == 1:
            raise IndexError("index 1 is out of bounds")
        return super().quantize(w)


class RefusesNoDimensions(Correct):
    def quantize(self, w):
        return super().quantize(w[:])


class RefusesEmpty(Correct):
    def quantize(self, w):
        w.max()
        return super().quantize(w)


class HalvesTheScale(Correct):
    def scales(self, blocks):
        return super().scales(blocks) / 2


class RoundsDown(Correct):
    def codes(self, normalized):
        return np.clip(np.searchsorted(LEVELS, normalized, side="right") - 1, 0, len(LEVELS) - 1)


class TiesByPosition(Correct):
    def codes(self, normalized):
        lower, upper = (np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, normalized, side=s) for s in ("left", "right"))
        return np.where(np.arange(BLOCK) % 2, lower, upper)


class TiesUp(Correct):
    side = "right"


class Shrinks(Correct):
    """Shrinks every result a little, within the error bound."""

    def dequantize(self, quantized):
        return super().dequantize(quantized) * np.float32(1 - 2**-10)


class AcceptsNaN(Correct):
    def quantize(self, w):
        codes, scales, shape = super().quantize(np.where(np.isfinite(w), w, 0).astype(w.dtype))
        bad = np.append(~np.isfinite(w.reshape(-1)), np.zeros(-w.size % BLOCK, dtype=bool)).reshape(-1, BLOCK)
        return codes, np.where(self.spoiled(bad), np.nan, scales), shape

    def spoiled(self, bad):
        return bad.any(axis=1, keepdims=True)


class SpreadsNaN(AcceptsNaN):
    def spoiled(self, bad):
        return bad.any()


class InvertsTheScale(Correct):
    def quantize(self, w):
        codes, scales, shape = super().quantize(w)
        with np.errstate(over="ignore", divide="ignore"):
            inverse = np.where(scales == 0, 0, np.float32(1) / scales)
        return codes, np.where(np.isinf(inverse), np.nan, scales), shape


class AddsTheEnds(Correct):
    """Doubles the scale on the way, which overflows, as the difference of largest and smallest weight may."""

    def scales(self, blocks):
        with np.errstate(over="ignore"):
            return (super().scales(blocks) * np.float32(2)) / np.float32(2)


class ReadsBitsOf(Correct):
    """Reads the bytes of one dtype as those of another."""

    dtype, other = "float16", "int16"

    def quantize(self, w):
        return super().quantize(w.view(self.other).astype(np.float32) if w.dtype.name == self.dtype else w)


class ReadsBitsOfBfloat16(ReadsBitsOf):
    dtype = "bfloat16"


class RefusesFloat64(Correct):
    def quantize(self, w):
        if w.dtype == np.float64:
            raise TypeError("float64 is not supported")
        return super().quantize(w)


class TakesIntegers(Correct):
    def quantize(self, w):
        return super().quantize(w.astype(np.float32))


class OverflowsInHalfPrecision(Correct):
    def scales(self, blocks):
        with np.errstate(over="ignore"):
            return super().scales(blocks).astype(np.float16).astype(np.float32)


class FavorsNegative(Correct):
    """Lacks the largest level, as integers in two's complement do."""

    def codes(self, normalized):
        return np.minimum(super().codes(normalized), len(LEVELS) - 2)
