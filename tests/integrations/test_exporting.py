"""Base models and adapters of PEFT from checkpoints: the same model in other libraries, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import lqlora as lq
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError
from lqlora.integrations.bitsandbytes import from_bitsandbytes
from lqlora.integrations.exporting import can_export, export_checkpoint
from lqlora.integrations.sources import open_model
from tests.requirements import require_module

torch, transformers = (require_module(name) for name in ("torch", "transformers"))
from tests.integrations import tiny_models  # noqa: E402 - needs torch

pytestmark = pytest.mark.filterwarnings("ignore")

#: Formats that bitsandbytes has, and others. Widths of the tiny models are multiples of 32.
NF4, NESTED, NF3 = (
    lq.BlockFormat.parse(text) for text in ("nf4/64:float32", "nf4/64:d8/256:float32", "nf3/16:u8/256:float32")
)


def decomposed(tmp_path, fmt=NF4, make="dense_llama", **options):
    """Write a decomposed folder, and return it with the model that this library loads from it."""
    model = wide_llama() if make == "wide_llama" else getattr(tiny_models, make)()
    model.save_pretrained(tmp_path / "dense")
    options = {"rank": 4, "max_iter": 2, "progress": False} | options
    lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", fmt, **options)
    lq.nn.load_model(tmp_path / "small", model)
    return tmp_path / "small", model.eval()


def wide_llama():
    """A Llama whose rows are multiples of the blocks, as the kernels of bitsandbytes for CPUs need them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny_models.tokens()).logits.float()


class TestDense:
    @pytest.mark.parametrize("make", ["dense_llama", "dense_gpt2"])
    def test_peft_adds_the_adapter_to_the_decoded_part(self, tmp_path, make):
        peft = require_module("peft")
        folder, expected = decomposed(tmp_path, NF3, make, scaling=0.5, rank={"*.0.*": 3, "*.1.*": 5})
        export_checkpoint(folder, tmp_path / "base", "dense", dtype="float32")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert not [own for own in base.modules() if isinstance(own, lq.nn.LQLinear)]
        model = peft.PeftModel.from_pretrained(base, tmp_path / "base" / "adapter", is_trainable=True)
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)
        names = [name for name, own in model.named_parameters() if own.requires_grad]
        assert names
        assert all("lora_" in name for name in names)

    def test_peft_opens_the_layout_of_loftq(self, tmp_path):
        peft = require_module("peft")
        folder, expected = decomposed(tmp_path, NF3)
        export_checkpoint(folder, tmp_path / "base", "dense", adapter="loftq_init", dtype="float32", progress=False)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "base", subfolder="loftq_init", is_trainable=True)
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["", "a/b", "..", "config.json", "a\0"])
    def test_other_names_of_adapters_are_refused(self, tmp_path, name):
        with pytest.raises(InvalidArgumentError, match="adapter must be a name"):
            export_checkpoint(tmp_path, tmp_path / "base", "dense", adapter=name)

    def test_no_matrix_of_rank_zero_is_in_the_adapter(self, tmp_path):
        folder, _ = decomposed(tmp_path, NF3, rank={"*q_proj": 2, "*": 0})
        export_checkpoint(folder, tmp_path / "base", "dense", progress=False)
        tensors = load_file(tmp_path / "base" / "adapter" / "adapter_model.safetensors")
        assert len(tensors) == 4
        assert all("q_proj.lora_" in name for name in tensors)


class TestBitsandbytes:
    @pytest.mark.parametrize("fmt", [NF4, NESTED], ids=str)
    def test_codes_and_scales_are_the_same(self, tmp_path, fmt):
        folder, _ = decomposed(tmp_path, fmt)
        sizes = export_checkpoint(folder, tmp_path / "base", "bitsandbytes", shard_bytes=20_000, progress=False)
        assert len(sizes) > 1
        tensors = {}
        for name in sizes:
            tensors |= load_file(tmp_path / "base" / name)
        for name, matrix in lq.load(folder).matrices.items():
            own = from_bitsandbytes(
                {key: array for key, array in tensors.items() if key.startswith(f"{name}.weight")}, f"{name}.weight"
            )
            assert own.dtype == "bfloat16"
            for key, array in matrix.quantized.to_arrays().items():
                np.testing.assert_array_equal(own.quantized.to_arrays()[key], array)
        config = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
        assert config["bnb_4bit_use_double_quant"] == (fmt is NESTED)
        assert config["llm_int8_skip_modules"] == ["lm_head", "model.embed_tokens"]
        assert (
            set(json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"])
            == tensors.keys()
        )

    @pytest.mark.parametrize("fmt", [NF4, NESTED], ids=str)
    def test_transformers_and_peft_make_the_same_tokens(self, tmp_path, fmt):
        require_module("bitsandbytes")
        peft = require_module("peft")
        folder, expected = decomposed(tmp_path, fmt, "wide_llama")
        export_checkpoint(folder, tmp_path / "base", "bitsandbytes", dtype="float32")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
        assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        model = peft.PeftModel.from_pretrained(base, tmp_path / "base" / "adapter")
        # Its kernels for CPUs round scales to bfloat16.
        error = (logits(model) - logits(expected)).norm() / logits(expected).norm()
        assert error < 0.01
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(tiny_models.tokens())
        assert torch.equal(
            model.generate(input_ids=tiny_models.tokens(), **options),
            expected.generate(tiny_models.tokens(), **options),
        )

    def test_an_output_head_may_be_quantized(self, tmp_path):
        require_module("bitsandbytes")
        folder, _ = decomposed(tmp_path, NF4, "wide_llama", exclude="*embed*", rank=0)
        assert "lm_head" in lq.load(folder).matrices
        export_checkpoint(folder, tmp_path / "base", "bitsandbytes", dtype="float32", progress=False)
        config = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
        assert config["llm_int8_skip_modules"] == ["model.embed_tokens"]
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
        assert type(base.lm_head).__name__ == "Linear4bit"

    def test_the_base_is_read_back(self, tmp_path):
        folder, _ = decomposed(tmp_path)
        export_checkpoint(folder, tmp_path / "base", "bitsandbytes")
        contents = open_model(tmp_path / "base")
        for name, own in lq.load(folder).matrices.items():
            np.testing.assert_array_equal(contents.weights[name](), lq.dequantize(own.quantized))

    @pytest.mark.parametrize(
        ("fmt", "match"),
        [
            ("nf3/64:float32", "codebook must be"),
            ("nf4/48:float32", "block_size must be"),
            ("nf4/64:float16", "scales must be"),
            ("nf4/64@0:float32", "for bitsandbytes"),
            ("nf4/64~both:float32", "rotation must be"),
        ],
    )
    def test_what_its_layout_cannot_hold_is_said_before_any_work(self, tmp_path, fmt, match):
        folder, _ = decomposed(tmp_path, lq.BlockFormat.parse(fmt), max_iter=1)
        faults = can_export(folder, "bitsandbytes")
        assert faults.keys() == lq.load(folder).matrices.keys()
        assert all(match in fault for fault in faults.values())
        with pytest.raises(FormatError, match=match):
            export_checkpoint(folder, tmp_path / "base", "bitsandbytes")
        assert not (tmp_path / "base").exists()
        assert can_export(folder, "dense") == {}

    def test_layers_of_gpt2_and_mixed_settings_are_refused(self, tmp_path):
        folder, _ = decomposed(tmp_path, NF4, "dense_gpt2")
        assert "transposed" in next(iter(can_export(folder, "bitsandbytes").values()))
        folder, _ = decomposed(tmp_path / "two", {"*.mlp.*": NF4, "*.self_attn.*": NESTED})
        assert "one for all" in next(iter(can_export(folder, "bitsandbytes").values()))
        with pytest.raises(FormatError, match="one for all"):
            export_checkpoint(folder, tmp_path / "base", "bitsandbytes")


class TestRefusals:
    def test_experts_have_no_adapters(self, tmp_path):
        from safetensors.numpy import save_file

        save_file({"mlp.experts.up": np.ones((2, 32, 32), np.float32)}, tmp_path / "m.safetensors")
        lq.decompose_checkpoint(tmp_path / "m.safetensors", tmp_path / "small", NF4, rank=1, progress=False)
        for base in ("dense", "bitsandbytes"):
            assert set(can_export(tmp_path / "small", base)) == {"mlp.experts.up.0", "mlp.experts.up.1"}

    def test_a_checkpoint_without_factors_a_full_folder_and_a_wrong_base(self, tmp_path):
        folder, _ = decomposed(tmp_path, rank=0)
        with pytest.raises(InvalidArgumentError, match="ranks of 0"):
            export_checkpoint(folder, tmp_path / "base", "dense")
        with pytest.raises(InvalidArgumentError, match="base"):
            export_checkpoint(folder, tmp_path / "base", "gguf")
        folder, _ = decomposed(tmp_path / "more")
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "mine").write_text("x")
        with pytest.raises(CheckpointError, match="not an empty folder"):
            export_checkpoint(folder, tmp_path / "base", "dense")
        assert [path.name for path in (tmp_path / "base").iterdir()] == ["mine"]
