"""The method "lqlora" of quantization in transformers: loading, saving, training, and configurations that do not fit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import safetensors.torch

import lqlora as lq
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError
from tests.requirements import require_module

torch, transformers = (require_module(name) for name in ("torch", "transformers"))
from lqlora.checkpoint.quantization_config import MatrixFormat, describe_matrices, read_matrices  # noqa: E402
from lqlora.integrations import transformers as ours  # noqa: E402 - needs torch
from lqlora.integrations._transformers_quantizer import LqloraConfig  # noqa: E402
from lqlora.integrations.comparison import compare_checkpoint  # noqa: E402
from lqlora.integrations.merging import merge_checkpoint  # noqa: E402
from tests.integrations import tiny_models  # noqa: E402
from tests.nn.architecture_checks import quantized  # noqa: E402
from tests.nn.architectures import ARCHITECTURES  # noqa: E402

# transformers warns of its own changes.
pytestmark = pytest.mark.filterwarnings("ignore")

FORMAT = tiny_models.FORMAT


@pytest.fixture(autouse=True, scope="module")
def _registered():
    ours.register()
    ours.register()  # a second call does nothing
    transformers.utils.logging.disable_progress_bar()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def loaded(cls, folder, **options):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A folder of decompose_checkpoint, and the same model loaded by this library."""
    dense = tiny_models.dense_llama()
    dense.save_pretrained(tmp_path / "dense")
    lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", FORMAT, rank=4, max_iter=2, progress=False)
    lq.nn.load_model(tmp_path / "small", dense)
    return tmp_path / "small", dense.eval()


class TestRoundTrips:
    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_a_quantized_model_is_saved_and_loaded_bit_by_bit(self, tmp_path, name):
        own = ARCHITECTURES[name]
        model = quantized(own).eval()
        ours.mark_quantized(model)
        for round_trip in range(2):
            model.save_pretrained(tmp_path / str(round_trip))
            found = loaded(type(model), tmp_path / str(round_trip))
            assert same(bits(found), bits(model))
            assert torch.equal(own.run(found), own.run(model))
            model = found

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_a_decomposed_folder_is_loaded(self, tmp_path, name):
        if name == "gpt-oss" and transformers.__version__.startswith("4."):
            pytest.skip("transformers 4 multiplies by the whole array of experts")
        own = ARCHITECTURES[name]
        dense = own.make()
        dense.save_pretrained(tmp_path / "dense")
        lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", FORMAT, rank=2, max_iter=1, progress=False)
        model = loaded(type(dense), tmp_path / "small")
        layers = [layer for layer in model.modules() if isinstance(layer, lq.nn.LQLinear)]
        assert len(layers) >= own.taken
        error = (own.run(model) - own.run(dense)).norm() / own.run(dense).norm()
        assert 0 < error < 1
        model.save_pretrained(tmp_path / "again")
        assert same(bits(loaded(type(dense), tmp_path / "again")), bits(model))

    def test_all_names_of_formats_are_kept(self, tmp_path):
        book = lq.Codebook([-1, -0.3, 0.2, 1], name="mine")
        formats = {
            "*.q_proj": lq.BlockFormat(book, 16),
            "*.k_proj": lq.BlockFormat.parse("tcq2/16:u8/256:float32"),
            "*.v_proj": lq.BlockFormat.parse("affine4/16:float16"),
            "*.o_proj": lq.BlockFormat.parse("nf3/16@0~both:bfloat16"),
            "*.mlp.*": FORMAT,
        }
        model = tiny_models.dense_llama()
        options = {"rank": {"*.q_proj": 0, "*": 3}, "scaling": {"*.v_proj": 0.3}, "max_iter": 1, "fit": "scale"}
        lq.nn.quantize_model(model, formats, progress=False, **options)
        ours.mark_quantized(model)
        model.save_pretrained(tmp_path)
        found = loaded(type(model), tmp_path)
        assert same(bits(found), bits(model.eval()))
        assert [own.scaling for own in found.modules() if isinstance(own, lq.nn.LQLinear)] == [
            own.scaling for own in model.modules() if isinstance(own, lq.nn.LQLinear)
        ]
        assert torch.equal(found(tiny_models.tokens()).logits, model(tiny_models.tokens()).logits)

    def test_files_in_parts_are_loaded(self, tmp_path):
        tiny_models.dense_llama().save_pretrained(tmp_path / "dense")
        options = {"rank": 4, "max_iter": 2, "progress": False}
        for number, size in enumerate((3000, 2**29)):
            lq.decompose_checkpoint(tmp_path / "dense", tmp_path / str(number), FORMAT, shard_bytes=size, **options)
        first, second = (loaded(transformers.LlamaForCausalLM, tmp_path / str(number)) for number in range(2))
        assert same(bits(first), bits(second))


class TestLoading:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_codes_scales_and_factors_keep_their_dtypes(self, folder, dtype):
        path, expected = folder
        model = loaded(transformers.AutoModelForCausalLM, path, dtype=getattr(torch, dtype))
        stored = {name: own for name, own in bits(model).items() if ".quantized." in name or ".lora_" in name}
        assert len(stored) > 50
        assert same(stored, {name: bits(expected)[name] for name in stored})
        assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == getattr(torch, dtype)
        with torch.no_grad():
            found, wanted = model(tiny_models.tokens()).logits.float(), expected(tiny_models.tokens()).logits
        assert (found - wanted).abs().max() <= (0 if dtype == "float32" else 0.02)

    def test_a_map_of_devices_and_generation(self, folder):
        path, expected = folder
        require_module("accelerate")
        model = loaded(transformers.AutoModelForCausalLM, path, device_map="cpu")
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(tiny_models.tokens())
        assert torch.equal(
            model.generate(tiny_models.tokens(), **options), expected.generate(tiny_models.tokens(), **options)
        )

    def test_layers_that_stay_on_the_disk(self, folder, tmp_path):
        path, expected = folder
        require_module("accelerate")
        places = dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        options = {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": str(tmp_path / "offloaded")}
        if transformers.__version__.startswith("4."):
            with pytest.raises(InvalidArgumentError, match="disk"):
                transformers.AutoModelForCausalLM.from_pretrained(path, **options)
            return
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
        with torch.no_grad():
            assert torch.equal(model(tiny_models.tokens()).logits, expected(tiny_models.tokens()).logits)

    @pytest.mark.parametrize("make", ["dense_llama", "dense_gpt2"])
    def test_only_factors_train(self, tmp_path, make):
        getattr(tiny_models, make)().save_pretrained(tmp_path / "dense")
        lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", FORMAT, rank=2, max_iter=1, progress=False)
        model = loaded(transformers.AutoModelForCausalLM, tmp_path / "small")
        names = [name for name, own in model.named_parameters() if own.requires_grad]
        assert names
        assert all(name.endswith((".lora_A", ".lora_B")) for name in names)

    def test_a_dense_model_is_quantized_on_load(self, folder, tmp_path):
        config = ours.quantize_on_load(str(FORMAT), 4, max_iter=2, progress=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).eval()
        assert torch.equal(model(tiny_models.tokens()).logits, folder[1](tiny_models.tokens()).logits)
        model.save_pretrained(tmp_path / "again")
        assert same(bits(loaded(type(model), tmp_path / "again")), bits(model))

    def test_it_becomes_dense_again(self, folder):
        model = loaded(transformers.AutoModelForCausalLM, folder[0])
        before = model(tiny_models.tokens()).logits
        dense = model.dequantize()
        assert not [own for own in dense.modules() if isinstance(own, lq.nn.LQLinear)]
        torch.testing.assert_close(dense(tiny_models.tokens()).logits, before, rtol=1e-4, atol=1e-5)
        assert getattr(dense.config, "quantization_config", None) is None

    def test_a_trainer_trains_it_and_its_checkpoint_is_loaded(self, folder, tmp_path):
        require_module("accelerate")
        model = loaded(transformers.AutoModelForCausalLM, folder[0])
        start = bits(model)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
            per_device_train_batch_size=4,
        )  # fmt: skip
        transformers.Trainer(model=model, args=options, train_dataset=tiny_models.examples()).train()
        after = bits(model)
        assert {name for name in after if not torch.equal(after[name], start[name])} == {
            name for name in after if ".lora_" in name
        }
        assert same(bits(loaded(type(model), tmp_path / "run" / "checkpoint-2")), after)

    def test_a_fresh_process_loads_it(self, folder):
        code = (
            "import sys, torch, transformers; from lqlora.integrations.transformers import register; register();"
            "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
            "print(type(m.model.layers[0].mlp.up_proj).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(folder[0])], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "LQLinear"


class TestOtherClasses:
    def test_a_base_model_reads_the_folder_of_a_model_with_a_head_and_back(self, folder, tmp_path):
        path, expected = folder
        base = transformers.AutoModel.from_pretrained(path).eval()
        hidden = base(tiny_models.tokens()).last_hidden_state
        assert torch.equal(hidden, expected.model(tiny_models.tokens()).last_hidden_state)
        base.save_pretrained(tmp_path / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(model.model(tiny_models.tokens()).last_hidden_state, hidden)

    def test_a_classifier_reads_the_folder_of_a_language_model(self, folder):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder[0], num_labels=3)
        assert len([own for own in model.modules() if isinstance(own, lq.nn.LQLinear)]) == 14
        assert model.score.weight.isfinite().all()

    def test_an_encoder_reads_the_folder_of_a_model_with_a_decoder(self, tmp_path):
        own = ARCHITECTURES["t5"]
        own.make().save_pretrained(tmp_path / "dense")
        lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", FORMAT, rank=2, max_iter=1, progress=False)
        encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "small").eval()
        whole = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
        ids = own.batch()["input_ids"]
        assert torch.equal(encoder(ids).last_hidden_state, whole.encoder(ids).last_hidden_state)


class TestChanges:
    """Models that change after they were loaded are described once more when they are saved."""

    def again(self, model, folder):
        model.save_pretrained(folder)
        found = loaded(transformers.AutoModelForCausalLM, folder)
        assert torch.equal(found(tiny_models.tokens()).logits, model.eval()(tiny_models.tokens()).logits)
        return found

    def test_dense_layers(self, folder, tmp_path):
        model = loaded(transformers.AutoModelForCausalLM, folder[0])
        lq.nn.dequantize_model(model)
        found = self.again(model, tmp_path / "again")
        assert not [own for own in found.modules() if isinstance(own, lq.nn.LQLinear)]

    @pytest.mark.parametrize("change", ["scaling", "rank", "more layers"])
    def test_other_factors_and_layers(self, folder, tmp_path, change):
        model = loaded(transformers.AutoModelForCausalLM, folder[0])
        factors = lq.nn.factors(model)
        if change == "more layers":
            lq.nn.quantize_model(model, FORMAT, rank=2, include="lm_head", max_iter=1, progress=False)
        elif change == "rank":
            lq.nn.set_factors(
                model,
                {name: lq.nn.Factors(own.lora_A[:2], own.lora_B[:, :2], own.scaling) for name, own in factors.items()},
            )
        else:
            lq.nn.set_factors(
                model, {name: lq.nn.Factors(own.lora_A, own.lora_B, 3.0) for name, own in factors.items()}
            )
        self.again(model, tmp_path / "again")

    def test_an_adapter_of_peft_that_is_merged(self, folder, tmp_path):
        peft = require_module("peft")
        from lqlora.integrations.peft import register

        register()
        model = loaded(transformers.AutoModelForCausalLM, folder[0])
        over = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        merged = over.merge_and_unload()
        self.again(merged, tmp_path / "again")

    def test_what_a_folder_cannot_describe_is_refused(self, folder, tmp_path):
        for change in (
            lq.nn.train_scales,
            lambda own: lq.nn.quantize_model(own, FORMAT, embeddings=FORMAT, rank=2, max_iter=1, progress=False),
        ):
            model = loaded(transformers.AutoModelForCausalLM, folder[0])
            change(model)
            with pytest.raises(InvalidArgumentError, match="can describe"):
                model.save_pretrained(tmp_path / "again")
        with pytest.raises(InvalidArgumentError, match="dropout"):
            ours.mark_quantized(tiny_models.llama(dropout=0.5))

    def test_a_tensor_that_no_file_has_is_named(self, folder):
        if transformers.__version__.startswith("4."):
            pytest.skip("transformers 4 raises an error of its own")
        path = folder[0] / "model-00001-of-00001.safetensors"
        tensors = safetensors.torch.load_file(path)
        del tensors["model.layers.0.mlp.up_proj.lora_A"]
        path.unlink()
        (folder[0] / "model.safetensors.index.json").unlink()
        safetensors.torch.save_file(tensors, folder[0] / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"up_proj\.lora_A' is in no file"):
            transformers.AutoModelForCausalLM.from_pretrained(folder[0])


class TestFoldersOfTransformers:
    def test_this_library_reads_and_merges_them(self, folder, tmp_path):
        path, expected = folder
        model = loaded(transformers.AutoModelForCausalLM, path)
        model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
        first, second = lq.verify(path), lq.verify(tmp_path / "again")
        assert first.matrices.keys() == second.matrices.keys()
        for name, own in first.matrices.items():
            assert own.quantized.packed.tobytes() == second.matrices[name].quantized.packed.tobytes()
            assert own.lora_A.tobytes() == second.matrices[name].lora_A.tobytes()
        assert {name: own.tobytes() for name, own in first.tensors.items()} == {
            name: own.tobytes() for name, own in second.tensors.items()
        }
        plain = tiny_models.dense_llama()
        lq.nn.load_model(tmp_path / "again", plain)
        assert torch.equal(plain.eval()(tiny_models.tokens()).logits, expected(tiny_models.tokens()).logits)
        for name in (path, tmp_path / "again"):
            merge_checkpoint(name, tmp_path / f"merged {name.name}", dtype="float32", progress=False)
        dense = [
            safetensors.torch.load_file(tmp_path / f"merged {name}" / "model.safetensors")
            for name in ("small", "again")
        ]
        assert same(*dense)
        errors = compare_checkpoint(tmp_path / "again", tmp_path / "dense", progress=False)
        assert errors.keys() == first.matrices.keys()

    def test_they_are_no_sources(self, folder, tmp_path):
        loaded(transformers.AutoModelForCausalLM, folder[0]).save_pretrained(tmp_path / "again")
        with pytest.raises(CheckpointError, match="lqlora has quantized"):
            lq.decompose_checkpoint(tmp_path / "again", tmp_path / "more", FORMAT, rank=1)

    def test_a_damaged_one_is_named(self, folder, tmp_path):
        loaded(transformers.AutoModelForCausalLM, folder[0]).save_pretrained(tmp_path / "again")
        path = tmp_path / "again" / "model.safetensors"
        good = safetensors.torch.load_file(path)
        name = "model.layers.0.mlp.up_proj"
        for key, value in {
            "lora_A": torch.ones(3),
            "quantized.codes": torch.ones(5, dtype=torch.uint8),
            "lora_B": None,
        }.items():
            own = {**good, f"{name}.{key}": value}
            safetensors.torch.save_file(
                {key: tensor for key, tensor in own.items() if tensor is not None}, path, {"format": "pt"}
            )
            with pytest.raises(CheckpointError, match="up_proj"):
                lq.load(tmp_path / "again")


class TestConfigurations:
    ROW = MatrixFormat(FORMAT, 4, 1.0)

    def test_rows_survive_json(self):
        rows = {
            "a": self.ROW,
            "b": MatrixFormat(lq.BlockFormat(lq.Codebook([-1, 0, 1], name="ternary"), 8), 0, 0.1),
            "c": self.ROW,
        }
        found = read_matrices(json.loads(json.dumps(describe_matrices(rows))), "config")
        assert found == rows
        assert len(describe_matrices(rows)["groups"]) == 2

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda own: own.clear(), "groups"),
            (lambda own: own.update(groups=[]), "groups"),
            (lambda own: own.update(groups=5), "groups"),
            (lambda own: own["groups"][0].update(format="nf99/64"), "format"),
            (lambda own: own["groups"][0].update(format=7), "format"),
            (lambda own: own["groups"][0].update(rank=-1), "rank"),
            (lambda own: own["groups"][0].update(rank=2.5), "rank"),
            (lambda own: own["groups"][0].update(scaling="x"), "scaling"),
            (lambda own: own["groups"][0].update(matrices=["a", "a"]), "one group"),
            (lambda own: own["groups"][0].update(extra=1), "extra"),
        ],
        ids=["nothing", "empty", "number", "format", "type of format", "rank", "fraction", "scaling", "twice", "more"],
    )
    def test_what_does_not_fit_the_schema_is_named(self, change, match):
        own = copy.deepcopy(describe_matrices({"a": self.ROW}))
        change(own)
        with pytest.raises(CheckpointError, match=match):
            read_matrices(own, "config.json")

    @pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj", "model.norm", "model.embed_tokens"])
    def test_a_layer_that_the_model_does_not_have_is_named(self, folder, name):
        path = folder[0] / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["groups"][0]["matrices"].append(name)
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"does not fit the model: '{name}'"):
            transformers.AutoModelForCausalLM.from_pretrained(folder[0])

    def test_models_that_a_folder_cannot_describe_are_refused(self):
        with pytest.raises(InvalidArgumentError, match="one of transformers"):
            ours.mark_quantized(torch.nn.Linear(2, 2))
        with pytest.raises(InvalidArgumentError, match="quantized layer"):
            ours.mark_quantized(tiny_models.dense_llama())
        for options, match in (
            ({"foo": 1}, "foo cannot be set"),
            ({"dropout": 0.1}, "dropout cannot"),
            ({"rank": -1}, "rank"),
        ):
            with pytest.raises(InvalidArgumentError, match=match):
                ours.quantize_on_load(**{"format": "nf4/64", "rank": 1, **options})
        with pytest.raises(FormatError):
            ours.quantize_on_load("nf99", 1)
        with pytest.raises(InvalidArgumentError, match="groups, or a format"):
            LqloraConfig()
