"""Time and memory of a model of seven billion weights: decomposed, quantized, its cost table, or its statistics.

The model is random: matrices of the shapes of Llama 2 7B in bfloat16, with heavier tails than normal numbers, in files of 2 GB. It is written
once to ``--model``. ``--layers`` makes it smaller. Resident memory is the largest of the process, as ``/usr/bin/time -v`` reports it, and
includes pages of mapped files. Anonymous memory, which the system cannot drop, is looked at twice a second.
"""

import argparse
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import lqlora as lq
from lqlora.integrations.sources import open_weights

WIDTH, INNER, WORDS = 4096, 11008, 32000
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def write_model(folder, layers):
    """Write the model, two gigabytes at a time."""
    names = {f"model.layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in SHAPES.items()}
    names |= {f"model.layers.{layer}.{name}.weight": (WIDTH,) for layer in range(layers)
              for name in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    names |= {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "lm_head.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    groups, size = [[]], 0
    for name, shape in sorted(names.items()):
        size += 2 * int(np.prod(shape))
        if size > 2e9:
            groups, size = [*groups, []], 2 * int(np.prod(shape))
        groups[-1].append(name)
    folder.mkdir(parents=True)
    rng, places = np.random.default_rng(0), {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # A normal number times a log-normal one for each row: rows of trained models differ in size, and have outliers.
        tensors = {}
        for name in group:
            values = rng.standard_normal(names[name], dtype=np.float32)
            values *= 0.02 * np.exp(0.3 * rng.standard_normal((names[name][0], *[1] * (len(names[name]) - 1))))
            tensors[name] = values.astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / file)
        places |= dict.fromkeys(group, file)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": WORDS,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def watch(largest):
    """Keep the largest anonymous memory of the process in a list, in KiB."""
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        largest[0] = max(largest[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
        time.sleep(0.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the model; it is made if it does not exist"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it is replaced")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", choices=["decompose", "quantize", "costs", "calibrate"], default="decompose")
    parser.add_argument("--format", default="nf3/64:u8/256:float32")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the one sequence of calibrate")
    parser.add_argument("--gradients", action="store_true", help="collect gradients in calibrate, too")
    options = parser.parse_args()
    if not options.model.exists():
        write_model(options.model, options.layers)
        print(f"wrote {options.model}; run this again, so that the memory of writing does not count")
        return
    if options.output.is_dir():
        shutil.rmtree(options.output)
    anonymous = [0]
    threading.Thread(target=watch, args=(anonymous,), daemon=True).start()
    start, used = time.perf_counter(), time.process_time()
    if options.work == "costs":
        from lqlora.recipes.demo.settings import Settings

        table = lq.cost_table(open_weights(options.model), Settings.formats, rank=options.rank, mode="fast")
        options.output.mkdir()
        (options.output / "table.json").write_text(table.to_json())
        size = sum(int(np.prod(shape)) for shape in table.shapes)
    elif options.work == "calibrate":
        import torch

        from lqlora.integrations.calibration import calibrate_checkpoint

        tokens = torch.randint(WORDS, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        calibrate_checkpoint(options.model, options.output, [tokens], gradients=options.gradients)
        size = sum(int(np.prod(shape)) for shape in SHAPES.values()) * options.layers
    else:
        fmt = lq.BlockFormat.parse(options.format)
        report = lq.decompose_checkpoint(
            options.model, options.output, fmt, rank=options.rank if options.work == "decompose" else 0,
            max_iter=options.iterations, rtol=0.0, factor_dtype="bfloat16",
        )  # fmt: skip
        print(report)
        size = sum(own.size for own in report.matrices.values())
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{options.work}: {size:,} weights, {wall:.0f} s, {cpu:.0f} CPU s, {size / wall / 1e6:.1f} million weights/s")
    print(f"resident memory: {memory / 2**30:.2f} GiB, {anonymous[0] / 2**20:.2f} GiB of it anonymous")


if __name__ == "__main__":
    main()
