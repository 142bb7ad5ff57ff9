"""What stops a diverging run: when exactly, with which checkpoint kept, the same after a resume."""

from __future__ import annotations

import json
import math

import pytest
from _commands import write_jsonl
from _tiny import save_tiny

from perl import cli, guards
from perl.config import ReinforceConfig
from perl.guards import Diverged, Guards
from perl.run import Run


def make(folder, **limits) -> tuple[Run, Guards]:
    config = ReinforceConfig(
        model="m", data="d", out=str(folder), reward_model="r", keep_checkpoints=1, **limits
    )
    return Run.create(folder, config), Guards(config, None)


def steps_until(run: Run, watching: Guards, **figures) -> int:
    """The step at which the figures, a list for each name, stop the run."""
    with pytest.raises(Diverged) as stopped:
        for step, values in enumerate(zip(*figures.values(), strict=True), 1):
            watching.watch(run, step, **dict(zip(figures, values, strict=True)))
    assert f"at step {step}" in str(stopped.value)
    return step


def test_kl_above_its_limit_stops_in_the_fifth_step_in_a_row(tmp_path):
    run, watching = make(tmp_path, kl_limit=2.0)
    kl = [0.1, *[3.0] * 4, 2.0, *[2.1] * 9]
    steady = {"reward": [0.5] * len(kl), "reward_std": [0.1] * len(kl)}
    assert steps_until(run, watching, kl=kl, **steady) == 11
    run, watching = make(tmp_path)
    for step in range(60):
        watching.watch(run, step, kl=1e6, reward=0.5, reward_std=0.1)


def test_a_collapsed_reward_stops_and_noise_does_not(tmp_path):
    """20 steps at 1, then 0: after k steps at 0 the mean of the last 20 lies k / 20 below."""
    run, watching = make(tmp_path, reward_drop=2.0)
    for step in range(1, 301):
        reward = 1.0 + 0.4 * math.sin(step)
        watching.watch(run, step, kl=0.0, reward=reward, reward_std=0.3)
    reward = [1.0] * 40 + [0.0] * 40
    # spread of the last 20 with k at 0: sqrt(std^2 + k / 20 (1 - k / 20)); stops at k / 20 > 2 x
    k = next(k for k in range(21) if k / 20 > 2 * (0.2**2 + k / 20 * (1 - k / 20)) ** 0.5)
    figures = {"kl": [0.0] * 80, "reward": reward, "reward_std": [0.2] * 80}
    assert steps_until(run, make(tmp_path, reward_drop=2.0)[1], **figures) == 40 + k
    figures["reward_std"] = [0.0] * 80
    figures["reward"] = [1.0] * 20 + [0.9] * 60  # every answer the same: any fall is one
    assert steps_until(run, make(tmp_path, reward_drop=2.0)[1], **figures) == 40
    _, off = make(tmp_path, reward_drop=0.0)
    for step, reward in enumerate(figures["reward"]):
        off.watch(run, step, kl=0.0, reward=reward, reward_std=0.0)


def test_guards_go_on_from_a_checkpoint(tmp_path):
    figures = [dict(kl=3.0 * (i > 37), reward=-float(i), reward_std=20.0) for i in range(70)]
    run, whole = make(tmp_path, kl_limit=2.0)
    config = run.config
    with pytest.raises(Diverged):
        for step, values in enumerate(figures):
            whole.watch(run, step, **values)
    assert step == 42
    for stop in (3, 20, 25, 40):
        first = Guards(config, None)
        for step in range(stop):
            first.watch(run, step, **figures[step])
        second = Guards(config, json.loads(json.dumps(first.state()["guards"])))
        for step in range(stop, 42):
            second.watch(run, step, **figures[step])
        with pytest.raises(Diverged):
            second.watch(run, 42, **figures[42])


def test_the_last_good_checkpoint_stays(tmp_path):
    run, watching = make(tmp_path / "run", kl_limit=2.0, reward_drop=2.0)
    assert run.kept == "no checkpoint was written before it"
    with run:
        for step, kl in enumerate([1.0, 1.0, 3.0, 3.0, 3.0], 1):
            watching.watch(run, step, kl=kl, reward=0.0, reward_std=1.0)
            run.save_checkpoint(step, {}, watching.state())
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 5]
        assert run.kept.endswith("step-2")
        watching.watch(run, 6, kl=1.0, reward=0.0, reward_std=1.0)
        run.save_checkpoint(6, {}, watching.state())
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [6]
        for step in range(7, 60):  # falls by one standard deviation and a bit: half the way
            reward = -1.1 * (step > 20)
            watching.watch(run, step, kl=1.0, reward=reward, reward_std=1.0)
        assert not watching.state()["good"]


FALLING = """
from pathlib import Path
CALLS = Path(__file__).with_name("calls")
def falling(prompts, completions):
    CALLS.write_text(CALLS.read_text() + "." if CALLS.exists() else ".")
    return [-float(len(CALLS.read_text()))] * len(completions)
"""


def test_a_diverging_run_ends_with_code_3_and_a_good_checkpoint(tmp_path, capsys, monkeypatch):
    """Calls: 1 is step 0's samples, 2 to 4 are steps, 5 the last one's samples, 6 is step 4's;
    rewards of all answers are alike. What the guards saw before the end of the first run counts.
    """
    monkeypatch.setattr(cli, "_report", lambda config: None)
    monkeypatch.setattr(guards, "WINDOW", 2)
    (tmp_path / "reward.py").write_text(FALLING)
    base = save_tiny(tmp_path / "base")
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "tea"}, {"prompt": "a latte"}])
    assert cli.main([str(word) for word in [
        "reinforce", "--model", base, "--data", data, "--out", tmp_path / "run", "--device", "cpu",
        "--reward-function", f"{tmp_path / 'reward.py'}:falling", "--steps", 3, "--lora-rank", 2,
        "--checkpoint-every", 1, "--keep-checkpoints", 1, "--prompts-per-step", 2,
        "--max-new-tokens", 3,
    ]]) == 0  # fmt: skip
    go_on = ["reinforce", "--out", str(tmp_path / "run"), "--resume", "--steps", "9"]
    assert cli.main(go_on) == 3
    said = capsys.readouterr().err  # (-2 - 3) / 2 - (-4 - 6) / 2
    assert "the mean reward of the last 2 steps lies 2.5 below" in said and "at step 4" in said
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step-3;" in said
    assert (tmp_path / "run/checkpoints/step-3/policy").is_dir()
