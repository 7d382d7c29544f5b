"""The presets against the papers that they are named after. Matrices are so small that every SVD is exact."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import BlockFormat, decompose, dequantize, gptq, quantize
from lqlora.errors import InvalidArgumentError, UnsupportedArrayError
from lqlora.initializers import cloq, loftq, lorc, lqlora, pissa, qera, qlora
from lqlora.weighting import Elementwise, InputGram
from tests.oracles import initializers as oracle
from tests.strategies import host, on, stored

FMT = BlockFormat.parse("nf2/16:float32")
ROWS, COLUMNS, RANK = 40, 14, 4

#: Tolerance between libraries, whose matrix products differ in the last bits.
CLOSE = 1e-6


def q(matrix):
    return dequantize(quantize(matrix, FMT)).astype(np.float64)


def product(d):
    return host(d.lora_B).astype(np.float64) @ host(d.lora_A).astype(np.float64)


def norm(matrix, weights=1.0):
    return np.sqrt((weights * matrix**2).sum())


def relative_errors(w, pairs, weights=1.0):
    return [norm(w - quantized - low_rank, weights) / norm(w, weights) for quantized, low_rank in pairs]


def assert_is_pair(d, pair):
    quantized, low_rank = pair
    np.testing.assert_array_equal(host(dequantize(d.quantized)), quantized)
    np.testing.assert_allclose(product(d), low_rank, atol=1e-5)


@pytest.fixture
def w():
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, COLUMNS)) + np.outer(rng.standard_normal(ROWS), rng.standard_normal(COLUMNS))


@pytest.fixture
def fisher():
    return np.random.default_rng(1).exponential(size=(ROWS, COLUMNS)) ** 2


@pytest.fixture
def gram():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS))
    return x.T @ x / 200


def same(one, other):
    return (
        stored(one.quantized) == stored(other.quantized)
        and host(one.lora_A).tobytes() == host(other.lora_A).tobytes()
        and host(one.lora_B).tobytes() == host(other.lora_B).tobytes()
    )


# --- LQ-LoRA


@pytest.mark.parametrize("is_weighted", [False, True])
def test_lqlora_is_the_algorithm_of_its_paper(xp, w, fisher, is_weighted):
    fisher = fisher if is_weighted else None
    d = lqlora(on(xp, w), FMT, RANK, fisher=None if fisher is None else on(xp, fisher), max_iter=6)
    pairs = oracle.lqlora(w, q, RANK, fisher, len(d.errors) - 2)
    errors = relative_errors(w, pairs, 1.0 if fisher is None else fisher)
    assert d.errors[2:] == pytest.approx(errors, rel=CLOSE)
    assert d.best >= 2
    assert_is_pair(d, pairs[d.best - 2])


def test_lqlora_stops_when_the_error_stops_falling(w):
    d = lqlora(w, FMT, RANK)
    assert d.stop_reason == "converged"
    # The paper stops at the first increase of the error. Until then its iterates equal ours.
    errors = relative_errors(w, oracle.lqlora(w, q, RANK, None, 30))
    rises = [index for index in range(1, 30) if errors[index] > errors[index - 1]]
    assert d.relative_error <= errors[rises[0] - 1 if rises else -1] * (1 + 1e-3)


def test_lqlora_without_fisher_information_is_the_plain_alternation(w):
    assert same(lqlora(w, FMT, RANK), decompose(w, FMT, RANK, extrapolation=0.0))


def test_decompose_by_default_ends_lower_than_lqlora_in_the_norm_of_fisher_information():
    ratios = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        w, fisher = rng.standard_normal((64, 64)), rng.exponential(size=(64, 64)) ** 2
        ours, theirs = decompose(w, FMT, RANK, weighting=Elementwise(fisher)), lqlora(w, FMT, RANK, fisher=fisher)
        ratios.append(ours.relative_error / theirs.relative_error)
    assert np.mean(ratios) < 0.99


# --- LoftQ, LoRC, QPiSSA, QLoRA


@pytest.mark.parametrize("iterations", [1, 5])
def test_loftq_is_the_algorithm_of_its_paper(xp, w, iterations):
    d = loftq(on(xp, w), FMT, RANK, iterations=iterations)
    pairs = oracle.loftq(w, q, RANK, iterations)
    assert (d.stop_reason, len(d.errors)) == ("max_iter", 1 + iterations)
    assert d.errors[1:] == pytest.approx(relative_errors(w, pairs), rel=CLOSE)
    assert_is_pair(d, pairs[d.best - 1])


def test_lorc_is_one_decomposition_of_the_error(xp, w):
    d = lorc(on(xp, w), FMT, RANK)
    pair = oracle.lorc(w, q, RANK)
    assert (len(d.errors), d.best) == (2, 1)
    assert d.relative_error == pytest.approx(relative_errors(w, [pair])[0], rel=CLOSE)
    assert_is_pair(d, pair)
    assert same(d, loftq(on(xp, w), FMT, RANK, iterations=1))


def test_the_factors_of_lorc_share_the_singular_values_evenly(w):
    d = lorc(w, FMT, RANK)
    roots = np.sqrt(np.linalg.svd(w - q(w), compute_uv=False)[:RANK])
    np.testing.assert_allclose(np.linalg.norm(d.lora_A, axis=1), roots, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(d.lora_B, axis=0), roots, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 5])
def test_pissa_quantizes_what_its_paper_does_and_is_nearer_to_the_matrix(xp, w, iterations):
    d = pissa(on(xp, w), FMT, RANK, iterations=iterations)
    pairs = oracle.pissa(w, q, RANK, iterations)
    # The adapter of the paper is from before the quantization. Ours is fitted to the quantized matrix.
    fitted = [(base, oracle.svd(w - base, RANK)) for base, _ in pairs]
    assert d.errors[2:] == pytest.approx(relative_errors(w, fitted), rel=CLOSE)
    assert d.relative_error < min(relative_errors(w, pairs))
    assert len(d.errors) == 2 + iterations


def test_pissa_beats_lorc_where_leading_components_are_strong(w):
    strong = w + 5 * oracle.svd(w, 1)
    assert pissa(strong, FMT, RANK).relative_error < lorc(strong, FMT, RANK).relative_error


def test_qlora_starts_the_adapter_at_zero(xp, w):
    d = qlora(on(xp, w), FMT, RANK, seed=3)
    np.testing.assert_array_equal(host(dequantize(d.quantized)), q(w))
    assert not host(d.lora_B).any()
    assert host(d.lora_A).all()
    assert not same(d, qlora(on(xp, w), FMT, RANK, seed=4))


# --- QERA, CLoQ


def test_qera_with_a_gram_is_exact(xp, w, gram):
    d = qera(on(xp, w), FMT, RANK, gram=on(xp, gram))
    pair = oracle.qera_exact(w, q, RANK, gram)
    np.testing.assert_array_equal(host(dequantize(d.quantized)), pair[0])
    np.testing.assert_allclose(product(d), pair[1], atol=1e-3)  # slightly damped
    rest = w - sum(pair)
    assert d.squared_error == pytest.approx(np.trace(rest @ gram @ rest.T), rel=1e-3)


def test_qera_with_a_diagonal_is_approximate(xp, w, gram):
    d = qera(on(xp, w), FMT, RANK, gram=on(xp, np.diag(gram).copy()))
    pair = oracle.qera_approx(w, q, RANK, np.diag(gram))
    assert_is_pair(d, pair)
    assert d.squared_error == pytest.approx((np.diag(gram) * (w - sum(pair)) ** 2).sum(), rel=CLOSE)


def test_qera_takes_the_gram_of_fewer_inputs_than_columns(xp, w):
    x = np.random.default_rng(3).standard_normal((5, COLUMNS))
    d = qera(on(xp, w), FMT, 5, gram=on(xp, x.T @ x))
    # The inputs span five directions, so a low-rank part of rank five makes the outputs exact.
    assert norm(x @ (w - host(d.reconstruct())).T) < 1e-2 * norm(x @ w.T)
    assert np.abs(product(d)).max() < 10


def test_exact_outputs_are_nearer_than_approximate_ones_and_these_than_lorcs(w, gram):
    errors = [
        np.trace((w - d.reconstruct()) @ gram @ (w - d.reconstruct()).T)
        for d in (
            cloq(w, FMT, RANK, gram=gram),
            qera(w, FMT, RANK, gram=gram),
            qera(w, FMT, RANK, gram=np.diag(gram).copy()),
            lorc(w, FMT, RANK),
        )
    ]
    assert errors[0] < errors[1] < errors[2] < errors[3]


def test_cloq_repairs_what_error_feedback_leaves(xp, w, gram):
    d = cloq(on(xp, w), FMT, RANK, gram=on(xp, gram))
    quantized = host(dequantize(d.quantized)).astype(np.float64)
    pair = oracle.cloq(w, quantized, RANK, gram)
    assert_is_pair(d, pair)
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(COLUMNS)
    rest = w - sum(pair)
    assert d.squared_error == pytest.approx(np.trace(rest @ damped @ rest.T), rel=1e-5)


def test_cloq_quantizes_by_error_feedback(w, gram):
    d = cloq(w, FMT, RANK, gram=gram)
    assert stored(d.quantized) == stored(gptq(w, FMT, gram, fit="scale", damping=0.01))
    rest = w - dequantize(d.quantized)
    assert np.trace(rest @ gram @ rest.T) < np.trace((w - q(w)) @ gram @ (w - q(w)).T)


def test_a_unit_gram_changes_nothing(w):
    assert qera(w, FMT, RANK, gram=np.ones(COLUMNS)).errors == pytest.approx(lorc(w, FMT, RANK).errors, rel=CLOSE)
    assert qera(w, FMT, RANK, gram=np.eye(COLUMNS)).errors == pytest.approx(lorc(w, FMT, RANK).errors, rel=CLOSE)


@pytest.mark.parametrize("method", [qera, cloq])
def test_grams_of_another_size_are_refused(w, method):
    with pytest.raises(InvalidArgumentError, match=r"^gram .*column"):
        method(w, FMT, RANK, gram=np.eye(COLUMNS + 1))
    with pytest.raises(UnsupportedArrayError, match="array"):
        method(w, FMT, RANK, gram=[1.0] * COLUMNS)


def test_error_feedback_refuses_a_diagonal_gram(w):
    with pytest.raises(InvalidArgumentError, match=r"(?i)^gram .*square"):
        cloq(w, FMT, RANK, gram=np.ones(COLUMNS))
    with pytest.raises(InvalidArgumentError, match=r"^col .*column.*got"):
        qera(w, FMT, RANK, gram=np.ones(COLUMNS + 1))


@pytest.mark.parametrize("method", [loftq, pissa])
def test_fewer_than_one_iteration_is_refused(w, method):
    with pytest.raises(InvalidArgumentError, match=r"^max_iter .*got 0"):
        method(w, FMT, RANK, iterations=0)


def test_more_work_gives_a_smaller_error(w):
    errors = [d.relative_error for d in (qlora(w, FMT, 4), lorc(w, FMT, 4), loftq(w, FMT, 4), lqlora(w, FMT, 4))]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] > errors[3]


def test_presets_are_one_call_of_decompose(w, gram):
    assert same(
        cloq(w, FMT, RANK, gram=gram),
        decompose(w, FMT, RANK, weighting=InputGram(gram), init="quantize", quantizer="gptq", fit="scale", max_iter=1),
    )
