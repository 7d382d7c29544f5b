"""Report of a conversion: which layers were quantized, what was left dense and why, and the storage of both."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lqlora._patterns import list_names
from lqlora._printable import printable

if TYPE_CHECKING:
    from lqlora.formats import BlockFormat

__all__ = ["DensePart", "QuantizationReport", "QuantizedLayer", "QuantizedTable"]

#: Most groups of dense parameters that the text of a report lists.
_MOST_GROUPS = 7


@dataclass(frozen=True)
class QuantizedLayer:
    """Numbers of one layer that :func:`quantize_model` replaced.

    Parameters
    ----------
    format : BlockFormat
        Format of the quantized part.
    shape : tuple of int
        Shape (out_features, in_features) of the matrix.
    rank : int
        Rank of the low-rank part.
    clipped_from : int, optional
        Rank that was asked for, if it exceeds the smaller side of the matrix.
    errors : tuple of float
        Relative weighted errors of the iterations, see :class:`lqlora.Decomposition`.
    relative_error : float
        Relative weighted error of the layer as it is.
    nbytes : int
        Bytes of the quantized part, scales and padding included.
    dense_bytes : int
        Bytes of the dense weight before.
    seconds : float
        Wall time of the decomposition. It is not compared.
    held_out_error : float, optional
        Relative error in the norm of inputs that the layer was not quantized with, if there were any: see :func:`quantize_blocks`.
    """

    format: BlockFormat
    shape: tuple[int, int]
    rank: int
    clipped_from: int | None
    errors: tuple[float, ...]
    relative_error: float
    nbytes: int
    dense_bytes: int
    seconds: float = field(compare=False)
    held_out_error: float | None = None

    @property
    def size(self) -> int:
        """Number of weights of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def factor_bytes(self) -> int:
        """Bytes of the low-rank factors, in float32."""
        # B and A of an (m, n) matrix have rank * m and rank * n entries of 4 bytes.
        return 4 * self.rank * sum(self.shape)


@dataclass(frozen=True)
class QuantizedTable:
    """Numbers of the table of one embedding that :func:`quantize_model` replaced.

    Parameters
    ----------
    format : BlockFormat
        Format of the table.
    shape : tuple of int
        Shape (num_embeddings, embedding_dim).
    modules : tuple of str
        Modules that use the table: embeddings, and output embeddings that are tied to them.
    relative_error : float
        Relative Frobenius norm of the error.
    nbytes : int
        Bytes of the quantized table, scales and padding included.
    dense_bytes : int
        Bytes of the dense table before.
    seconds : float
        Wall time of the quantization. It is not compared.
    """

    format: BlockFormat
    shape: tuple[int, int]
    modules: tuple[str, ...]
    relative_error: float
    nbytes: int
    dense_bytes: int
    seconds: float = field(compare=False)

    @property
    def size(self) -> int:
        """Number of entries of the table."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class DensePart:
    """Parameters and buffers that were left dense for one reason.

    Parameters
    ----------
    layers : tuple of str
        Linear layers among them.
    size : int
        Number of entries. Tied parameters count once, for the reason of their first name.
    nbytes : int
        Bytes of these entries.
    trainable : int
        Number of the entries that require gradients.
    """

    layers: tuple[str, ...]
    size: int
    nbytes: int
    trainable: int


@dataclass(frozen=True)
class QuantizationReport:
    """Numbers of the layers that :func:`quantize_model` replaced, and of the rest of the model. Printing it sums them up.

    Parameters
    ----------
    layers : dict of str to QuantizedLayer
        Numbers of each quantized layer by name.
    dense : dict of str to DensePart
        What was left dense, by reason.
    kept : dict of str to int
        Bytes of each parameter and buffer that was not replaced. Tied parameters are listed once.
    trainable : int
        Number of entries of parameters that require gradients.
    bytes_before : int
        Bytes of the whole model before the conversion.
    tables : dict of str to QuantizedTable
        Numbers of each quantized embedding by name.
    """

    layers: dict[str, QuantizedLayer]
    dense: dict[str, DensePart]
    kept: dict[str, int]
    trainable: int
    bytes_before: int
    tables: dict[str, QuantizedTable] = field(default_factory=dict)

    @property
    def storage_bits(self) -> int:
        """Exact number of bits of the quantized parts of the layers, scales and padding included. Embeddings are not counted."""
        return 8 * sum(layer.nbytes for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the layers, scales and padding included. Low-rank factors and embeddings are not counted.

        It is NaN if only embeddings were quantized.
        """
        return self.storage_bits / sum(layer.size for layer in self.layers.values()) if self.layers else math.nan

    @property
    def factor_bytes(self) -> int:
        """Bytes of the low-rank factors, in float32."""
        return sum(layer.factor_bytes for layer in self.layers.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of the quantized embeddings, scales and padding included."""
        return sum(table.nbytes for table in self.tables.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model: quantized parts, low-rank factors, and everything that was not replaced."""
        return self.storage_bits // 8 + self.table_bytes + self.factor_bytes + sum(self.kept.values())

    def __str__(self) -> str:
        layers = self.layers.values()
        quantized = sum(layer.size for layer in layers)
        tables = self.tables.values()
        in_tables, total_bytes = sum(table.size for table in tables), self.total_bytes
        total = quantized + in_tables + sum(part.size for part in self.dense.values())
        rows = [("quantized", _number(len(layers), "layer"), quantized, self.storage_bits // 8)] if layers else []
        if tables:
            of_tables = _counts(Counter(str(table.format) for table in tables), "table")
            rows.append((f"embeddings: {of_tables}", _number(len(tables), "table"), in_tables, self.table_bytes))
        parts = sorted(self.dense.items(), key=lambda item: -item[1].nbytes)
        most = _MOST_GROUPS - bool(tables and layers)
        rows += [(f"dense: {reason}", _layers(part), part.size, part.nbytes) for reason, part in parts[:most]]
        if rest := [part for _, part in parts[most:]]:
            merged = DensePart(
                tuple(name for part in rest for name in part.layers),
                sum(part.size for part in rest),
                sum(part.nbytes for part in rest),
                sum(part.trainable for part in rest),
            )
            rows.append(("dense: other reasons", _layers(merged), merged.size, merged.nbytes))
        lines = [
            f"{what:<40} {count:>18} {size:>13,} parameters {size / total:>7.1%} {_megabytes(nbytes):>11} {nbytes / total_bytes:>7.1%}"
            for what, count, size, nbytes in rows
        ]
        if layers:
            formats = Counter(str(layer.format) for layer in layers)
            ranks = Counter(layer.rank for layer in layers)
            worst = max(self.layers, key=lambda name: self.layers[name].relative_error)
            median = statistics.median(layer.relative_error for layer in layers)
            lines += [
                f"low-rank factors: rank {_counts(ranks)}, {_megabytes(self.factor_bytes)} ({self.factor_bytes / total_bytes:.1%})",
                f"formats: {_counts(formats)}, {self.bits_per_weight:.2f} bits per weight",
                f"relative error: median {median:.3g}, largest {self.layers[worst].relative_error:.3g} ({printable(worst)})",
            ]
        held_out = {
            name: layer.held_out_error for name, layer in self.layers.items() if layer.held_out_error is not None
        }
        if held_out:
            worst = max(held_out, key=held_out.__getitem__)
            median = statistics.median(held_out.values())
            lines.append(f"on held-out inputs: median {median:.3g}, largest {held_out[worst]:.3g} ({printable(worst)})")
        if clipped := [name for name, layer in self.layers.items() if layer.clipped_from is not None]:
            lines.append(f"rank clipped to the smaller side of the matrix: {printable(list_names(clipped, 3))}")
        beside = sum(part.trainable for part in self.dense.values())
        lines += [
            f"trainable: {self.trainable:,} parameters, of them {beside:,} in dense parts",
            f"memory: {_megabytes(self.bytes_before)} before, {_megabytes(total_bytes)} after",
        ]
        return "\n".join(lines)


def _layers(part: DensePart) -> str:
    """Return the number of layers of a part, if it has any. Their parameters may be counted in another part."""
    count = _number(len(part.layers), "layer") if part.layers else ""
    return f"{count} (shared)" if count and not part.size else count


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _counts(counter: Counter[str] | Counter[int], what: str = "layer") -> str:
    """Return the most frequent values with their numbers of layers."""
    if len(counter) == 1:
        return str(next(iter(counter)))
    listed = ", ".join(f"{value} ({_number(count, what)})" for value, count in counter.most_common(3))
    return listed + (f" and {len(counter) - 3} others" if len(counter) > 3 else "")


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"
