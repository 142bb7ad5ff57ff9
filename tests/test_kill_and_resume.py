"""A training that is killed at any moment and resumed is the uninterrupted one, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from _commands import read_jsonl, save_reward, write_jsonl
from _tiny import save_tiny

from perl.config import ReinforceConfig
from perl.train_policy import train

PROMPTS = ["one latte please", "a large tea", "two scones and a tea", "a latte", "tea", "scones"]
FORKED = multiprocessing.get_context("forkserver")  # imports happen once
FORKED.set_forkserver_preload(["perl.train_policy"])


def same(run: Path) -> list[dict]:
    """What must repeat of the metrics: everything but times and memory."""
    unlike = ("_s", "peak_memory_bytes")
    rows = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(unlike)} for row in rows]


def kill(config: ReinforceConfig, pause: float) -> int:
    """Trains in a process that is killed so many seconds after its next line of metrics.

    Returns its exit code, which is another where the kill came too late.
    """
    lines = Path(config.out, "metrics.jsonl")
    before = lines.stat().st_size if lines.exists() else 0
    training = FORKED.Process(target=train, args=(config,))
    training.start()
    while training.is_alive() and not (lines.exists() and lines.stat().st_size > before):
        time.sleep(0.002)
    if training.is_alive():
        time.sleep(pause)
        os.kill(training.pid, signal.SIGKILL)
    training.join()
    return training.exitcode


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.1, "lr": 1e-2}, {"tuning": "full", "lr": 1e-3}]
)
def test_kills_at_any_moment_change_nothing(tmp_path, changes):
    base = save_tiny(tmp_path / "base")
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    settings = dict(
        model=str(base), data=str(data), reward_model=str(save_reward(tmp_path / "rm", base, 3)),
        lora_rank=3, steps=6, prompts_per_step=4, max_new_tokens=6, warmup_steps=3, threads=1,
        checkpoint_every=2, samples_every=4, device="cpu", validation=str(data), validate_every=3,
    )  # fmt: skip
    settings |= changes
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(ReinforceConfig(**settings, out=str(whole)))
    moments, step_s = random.Random(7), read_jsonl(whole / "metrics.jsonl")[-1]["step_s"]
    for resume in (False, True):
        config = ReinforceConfig(**settings, out=str(part), resume=resume)
        code = kill(config, 2 * step_s * moments.random())
        assert code == -signal.SIGKILL or resume
    train(ReinforceConfig(**settings, out=str(part), resume=True))
    assert same(part) == same(whole)
    assert len(same(whole)) == 7 and all(row["kl"] != 0 for row in same(whole)[2:])
    assert read_jsonl(part / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")
    files = [file for file in (whole / "checkpoints/step-6").rglob("*") if file.is_file()]
    assert {"state.json", "value_optimizer.safetensors"} < {file.name for file in files}
    for file in files:
        assert (part / file.relative_to(whole)).read_bytes() == file.read_bytes(), file.name
