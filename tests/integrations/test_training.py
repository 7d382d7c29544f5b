"""Trainers of other libraries: training, resuming to the bit, and loading in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lqlora as lq
from tests.requirements import require_module

torch, transformers, accelerate = (require_module(name) for name in ("torch", "transformers", "accelerate"))
from lqlora.integrations.peft import register  # noqa: E402 - needs torch
from tests.integrations.tiny_models import dense_llama, examples, llama, tokens  # noqa: E402

# The libraries warn of each other's changes.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def options(folder, cls=None, **more):
    return (cls or transformers.TrainingArguments)(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=STEPS // 2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_resuming(make_trainer, folder, resume_at=STEPS // 2):
    """Train, resume from the checkpoint in the middle with a new model, and compare; return the trained model."""
    trainer = make_trainer(folder / "whole")
    start = bits(trainer.model)
    trainer.train()
    assert not same(bits(trainer.model), start)
    resumed = make_trainer(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{resume_at}"))
    assert same(bits(resumed.model), bits(trainer.model))
    assert losses(resumed)[-1] == losses(trainer)[-1]
    return trainer.model


def in_a_fresh_process(body, *arguments):
    """Run code in a new interpreter, which writes ``logits`` to the last argument; return them."""
    code = f"""
import sys, warnings, torch
warnings.simplefilter("ignore")
import lqlora as lq
from tests.integrations.tiny_models import dense_llama, tokens
{body}
with torch.no_grad():
    torch.save(model.eval()(input_ids=tokens()).logits, sys.argv[-1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(arguments[-1])


def lowered(values):
    return values[-1] < values[0]


@pytest.mark.slow
def test_trainer_resumes_to_the_bit_and_its_model_comes_back(tmp_path):
    data = examples()

    def make(folder):
        return transformers.Trainer(model=llama(), args=options(folder), train_dataset=data)

    model = check_resuming(make, tmp_path)
    lq.nn.save_model(tmp_path / "model.safetensors", model)
    body = "model = dense_llama()\nlq.nn.load_model(sys.argv[1], model)"
    assert torch.equal(in_a_fresh_process(body, tmp_path / "model.safetensors", tmp_path / "out.pt"), logits(model))


def test_a_plain_loop_with_checkpointing_lowers_the_loss():
    model = llama().train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert lowered(found)


def with_adapter(**more):
    peft = require_module("peft")
    register()
    torch.manual_seed(7)
    return peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_trainer_with_an_adapter_resumes_to_the_bit_and_the_adapter_comes_back(kind, tmp_path):
    data = examples()

    def make(folder):
        model = with_adapter(use_dora=kind == "dora", lora_dropout=0.1)
        return transformers.Trainer(model=model, args=options(folder), train_dataset=data)

    model = check_resuming(make, tmp_path)
    lq.nn.save_model(tmp_path / "base.safetensors", llama())
    body = """
from peft import PeftModel
from lqlora.integrations.peft import register
register()
model = dense_llama()
lq.nn.load_model(sys.argv[1], model)
model = PeftModel.from_pretrained(model, sys.argv[2])
"""
    paths = tmp_path / "base.safetensors", tmp_path / "whole" / f"checkpoint-{STEPS}", tmp_path / "out.pt"
    assert torch.equal(in_a_fresh_process(body, *paths), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_the_trainer_of_trl_resumes_to_the_bit(adapter, tmp_path):
    trl, peft, datasets = require_module("trl"), require_module("peft"), require_module("datasets")
    register()
    data = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in tokens(16)])

    def make(folder):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if adapter else None
        args = options(folder, trl.SFTConfig, max_length=12, bf16=False)
        return trl.SFTTrainer(
            model=llama(), args=args, train_dataset=data, peft_config=config, processing_class=tokenizer()
        )

    model = check_resuming(make, tmp_path)
    if adapter:
        assert isinstance(model, peft.PeftModel)


def tokenizer():
    """A tokenizer whose words are numbers. The data are tokens, so only its padding is used."""
    from tokenizers import Tokenizer, models

    words = {str(number): number for number in range(60)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_to_the_bit(precision, tmp_path):
    def run(model, steps, load=None, save=None):
        torch.manual_seed(3)
        own = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
        model, optimizer, schedule = own.prepare(model, optimizer, schedule)
        if load:
            own.load_state(str(load))
        for step in steps:
            rows = tokens(seed=step)
            optimizer.zero_grad()
            own.backward(model(input_ids=rows, labels=rows).loss)
            optimizer.step()
            schedule.step()
            if save and step == STEPS // 2 - 1:
                own.save_state(str(save))
        result = bits(own.unwrap_model(model))
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # its precision is of the process
        return result

    start = bits(llama())
    whole = run(llama(), range(STEPS), save=tmp_path / "half")
    resumed = run(llama(), range(STEPS // 2, STEPS), load=tmp_path / "half")
    assert same(whole, resumed)
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert changed == {name for name in whole if name.endswith((".lora_A", ".lora_B"))}


@pytest.mark.slow
def test_trainer_trains_an_adapter_that_is_merged_for_other_programs(tmp_path):
    model = with_adapter()
    trainer = transformers.Trainer(model=model, args=options(tmp_path / "run"), train_dataset=examples())
    trainer.train()
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    assert type(again) is type(dense_llama())
