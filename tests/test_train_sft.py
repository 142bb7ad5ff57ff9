"""`perl sft` on tiny models: the loss against transformers' own, learning, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import perl_kernels as pk
from perl import cli
from perl.optimizer import Optimizer

ROWS = [
    {"prompt": "a large tea and", "completion": " two scones"},
    {"prompt": "one latte please", "completion": " Anything else? That is 7 euros."},
]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "one latte"},
            {"role": "assistant", "content": "That is 7 euros."},
            {"role": "user", "content": "tea"},
            {"role": "assistant", "content": "two scones"},
        ]
    }
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(model: Path, data: Path, out: Path, *extra: str) -> int:
    return cli.main(
        [
            "sft",
            "--model",
            str(model),
            "--data",
            str(data),
            "--out",
            str(out),
            "--threads",
            "1",
            "--batch-size",
            "2",
            "--lora-rank",
            "4",
            *extra,
        ]
    )


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("step_s", "tokens_per_s", "peak_memory_bytes")}
        for row in rows
    ]


def their_loss(folder: Path, sequences: list[tuple[list[int], list[int]]]) -> float:
    """transformers' own loss over (ids, labels), labels -100 where nothing is learned."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    total = count = 0
    with torch.no_grad():
        for ids, labels in sequences:
            n = sum(label != -100 for label in labels[1:])
            total += n * model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            count += n
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_first_loss_is_that_of_the_completions(tmp_path, family):
    folder = save_tiny(tmp_path / "model", family)
    assert sft(folder, write(tmp_path / "d.jsonl", ROWS), tmp_path / "run", "--steps", "1") == 0
    tokenizer, sequences = AutoTokenizer.from_pretrained(folder), []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        sequences.append((prompt + answer, [-100] * len(prompt) + answer))
    [row] = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(their_loss(folder, sequences), rel=1e-5)
    assert row["learned_tokens"] == sum(len(labels) - labels.count(-100) for _, labels in sequences)


def test_the_first_loss_of_texts_counts_every_token(model, tmp_path):
    texts = [{"text": "one latte please"}, {"text": "Anything else?"}]
    assert sft(model, write(tmp_path / "d.jsonl", texts), tmp_path / "run", "--steps", "1") == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in texts]
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(
        their_loss(model, [(row, row) for row in ids]), rel=1e-5
    )


def test_only_learned_tokens_meet_the_head(model, tmp_path, monkeypatch):
    shapes, log_prob = [], pk.linear_log_prob

    def watched(hidden, weight, target, **keywords):
        shapes.append(tuple(hidden.shape))
        return log_prob(hidden, weight, target, **keywords)

    monkeypatch.setattr(pk, "linear_log_prob", watched)
    sft(model, write(tmp_path / "d.jsonl", MESSAGES), tmp_path / "run", "--steps", "1")
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = [m["content"] for m in MESSAGES[0]["messages"] if m["role"] == "assistant"]
    expected = sum(
        len(tokenizer(" " + a, add_special_tokens=False)["input_ids"]) + 1 for a in answers
    )
    assert shapes == [(expected, 32)]


@pytest.mark.parametrize("tuning, lr", [("lora", "1e-2"), ("full", "3e-3")])
def test_it_learns_by_heart_and_the_result_generates(model, tmp_path, tuning, lr, capsys):
    data = write(tmp_path / "d.jsonl", ROWS)
    run = tmp_path / "run"
    assert (
        sft(
            model,
            data,
            run,
            "--tuning",
            tuning,
            "--lr",
            lr,
            "--steps",
            "60",
            "--validation",
            str(data),
            "--validate-every",
            "60",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["validation_loss"] < 0.1
    for where in (["--model", str(run)], ["--model", str(model), "--policy", str(run)]):
        assert (
            cli.main(
                [
                    "generate",
                    *where,
                    "--prompt",
                    ROWS[0]["prompt"],
                    "--temperature",
                    "0",
                    "--max-new-tokens",
                    "20",
                ]
            )
            == 0
        )
        assert capsys.readouterr().out == ROWS[0]["prompt"] + ROWS[0]["completion"] + "\n"


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_resume_is_bit_for_bit(model, tmp_path, tuning, monkeypatch):
    data = write(tmp_path / "d.jsonl", [{"prompt": "tea", "completion": f" {i}"} for i in range(5)])
    extra = [
        "--tuning",
        tuning,
        "--steps",
        "7",
        "--checkpoint-every",
        "2",
        "--lora-dropout",
        "0.1",
        "--micro-batch-size",
        "1",
        "--lr",
        "1e-3",
        "--lora-targets",
        "q_proj",
    ]
    assert sft(model, data, tmp_path / "whole", *extra) == 0
    step, steps = Optimizer.step, []

    def failing_step(self, number):
        steps.append(number)
        if len(steps) == 6:
            raise KeyboardInterrupt  # as a second Ctrl-C: no checkpoint is written
        step(self, number)

    monkeypatch.setattr(Optimizer, "step", failing_step)
    assert sft(model, data, tmp_path / "cut", *extra) == 130
    assert cli.main(["sft", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    weights = [
        next((tmp_path / run / "policy").glob("*model.safetensors")).read_bytes()
        for run in ("cut", "whole")
    ]
    assert weights[0] == weights[1]


def test_pairs_are_refused(model, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert sft(model, data, tmp_path / "run") == 2
    assert "sft wants {prompt, completion} or {messages} or {text}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
