"""Tokens of llama.cpp beside those of lqlora: SmolLM2-135M merged, and as a base with an adapter.

llama.cpp comes with an npm package. Install it into a folder, without a build: ``npm install node-llama-cpp@3.22.1``, and name the folder.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import lqlora as lq
from lqlora.integrations.exporting import export_checkpoint
from lqlora.integrations.gguf import load_llama, packaged_smollm2
from lqlora.integrations.merging import merge_checkpoint

PROMPTS = (
    "The capital of France is", "Water boils at", "def fibonacci(n):", "The largest planet is", "Once upon a time", "In 1969, the first",
    "To make bread you need", "The theory of relativity",
)  # fmt: skip
COUNT = 64


def continued(model, prompts):
    """Return the likeliest tokens after each prompt."""
    options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def by_llama_cpp(folder, model, adapter, prompts):
    """Return the same by llama.cpp, which stops at the end of the text."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    shutil.copy(Path(__file__).with_name("llama_cpp.mjs"), folder)
    call = ["node", "llama_cpp.mjs", str(model), str(adapter or "-"), "prompts.json", "result.json", str(COUNT)]
    subprocess.run(call, cwd=folder, check=True, capture_output=True)
    return json.loads((folder / "result.json").read_text())


def agreeing(ours, theirs):
    """Return how many tokens are the same from the beginning, of how many."""
    same = [
        next((i for i, (a, b) in enumerate(zip(*own, strict=False)) if a != b), len(own[1]))
        for own in zip(ours, theirs, strict=True)
    ]
    return ", ".join(f"{count} of {len(own)}" for count, own in zip(same, theirs, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npm", type=Path, help="folder in which npm has installed node-llama-cpp")
    parser.add_argument("--formats", nargs="+", default=["int4s/32:float16", "int8s/32:float16"])
    options = parser.parse_args()
    source = packaged_smollm2()
    print("| format | file | tokens that agree, for each prompt |\n|---|---|---|")
    for text in options.formats:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            model, tokenizer = load_llama(source)
            prompts = [tokenizer(own).input_ids for own in PROMPTS]
            lq.decompose_checkpoint(source, work / "small", lq.BlockFormat.parse(text), rank=16, progress=False)
            lq.nn.load_model(work / "small", model)
            ours = continued(model, prompts)
            export_checkpoint(work / "small", work / "base", "gguf", like=source, progress=False)
            files = {"base and adapter": (work / "base" / "model.gguf", work / "base" / "adapter.gguf")}
            for dtype in ("float32", "float16"):
                merge_checkpoint(work / "small", work / dtype, like=source, dtype=dtype, progress=False)
                files[f"merged, {dtype}"] = (work / dtype / "model.gguf", None)
            for title, (file, adapter) in files.items():
                theirs = by_llama_cpp(options.npm.absolute(), file, adapter, prompts)
                print(f"| `{text}` | {title} | {agreeing(ours, theirs)} |", flush=True)


if __name__ == "__main__":
    main()
