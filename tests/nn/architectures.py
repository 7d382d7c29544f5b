"""Tiny random models of transformers, by architecture, with the layers that selection takes and leaves dense."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.requirements import import_quietly, require_module

if TYPE_CHECKING:
    from collections.abc import Callable

torch = require_module("torch")
transformers = require_module("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {**SIZES, "vocab_size": 99, "pad_token_id": 0}
LLAMA = {**WORDS, "num_key_value_heads": 2}
T5 = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
QWEN_EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}
CLIP = {"text_config": WORDS, "vision_config": IMAGES, "projection_dim": 16}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "max_source_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _words() -> dict[str, Any]:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1  # the end of a sequence, for heads of T5
    return {"input_ids": ids}


def _both() -> dict[str, Any]:
    return {**_words(), "decoder_input_ids": _words()["input_ids"]}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _sound() -> dict[str, Any]:
    sound = torch.randn(2, 80, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": sound, "decoder_input_ids": _words()["input_ids"]}


@dataclass(frozen=True)
class Architecture:
    """Class and settings of a model, the number of layers taken, those left dense by group, and the heads that train."""

    model: str
    config: str
    settings: dict[str, Any]
    taken: int
    left: dict[str, list[str]]
    trains: tuple[str, ...] = ()
    inputs: Callable[[], dict[str, Any]] = _words

    def make(self, seed: int = 0):
        import_quietly("transformers")
        torch.manual_seed(seed)
        settings = copy.deepcopy(self.settings)  # a configuration takes parts out of nested ones
        config = getattr(transformers, self.config)(**settings)
        for key, value in vars(config).items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # so that a step of training does not depend on random numbers
        return getattr(transformers, self.model)(config).eval()

    def shallow(self) -> Architecture:
        """Return the architecture with one layer, or one of the encoder and one of the decoder."""
        counts = {"num_hidden_layers": 1, "n_layer": 1, "num_layers": 1, "num_local_experts": 2, "num_experts": 2}
        return replace(self, settings={key: counts.get(key, value) for key, value in self.settings.items()})

    def batch(self, dtype: Any = None) -> dict[str, Any]:
        """Return the inputs, with floating-point ones in another dtype if it is given."""
        return {key: x.to(dtype) if dtype and x.is_floating_point() else x for key, x in self.inputs().items()}

    def run(self, model, dtype: Any = None):
        output = model(**self.batch(dtype))
        return next(
            getattr(output, name) for name in ("logits", "start_logits", "logits_per_image") if hasattr(output, name)
        )


HEAD = {"output embeddings": ["lm_head"]}
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", LLAMA, 14, HEAD),
    "tied llama": Architecture("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, 14, HEAD),
    "llama classifier": Architecture(
        "LlamaForSequenceClassification", "LlamaConfig", LLAMA, 14, {"heads": ["score"]}, ("score",)
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", LLAMA, 14, HEAD),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}, 14, HEAD),
    "mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}, 24, HEAD),
    "qwen2 experts": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 16},
        30,
        {"routers": [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)], **HEAD},
    ),
    "qwen3 experts": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**QWEN_EXPERTS, "head_dim": 8}, 24, HEAD),
    "gpt-oss": Architecture(
        "GptOssForCausalLM", "GptOssConfig", {**LLAMA, "head_dim": 8, "num_local_experts": 4}, 24, HEAD
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, 8, HEAD
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99},
        8,
        HEAD,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
        8,
        HEAD,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4},
        8,
        HEAD,
    ),
    "bert": Architecture(
        "BertForMaskedLM",
        "BertConfig",
        WORDS,
        12,
        {"heads": ["cls.predictions.transform.dense"], "output embeddings": ["cls.predictions.decoder"]},
    ),
    "bert classifier": Architecture(
        "BertForSequenceClassification", "BertConfig", WORDS, 13, {"heads": ["classifier"]}, ("classifier",)
    ),
    "bert answers": Architecture(
        "BertForQuestionAnswering", "BertConfig", WORDS, 12, {"heads": ["qa_outputs"]}, ("qa_outputs",)
    ),
    "roberta classifier": Architecture(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        WORDS,
        12,
        {"heads": ["classifier.dense", "classifier.out_proj"]},
        ("classifier",),
    ),
    "deberta classifier": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**WORDS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        16,
        {"heads": ["pooler.dense", "classifier"]},
        ("pooler", "classifier"),
    ),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, 32, HEAD, inputs=_both),
    "t5 classifier": Architecture(
        "T5ForSequenceClassification",
        "T5Config",
        T5,
        32,
        {"heads": ["classification_head.dense", "classification_head.out_proj"]},
        ("classification_head",),
    ),
    "switch": Architecture(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **T5,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
        },
        44,
        {
            "routers": [
                "encoder.block.1.layer.1.mlp.router.classifier",
                "decoder.block.1.layer.2.mlp.router.classifier",
            ],
            **HEAD,
        },
        inputs=_both,
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        IMAGES,
        12,
        {"heads": ["classifier"]},
        ("classifier",),
        inputs=_image,
    ),
    "clip": Architecture("CLIPModel", "CLIPConfig", CLIP, 26, {}, inputs=lambda: {**_words(), **_image()}),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        16,
        {"output embeddings": ["proj_out"]},
        inputs=_sound,
    ),
}
