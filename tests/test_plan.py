"""The planner: what it counts without data is what happens with data, down to a process's peak."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers
from _architectures import ARCHITECTURES
from _commands import read_jsonl, refused, run, write_jsonl
from _tiny import save_tiny, tiny_tokenizer
from torch._subclasses import FakeTensorMode

from perl import plan
from perl.config import PlanConfig, SftConfig

MODELS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2", "GPT-NeoX"]
SMALL = dict(max_tokens=24, max_new_tokens=5, batch_size=3, prompts_per_step=3, lora_rank=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config.json, and nothing beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    ARCHITECTURES["Llama"][1]().save_pretrained(folder)
    return str(folder)


def config_of(model: str, **changes) -> PlanConfig:
    return PlanConfig(model=model, **SMALL | changes)


# ------------------------------------------------------------------------------------------------
# What is kept for backward


def kept(backbone, ids, mask) -> int:
    """Bytes that autograd keeps of a pass beside what the model owns, each storage once."""
    models = backbone.models()
    own = {t.untyped_storage()._cdata for m in models for t in (*m.parameters(), *m.buffers())}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = backbone.hidden("policy", ids, mask)
    size = sum(storage.nbytes() for key, storage in found.items() if key not in own)
    del hidden
    return size


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_as_much_is_kept_as_with_data(name, tuning):
    config = SftConfig(
        model=name, data=["-"], out="-", tuning=tuning, lora_rank=3, lora_dropout=0.1
    )
    ids = torch.full((2, 19), 5)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0  # padding
    sizes = []
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        backbone = plan.blueprint(config, ARCHITECTURES[name][1](), {"policy": False})
        with mode:
            plan.give_storage(backbone.models())
            backbone.device = torch.device("cpu")
            sizes.append(kept(backbone, ids.clone(), mask.clone()))
    assert sizes[0] == sizes[1] > 0


# ------------------------------------------------------------------------------------------------
# The ledger of an update


@pytest.mark.parametrize(
    "job, changes",
    [
        ("sft", dict(micro_batch_size=1)),
        ("reward", dict(checkpoint_activations=True)),
        ("reinforce", dict(kl_in="loss", dtype="bfloat16")),
    ],
)
def test_an_update_without_data_is_one_with_data(tiny, job, changes, monkeypatch):
    config = config_of(tiny, **changes)
    planned = plan.count(config, job, "lora")
    assert planned.now.total() == 0  # nothing is left behind
    monkeypatch.setattr(plan, "FakeTensorMode", nullcontext)
    real = plan.count(config, job, "lora")
    assert planned.peak == real.peak and planned.peak_phase == real.peak_phase
    assert planned.work == real.work


# ------------------------------------------------------------------------------------------------
# The peak of a process

SHAPE = dict(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=8, vocab_size=8000, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FLAGS = {
    "sft": ["--batch-size", "16", "--max-tokens", "257"],
    "reward": ["--batch-size", "8", "--max-tokens", "256"],
    "reinforce": ["--prompts-per-step", "16", "--max-tokens", "257", "--max-new-tokens", "33"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 27 million parameters, and data for every job whose batches are padded."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    long, short = "a large tea and two scones please " * 60, "two scones"
    answers = [long if i else short for i in range(16)]
    write_jsonl(folder / "sft.jsonl", [{"prompt": t, "completion": " latte"} for t in answers])
    rows = [{"prompt": long, "chosen": t, "rejected": " latte"} for t in [" one", " two"] * 4]
    write_jsonl(folder / "reward.jsonl", rows)
    write_jsonl(folder / "reinforce.jsonl", [{"prompt": t} for t in answers])
    (folder / "f.py").write_text("def reward(p, c):\n    return [float(len(text)) for text in c]\n")
    return folder


def perl(*words: object) -> str:
    words = [sys.executable, "-m", "perl", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("job", FLAGS)
def test_peak_of_a_process(small, job, tuning, tmp_path):
    planned = json.loads(
        perl("plan", "--model", small, "--job", job, *FLAGS[job], "--reward-models", 0, "--json")
    )
    flags = ["--reward-function", f"{small}/f.py:reward"] if job == "reinforce" else []
    perl(
        job, "--model", small, "--data", small / f"{job}.jsonl", "--out", tmp_path / "run",
        "--tuning", tuning, "--steps", 2, "--truncate-prompts", *FLAGS[job], *flags,
    )  # fmt: skip
    measured = max(row.get("peak_memory_bytes", 0) for row in read_jsonl(tmp_path / "run/metrics.jsonl"))
    print(job, tuning, planned[job][tuning]["peak"] / measured, measured / 2**20, planned[job][tuning])
    assert planned[job][tuning]["peak"] == pytest.approx(measured, rel=0.1)
