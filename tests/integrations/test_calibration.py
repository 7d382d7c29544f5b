"""Statistics of models from their files, block after block: they are those of the model in memory, and survive interruptions."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest

import lqlora as lq
from lqlora.checkpoint._container import digest
from lqlora.errors import CheckpointError, DeadLayerWarning, InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch, transformers, _ = (require_module(name) for name in ("torch", "transformers", "accelerate"))
from lqlora.integrations import _block_runs, calibration  # noqa: E402 - needs torch
from lqlora.integrations.calibration import calibrate_checkpoint  # noqa: E402
from lqlora.integrations.sources import open_model  # noqa: E402
from lqlora.integrations.statistics import open_statistics  # noqa: E402
from lqlora.weighting import InputGram  # noqa: E402
from tests.integrations import tiny_models  # noqa: E402
from tests.nn.architectures import ARCHITECTURES  # noqa: E402

# transformers warns of its own changes.
pytestmark = pytest.mark.filterwarnings("ignore:(?!source has no matrices)")

FORMAT = tiny_models.FORMAT

#: Lists of blocks of models that have several.
BLOCKS = {
    "t5": ["decoder.block", "encoder.block"],
    "t5 classifier": ["transformer.decoder.block"],
    "switch": ["encoder.block", "decoder.block"],
    "clip": ["text_model.encoder.layers", "vision_model.encoder.layers"],
    "whisper": ["model.decoder.layers", "model.encoder.layers"],
}
CASES = [(name, blocks) for name in ARCHITECTURES for blocks in BLOCKS.get(name, [None])]

#: Names of the experts' matrices in files, with their arrays in models of transformers 5 and their place in the rows.
EXPERTS = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
EXPERTS |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def saved(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def batches(seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(tiny_models.VOCABULARY, (2, 6 + own), generator=generator) for own in range(count)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def of_layer(name, layers):
    """The layer that has a matrix of a file, and its place among the rows: transformers 5 joins experts, transformers 4 does not."""
    if name not in layers and (found := re.fullmatch(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)", name)):
        array, place = EXPERTS[found[3]]
        return f"{found[1]}.mlp.experts.{array}.{found[2]}", place
    return name, 0


@pytest.mark.parametrize(("name", "blocks"), CASES, ids=[f"{name}-{blocks or 'blocks'}" for name, blocks in CASES])
def test_statistics_of_all_architectures_are_those_of_the_model_in_memory(tmp_path, name, blocks):
    own = ARCHITECTURES[name]
    model = own.make()
    source = saved(model, tmp_path / "model")
    model = type(model).from_pretrained(source).eval()
    found = calibrate_checkpoint(
        source, tmp_path / "statistics", [own.batch()], blocks=blocks, model_class=type(model), progress=False
    )
    expected = lq.nn.collect_gram(model, [own.batch()], progress=False)
    weights = open_model(source).weights
    assert found.inputs
    # transformers renames what it reads of some models.
    known = {name: own for name in found.inputs if (own := of_layer(name, expected)[0]) in expected}
    assert len(known) == len(found.inputs) or name == "vit"
    for matrix, layer in known.items():
        np.testing.assert_allclose(found.inputs[matrix](), expected[layer].numpy(), rtol=2e-5, atol=1e-6)
        assert weights[matrix]().shape[1] == len(expected[layer])
    fmt = lq.BlockFormat.parse("nf3/16:float32")
    report = lq.decompose_checkpoint(
        source, tmp_path / "small", fmt, rank=1, max_iter=1, include=list(found.inputs), weighting=found.weighting(), progress=False
    )  # fmt: skip
    assert report.matrices.keys() == found.inputs.keys()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "t5", "qwen2 experts"])
def test_gradients_are_those_of_the_model_in_memory(tmp_path, name):
    own = ARCHITECTURES[name]
    model = own.make()
    source = saved(model, tmp_path / "model")
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = [{"input_ids": ids, "attention_mask": mask}]
    if name in ("bert", "t5"):
        given[0]["labels"] = ids.masked_fill(mask == 0, -100)
    found = calibrate_checkpoint(
        source, tmp_path / "statistics", given, gradients=True, blocks=BLOCKS.get(name, [None])[0], model_class=type(model), progress=False
    )  # fmt: skip
    expected = lq.nn.collect_kronecker(model, given, progress=False)
    assert found.examples == 3
    assert found.output_gradients.keys() == found.inputs.keys()
    for matrix, load in found.output_gradients.items():
        layer, place = of_layer(matrix, expected)
        if layer not in expected:  # an expert of whose tokens none has a gradient
            assert not load().any()
            continue
        outputs, inputs = expected[layer]
        rows = len(load())
        np.testing.assert_allclose(load(), outputs.diagonal()[place * rows :][:rows].numpy(), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found.inputs[matrix](), inputs.numpy(), rtol=2e-5, atol=1e-6)


def test_a_norm_with_gradients_estimates_the_loss(tmp_path):
    model = tiny_models.dense_llama()
    source = saved(model, tmp_path / "model")
    found = calibrate_checkpoint(source, tmp_path / "statistics", batches(), gradients=True, progress=False)
    plain = calibrate_checkpoint(source, tmp_path / "plain", batches(), progress=False)
    name = "model.layers.1.mlp.up_proj"
    error = np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)
    norm, scale = found.weighting()[name](), float(found.output_gradients[name]().mean())
    assert math.isclose(norm.squared_norm(error), scale * plain.weighting()[name]().squared_norm(error), rel_tol=1e-4)
    assert pickle.loads(pickle.dumps(found.weighting()))[name]().squared_norm(error) == norm.squared_norm(error)
    damped = plain.weighting(lambda gram: InputGram(gram, damping=0.1))[name]()
    assert damped.damping == 0.1


def test_blocks_may_see_what_the_quantized_blocks_before_them_give(tmp_path):
    model = tiny_models.dense_llama()
    source = saved(model, tmp_path / "model")
    options = {"rank": 0, "quantizer": "gptq", "fit": "scale"}
    found = calibrate_checkpoint(source, tmp_path / "fed", batches(), quantized=FORMAT, progress=False, **options)
    seen = {}
    lq.nn.quantize_blocks(
        model, FORMAT, batches(), progress=False, weighting=lambda gram: seen.setdefault(len(seen), InputGram(gram)), **options
    )  # fmt: skip
    # One norm for each different input, in the order of the layers.
    unique = {load().tobytes(): load() for load in found.inputs.values()}
    assert len(unique) == len(seen)
    for gram, norm in zip(unique.values(), seen.values(), strict=True):
        np.testing.assert_allclose(gram, np.asarray(norm.gram), rtol=2e-5, atol=1e-6)
    plain = calibrate_checkpoint(source, tmp_path / "plain", batches(), progress=False)
    first, last = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
    assert np.array_equal(plain.inputs[first](), found.inputs[first]())
    assert not np.allclose(plain.inputs[last](), found.inputs[last](), rtol=1e-3)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_after_any_interruption(tmp_path, monkeypatch, gradients):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    options = {"gradients": gradients, "progress": False}
    calibrate_checkpoint(source, tmp_path / "whole", batches(), **options)
    expected, calls, forward = files(tmp_path / "whole"), [], _block_runs.run_block

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(_block_runs, "run_block", interrupted)
    monkeypatch.setattr("lqlora.nn.block_calls.run_block", interrupted)
    count = 0
    for limit in range(1, 100):
        folder = tmp_path / f"cut{limit}"
        calls.clear()
        with_error = False
        try:
            calibrate_checkpoint(source, folder, batches(), **options)
        except KeyboardInterrupt:
            with_error = True
            count += 1
            limit = 0  # noqa: PLW2901 - no call is interrupted
        calibrate_checkpoint(source, folder, batches(), **options)
        assert files(folder) == expected
        assert not (folder / "unfinished").exists()
        if not with_error:
            break
        shutil.rmtree(folder)
    assert count >= (12 if gradients else 6)


def test_finished_blocks_are_not_repeated(tmp_path, monkeypatch):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    done = []
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(
            source, tmp_path / "out", batches(), progress=lambda own, _: done.append(own) or own < 1 or stop()
        )
    done.clear()
    calibrate_checkpoint(source, tmp_path / "out", batches(), progress=lambda own, _: done.append(own))
    assert min(done) == 2
    monkeypatch.setattr(calibration, "DiskModel", None)  # a complete folder is only read
    assert calibrate_checkpoint(source, tmp_path / "out", batches(), progress=False).examples == 6


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {"gradients": True}, {"dtype": "bfloat16"}, {"include": "q_proj"}, {"batches": batches(1)}, {"quantized": FORMAT},
        {"model_class": transformers.LlamaForCausalLM},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_a_folder_of_another_run_is_refused(tmp_path, changes):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    calibrate_checkpoint(source, tmp_path / "out", batches(), progress=False)
    before = files(tmp_path / "out")
    options = {"batches": batches(), "progress": False} | changes
    with pytest.raises(CheckpointError, match="was begun with"):
        calibrate_checkpoint(source, tmp_path / "out", **options)
    assert files(tmp_path / "out") == before


def test_another_model_and_foreign_folders_are_refused(tmp_path):
    model = tiny_models.dense_llama()
    source = saved(model, tmp_path / "model")
    calibrate_checkpoint(source, tmp_path / "out", batches(), progress=False)
    with torch.no_grad():
        model.model.norm.weight += 1
    saved(model, tmp_path / "other")
    with pytest.raises(CheckpointError, match="a model of other weights"):
        calibrate_checkpoint(tmp_path / "other", tmp_path / "out", batches(), progress=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name, message in (("foreign", "it holds"), ("file", "is not a folder"), ("model", "it holds")):
        with pytest.raises(CheckpointError, match=message):
            calibrate_checkpoint(source, tmp_path / name, batches(), progress=False)
    assert (tmp_path / "foreign" / "letter.txt").read_text() == "dear"


def test_what_is_refused(tmp_path):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    cases = [
        ({"batches": []}, "at least one batch"),
        ({"batches": batches()[0]}, "Pass \\[batch\\]"),
        ({"blocks": "model.blocks"}, "blocks must be the name"),
        ({"include": "nothing"}, "nothing"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"gradients": True, "quantized": FORMAT}, "quantized must not be given"),
        ({"rank": 3}, "rank needs quantized="),
        ({"quantized": FORMAT, "rnak": 3}, "rnak is not an option"),
        ({"quantized": FORMAT, "weighting": None}, "weighting is not an option"),
        ({"quantized": FORMAT, "rank": -1}, "rank must be"),
        ({"device": "nowhere"}, "device must be"),
        ({"device": "meta"}, "device must be"),
        ({"device": "cuda:99"}, "device must be"),
        ({"batches": [torch.tensor([[10**6]])]}, "batches must suit the model"),
        ({"batches": [torch.empty((0, 4), dtype=torch.int64)]}, "batches must have tokens"),
        ({"model_class": "LlamaForCausalLM"}, "model_class must be"),
        ({"gradients": True, "loss": lambda *_: torch.ones(1)}, "loss must depend"),
    ]
    for changes, message in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            calibrate_checkpoint(source, tmp_path / "out", **({"batches": batches(), "progress": False} | changes))
        assert not (tmp_path / "out").exists() or changes.get("gradients")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "empty").mkdir()
    quantized = tmp_path / "quantized"
    lq.decompose_checkpoint(source, quantized, FORMAT, rank=0, max_iter=1, progress=False)
    for path, message in ((tmp_path / "empty", "cannot be read as a model"), (tmp_path / "no", "cannot be read"), (quantized, "quantized already")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            calibrate_checkpoint(path, tmp_path / "out", batches(), progress=False)


def test_a_model_with_missing_weights_is_refused(tmp_path):
    model = tiny_models.dense_llama()
    state = {name: own for name, own in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(CheckpointError, match="up_proj"):
        calibrate_checkpoint(tmp_path / "cut", tmp_path / "out", batches(), progress=False)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = tiny_models.dense_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    source = saved(model, tmp_path / "model")
    with pytest.raises(NonFiniteError):
        calibrate_checkpoint(source, tmp_path / "out", batches(), progress=False)


def test_experts_without_tokens_are_listed(tmp_path):
    model = ARCHITECTURES["mixtral"].make()
    source = saved(model, tmp_path / "model")
    with pytest.warns(DeadLayerWarning, match="never got an input"):
        found = calibrate_checkpoint(source, tmp_path / "out", [torch.tensor([[5]])], progress=False)
    assert 0 < len(found.inputs) < len(open_model(source).select())


def test_blocks_that_do_not_run_one_after_another_are_refused(tmp_path):
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99, "embedding_size": 32}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**settings))
    source = saved(model, tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="one after another"):
        calibrate_checkpoint(source, tmp_path / "out", [torch.arange(8)[None]], model_class=transformers.AlbertForMaskedLM, progress=False)  # fmt: skip


def test_results_that_blocks_pass_on_to_each_other_are_compared(tmp_path, monkeypatch):
    model = ARCHITECTURES["t5"].make()
    source = saved(model, tmp_path / "model")
    block = type(model.decoder.block[0])
    forward = block.forward

    def changed(self, *arguments, **options):
        found = forward(self, *arguments, **options)
        return tuple(own if place == 0 or own is None else own * 2 for place, own in enumerate(found))

    monkeypatch.setattr(
        block, "forward", changed
    )  # so that each block takes another bias of positions than the one before
    with pytest.raises(InvalidArgumentError, match="passes on other results"):
        calibrate_checkpoint(
            source, tmp_path / "out", [ARCHITECTURES["t5"].batch()], blocks="decoder.block", model_class=type(model), progress=False
        )  # fmt: skip


def test_logits_are_computed_for_gradients_alone(tmp_path, monkeypatch):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    calls, linear = [], torch.nn.functional.linear

    def watched(x, weight, bias=None):
        calls.append(len(weight) == tiny_models.VOCABULARY)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    for gradients in (False, True):
        calls.clear()
        calibrate_checkpoint(source, tmp_path / str(gradients), batches(), gradients=gradients, progress=False)
        assert sum(calls) == (6 if gradients else 0)
        assert len(calls) > 20


def test_a_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    seen = []

    class Watched(calibration.DiskModel):
        def block(self, name, device):
            seen.append([key for key, own in self.model.named_parameters() if not own.is_meta and ".layers." in key])
            return super().block(name, device)

    monkeypatch.setattr(calibration, "DiskModel", Watched)
    calibrate_checkpoint(source, tmp_path / "out", batches(), gradients=True, progress=False)
    assert len(seen) >= 5
    assert not any(seen)


def test_labels_of_another_length_than_the_padding_of_the_encoder(tmp_path):
    model = ARCHITECTURES["t5"].make()
    source = saved(model, tmp_path / "model")
    ids, labels = torch.randint(3, 90, (2, 3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, 6:] = 0
    given = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    expected = lq.nn.collect_kronecker(model, given, progress=False)
    for blocks in BLOCKS["t5"]:
        options = {"blocks": blocks, "model_class": type(model), "progress": False}
        found = calibrate_checkpoint(source, tmp_path / blocks, given, gradients=True, **options)
        for name, load in found.inputs.items():
            outputs, inputs = expected[name]
            np.testing.assert_allclose(load(), inputs.numpy(), rtol=2e-5, atol=1e-6)
            if blocks == "decoder.block":  # other gradients reach the encoder through each block of the decoder
                own = found.output_gradients[name]()
                np.testing.assert_allclose(own, outputs.diagonal().numpy(), rtol=1e-4, atol=1e-9)


def test_what_belongs_to_the_user_stays(tmp_path):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    for name in ("unfinished/thesis.txt", "thesis.txt", "inputs-1.safetensors", "unfinished/inputs"):
        folder = tmp_path / name.replace("/", " ")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
        for own in (source, tmp_path / "no"):
            with pytest.raises(CheckpointError):
                calibrate_checkpoint(own, folder, batches(), progress=False)
        assert (folder / name).read_text() == "x"


def test_other_functions_and_entries_of_batches_are_other_settings(tmp_path):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    ids = batches()[0]
    pairs = {
        "loss": [
            {"gradients": True, "loss": lambda m, b: m(b).logits.mean((1, 2))},
            {"gradients": True, "loss": lambda m, b: m(b).logits.square().mean((1, 2))},
        ],
        "pattern": [{"include": re.compile("|".join(["x" * 10] * 25) + f"|.*{own}_proj")} for own in "qk"],
        "keys": [{"batches": [{"input_ids": ids, own: torch.ones_like(ids)}]} for own in ("attention_mask", "token_type_ids")],
    }  # fmt: skip
    for name, (first, second) in pairs.items():
        folder, plain = tmp_path / name, {"batches": batches(), "progress": False}
        calibrate_checkpoint(source, folder, **(plain | first))
        with pytest.raises(CheckpointError, match="was begun with"):
            calibrate_checkpoint(source, folder, **(plain | second))
        calibrate_checkpoint(source, folder, **(plain | first))
    calibrate_checkpoint(source, tmp_path / "list", batches(), exclude=["*q_proj"], progress=False)
    calibrate_checkpoint(source, tmp_path / "list", batches(), exclude="*q_proj", progress=False)


def test_losses_that_do_not_come_from_the_last_block_alone_are_refused(tmp_path):
    model = ARCHITECTURES["mixtral"].make()
    model.config.output_router_logits = True
    source = saved(model, tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="output_router_logits"):
        calibrate_checkpoint(source, tmp_path / "out", batches(), gradients=True, progress=False)


def test_an_error_in_the_first_block_leaves_the_folder_free(tmp_path, monkeypatch):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    whole = calibrate_checkpoint(source, tmp_path / "whole", batches(), quantized=FORMAT, progress=False)
    real = _block_runs.quantize_model
    monkeypatch.setattr(_block_runs, "quantize_model", lambda *_, **__: stop())
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(source, tmp_path / "out", batches(), quantized=FORMAT, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(_block_runs, "quantize_model", real)
    calibrate_checkpoint(source, tmp_path / "out", batches(), quantized=FORMAT, progress=False)
    assert files(tmp_path / "out") == files(whole.path)


def test_examples_are_counted_by_the_tokens(tmp_path):
    source = saved(tiny_models.dense_llama(), tmp_path / "model")
    ids = torch.randint(60, (4, 6))
    given = [{"position_ids": torch.arange(6)[None], "input_ids": ids}]
    assert calibrate_checkpoint(source, tmp_path / "out", given, progress=False).examples == 4


def signed(document):
    """A document with the fingerprint of its content."""
    return document | {"sha256": digest({}, document)}


class TestFolder:
    """Folders that were changed."""

    @pytest.fixture
    def folder(self, tmp_path):
        source = saved(tiny_models.dense_llama(), tmp_path / "model")
        calibrate_checkpoint(source, tmp_path / "out", batches(), gradients=True, progress=False)
        return tmp_path / "out"

    def test_a_changed_byte_is_found(self, folder):
        for path in sorted(folder.glob("*.safetensors")):
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(CheckpointError, match="fingerprint"):
                open_statistics(folder)
            path.write_bytes(data)
        open_statistics(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"spec": 2}, "spec"),
            ({"matrices": {}}, "matrices"),
            ({"files": {"../a.safetensors": "0" * 64}}, "name of a .safetensors"),
            ({"files": {"missing.safetensors": "0" * 64}}, "cannot be read"),
            ({"examples": -1}, "examples"),
            ({"more": 1}, "more"),
        ],
        ids=lambda own: next(iter(own)) if isinstance(own, dict) else None,
    )
    def test_documents_that_do_not_fit(self, folder, changes, message):
        document = json.loads((folder / "statistics.json").read_text())
        (folder / "statistics.json").write_text(json.dumps(signed(document | changes)))
        with pytest.raises(CheckpointError, match=message):
            open_statistics(folder)

    def test_a_shape_that_does_not_fit_its_tensors(self, folder):
        document = json.loads((folder / "statistics.json").read_text())
        name = "model.layers.0.mlp.up_proj"
        for shape in ([48, 33], [47, 32], [2**31 - 1, 2**31 - 1]):
            document["matrices"][name]["shape"] = shape
            (folder / "statistics.json").write_text(json.dumps(document))
            with pytest.raises(CheckpointError, match="fingerprint"):
                open_statistics(folder)
            (folder / "statistics.json").write_text(json.dumps(signed(document)))
            with pytest.raises(CheckpointError, match="lacks"):
                open_statistics(folder)

    def test_folders_without_a_document(self, folder, tmp_path):
        (folder / "statistics.json").unlink()
        for path, message in (
            (folder, "written last"),
            (tmp_path / "no", "is not a folder"),
            ("a\0b", "is not a folder"),
        ):
            with pytest.raises(CheckpointError, match=message):
                open_statistics(path)
