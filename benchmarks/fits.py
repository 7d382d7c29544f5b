"""Error and time of each fit, on a million standard normal weights in blocks of 64."""

import sys
import time

import numpy as np

import lqlora as lq

SCALES = ("float32", "bfloat16", "u8/256:float32", "d8/256:float32", "l8/256:float32")
FITS = ("absmax", "scale", "levels+scale")


def main():
    w = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    print(
        f"Mean squared error per weight, and CPU milliseconds; NumPy {np.__version__}, Python {sys.version.split()[0]}\n"
    )
    print("| format | bits per weight | " + " | ".join(f"{fit} | ms" for fit in FITS) + " |")
    print("|" + "---|" * (2 + 2 * len(FITS)))
    for bits in (2, 3, 4, 8):
        for scales in SCALES if bits < 8 else SCALES[:1]:
            fmt = lq.BlockFormat.parse(f"nf{bits}/64:{scales}")
            cells = [str(fmt), f"{fmt.storage_bits(w.shape) / w.size:.4f}"]
            for fit in FITS:
                start = time.process_time()
                q = lq.quantize(w, fmt, fit=fit)
                milliseconds = 1e3 * (time.process_time() - start)
                cells += [f"{np.mean((lq.dequantize(q).astype(np.float64) - w) ** 2):.3g}", f"{milliseconds:.0f}"]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
