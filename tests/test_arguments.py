"""Every public function takes every kind of array: it gives the result for the plain array, or one sentence of ours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import lqlora as lq
from lqlora import ops
from lqlora._dispatch import Operation
from lqlora.errors import LQLoRAError
from tests.arguments import (
    DESCRIBES,
    MOVES,
    NUMBERS,
    OTHER,
    REFUSED,
    SAME,
    TABLES,
    Doubling,
    calls,
    public_functions,
    torch_kinds,
)
from tests.strategies import host, on

#: Odd arrays make libraries warn, of sparse layouts for example.
pytestmark = pytest.mark.filterwarnings("ignore")

CALLS = calls()
#: Functions that decompose or quantize several times in each call.
LONG = {"cloq", "cost_table", "decompose_stack", "gptq", "loftq", "lqlora", "pissa", "qera"}

#: Functions that take a list of arrays, which have no names.
LISTS = {"from_operands"}


def test_every_public_function_that_takes_arrays_has_a_call():
    assert sorted(set(public_functions()) - set(CALLS)) == []


def entries(result):
    """The arrays and other values of a result, as NumPy arrays, in one list."""
    if isinstance(result, lq.QuantizedArray):
        return entries(list(result.to_arrays().values()))
    if dataclasses.is_dataclass(result):
        return entries([getattr(result, own) for own in ("quantized", "lora_A", "lora_B")])
    if isinstance(result, list | tuple):
        return [entry for part in result for entry in entries(part)]
    if type(result).__module__.startswith("torch"):
        return [result.detach().resolve_neg().numpy()]
    return [np.asarray(result)]


def run(name, arrays):
    """The result, or the error if the call is refused in our words."""
    try:
        return CALLS[name][1](**arrays)
    except LQLoRAError as error:
        return error


def faults_of(name, arrays, changed, kinds, judge):
    """Yield a line for each kind of array that, in place of an argument, neither works nor is refused in our words."""
    for kind, make in kinds.items():
        value = make(arrays[changed])
        if value is None and kind != "None":
            continue
        try:
            found = run(name, {**arrays, changed: value})
            if isinstance(found, LQLoRAError):
                assert judge in (must_refuse, may_be_anything) or may_refuse(name, changed, kind), f"refused: {found}"
                is_named = judge is not may_be_anything and name not in LISTS
                check_sentence(str(found), changed.replace("_DOT_", ".") if is_named else "")
            else:
                judge(found)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the fault that is looked for
            yield f"{changed} {kind}: {type(error).__name__}: {str(error)[:300]}"


def may_refuse(name, changed, kind):
    """Return whether an argument may be refused although it has the same entries as a plain array."""
    is_written = changed == "out" or (name, changed) == ("put_flat", "array")
    converted = kind in ("matrix", "big-endian", "negated")
    return (is_written and (converted or kind in ("read-only", "parameter", "tracked"))) or (
        converted and name in ops.__all__ and name != "convert"
    )


def check_sentence(text, name):
    """An error is short and printable, and begins with the name of the argument, or with all names that do not fit."""
    assert len(text) <= 400
    assert text.isprintable()
    several = ("arrays must be of one library", "arrays must be on one device")
    names = text.partition(" must fit ")[0].split(" and ")
    assert text.startswith((name, repr(name), *several)) or name in names, text


def must_equal(plain):
    """Compare codes exactly, and numbers but for the order of additions in a product of matrices."""

    def judge(found):
        pairs = list(zip(entries(found), entries(plain), strict=True))
        for ours, theirs in pairs:
            np.testing.assert_allclose(
                ours, theirs, rtol=1e-4 * (theirs.dtype.kind == "f"), atol=1e-5 * (theirs.dtype.kind == "f")
            ) if theirs.dtype.kind in "iuf" else np.testing.assert_array_equal(ours, theirs)

    return judge


def must_refuse(found):
    raise AssertionError(f"not refused, got {str(found)[:80]}")


def may_be_anything(_):
    """Accept a result that cannot be compared."""


def all_faults(name, arrays, names, kinds):
    same, numbers, refused, other = kinds
    plain = run(name, arrays)
    assert not isinstance(plain, LQLoRAError), plain
    judges = {
        must_equal(plain): same,
        must_refuse: refused if name in MOVES else refused | numbers,
        may_be_anything: other | numbers if name in MOVES else other,
    }
    if name in DESCRIBES:
        judges = {may_be_anything: same | numbers | refused | other}
    return [
        fault
        for judge, own in judges.items()
        for changed in names
        for fault in faults_of(name, arrays, changed, own, judge)
    ]


def names_without(*others):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(set(CALLS) - set(others))]


@pytest.mark.parametrize("name", names_without("from_operands"))
def test_arrays_of_numpy(name):
    arrays = CALLS[name][0]
    refused = {} if name == "Codebook" else REFUSED
    assert all_faults(name, arrays, arrays, (SAME, NUMBERS, refused, OTHER if refused else OTHER | REFUSED)) == []


@pytest.mark.parametrize("name", names_without("from_operands", *ops.__all__))
def test_subclasses_with_arithmetic_of_their_own(name):
    # Operations, which only lqlora calls, take arrays as they are.
    arrays = CALLS[name][0]
    assert all_faults(name, arrays, arrays, ({"own arithmetic": lambda a: a.view(Doubling)}, {}, {}, {})) == []


@pytest.mark.parametrize("name", names_without("Codebook", "CostTable"))
def test_tensors(name, torch):
    tables = TABLES if isinstance(getattr(ops, name, None), Operation) else ()
    arrays = {key: own if key in tables else torch.from_numpy(own.copy()) for key, own in CALLS[name][0].items()}
    names = [key for key in arrays if key not in tables]
    assert all_faults(name, arrays, names, torch_kinds(torch)) == []


def refused(call, *words):
    with pytest.raises(LQLoRAError) as caught:
        call()
    check_sentence(str(caught.value), words[0])
    assert all(word in str(caught.value) for word in words)


W = np.linspace(-1, 1, 128, dtype=np.float32).reshape(8, 16)
FORMAT = lq.BlockFormat.parse("nf4/16:float32")


@pytest.mark.parametrize(
    "shapes", [((3, 16), (8, 2)), ((2, 15), (8, 2)), ((2, 16), (7, 2)), ((16,), (8, 2)), ((2, 8), (16, 2))]
)
def test_factors_that_do_not_fit_are_refused(shapes, xp):
    lora_A, lora_B = (on(xp, np.ones(shape, np.float32)) for shape in shapes)
    q = lq.quantize(on(xp, W), FORMAT)
    refused(lambda: lq.matmul(on(xp, W), q, lora_A, lora_B), "lora_B", str(shapes[0]), "(8, rank)")


@pytest.mark.parametrize("value", [W, None, "w", {"codes": W}])
def test_what_is_not_quantized_is_refused(value):
    for call in (lq.dequantize, lambda q: lq.matmul(W, q), lq.integrations.bitsandbytes.to_bitsandbytes):
        refused(lambda call=call: call(value), "q", type(value).__name__)


@pytest.mark.parametrize("shape", [5, None, "ab", (8.0, 16), (True, 16), ("8", 16), (8, -16), 2.5, {8, 16}])
def test_shapes_of_another_type_are_refused(shape):
    refused(lambda: lq.QuantizedArray.from_arrays(lq.quantize(W, FORMAT).to_arrays(), FORMAT, shape), "shape")


@pytest.mark.parametrize("implementation", [None, "numpy", "reference"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_codes_without_a_level_decode_to_nan_everywhere(library, implementation, request):
    put = np.asarray if library == "numpy" else request.getfixturevalue("torch").from_numpy
    codes = np.arange(16, dtype=np.uint8)
    packed, scales, out = ops.pack_codes(codes, 4), np.ones(1, np.float32), np.zeros(16, np.float32)
    stored = ops.PackedBlocks(put(packed), put(scales), None, np.arange(11, dtype=np.float32), 4, 16)
    with lq.forced(implementation):
        found = np.asarray(ops.decode(stored, put(out)))
    np.testing.assert_array_equal(found, np.where(codes < 11, codes, np.nan))


@pytest.mark.parametrize("implementation", [None, "numpy", "reference"])
def test_one_scale_for_many_blocks_is_refused(implementation, xp):
    stored = ops.PackedBlocks(
        *(on(xp, own) for own in (np.zeros(16, np.uint8), np.ones(1, np.float32))), None, lq.NF4.levels, 4, 8
    )
    x, out = on(xp, np.ones((1, 8), np.float32)), on(xp, np.zeros((1, 4), np.float32))
    with lq.forced(implementation):
        refused(lambda: ops.decode(stored, on(xp, np.zeros(32, np.float32))), "stored", "(1,)")
        refused(lambda: ops.matmul_packed(x, stored, out), "stored", "(1,)")


def test_a_plain_tuple_is_no_record():
    stored = (np.zeros(4, np.uint8), np.ones(1, np.float32), None, lq.NF4.levels, 4, 8)
    refused(lambda: ops.decode(stored, np.zeros(8, np.float32)), "stored", "PackedBlocks", "tuple")


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("bins", [[0, 3], [-1, 0]])
def test_terms_of_bins_that_do_not_exist_are_left_out(bins, implementation, xp):
    with lq.forced(implementation):
        assert host(ops.bin_sums(on(xp, np.ones(2)), on(xp, np.array(bins)), 3)).tolist() == [1.0, 0.0, 0.0]


def test_codes_and_sets_that_do_not_exist_are_refused(xp):
    levels, sets = on(xp, np.arange(8, dtype=np.float32).reshape(2, 4)), on(xp, np.array([0]))
    refused(lambda: ops.values_by_row(on(xp, np.array([[4]], np.uint8)), levels, sets), "codes", "4")
    for wrong, names in ((-1, "index"), (2, "array and index")):
        refused(
            lambda wrong=wrong: ops.values_by_row(on(xp, np.array([[0]], np.uint8)), levels, on(xp, np.array([wrong]))),
            names,
        )


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_results_are_written_only_where_each_entry_is_its_own(library, request):
    q = lq.quantize(W, FORMAT)
    if library == "numpy":
        wrong = [
            np.broadcast_to(np.zeros(16, np.float32), (8, 16)),
            np.lib.stride_tricks.as_strided(W.copy(), (8, 16), (0, 4)),
        ]
    else:
        torch = request.getfixturevalue("torch")
        q, wrong = q.to(torch), [torch.zeros(16).expand(8, 16), torch.zeros(8, 16, requires_grad=True)]
    for out in wrong:
        refused(lambda out=out: lq.dequantize(q, out=out), "out", "copy")


def test_a_transform_of_torch_is_refused(torch):
    refused(lambda: torch.func.vmap(lambda w: lq.quantize(w, FORMAT).packed)(torch.ones(2, 8, 16)), "w", "torch.func")
