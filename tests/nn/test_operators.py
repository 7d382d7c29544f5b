"""The operators of torch: against the functions on arrays, under opcheck, autograd and the compilers."""

from __future__ import annotations

import io
import shutil

import pytest

import lqlora as lq
from lqlora.errors import (
    FormatError,
    InvalidArgumentError,
    LQLoRAError,
    MixedArraysError,
    NonFiniteError,
    UnsupportedArrayError,
)
from tests.quantized.cases import KINDS
from tests.requirements import require_module

torch = require_module("torch")
from torch.autograd import forward_ad  # noqa: E402 - needs torch
from torch.utils.checkpoint import checkpoint  # noqa: E402

from lqlora.nn import LQLinear, from_operands, operands  # noqa: E402

OUT, IN = 12, 20
OWN = lq.Codebook([-1, -0.3, 0.2, 1], "own")
#: Nested scales, fitted levels of a matrix and of lines, zero points, axes, a codebook without a name.
FORMATS = {
    "nf4/16:float32": None, "nf3/8:u8/16:float16": None, "nf2+fit/8:float16": None, "nf2+fit2/8@-1:float32": None,
    "affine4/7:float16": None, "nf3/8@0:u4+none/4:u8/16:bfloat16": None, "own/8:d8/4:float32": OWN,
}  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _quantized(text="nf3/8:u8/16:float16", shape=(OUT, IN), **options):
    return lq.quantize(_random(*shape), lq.BlockFormat.parse(text, FORMATS.get(text)), **options)


def _layer(text="nf3/8:u8/16:float16", shape=(OUT, IN)) -> LQLinear:
    rows, columns = shape
    return LQLinear(
        _quantized(text, shape), _random(3, columns, seed=1), _random(rows, 3, seed=2), 0.5, _random(rows, seed=3)
    )


def _model():
    return torch.nn.Sequential(_layer(), torch.nn.Tanh(), _layer("own/8:d8/4:float32", (5, OUT)))


@pytest.fixture(params=list(FORMATS))
def q(request):
    return _quantized(request.param)


class TestTheyAreTheFunctionsOnArrays:
    @pytest.mark.parametrize("text", KINDS)
    def test_dequantize(self, text):
        q = _quantized(text)
        assert torch.equal(torch.ops.lqlora.dequantize(*operands(q)), lq.dequantize(q))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dequantize_to_every_dtype(self, dtype):
        q = _quantized()
        dense = torch.ops.lqlora.dequantize(*operands(q), dtype=dtype)
        assert dense.dtype == dtype
        assert torch.equal(dense, lq.dequantize(q).to(dtype))

    @pytest.mark.parametrize("text", sorted({*KINDS, *FORMATS}))
    def test_quantize(self, text):
        fmt = lq.BlockFormat.parse(text, FORMATS.get(text))
        expected = lq.quantize(_random(OUT, IN), fmt)
        found = torch.ops.lqlora.quantize(_random(OUT, IN), text, operands(expected).codebook)
        assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in expected.to_arrays().values()]
        assert all(map(torch.equal, found, expected.to_arrays().values()))

    @pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
    def test_quantize_with_a_fit_and_batch_dimensions(self, fit):
        w, text = _random(3, OUT, IN), "nf2+fit/8:float32"
        found = torch.ops.lqlora.quantize(w, text, fit=fit, batch_dims=1)
        expected = lq.quantize(w, lq.BlockFormat.parse(text), fit=fit, batch_dims=1)
        assert all(map(torch.equal, found, expected.to_arrays().values()))
        assert torch.equal(torch.ops.lqlora.dequantize(found, text, w.shape), lq.dequantize(expected))

    @pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN), (0, IN), (2, 0, IN)], ids=str)
    def test_matmul(self, q, shape):
        x = _random(*shape, seed=1)
        torch.testing.assert_close(torch.ops.lqlora.matmul(x, *operands(q)), lq.matmul(x, q))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("adjoint", [False, True])
    def test_integers_are_multiplied_exactly_in_every_dtype(self, dtype, adjoint):
        generator = torch.Generator().manual_seed(0)
        w = torch.randint(-7, 8, (OUT, IN), generator=generator).float()
        w[:, 0] = 7  # so that scales are 1
        q = lq.quantize(w, lq.BlockFormat.parse("int4/20:float32"))
        x = torch.randint(-1, 2, (3, OUT if adjoint else IN), generator=generator).to(dtype)
        y = torch.ops.lqlora.matmul(x, *operands(q), adjoint=adjoint)
        assert torch.equal(lq.dequantize(q), w)
        assert torch.equal(y, (x.double() @ (w if adjoint else w.T).double()).to(dtype))

    @pytest.mark.parametrize("adjoint", [False, True])
    def test_rows_in_any_layout(self, q, adjoint):
        rows = OUT if adjoint else IN
        dense = lq.dequantize(q) if adjoint else lq.dequantize(q).T
        for x in (_random(rows, 4).T, _random(4, 2 * rows)[:, ::2], _random(1, rows).expand(4, rows)):
            assert not x.is_contiguous()
            y = torch.ops.lqlora.matmul(x, *operands(q), adjoint=adjoint)
            assert y.is_contiguous()
            torch.testing.assert_close(y, x @ dense, rtol=1e-5, atol=1e-5)

    def test_on_the_meta_device_they_tell_shapes_and_dtypes(self, q):
        tensors, *rest = operands(q)
        meta = [tensor.to("meta") for tensor in tensors]
        y = torch.ops.lqlora.matmul(torch.empty(3, IN, device="meta", dtype=torch.bfloat16), meta, *rest)
        assert (tuple(y.shape), y.dtype, y.device.type) == ((3, OUT), torch.bfloat16, "meta")
        found = torch.ops.lqlora.quantize(torch.empty(OUT, IN, device="meta"), rest[0], rest[2])
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in tensors]
        assert torch.ops.lqlora.dequantize(meta, *rest, dtype=torch.float16).dtype == torch.float16


class TestTheLayer:
    @pytest.mark.parametrize("text", FORMATS)
    def test_its_weight_is_handed_over_without_a_copy(self, text):
        weight = _layer(text).weight
        found, expected = weight.operands, operands(weight.array)
        assert found[1:] == expected[1:]
        assert all(one is other for one, other in zip(found.tensors, expected.tensors, strict=True))

    def test_it_runs_on_the_meta_device(self):
        y = _layer().to("meta")(torch.empty(2, 3, IN, device="meta", dtype=torch.float16))
        assert (tuple(y.shape), y.dtype) == ((2, 3, OUT), torch.float16)

    def test_rows_that_do_not_fit_are_refused_by_a_sentence(self):
        with pytest.raises(InvalidArgumentError, match=r"x must .* \(3, 19\) and \(12, 20\)"):
            _layer()(_random(3, IN - 1))


class TestOpcheck:
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("adjoint", [False, True])
    def test_matmul(self, q, adjoint):
        x = _random(3, OUT if adjoint else IN).requires_grad_(not adjoint)
        torch.library.opcheck(torch.ops.lqlora.matmul.default, (x, *operands(q)), {"adjoint": adjoint})

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("x", [_random(IN), _random(2, 0, IN), _random(IN, 3).T, _random(3, IN).half()], ids=str)
    def test_matmul_of_rows_of_other_kinds(self, x):
        torch.library.opcheck(torch.ops.lqlora.matmul.default, (x.requires_grad_(), *operands(_quantized())))

    @pytest.mark.sampled(3)
    def test_dequantize(self, q):
        torch.library.opcheck(torch.ops.lqlora.dequantize.default, tuple(operands(q)), {"dtype": torch.bfloat16})

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("grad", [False, True])
    def test_quantize(self, q, grad):
        w, (_, text, _, codebook) = _random(OUT, IN).requires_grad_(grad), operands(q)
        torch.library.opcheck(torch.ops.lqlora.quantize.default, (w, text, codebook))


#: torch loads its formulas of forward mode by means that it deprecates.
forwards = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class TestGradients:
    @pytest.mark.parametrize("text", ["nf3/8:u8/16:float16", "affine4/7:float16"])
    def test_of_matmul_with_respect_to_the_rows_once_and_twice(self, text):
        q = _quantized(text)
        x = _random(3, IN, dtype=torch.float64).requires_grad_()

        def product(rows):
            return torch.ops.lqlora.matmul(rows, *operands(q))

        assert torch.autograd.gradcheck(product, (x,))
        assert torch.autograd.gradgradcheck(lambda rows: product(rows).square(), (x,))

    @forwards
    @pytest.mark.parametrize("wanted", [False, True])
    def test_of_matmul_forwards(self, q, wanted):
        x, tangent = _random(3, IN).requires_grad_(wanted), _random(3, IN, seed=1)
        with forward_ad.dual_level():
            y = torch.ops.lqlora.matmul(forward_ad.make_dual(x, tangent), *operands(q))
            found = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(found, tangent @ lq.dequantize(q).T, rtol=1e-5, atol=1e-5)

    @forwards
    def test_those_of_torch_func_are_refused_and_not_lost(self):
        layer, x = _layer(), _random(3, IN)
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.jvp(layer, (x,), (x,))
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda rows: layer(rows).sum())(x)

    def test_rounding_has_none(self):
        w = _random(OUT, IN).requires_grad_()
        tensors = torch.ops.lqlora.quantize(w, "nf4/8:float32")
        tensors[1].requires_grad_()
        dense = torch.ops.lqlora.dequantize(tensors, "nf4/8:float32", w.shape)
        assert not any(tensor.grad_fn for tensor in tensors)
        assert not dense.requires_grad

    def test_a_weight_that_changed_before_the_backward_pass_is_noticed(self):
        layer = _layer()
        y = layer(_random(2, IN).requires_grad_())
        layer.load_state_dict(layer.state_dict())
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_changes_no_gradient(self, use_reentrant):
        model, x = _model(), _random(3, IN).requires_grad_()
        expected = torch.autograd.grad(model(x).square().sum(), [x, *_trainable(model)])
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        assert all(map(torch.equal, [x.grad, *(p.grad for p in _trainable(model))], expected))


def _trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


WRONG = {
    "columns": (lambda x, o: (x[:, 1:], *o), InvalidArgumentError, "x must have as many"),
    "no row": (lambda x, o: (x[0, 0], *o), InvalidArgumentError, "x must have as many"),
    "integers": (lambda x, o: (x.int(), *o), UnsupportedArrayError, "x must be .* torch.int32"),
    "device": (lambda x, o: (x.to("meta"), *o), MixedArraysError, "x and weight .* meta and cpu"),
    "tensors": (lambda x, o: (x, o.tensors[1:], *o[1:]), FormatError, "weight must be 4 tensors"),
    "format": (lambda x, o: (x, o.tensors, "nf5/16", *o[2:]), FormatError, "weight must be 2 tensors"),
    "spelling": (lambda x, o: (x, o.tensors, "nf4", *o[2:]), FormatError, "block format.* 'nf4'"),
    "codebook": (lambda x, o: (x, o.tensors, o.fmt, o.shape, "-1 0 1"), FormatError, "codebook must be"),
}


class TestErrors:
    @pytest.mark.parametrize("case", WRONG)
    def test_of_matmul_are_sentences(self, case):
        wrong, error, sentence = WRONG[case]
        with pytest.raises(error, match=sentence):
            torch.ops.lqlora.matmul(*wrong(_random(3, IN), operands(_quantized())))

    @pytest.mark.parametrize("case", sorted(set(WRONG) - {"device"}))
    def test_a_tracing_compiler_finds_the_same_ones(self, case):
        wrong, error, sentence = WRONG[case]
        o = operands(_quantized())
        o = o._replace(tensors=[tensor.to("meta") for tensor in o.tensors])
        with pytest.raises(error, match=sentence):
            torch.ops.lqlora.matmul(*wrong(_random(3, IN).to("meta"), o))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_a_stack_is_no_matrix(self, device):
        tensors, *rest = operands(_quantized("nf4/8:float32", (2, 20), batch_dims=1))
        with pytest.raises(InvalidArgumentError, match="x must have as many"):
            torch.ops.lqlora.matmul(_random(3, 20).to(device), [tensor.to(device) for tensor in tensors], *rest)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_of_the_others_too(self, device):
        tensors, *rest = operands(_quantized())
        with pytest.raises(UnsupportedArrayError, match="dtype must be float16"):
            torch.ops.lqlora.dequantize([tensor.to(device) for tensor in tensors], *rest, dtype=torch.int8)
        w = _random(OUT, IN).to(device)
        with pytest.raises(InvalidArgumentError, match=r"fmt must .*\+fit"):
            torch.ops.lqlora.quantize(w, "nf4/8:float32", fit="levels+scale")
        with pytest.raises(InvalidArgumentError, match=r"batch_dims must be .* 2"):
            torch.ops.lqlora.quantize(w, "nf4/8:float32", batch_dims=3)
        with pytest.raises(UnsupportedArrayError, match="int32"):
            torch.ops.lqlora.quantize(w.int(), "nf4/8:float32")

    def test_what_quantize_finds_when_it_runs(self):
        with pytest.raises(InvalidArgumentError, match=r"fit must be .* 'best'"):
            torch.ops.lqlora.quantize(torch.ones(4), "nf4/8:float32", fit="best")
        with pytest.raises(NonFiniteError, match="4 non-finite value"):
            torch.ops.lqlora.quantize(torch.full((4,), float("nan")), "nf4/8:float32")

    @pytest.mark.usefixtures("compiler")  # a shape that was compiled for before may have become a symbol
    def test_the_sentence_survives_compilation(self):
        compiled = torch.compile(_model(), fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match=r"x must .* \(3, 19\) and \(12, 20\)"):
            compiled(_random(3, IN - 1))

    def test_every_class_of_error_is_the_librarys(self):
        assert all(issubclass(error, LQLoRAError) for _, error, _ in WRONG.values())


@pytest.fixture
def compiler():
    """Start and end without compiled code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler."),
                pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
            ],
        ),
    ],
)
class TestCompiled:
    def test_training_with_batches_of_any_size_takes_one_graph_without_breaks(self, backend):
        model = _model()
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
        for rows in (4, 5, 1, 9):
            with torch.compiler.set_stance("fail_on_recompile" if rows in {5, 9} else "default"):
                _assert_trains_alike(compiled, model, _random(rows, IN, seed=rows))

    def test_inference(self, backend):
        model, x = _model(), _random(2, 3, IN)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(compiled(x), model(x))

    def test_autocast_and_narrow_inputs(self, backend):
        model, x = _model(), _random(3, IN)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = compiled(x)
        for y, dtype in ((found, torch.bfloat16), (compiled(x.half()), torch.float16)):
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=0.2)

    def test_nothing_of_the_weights_size_is_saved_for_the_backward_pass(self, backend):
        saved = []
        compiled = torch.compile(_layer(), fullgraph=True, backend=backend)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            y = compiled(_random(2, IN).requires_grad_())
        assert saved
        assert max(tensor.numel() for tensor in saved) < OUT * IN
        assert max(tensor.untyped_storage().nbytes() for tensor in saved) < 4 * OUT * IN
        y.sum().backward()

    def test_checkpointing(self, backend):
        model = _model()

        def saving(x):
            return checkpoint(model, x, use_reentrant=False)

        _assert_trains_alike(torch.compile(saving, fullgraph=True, backend=backend), model, _random(3, IN))

    def test_the_three_operators_in_a_function(self, backend):
        def there_and_back(w, x):
            tensors = torch.ops.lqlora.quantize(w, "nf3/8:u8/16:float16")
            dense = torch.ops.lqlora.dequantize(tensors, "nf3/8:u8/16:float16", w.shape)
            return dense, torch.ops.lqlora.matmul(x, tensors, "nf3/8:u8/16:float16", w.shape), tensors

        compiled = torch.compile(there_and_back, fullgraph=True, backend=backend, dynamic=True)
        for rows in (OUT, OUT + 1):
            w, x = _random(rows, IN), _random(2, IN)
            dense, y, tensors = compiled(w, x)
            assert torch.equal(dense, lq.dequantize(_quantized(shape=(rows, IN))))
            assert from_operands(tensors, "nf3/8:u8/16:float16", w.shape).shape == (rows, IN)
            torch.testing.assert_close(y, x @ dense.T)


def _assert_trains_alike(compiled, model, x):
    gradients = []
    for function in (compiled, model):
        own = x.clone().requires_grad_()
        y = function(own)
        gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), [own, *_trainable(model)])])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


class TestExport:
    def test_an_exported_model_takes_batches_of_any_size(self):
        model = _model()
        exported = torch.export.export(model, (_random(4, IN),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        for rows in (1, 4, 7):
            torch.testing.assert_close(exported.module()(_random(rows, IN)), model(_random(rows, IN)))

    def test_it_is_saved_with_packed_weights_and_loaded_again(self):
        model, file = _model(), io.BytesIO()
        torch.export.save(torch.export.export(model, (_random(4, IN),)), file)
        file.seek(0)
        loaded = torch.export.load(file)
        torch.testing.assert_close(loaded.module()(_random(4, IN)), model(_random(4, IN)))
        assert {name for name in loaded.state_dict if name.endswith("codes")} == {
            "0.quantized.codes", "0.quantized.scales.codes", "2.quantized.codes", "2.quantized.scales.codes",
        }  # fmt: skip
