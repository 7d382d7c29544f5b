"""A small language model, tokens, a loss, and the state of a model, for the tests of all collectors."""

from __future__ import annotations

from lqlora._optional import is_installed
from tests.requirements import import_quietly, require_module, require_or_skip

torch = require_module("torch")


def tiny_llama():
    """Return a language model of two layers in evaluation mode."""
    require_or_skip("transformers", is_installed("transformers"))
    transformers = import_quietly("transformers")

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(examples: int):
    """Return sequences of tokens for the language model."""
    return torch.randint(50, (examples, 9), generator=torch.Generator().manual_seed(examples))


def squared(model, batch):
    """Return the sum of the squared outputs of each example as its loss."""
    return model(batch).square().flatten(1).sum(dim=1)


def state_of(model) -> dict:
    """Return everything of a model that a collector must leave as it was."""
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) for m in model.modules()],
    }


def mixed_state_model():
    """Return a model with mixed modes and flags, and with one gradient."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    model[1].eval()
    model[0].weight.requires_grad = False
    model[3].weight.grad = torch.full((3, 6), 7.0)
    return model
