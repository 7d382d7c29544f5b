"""Gram matrices and Kronecker factors against loops over rows and over gradients of single examples."""

from __future__ import annotations

import warnings

import pytest

from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lqlora.nn import causal_lm_loss, collect_fisher, collect_gram, collect_kronecker, select_linears  # noqa: E402
from tests.nn.statistics.models import mixed_state_model, squared, state_of, tokens  # noqa: E402


def _input_loop(model, batches) -> dict:
    """Mean of the outer product of every row, one at a time, in float64."""
    rows = {name: [] for name in select_linears(model)}

    def watch(name):
        def hook(_, args, kwargs):
            x = (args[0] if args else kwargs["input"]).detach().double().clone()
            rows[name] += x.reshape(-1, x.shape[-1])

        return hook

    linears = select_linears(model)
    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in linears.items()]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: (sum(torch.outer(x, x) for x in seen) / len(seen)).float() for name, seen in rows.items()}


def _gradient_loop(model, batches, loss) -> dict:
    """Outer products of the gradients of single losses at every row of every output, over the examples."""
    linears = select_linears(model)
    outputs = {name: [] for name in linears}

    def watch(name):
        def hook(_module, _args, output):
            outputs[name].append(output)
            return output.clone()  # the model may change it in place

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    totals = {name: torch.zeros(module.out_features, module.out_features) for name, module in linears.items()}
    for batch in batches:
        for single in loss(model, batch):
            for name, seen in outputs.items():
                for gradient in torch.autograd.grad(single, seen, retain_graph=True):
                    totals[name] += sum(torch.outer(g, g) for g in gradient.reshape(-1, gradient.shape[-1]))
        for seen in outputs.values():
            seen.clear()
    for handle in handles:
        handle.remove()
    return {name: total / sum(map(len, batches)) for name, total in totals.items()}


def _assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-6 * values.abs().max().item(), msg=name)


class Attention(nn.Module):
    """Two layers see the same tensor, a third one a changed copy, a fourth the tensor after it was changed."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.other, self.late, self.last = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        x = torch.tanh(x)
        y = self.q(x) + self.other(x * 2) + self.k(x)
        with torch.no_grad():
            x += 1
        return self.last(torch.relu_(y + self.late(x)))


class Twice(nn.Module):
    """Uses one layer at two depths, and once more on the same tensor."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x) + 0.5 * self.shared(input=x)))))


class Sometimes(nn.Module):
    """Two layers share some of their inputs only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) + self.b(x if x.mean() > 0 else -2 * x)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False)),
    "in-place activation in the middle": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
    ),
    "shared input": Attention,
    "layer used twice": Twice,
    "sometimes shared": Sometimes,
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture(params=[(3, 4), (2, 5, 4)], ids=["vectors", "sequences"])
def batches(request) -> list:
    torch.manual_seed(1)
    shape = request.param
    return [torch.randn(shape), torch.randn(shape) + 2, torch.randn(1, *shape[1:])]


class TestInputs:
    def test_it_is_the_mean_outer_product_of_rows(self, model, batches):
        _assert_close(collect_gram(model, batches), _input_loop(model, batches))

    def test_it_is_exactly_symmetric(self):
        model = nn.Sequential(nn.Linear(67, 1))
        gram = collect_gram(model, [torch.randn(33, 67)])["0"]
        assert torch.equal(gram, gram.T)

    def test_a_language_model_shares_what_it_sees_between_projections(self, llama):
        batches = [tokens(3), tokens(1)]
        found = collect_gram(llama, batches)
        expected = _input_loop(llama, batches)
        _assert_close(found, expected)
        for layer in ("model.layers.0.", "model.layers.1."):
            assert found[f"{layer}self_attn.q_proj"] is found[f"{layer}self_attn.k_proj"]
            assert found[f"{layer}self_attn.q_proj"] is found[f"{layer}self_attn.v_proj"]
            assert found[f"{layer}mlp.gate_proj"] is found[f"{layer}mlp.up_proj"]
        assert len({id(gram) for gram in found.values()}) == 2 * 4

    def test_only_layers_with_all_inputs_in_common_share(self):
        torch.manual_seed(0)
        found = collect_gram(Attention(), [torch.randn(3, 4)])
        assert found["q"] is found["k"]
        assert len({id(gram) for gram in found.values()}) == 4
        positive, negative = torch.ones(2, 4), -torch.ones(2, 4)
        found = collect_gram(Sometimes(), [positive, positive])
        assert found["a"] is found["b"]
        found = collect_gram(Sometimes(), [positive, negative])
        assert found["a"].flatten().unique().tolist() == [1.0]
        assert found["b"].flatten().unique().tolist() == [2.5]

    def test_a_shared_input_is_multiplied_once(self):
        class Products(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.count += function is torch.ops.aten.mm.default  # layers with a bias use another one
                return function(*args, **(kwargs or {}))

        with Products() as products:
            collect_gram(Attention(), [torch.randn(3, 4)])
        assert products.count == len(["q and k", "other", "late", "last"])

    def test_many_batches_lose_no_precision(self):
        """A float32 sum of 2**28 stays the same when ones are added, as 2**28 + 1 is not a float32. This one is float64."""
        first, ones = torch.full((1, 1), 2.0**14), torch.ones(1, 1)
        found = collect_gram(nn.Sequential(nn.Linear(1, 1)), [first, *[ones] * 4095])["0"]
        assert found.item() == 65537.0

    def test_how_rows_are_batched_does_not_matter(self):
        torch.manual_seed(0)
        model, data = MODELS["mlp"](), torch.randn(12, 4)
        whole = collect_gram(model, [data])
        for size in (1, 5):
            _assert_close(collect_gram(model, data.split(size)), whole)

    def test_a_loss_runs_the_model(self, llama):
        batches = [{"input_ids": tokens(2)}]
        found = collect_gram(llama, batches, loss=lambda model, batch: model(**batch))
        _assert_close(found, collect_gram(llama, [tokens(2)]))

    def test_inference_mode_around_it_changes_nothing(self):
        torch.manual_seed(0)
        model = Attention()
        data = torch.randn(3, 4)
        expected = collect_gram(model, [data])
        with torch.inference_mode():
            found = collect_gram(model, [data.clone()])
            _assert_close(found, expected)
        assert found["q"] is found["k"]
        assert not found["q"].is_inference()


class TestKroneckerFactors:
    def test_they_are_the_moments_of_inputs_and_of_gradients(self, model, batches):
        found = collect_kronecker(model, batches, loss=squared)
        _assert_close({name: inputs for name, (_, inputs) in found.items()}, _input_loop(model, batches))
        _assert_close({name: outputs for name, (outputs, _) in found.items()}, _gradient_loop(model, batches, squared))

    def test_inputs_are_those_of_the_other_function_and_shared_too(self, llama):
        batches = [tokens(3), tokens(1)]
        found = collect_kronecker(llama, batches)
        gradients = _gradient_loop(llama, batches, causal_lm_loss)
        _assert_close({name: inputs for name, (_, inputs) in found.items()}, collect_gram(llama, batches))
        _assert_close({name: outputs for name, (outputs, _) in found.items()}, gradients)
        assert found["model.layers.0.mlp.gate_proj"][1] is found["model.layers.0.mlp.up_proj"][1]

    @pytest.mark.parametrize("examples", [1, 5])
    def test_their_product_is_the_fisher_information_of_equaltokens(self, examples):
        """Exact for one example of one row, and for several whose inputs are the same up to sign."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
        x = torch.randn(1, 4) * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])[:examples, None]
        targets = torch.randn(examples, 3)

        def loss(model, batch):
            return (model(batch) - targets).pow(4).sum(dim=1)

        outputs, inputs = collect_kronecker(model, [x], loss=loss)["0"]
        gradients = [torch.autograd.grad(loss(model, x)[i], model[0].weight)[0].flatten() for i in range(examples)]
        fisher = sum(torch.outer(g, g) for g in gradients) / examples
        product = torch.kron(outputs, inputs)
        torch.testing.assert_close(product, fisher, rtol=1e-4, atol=1e-5 * fisher.max().item())
        diagonal = collect_fisher(model, [x], loss=loss)["0"]
        torch.testing.assert_close(product.diagonal().view(3, 4), diagonal, rtol=1e-4, atol=0)

    def test_their_product_is_on_the_scale_of_the_fisher_information(self):
        """With independent rows both have the same trace, in the mean, however many rows an example has."""
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
        x, signs = torch.randn(4000, 6, 4, generator=generator), torch.randn(4000, 6, 3, generator=generator).sign()

        def loss(model, batch):
            return (model(batch) * signs).flatten(1).sum(dim=1)

        outputs, inputs = collect_kronecker(model, [x], loss=loss)["0"]
        fisher = collect_fisher(model, [x], loss=loss)["0"]
        assert (outputs.trace() * inputs.trace() / fisher.sum()).item() == pytest.approx(1, abs=0.03)

    def test_layers_may_merge_examples_andtokens(self):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 5, 4)
        merged = collect_kronecker(model, [x], loss=lambda m, b: m(b.view(-1, 4)).square().view(2, -1).sum(dim=1))
        apart = collect_kronecker(model, [x], loss=squared)
        for found, expected in zip(merged["0"], apart["0"], strict=True):
            torch.testing.assert_close(found, expected)

    def test_it_works_where_gradients_are_switched_off(self):
        torch.manual_seed(0)
        model, data = MODELS["mlp"](), torch.randn(3, 4)
        expected = collect_kronecker(model, [data], loss=squared)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                found = collect_kronecker(model, [data], loss=squared)
            assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))

    def test_an_input_that_is_not_finite_is_refused_though_the_loss_is(self):
        model = nn.Sequential(nn.Linear(4, 2))
        with pytest.raises(NonFiniteError, match="input of '0'"):
            collect_kronecker(model, [torch.full((1, 4), 1e25)], loss=lambda model, x: model(x).sum(dim=1))

    def test_a_gradient_that_is_not_finite_is_refused_by_name(self):
        model = nn.Sequential(nn.Linear(4, 2))
        with pytest.raises(NonFiniteError, match="gradient at the output of '0'"):
            collect_kronecker(model, [torch.ones(1, 4)], loss=lambda model, x: (model(x) * 1e25).sum(dim=1))

    def test_a_loss_of_no_dimensions_is_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"loss.*\(\)"):
            collect_kronecker(MODELS["mlp"](), [torch.ones(2, 4)], loss=lambda model, x: model(x).sum())

    def test_a_loss_that_is_not_finite_is_refused(self):
        with pytest.raises(NonFiniteError, match=r"loss.*example 2\b"):
            collect_kronecker(
                MODELS["mlp"](),
                [torch.ones(2, 4), torch.ones(1, 4)],
                loss=lambda m, x: squared(m, x).log() / (len(x) - 1),
            )


def _gram(model, batches):
    return collect_gram(model, batches)


def _kronecker(model, batches):
    return {
        f"{name}.{which}": moment
        for name, moments in collect_kronecker(model, batches, loss=squared).items()
        for which, moment in zip(("outputs", "inputs"), moments, strict=True)
    }


@pytest.mark.parametrize("collect", [_gram, _kronecker])
class TestBoth:
    def test_half_precision_models_give_float32_moments_of_what_they_see(self, collect):
        torch.manual_seed(0)
        model, data = nn.Sequential(nn.Linear(4, 3)).bfloat16(), torch.randn(50, 4).bfloat16()
        found = collect(model, [data])
        assert {moment.dtype for moment in found.values()} == {torch.float32}
        name = next(name for name in found if not name.endswith("outputs"))
        wide = data.double()
        torch.testing.assert_close(found[name].double(), wide.T @ wide / 50, rtol=1e-5, atol=1e-6)

    def test_autocast_does_not_lower_the_precision_of_products(self, collect):
        torch.manual_seed(0)
        model, data = nn.Sequential(nn.Linear(4, 3)), torch.randn(50, 4)
        with torch.autocast("cpu", torch.bfloat16):
            found = collect(model, [data])
        name = next(name for name in found if not name.endswith("outputs"))
        torch.testing.assert_close(found[name], data.T @ data / 50, rtol=1e-5, atol=1e-6)

    def test_no_batches_are_refused(self, collect):
        with pytest.raises(InvalidArgumentError, match="batches"):
            collect(MODELS["mlp"](), [])

    def test_one_mapping_is_no_list_of_batches(self, collect):
        with pytest.raises(InvalidArgumentError, match=r"^batches .*\[batch\]"):
            collect(MODELS["mlp"](), {"input": torch.ones(1, 4)})

    def test_inputs_that_are_not_finite_are_refused_by_name(self, collect):
        for bad in (float("nan"), float("inf"), 1e30):
            model = nn.Sequential(nn.Tanh(), nn.Linear(4, 3), nn.Threshold(1e9, bad), nn.Linear(3, 2))
            with pytest.raises(NonFiniteError, match=r"input of '3'|loss"):
                collect(model, [torch.ones(1, 4)])

    def test_nothing_is_left_behind(self, collect):
        model = mixed_state_model()
        before = state_of(model)
        collect(model, [torch.randn(5, 4)])
        assert state_of(model) == before
        with pytest.raises(NonFiniteError):
            collect(model, [torch.randn(5, 4), torch.full((1, 4), float("nan"))])
        assert state_of(model) == before


@pytest.mark.parametrize("collect", [collect_gram, lambda *a, **k: collect_kronecker(*a, loss=squared, **k)])
def test_include_and_exclude_select_layers(collect):
    model = MODELS["mlp"]()
    assert list(collect(model, [torch.ones(1, 4)], include="2")) == ["2"]
    assert list(collect(model, [torch.ones(1, 4)], exclude="2")) == ["0"]
    with pytest.raises(InvalidArgumentError, match=r"include.*nothing"):
        collect(model, [torch.ones(1, 4)], include="nothing")


def _means(model, data):
    return collect_gram(model, [data])["0"]


def _moments(model, data):
    return collect_kronecker(model, [data], loss=lambda model, x: model(x).sum(dim=1))["0"][1]


@pytest.mark.parametrize("collect", [_means, _moments])
class TestSmallInputs:
    @pytest.mark.parametrize("size", [1e-18, 3e-19])
    def test_near_the_smallest_normal_squares_they_lose_no_digits(self, collect, size):
        torch.manual_seed(0)
        data = torch.randn(50, 4).abs() + 1
        found = collect(nn.Sequential(nn.Linear(4, 2)), data * size)
        wide = (data * size).double()
        torch.testing.assert_close(found.double(), wide.T @ wide / 50, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-42])
    def test_below_it_they_are_named_in_a_warning(self, collect, size):
        with pytest.warns(UserWarning, match=r"^inputs of the layers 0 are"):
            collect(nn.Sequential(nn.Linear(4, 2)), torch.full((3, 4), size))

    def test_zeros_do_not_warn(self, collect):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not collect(nn.Sequential(nn.Linear(4, 2)), torch.zeros(3, 4)).any()


def test_small_gradients_are_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"^output gradients of the"):
        collect_kronecker(
            nn.Sequential(nn.Linear(4, 2)), [torch.ones(3, 4)], loss=lambda model, x: 1e-25 * model(x).sum(dim=1)
        )
