from __future__ import annotations

import hashlib

import numpy as np
import pytest

from lqlora import dynamic8

#: bitsandbytes 0.50.2, functional.create_dynamic_map() on a CPU: the float32 bytes, and some of the values.
SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
VALUES = {
    True: {
        0: -0.992968738079071,
        1: -0.9789062738418579,
        2: -0.96484375,
        60: -0.14921875298023224,
        64: -0.09859374910593033,
        100: -0.0074687497690320015,
        126: -5.500000384017767e-07,
        127: 0.0,
        128: 5.500000384017767e-07,
        129: 3.250000190746505e-06,
        180: 0.07046874612569809,
        254: 0.992968738079071,
        255: 1.0,
    },
    False: {
        0: 0.0,
        1: 3.2500003044333425e-07,
        2: 7.749999895168003e-07,
        60: 0.009296874515712261,
        100: 0.06273438036441803,
        126: 0.09929687529802322,
        127: 0.103515625,
        180: 0.4761718511581421,
        254: 0.9964843988418579,
        255: 1.0,
    },
}


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_bitsandbytes_bit_for_bit(signed):
    levels = dynamic8(signed=signed).levels
    assert {index: float(levels[index]) for index in VALUES[signed]} == VALUES[signed]
    assert hashlib.sha256(levels.astype("<f4").tobytes()).hexdigest() == SHA256[signed]


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_centers_of_cells_of_seven_decades(signed):
    cells = [2 ** (decade + (not signed)) for decade in range(7)]
    exact = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (k + 0.5) / count)
        for decade, count in enumerate(cells)
        for k in range(count)
    ]
    levels = dynamic8(signed=signed).levels
    np.testing.assert_allclose(levels[levels > 0][:-1], exact, rtol=3e-7)
    assert (-levels[levels < 0])[::-1].tolist() == (levels[levels > 0][:-1].tolist() if signed else [])
    assert (len(levels), (levels == 0).sum(), levels[-1]) == (256, 1, 1.0)


def test_names_tell_the_two_maps_apart():
    assert (dynamic8().name, dynamic8(signed=False).name) == ("dynamic8", "udynamic8")
    assert dynamic8() != dynamic8(signed=False)
