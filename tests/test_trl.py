"""TRL's trainers, with accelerate_peft as the only change: they train to the same losses."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from _tiny import TEXTS, stir, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn

import perl_kernels as pk

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [{"prompt": t, "chosen": f"{t} please", "rejected": f"{t} now"} for t in TEXTS * 4]


def sft(model: nn.Module, arguments: dict):
    rows = [{"text": text} for text in TEXTS * 4]
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments, max_length=32),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def reward(model: nn.Module, arguments: dict):
    return trl.RewardTrainer(
        model,
        trl.RewardConfig(**arguments, max_length=32),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
    )


def rloo(model: nn.Module, arguments: dict, kind: str = "RLOO"):
    config = getattr(trl, f"{kind}Config")
    return getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=config(**arguments, num_generations=2, max_completion_length=6, beta=0.1),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in TEXTS * 4]),
        processing_class=tiny_tokenizer(),
    )


def grpo(model: nn.Module, arguments: dict):
    return rloo(model, arguments, "GRPO")


@pytest.mark.parametrize(
    "trainer",
    [sft, reward, grpo, pytest.param(rloo, marks=pytest.mark.slow)],
    ids=lambda trainer: trainer.__name__,
)
def test_trainer_reaches_the_same_losses(trainer, tmp_path):
    """TRL's SFT, Reward, RLOO and GRPOTrainer with `accelerate_peft`: the same losses"""
    task = "SEQ_CLS" if trainer is reward else "CAUSAL_LM"
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.0, task_type=task)
    peers = get_peft_model(tiny_model(scalar=trainer is reward), config)
    stir(peers)
    start = copy.deepcopy(peers.state_dict())
    ours = pk.accelerate_peft(copy.deepcopy(peers))
    arguments = dict(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, seed=3,
        disable_tqdm=True,
    )  # fmt: skip

    def losses(model: nn.Module) -> list[float]:
        run = trainer(model, arguments)
        run.train()
        assert any(not torch.equal(start[name], t) for name, t in model.state_dict().items())
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    wanted = losses(peers)
    assert len(wanted) == 4
    assert losses(ours) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, peers.state_dict()[name], rtol=1e-2, atol=1e-3)
    assert {row.route for row in pk.explain(ours)} == {"lora_linear", "lora_mlp"}


@pytest.mark.parametrize("script", ["trl_reward.py", "trl_grpo.py"])
def test_examples_run(script, tmp_path, monkeypatch, capsys):
    """`docs/trl_reward.py`, `docs/trl_grpo.py`"""
    path = Path(__file__).parents[1] / "docs" / script
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(path, run_name="__main__")
    assert "--no-accelerate" in capsys.readouterr().out
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [script, "--out", str(out), "--steps", "2", "--rank", "2"])
    runpy.run_path(path, run_name="__main__")
    assert "lora_mlp" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").is_file()
