from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora.ops.tables as tables_module
from lqlora.errors import InvalidArgumentError, UnsupportedArrayError
from lqlora.ops import pick, table_beside
from tests.strategies import host, on, on_device

DTYPES = (np.float32, np.float64, np.bool_)


@given(size=st.integers(0, 300), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_a_table_is_where_the_array_is_with_every_bit(xp, size, seed, dtype):
    table = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    table.flags.writeable = False
    array = on(xp, np.zeros(2))
    found = table_beside(table, array)
    assert type(found) is type(array)
    assert found.device == array.device
    assert host(found).dtype == table.dtype
    assert host(found).tobytes() == table.tobytes()


def test_minus_zero_is_another_table_than_zero(xp):
    found = [host(table_beside(np.array([zero]), on(xp, np.zeros(1)))) for zero in (0.0, -0.0, 0.0)]
    assert [bool(np.signbit(table[0])) for table in found] == [False, True, False]


def test_tables_of_one_content_and_two_dtypes_are_told_apart(xp):
    array, zeros = on(xp, np.zeros(1)), np.zeros(2)
    assert host(table_beside(zeros, array)).dtype == np.float64
    assert host(table_beside(zeros.view(np.float32), array)).shape == (4,)
    assert host(table_beside(zeros.view(np.float32).reshape(2, 2), array)).shape == (2, 2)


def test_tables_of_tensors_are_kept_by_device(torch):
    table = np.array([0.25, 0.5], dtype=np.float32)
    here = torch.zeros(1)
    assert table_beside(table, here) is table_beside(table.copy(), here)
    assert table_beside(table, here).device.type == "cpu"


def test_a_table_that_changes_later_is_not_the_one_that_is_kept(torch):
    table = np.array([0.25, 0.5])
    kept = table_beside(table, torch.zeros(1))
    table[0] = 9
    assert kept.tolist() == [0.25, 0.5]
    assert table_beside(table, torch.zeros(1)).tolist() == [9.0, 0.5]


def test_tensors_that_compilers_trace_with_are_not_kept(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    table = np.array([0.125, 0.75])
    with FakeTensorMode(), pytest.raises(UnsupportedArrayError, match=r"^array .*FakeTensor"):
        table_beside(table, torch.zeros(1))
    assert table_beside(table, torch.zeros(1)).tolist() == [0.125, 0.75]


def test_real_tensors_in_the_presence_of_a_tracing_compiler_are_not_led_astray(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    table, real = np.array([0.375, 0.875]), torch.zeros(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        table_beside(table, real)
    assert type(table_beside(table, real)) is torch.Tensor
    assert table_beside(table, real).tolist() == [0.375, 0.875]


def test_the_oldest_tables_are_given_up(torch, monkeypatch):
    monkeypatch.setattr(tables_module, "_tables", {})
    most, beside = tables_module._MOST_TABLES, torch.zeros(1)
    first, *others = (table_beside(np.array([float(value)]), beside) for value in range(most + 1))
    assert table_beside(np.array([float(most)]), beside) is others[-1]
    assert table_beside(np.array([0.0]), beside) is not first
    assert len(tables_module._tables) == most


def test_threads_may_ask_at_once(torch):
    tables = [np.full(3, value) for value in range(50)]
    wrong = []

    def ask():
        wrong.extend(t for t in tables if table_beside(t, torch.zeros(1)).tolist() != t.tolist())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), axis=st.integers(0, 1), data=st.data())
def test_entries_are_those_of_numpy(xp, shape, axis, data):
    array = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    index = np.array(data.draw(st.lists(st.integers(0, shape[axis] - 1), max_size=9)), dtype=np.int64)
    found = host(pick(on(xp, array), on(xp, index), axis))
    assert found.tolist() == np.take(array, index, axis=axis).tolist()
    assert found.shape == np.take(array, index, axis=axis).shape


def test_positions_beyond_the_end_are_refused(xp):
    if on_device(on(xp, np.zeros(1))):
        pytest.skip("A device wraps them around, or gives up for good.")
    for position in (3, -1):
        with pytest.raises(InvalidArgumentError, match="index"):
            pick(on(xp, np.zeros(3)), on(xp, np.array([position])))


def test_a_table_that_is_not_of_numpy_is_refused(strict):
    with pytest.raises(UnsupportedArrayError, match=r"^table must be a NumPy array"):
        table_beside(strict.asarray([0.5]), np.zeros(2))
