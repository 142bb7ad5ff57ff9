"""The command line inside a test, and reward models for it made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from _tiny import perturb

import perl_kernels as pk
from perl import cli
from perl.backbone import Backbone
from perl.data import answer_ids, prompt_ids


def run(capsys, *argv: object) -> str:
    """What a command that succeeds prints on stdout."""
    assert cli.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    """The one line on stderr of a command that is refused."""
    assert cli.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_reward(folder: Path, base: Path, seed: int, tuning: str = "lora", **lora) -> Path:
    """A run folder with a reward model on `base` that says something; returns the folder."""
    torch.manual_seed(seed)
    backbone = Backbone.load(base, tuning=tuning, lora=pk.LoRAConfig(**{"r": 3} | lora))
    backbone.add_role("reward", scalar=True)
    perturb(backbone.trainable("reward"), seed, 0.1 if tuning == "lora" else 0.02)
    backbone.save_role("reward", folder / "reward")
    (folder / "config.toml").write_text(f'model = "{base}"\n')
    return folder


def scores_of(base: Path, reward_model: Path, texts: list[tuple[str, str]]) -> list[float]:
    """The definition: each prompt and answer alone, in one pass of its own."""
    backbone = Backbone.load(base)
    backbone.load_role("reward", reward_model)
    found = []
    for prompt, answer in texts:
        ids = prompt_ids(prompt, backbone.tokenizer)
        ids = torch.tensor([ids + answer_ids(prompt, answer, backbone.tokenizer)])
        with torch.no_grad():
            found.append(backbone.score("reward", ids, torch.ones_like(ids)).item())
    return found
