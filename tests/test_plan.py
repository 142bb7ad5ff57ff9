"""The planner: what it counts without data is what happens with data, down to a process's peak."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from _architectures import ARCHITECTURES
from _commands import read_jsonl, refused, run, write_jsonl
from _tiny import tiny_tokenizer
from torch._subclasses import FakeTensorMode

import perl_kernels as pk
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
    gc.collect()  # a checkpoint's frames refer to each other
    assert planned.now.total() == 0  # nothing is left behind
    monkeypatch.setattr(plan, "FakeTensorMode", nullcontext)
    real = plan.count(config, job, "lora")
    assert planned.peak == real.peak and planned.peak_phase == real.peak_phase
    assert work_of(planned) == work_of(real)


def work_of(ledger: plan.Ledger) -> list[tuple]:
    """Products alone: how torch takes other operations apart differs without data."""
    return [entry[:3] for entry in ledger.work if entry[2]]


def test_products_of_an_update(tiny):
    """Full tuning: 6 FLOPs a token and weight of a product, and attention's 4 + 10 T D a layer."""
    config = config_of(tiny, batch_size=2)
    ledger = plan.count(config, "sft", "full")
    shape = ARCHITECTURES["Llama"][1]()
    tokens, hidden, inner = 2 * (24 - 1), shape.hidden_size, shape.intermediate_size
    kv = shape.num_key_value_heads * shape.head_dim
    weights = shape.num_hidden_layers * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner)
    attention = shape.num_hidden_layers * 14 * (24 - 1) * hidden
    # The head's logits are made twice; the sft loss is of all tokens but the first.
    head = 8 * shape.vocab_size * hidden
    assert sum(entry[2] for entry in ledger.work) == tokens * (6 * weights + attention + head)


def test_micro_batches_count_for_the_batch(tiny):
    """As many products as in one pass, and memory that does not grow with the batch."""
    whole, some, more = (
        plan.count(config_of(tiny, batch_size=rows, micro_batch_size=part), "reward", "lora")
        for rows, part in ((8, 0), (8, 2), (64, 2))
    )
    products = [
        sum(times * number for _, times, number, _ in one.work) for one in (whole, some, more)
    ]
    assert products == [products[0], products[0], 8 * products[0]]
    assert some.peak == more.peak and some.peak.total() < whole.peak.total()


def test_a_sharded_model(tiny):
    """Two devices hold half the decoder and half its optimizer state each, the head is on both."""
    changes = dict(batch_size=4, devices=2)
    alone, halves = (
        plan.count(config_of(tiny, **changes, shard=shard), "sft", "full").peak
        for shard in (False, True)
    )
    shape = ARCHITECTURES["Llama"][1]()
    head = 4 * shape.vocab_size * shape.hidden_size
    assert halves["optimizer"] - 2 * head == pytest.approx(
        (alone["optimizer"] - 2 * head) / 2, rel=0.02
    )
    assert halves["weights"] - head == pytest.approx((alone["weights"] - head) / 2, rel=0.02)
    assert halves["activations"] == alone["activations"]


@pytest.mark.parametrize("size", [2**18 - 1, 2**18, 2**18 + 1, 2**22 - 1, 2**22, 2**22 + 1])
def test_what_the_pool_takes(size):
    if not pk.use_cpu_pool():
        pytest.skip("the pool is compiled, and for Linux only")
    before, _ = torch.ops.perl_kernels.cpu_pool_bytes()
    tensor = torch.empty(size, dtype=torch.uint8)
    used, _ = torch.ops.perl_kernels.cpu_pool_bytes()
    assert used - before == (plan.pooled(size) if size >= 2**18 else 0)
    del tensor


@pytest.mark.parametrize("limit", [99, 100, 1_000, 123_456])
def test_largest_batch(limit):
    """The exact one, in a few calls, of a peak that is flat at first and bends."""
    sizes, asked = [max(100, 40 + 7 * rows, 11 * rows) for rows in range(20_000)], []
    found = plan.largest(lambda rows: asked.append(rows) or sizes[rows], limit)
    assert found == max((n for n, size in enumerate(sizes) if n and size <= limit), default=0)
    assert len(asked) < 12


def test_the_table_says_what_json_says(capsys, tiny):
    flags = ["plan", "--model", tiny, "--max-tokens", 24, "--batch-size", 2, "--job", "sft"]
    flags += ["--device", "cuda", "--memory", 0.001, "--device-flops", 1e9]
    flags += ["--device-bandwidth", 1e9]
    told = json.loads(run(capsys, *flags, "--json"))
    assert told.keys() == {"sft", "peaks"} and told["peaks"]["efficiency"] == 1
    figures = told["sft"]
    for tuning in ("full", "lora"):
        assert figures[tuning]["peak"] == sum(figures[tuning]["memory"].values())
        held = sum(role["weights"] for role in figures[tuning]["roles"].values())
        assert held == pytest.approx(figures[tuning]["memory"]["weights"], rel=0.1)  # in 512 bytes
    assert list(figures["full"]["roles"]) == ["policy"]
    assert list(figures["lora"]["roles"]) == ["policy", "reference"]
    assert figures["lora"]["peak"] < figures["full"]["peak"]
    assert figures["lora"]["largest_batch"] > figures["full"]["largest_batch"] > 0
    said = run(capsys, *flags)
    assert "times: peaks as given, 100% of them reached; what a step takes at best" in said
    lines = {line[:18].strip(): line[18:].split() for line in said.splitlines()}
    assert lines["largest batch"] == [str(figures[t]["largest_batch"]) for t in ("full", "lora")]
    assert {"policy", "reference"} < set(lines)
    assert lines["step, s"] == [f"{figures[t]['seconds']['learn']:.3g}" for t in ("full", "lora")]


def test_seconds_are_the_longer_of_arithmetic_and_traffic():
    peaks = plan.Peaks(flops=100.0, bandwidth=10.0, source="", efficiency=0.5, note="")
    work = [("learn", 3.0, 200, 10), ("learn", 1.0, 0, 50), ("rollout", 1.0, 100, 20)]
    assert plan.seconds(work, peaks) == {"learn": (3 * 2 + 5) / 0.5, "rollout": 2 / 0.5}


@pytest.mark.parametrize(
    "changes, share, words",
    [
        ({}, plan.REACHED, "threads; a step may well take 0.7 to 1.4 times as long"),
        ({"efficiency": 0.5}, 0.5, "an estimate"),
        ({"device": "cuda"}, 1.0, "here, 10 TFLOP/s and 20 GB/s; what a step takes at best"),
        ({"device_flops": 1e13, "device_bandwidth": 2e10}, 1.0, "as given; what a step takes"),
        ({"devices": 2}, plan.REACHED, "messages between devices are not counted"),
    ],
)
def test_what_times_are_worth(tiny, monkeypatch, changes, share, words):
    monkeypatch.setattr(plan, "probe", lambda config: (1e13, 2e10))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    peaks = plan.peaks_of(config_of(tiny, **changes))
    assert peaks[:2] == (1e13, 2e10) and peaks.efficiency == share
    assert words in f"{peaks.source}; {peaks.note}"


def test_no_times_without_a_gpu_to_measure(capsys, tiny, monkeypatch):
    monkeypatch.setattr(plan, "probe", lambda config: pytest.fail("there is none"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = ["plan", "--model", tiny, "--job", "sft", "--device", "cuda"]
    said = run(capsys, *given)
    assert "times: none, as torch sees no GPU here" in said and "step, s" not in said


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--shard"], "give at least 2"),
        (["--device-flops", "1e12"], "give both"),
        (["--machine", "h200", "--device-flops", "1", "--device-bandwidth", "1"], "give one"),
        (["--device-flops", "-1", "--device-bandwidth", "1"], "--device-flops"),
        (["--efficiency", "1.1"], "--efficiency"),
        (["--machine", "h200"], "is a GPU; give --device cuda"),
        (["--machine", "h200", "--device", "cuda"], "give --dtype bfloat16"),
        (["--job", "sft", "--checkpoint-activations"], "is of reward"),
        (["--max-tokens", "65"], "context is 64"),
        (["--max-tokens", "1"], "want at least 2"),
        (["--lora-targets", "nothing"], "nothing"),
        (["--job", "reinforce", "--max-new-tokens", "64"], "no room is left"),
    ],
)
def test_refusals(capsys, tiny, flags, words):
    assert words in refused(capsys, "plan", "--model", tiny, *flags)


def test_a_hub_name_is_not_fetched(capsys, monkeypatch, tmp_path, tiny):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refused(capsys, "plan", "--model", "nobody/tiny")
    assert "no such folder or file" in said and "`hf download nobody/tiny config.json`" in said
    assert "no such folder or file" in refused(capsys, "plan", "--model", tmp_path / "a" / "b")
    kept = tmp_path / "models--nobody--tiny"
    shutil.copytree(tiny, kept / "snapshots" / "1")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1")
    assert plan.model_config("nobody/tiny").model_type == "llama"


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
    texts = [text[:721] for text in answers]  # 257 tokens, all of them learned, as a plan takes it
    write_jsonl(folder / "sft.jsonl", [{"text": text} for text in texts])
    rows = [{"prompt": long, "chosen": t, "rejected": " latte"} for t in [" one", " two"] * 4]
    write_jsonl(folder / "reward.jsonl", rows)
    write_jsonl(folder / "reinforce.jsonl", [{"prompt": t} for t in answers])
    (folder / "f.py").write_text("def reward(p, c):\n    return [float(len(text)) for text in c]\n")
    return folder


def perl(*words: object, processes: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    words = [*(launcher if processes > 1 else []), "-m", "perl", *map(str, words)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache  # a test of memory and one of time share a run
def compared(job: str, tuning: str, model: Path, devices: int = 1) -> dict[str, tuple]:
    """Bytes at the peak and seconds of a step, each (as planned, as measured); of several processes
    the largest."""
    shard, out = ["--shard"] * (devices > 1), model / f"{job}-{tuning}-{devices}"
    planned = json.loads(
        perl(
            "plan", "--model", model, "--job", job, *FLAGS[job], "--reward-models", 0,
            "--devices", devices, *shard, "--json",
        )
    )[job][tuning]  # fmt: skip
    flags = ["--reward-function", f"{model}/f.py:reward"] if job == "reinforce" else []
    perl(
        job, "--model", model, "--data", model / f"{job}.jsonl", "--out", out, "--tuning", tuning,
        "--steps", 4, "--truncate-prompts", *FLAGS[job], *flags, *shard, processes=devices,
    )  # fmt: skip
    rows = read_jsonl(out / "metrics.jsonl")
    _, *times = [row["step_s"] for row in rows if "step_s" in row]  # the first one warms up
    found = {
        "bytes": (planned["peak"], max(row.get("peak_memory_bytes", 0) for row in rows)),
        "seconds": (sum(planned["seconds"].values()), statistics.median(times)),
    }
    print(f"{job}, {tuning}, {devices} devices, planned and measured: {found}")
    return found


both_tunings = pytest.mark.parametrize("tuning", ["lora", "full"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@both_tunings
@pytest.mark.parametrize("job", FLAGS)
def test_peak_of_a_process(small, job, tuning):
    planned, measured = compared(job, tuning, small)["bytes"]
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@both_tunings
@pytest.mark.parametrize("job", FLAGS)
def test_time_of_a_step(small, job, tuning):
    """On a machine that does nothing else."""
    planned, measured = compared(job, tuning, small)["seconds"]
    assert 1 / plan.MARGIN < measured / planned < plan.MARGIN


@pytest.mark.slow
@pytest.mark.timeout(1800)
@both_tunings
def test_peak_of_each_of_two_processes(small, tuning):
    planned, measured = compared("sft", tuning, small, devices=2)["bytes"]
    assert planned == pytest.approx(measured, rel=0.1)
