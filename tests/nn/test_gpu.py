"""Layers, operators and decompositions on a CUDA device: equal to the CPU, without waits or copies to the host."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

import lqlora as lq
from lqlora._optional import is_installed
from tests.requirements import require_module

torch = require_module("torch")
from lqlora.nn import LQLinear, collect_fisher, collect_kronecker, operands  # noqa: E402 - needs torch
from tests.nn.statistics.layouts import Experts  # noqa: E402
from tests.nn.statistics.models import squared  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_torch")]

OUT, IN, RANK = 48, 64, 4
FORMATS = {
    "plain": lq.BlockFormat.parse("nf4/64:float32"),
    "nested": lq.BlockFormat.parse("nf3/16:u8/16:float16"),
    "zero points": lq.BlockFormat.parse("affine4/32:float16"),
    "levels of lines": lq.BlockFormat.parse("nf2+fit2/8@-1:float32"),
    "down the columns": lq.BlockFormat.parse("nf4/16@0:float32"),
}

#: Norm of the difference from the CPU's result over the norm of that: rounding of weights and results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

every_format = pytest.mark.parametrize("text", list(FORMATS))


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantized(text: str, *shape: int) -> lq.QuantizedArray:
    return lq.quantize(_random(*(shape or (OUT, IN))), FORMATS[text])


def _layer(text: str) -> LQLinear:
    factors = _random(RANK, IN, seed=1), _random(OUT, RANK, seed=2)
    return LQLinear(_quantized(text), *factors, 0.5, _random(OUT, seed=3))


def _contents(layer: LQLinear) -> dict[str, bytes]:
    state = layer.state_dict()
    return {name: tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def _assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.is_cuda
    wide = expected.detach().double()
    difference = found.detach().double().cpu() - wide
    assert float(difference.norm()) <= tolerance * float(wide.norm())


class TestLayers:
    @every_format
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("rows", [1, 5, 40])
    def test_values_and_gradients_are_those_of_the_cpu(self, text, dtype, rows):
        layer = _layer(text)
        there = copy.deepcopy(layer).to("cuda")
        x = _random(rows, IN, seed=4).to(dtype)
        own, moved = x.float().clone().requires_grad_(), x.to("cuda").requires_grad_()
        y, found = layer(own), there(moved)
        assert found.dtype == dtype
        y.square().sum().backward()
        found.float().square().sum().backward()
        _assert_near(found, y.detach(), TOLERANCE[dtype])
        pairs = [(moved, own), (there.lora_A, layer.lora_A), (there.lora_B, layer.lora_B)]
        for other, expected in pairs:
            _assert_near(other.grad, expected.grad, 4 * TOLERANCE[dtype])

    @every_format
    def test_to_the_device_and_back_keeps_every_byte(self, text):
        layer = _layer(text)
        before = _contents(layer)
        there = layer.to("cuda")
        assert there.weight.device.type == "cuda"
        assert _contents(there) == before
        assert _contents(there.to("cpu")) == before

    @every_format
    def test_quantizing_there_stores_the_bytes_of_the_cpu(self, text):
        there = lq.quantize(_random(OUT, IN).to("cuda"), FORMATS[text])
        assert {array.device.type for array in there.to_arrays().values()} == {"cuda"}
        for name, array in _quantized(text).to_arrays().items():
            assert torch.equal(there.to_arrays()[name].cpu(), array)
        assert torch.equal(lq.dequantize(there).cpu(), lq.dequantize(_quantized(text)))

    def test_a_decomposition_stays_on_the_device_and_has_the_error_of_the_cpu(self):
        w = _random(OUT, IN)
        here = lq.decompose(w.numpy(), FORMATS["plain"], RANK, max_iter=5)
        d = lq.decompose(w.to("cuda"), FORMATS["plain"], RANK, max_iter=5)
        assert d.lora_A.is_cuda
        assert d.lora_B.is_cuda
        assert d.relative_error == pytest.approx(here.relative_error, rel=0.01)
        layer = LQLinear.from_decomposition(d, _random(OUT).to("cuda"))
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cuda"}
        dense = torch.nn.functional.linear(w.to("cuda"), d.reconstruct(), layer.bias)
        torch.testing.assert_close(layer(w.to("cuda")), dense, rtol=1e-4, atol=1e-4)


class TestOperators:
    @every_format
    @pytest.mark.parametrize("adjoint", [False, True])
    def test_matmul(self, text, adjoint):
        x = _random(3, OUT if adjoint else IN).to("cuda").requires_grad_(not adjoint)
        q = _quantized(text).to(torch, "cuda")
        torch.library.opcheck(torch.ops.lqlora.matmul.default, (x, *operands(q)), {"adjoint": adjoint})

    @every_format
    def test_dequantize_and_quantize(self, text):
        q = _quantized(text).to(torch, "cuda")
        _, spelled, _, codebook = operands(q)
        torch.library.opcheck(torch.ops.lqlora.dequantize.default, tuple(operands(q)), {"dtype": torch.bfloat16})
        torch.library.opcheck(torch.ops.lqlora.quantize.default, (_random(OUT, IN).to("cuda"), spelled, codebook))

    @pytest.mark.parametrize("grad", [False, True])
    def test_linear(self, grad):
        shapes = ((3, IN), (RANK, IN), (OUT, RANK))
        x, *factors = (_random(*shape, seed=i).to("cuda").requires_grad_(grad) for i, shape in enumerate(shapes))
        weight = operands(_quantized("nested").to(torch, "cuda"))
        torch.library.opcheck(torch.ops.lqlora.linear.default, (x, *weight, *factors, 0.5))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_layers_are_compiled_into_one_graph(self, backend):
        if backend == "inductor" and not is_installed("triton"):
            pytest.skip("Inductor needs triton.")
        model = torch.nn.Sequential(_layer("nested"), torch.nn.Tanh()).to("cuda")
        x = _random(3, IN).to("cuda").requires_grad_()
        torch.compiler.reset()
        y = torch.compile(model, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
        (found,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            found = torch.compile(model, fullgraph=True, backend=backend)(x)
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
        torch.compiler.reset()

    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
    @pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # Inductor makes one when it starts
    def test_a_compiler_puts_layers_into_cuda_graphs(self):
        if not is_installed("triton"):
            pytest.skip("Inductor needs triton.")
        model = torch.nn.Sequential(_layer("nested"), torch.nn.Tanh()).to("cuda")
        torch.compiler.reset()
        skipped = torch._dynamo.utils.counters["inductor"]
        skipped.clear()
        with torch.inference_mode():
            compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
            for seed in range(4):  # compiled, recorded, replayed
                x = _random(3, IN, seed=seed).to("cuda")
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert not skipped["cudagraph_skips"]
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
class TestWaiting:
    @every_format
    @pytest.mark.parametrize("rows", [1, 40])
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_matmul_is_captured_in_a_cuda_graph(self, text, rows, dtype):
        q = _quantized(text).to(torch, "cuda")
        x, other = (_random(rows, IN, seed=seed).to("cuda", dtype) for seed in (1, 2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels and copies tables, which a capture forbids
                lq.matmul(x, q)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lq.matmul(x, q)
        x.copy_(other)
        graph.replay()
        torch.testing.assert_close(y, lq.matmul(other, q))

    @every_format
    def test_dequantize_and_matmul_do_not_wait_for_the_device(self, text):
        q, x = _quantized(text).to(torch, "cuda"), _random(20, IN).to("cuda")
        layer = _layer(text).to("cuda")

        def work():
            lq.dequantize(q)
            lq.matmul(x, q)
            layer(x.clone().requires_grad_()).sum().backward()

        work()  # compiles kernels and copies tables
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize(("text", "most"), [("plain", 3), ("nested", 8)])
    def test_quantize_waits_only_to_check_for_nonfinite_weights_and_lost_blocks(self, text, most):
        w = _random(OUT, IN).to("cuda")
        lq.quantize(w, FORMATS[text])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                lq.quantize(w, FORMATS[text])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(waits) <= most, [str(wait.message) for wait in waits]

    @pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
    def test_no_weight_is_copied_to_the_host(self, fit, monkeypatch):
        w, copied = _random(4 * OUT, 4 * IN).to("cuda"), []
        gram = _random(8 * IN, 4 * IN, seed=1).to("cuda")

        def watch(name):
            method = getattr(torch.Tensor, name)

            def watched(tensor, *args, **kwargs):
                result = method(tensor, *args, **kwargs)
                left = tensor.is_cuda and not (isinstance(result, torch.Tensor) and result.is_cuda)
                copied.append(tensor.numel() if left else 0)
                return result

            monkeypatch.setattr(torch.Tensor, name, watched)

        for name in ("cpu", "to", "numpy", "tolist", "__array__"):
            watch(name)
        q = lq.quantize(w, FORMATS["nested"], fit=fit)
        lq.dequantize(q)
        lq.decompose(w, FORMATS["nested"], RANK, fit=fit, max_iter=2)
        lq.gptq(w, FORMATS["plain"], gram.T @ gram, fit=fit, rounds=1, sweeps=0)
        assert max(copied, default=0) < np.prod(w.shape) // 64


@pytest.mark.parametrize("collect", [collect_fisher, collect_kronecker])
def test_statistics_are_those_of_the_cpu_in_host_memory(collect):
    """Two experts see the tokens of a batch in the order that they choose."""
    torch.manual_seed(0)
    model, x = Experts(), _random(6, 5, 4)
    expected = collect(model, [x], loss=squared)
    found = collect(model.to("cuda"), [x.to("cuda")], loss=squared)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        pairs = zip(found[name], values, strict=True) if isinstance(values, tuple) else [(found[name], values)]
        for own, other in pairs:
            assert own.device.type == "cpu"
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.max()))
