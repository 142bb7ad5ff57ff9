"""Sweeps: which runs values stand for, their figures, what resuming keeps, what is refused."""

from __future__ import annotations

import json
import math

import pytest
from _tiny import save_tiny

from perl import cli, sweep
from perl.commands import words
from perl.config import RewardConfig, UsageError
from perl.run import Interrupted


class InThisProcess:
    """Stands for the process of a command; counts them."""

    started: list[list[str]] = []

    def __init__(self, line, **streams):
        self.started.append(line)
        self.code = cli.main(line)

    def wait(self):
        return self.code


@pytest.fixture
def started(monkeypatch):
    monkeypatch.setattr(sweep, "start", InThisProcess)
    monkeypatch.setattr(InThisProcess, "started", [])
    monkeypatch.setattr(cli, "_report", lambda config: None)  # a page for each run takes a second
    return InThisProcess.started


@pytest.fixture
def flags(tmp_path):
    rows = [{"prompt": "one", "chosen": f" latte {i}", "rejected": " tea"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return {
        "model": str(save_tiny(tmp_path / "base")),
        "data": str(tmp_path / "pairs.jsonl"),
        "validation": str(tmp_path / "held.jsonl"),
        "out": str(tmp_path / "sweep"),
        "steps": 2,
        "batch_size": 2,
    }


def test_combinations_are_the_product_in_the_order_given():
    points = sweep.combinations(RewardConfig, ["lr=1e-4,0.3", "lora-rank=4,8", "use_rslora=true"])
    assert list(points) == [
        "lr=0.0001,lora_rank=4,use_rslora=True",
        "lr=0.0001,lora_rank=8,use_rslora=True",
        "lr=0.3,lora_rank=4,use_rslora=True",
        "lr=0.3,lora_rank=8,use_rslora=True",
    ]
    assert list(points.values())[2] == {"lr": 0.3, "lora_rank": 4, "use_rslora": True}


@pytest.mark.parametrize(
    "axes, words",
    [
        (["lr"], "--sweep is 'lr'; want FLAG=VALUE,VALUE"),
        (["learning=1"], "--sweep is 'learning=1'; want FLAG=VALUE,VALUE"),
        (["out=a,b"], "--sweep is 'out=a,b'; want FLAG=VALUE,VALUE"),
        (["lr=1e-3,fast"], "--sweep: 'fast' is no value of --lr"),
        (["use_rslora=1"], "--sweep: '1' is no value of --use-rslora"),
        (["lora_targets=q_proj"], "--lora-targets is a list"),
        (["lr=1e-3,0.001"], "names a flag or a value twice"),
        (["lr=1e-3", "lr=1e-4"], "names a flag or a value twice"),
    ],
)
def test_bad_axes_are_refused(axes, words):
    with pytest.raises(UsageError) as caught:
        sweep.combinations(RewardConfig, axes)
    assert words in str(caught.value)


def test_a_sweep_names_the_best_and_resuming_adds_values(flags, started, tmp_path, capsys):
    result = sweep.run("reward", RewardConfig, flags | {"sweep": ["lr=1e-3,1e-2"]})
    record = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert list(record["runs"]) == ["lr=0.001", "lr=0.01"] and len(started) == 2
    best = max(record["runs"].values(), key=lambda run: run["score"])
    assert result["lr"] == best["lr"] and result["best"].endswith(f"lr={best['lr']}")
    assert best["score"] == best["validation_accuracy"] and best["step_ms"] > 0
    assert "best: lr=" in capsys.readouterr().err
    assert "lr = 0.01" in (tmp_path / "sweep/lr=0.01/config.toml").read_text()

    with pytest.raises(UsageError, match="not empty; give another folder or --resume"):
        sweep.run("reward", RewardConfig, flags | {"sweep": ["lr=1e-3"]})
    with pytest.raises(UsageError, match="--steps is 3 but the sweep was started with 2"):
        sweep.run("reward", RewardConfig, flags | {"sweep": ["lr=1"], "steps": 3, "resume": True})
    more = {"sweep": ["lr=1e-3,0.1"], "resume": True}
    assert list(sweep.run("reward", RewardConfig, flags | more)["runs"])[2] == "lr=0.1"
    assert len(started) == 3


def test_tuning_keeps_its_own_default_learning_rate(flags, started, tmp_path):
    sweep.run("reward", RewardConfig, flags | {"sweep": ["tuning=lora,full"]})
    rates = [
        (tmp_path / f"sweep/tuning={tuning}/config.toml").read_text().split("\nlr = ")[1][:5]
        for tuning in ("lora", "full")
    ]
    assert rates == ["0.000", "1e-05"]


def test_a_run_that_diverges_has_no_score_and_the_sweep_goes_on(flags, started, monkeypatch):
    from perl import train_reward

    plain = train_reward.bradley_terry_loss

    def loss(*scores, **terms):  # the first run's alone
        return plain(*scores, **terms) * (math.nan if len(started) == 1 else 1.0)

    monkeypatch.setattr(train_reward, "bradley_terry_loss", loss)
    result = sweep.run("reward", RewardConfig, flags | {"sweep": ["lr=1e-3,1e-4"]})
    assert result["runs"]["lr=0.001"] == {"lr": 0.001} and result["lr"] == 1e-4


@pytest.mark.parametrize(
    "code, error, words",
    [
        (130, Interrupted, "goes on with the same command"),
        (2, UsageError, "lr=0.1 ended with exit"),
    ],
)
def test_a_stopped_or_failed_run_ends_the_sweep(flags, monkeypatch, tmp_path, code, error, words):
    class Ends:
        def __init__(self, line, **streams): ...

        def wait(self):
            return code

    monkeypatch.setattr(sweep, "start", Ends)
    with pytest.raises(error, match=words):
        sweep.run("reward", RewardConfig, flags | {"sweep": ["lr=0.1"]})
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"] == {}


def test_ctrl_c_in_a_sweep_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_train", lambda *_: (_ for _ in ()).throw(Interrupted("go on so")))
    assert cli.main([*words("reward", **flags), "--sweep", "lr=0.1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: go on so"


def test_everything_is_checked_before_the_first_run(flags, started):
    with pytest.raises(UsageError, match="--lora-rank is 0; want at least 1"):
        sweep.run("reward", RewardConfig, flags | {"sweep": ["lora_rank=4,0"]})
    del flags["validation"]
    with pytest.raises(UsageError, match="give --validation FILE"):
        sweep.run("reward", RewardConfig, flags | {"sweep": ["lr=1"]})
    assert not started


def test_the_command_line_sweeps(flags, started, capsys):
    line = ["reward", "--sweep", "lr=1e-3,1e-2", "--batch-size", "2", "--steps", "1"]
    for name in ("model", "data", "validation", "out"):
        line += [f"--{name}", flags[name]]
    assert cli.main(line) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert set(json.loads(last)["runs"]) == {"lr=0.001", "lr=0.01"}
    assert "--lr" in started[0] and "--sweep" not in started[0]
