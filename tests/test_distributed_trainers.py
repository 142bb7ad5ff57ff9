"""The trainers on two processes: the metrics and results of one, resumed, refused, interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _tiny import save_tiny
from safetensors.torch import load_file

from perl import cli

REPO = Path(__file__).parents[1]
WORDS = ["tea", "a large tea", "one latte please", "two scones", "latte", "That is 7 euros."]
UNLIKE = {"step_s", "tokens_per_s", "rollout_s", "score_s", "learn_s", "peak_memory_bytes"}
SCORES = """
import os, signal

def scores(prompts, completions):
    # unlike and never 0: Adam or whitening would make updates of full size from mere rounding
    return [0.1 + sum(map(ord, text)) % 97 / 97 for text in completions]

def fails(prompts, completions):
    assert os.environ.get("RANK") != "1", "on rank 1"
    return scores(prompts, completions)

calls = 0

def interrupts(prompts, completions):
    global calls
    calls += 1
    if calls == 5 and os.environ.get("RANK") == "1":  # step 0: samples, 2 validations; 1; 2
        os.kill(os.getpid(), signal.SIGINT)
    return scores(prompts, completions)

def fails_later(prompts, completions):
    global calls
    calls += 1
    assert calls != 8 or os.environ.get("RANK") != "1", "late"  # step 2: 2 validations; 3
    return scores(prompts, completions)
"""
SFT = ["sft", "--data", "sft.jsonl", "--validation", "sft-held.jsonl", "--batch-size", "4"]
REWARD = [
    "reward", "--data", "{data}.jsonl", "--validation", "{data}-held.jsonl", "--batch-size", "4"
]  # fmt: skip
PAIRS = [argument.format(data="pairs") for argument in REWARD]
LABELS = [argument.format(data="labels") for argument in REWARD]
REINFORCE = [
    "reinforce", "--data", "prompts.jsonl", "--reward-function", "reward.py:scores",
    "--prompts-per-step", "4", "--max-new-tokens", "6", "--validation", "prompts-held.jsonl",
    "--lr", "1e-3",
]  # fmt: skip
FULL, SHARD = ["--tuning", "full", "--lr", "1e-3"], ["--shard"]
# Each is run by one process, by two, and (where named) by two with the model spread over them.
ALIKE = {
    "sft": SFT + ["--micro-batch-size", "1"],
    "sft-full": SFT + FULL,
    "pairs": PAIRS,
    "labels": LABELS + ["--balance-labels"],
    "reinforce": REINFORCE + ["--whiten-advantages", "--micro-batch-size", "1"],
}
ALIKE["reinforce-ppo"] = REINFORCE + [
    "--answers-per-prompt", "2", "--baseline", "leave_one_out", "--epochs-per-batch", "2",
    "--minibatches", "2", "--kl-estimator", "exact", "--kl-target", "0.1", "--entropy-coef", "0.01",
    "--length-penalty", "0.02", "--no-end-penalty", "0.1", "--stop", "a", "e",
]  # fmt: skip
SHARDED = ["sft", "sft-full", "reinforce", "reinforce-ppo"]
ALIKE_SLOW = {
    "pairs-full": PAIRS + FULL,
    "reinforce-full": REINFORCE + FULL,
    "reinforce-loss": REINFORCE + ["--kl-in", "loss", "--baseline", "batch_mean"],
}
DROPOUT = SFT + ["--lora-dropout", "0.2", "--checkpoint-every", "2"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Figures take longer than these runs."""
    monkeypatch.setattr(cli, "_report", lambda config: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base model and small data files; the number of rows divides neither by 2 nor by 4."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "base")
    save_tiny(folder / "base-0")
    save_tiny(folder / "base-1", seed=1)
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    files = {
        "sft": [{"prompt": a, "completion": " " + b} for a, b in pairs],
        "pairs": [{"prompt": a, "chosen": " " + b, "rejected": " no"} for a, b in pairs],
        "labels": [
            {"prompt": a, "completion": " " + b, "label": i % 3 > 0}
            for i, (a, b) in enumerate(pairs)
        ],
        "prompts": [{"prompt": f"{a} and {b}"} for a, b in pairs],
    }
    files |= {f"{name}-held": rows[9:14] for name, rows in files.items()}
    files |= {name: files[name][:9] for name in ("sft", "pairs", "labels", "prompts")}
    files |= {
        "data-0": [{"text": a} for a in WORDS],
        "data-1": [{"text": a} for a in reversed(WORDS)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(SCORES)
    return folder


def command(world: Path, out: str, argv: list[str]) -> list[str]:
    """The arguments with paths of the world, and what all trainings here share; given ones win."""
    argv = [str(world / a) if ".jsonl" in a or a.startswith("reward.py") else a for a in argv]
    if "--resume" in argv or argv[0] == "evaluate":
        return argv
    return [
        argv[0], "--model", str(world / "base"), "--threads", "1", "--device", "cpu",
        "--steps", "4", "--lr", "1e-2", "--warmup-steps", "0", "--lora-rank", "3",
        "--validate-every", "2", "--out", str(world / out), *argv[1:],
    ]  # fmt: skip


def by_two(world: Path, commands: dict[str, list[str]]) -> dict[str, list[dict]]:
    """What both ranks of each command printed and returned."""
    entries = [
        {"name": name, "argv": command(world, name, argv)} for name, argv in commands.items()
    ]
    (world / "commands.json").write_text(json.dumps(entries))
    script = Path(__file__).with_name("two_trainers.py")
    done = subprocess.run(
        [sys.executable, script, world, world / "commands.json"],
        env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        name: [json.loads((world / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for name in commands
    }


@pytest.fixture(scope="module")
def printed(world) -> dict[str, list[dict]]:
    """All that two processes do in the quick tests, in one go: what each rank printed."""
    commands = {f"two-{name}": argv for name, argv in ALIKE.items()}
    commands |= {f"shard-{name}": ALIKE[name] + SHARD for name in SHARDED}
    commands |= {
        "whole": DROPOUT,
        "cut": DROPOUT + ["--steps", "2"],
        "resumed": ["sft", "--out", str(world / "cut"), "--resume", "--steps", "4"],
        "indivisible": SFT + ["--batch-size", "3"],
        "other-data": ["sft", "--data", "data-{rank}.jsonl", "--batch-size", "2"],
        "other-model": SFT + ["--model", str(world / "base-{rank}")],
        "fails": REINFORCE + ["--reward-function", "reward.py:fails"],
        "late": ALIKE["reinforce"] + ["--reward-function", "reward.py:fails_later"],
        "goes-on": ["reinforce", "--out", str(world / "late"), "--resume"],
        "interrupts": REINFORCE + ["--reward-function", "reward.py:interrupts"],
        "diverges": SFT + ["--lr", "1e30"],
        "evaluate": ["evaluate", "--model", str(world / "base"), "--data", "sft.jsonl"],
    }
    return by_two(world, commands)


def metrics(run: Path) -> list[dict]:
    """What must repeat: all numbers but times and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    unlike = UNLIKE | {"peak_memory_bytes_by_rank", "padding"}  # of passes, which differ
    return [
        {k: v for k, v in row.items() if k not in unlike and not isinstance(v, dict)}
        for row in rows
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    role = next(run / role for role in ("policy", "reward") if (run / role).is_dir())
    return load_file(next(role.glob("*model.safetensors")))


def assert_alike(found: Path, wanted: Path) -> None:
    """Equal to rounding, which counts absolutely where a figure is the rounding itself."""
    for row, other in zip(metrics(found), metrics(wanted), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=2e-6), (row, other)
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    if (wanted / "samples.jsonl").exists():
        assert (found / "samples.jsonl").read_text() == (wanted / "samples.jsonl").read_text()


def check(world: Path, name: str, argv: list[str], runs: dict[str, list[dict]], capsys) -> None:
    """One process against runs of two."""
    assert cli.main(command(world, name, argv)) == 0
    alone = json.loads(capsys.readouterr().out)
    for run, (first, second) in runs.items():
        assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
        assert second["out"] == second["err"] == ""
        assert json.loads(first["out"])["step"] == alone["step"]
        assert_alike(world / run, world / name)
        rows = [json.loads(line) for line in (world / run / "metrics.jsonl").open()]
        assert all(min(row["peak_memory_bytes_by_rank"]) > 0 for row in rows if row["step"])


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_are_one(world, printed, name, capsys):
    runs = [f"two-{name}"] + [f"shard-{name}"] * (name in SHARDED)
    check(world, name, ALIKE[name], {run: printed[run] for run in runs}, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE_SLOW)
def test_two_processes_are_one_in_other_ways_too(world, name, capsys):
    argv = ALIKE_SLOW[name]
    runs = by_two(world, {f"two-{name}": argv, f"shard-{name}": argv + SHARD})
    check(world, name, argv, runs, capsys)


def test_resume_is_bit_for_bit_and_dropout_differs(world, printed):
    ranks = printed["whole"] + printed["cut"] + printed["resumed"]
    assert [rank["code"] for rank in ranks] == [0] * 6
    first, second = json.loads((world / "cut/checkpoints/step-2/state.json").read_text())["rng"]
    assert first["torch"] != second["torch"]
    assert metrics(world / "cut") == metrics(world / "whole")
    for name, tensor in weights(world / "cut").items():
        assert tensor.equal(weights(world / "whole")[name]), name


def test_a_reward_that_fails_on_one_process_costs_no_step(world, printed):
    assert [rank["code"] for rank in printed["goes-on"]] == [0, 0], printed["goes-on"]
    assert metrics(world / "late") == metrics(world / "two-reinforce")


def test_one_process_goes_on_with_a_run_of_two(world, printed):
    assert printed["two-pairs"][0]["code"] == 0
    shutil.copytree(world / "two-pairs", world / "on")
    for argv in (
        ["reward", "--out", str(world / "on"), "--resume", "--steps", "6"],
        command(world, "six", PAIRS + ["--steps", "6"]),
    ):
        assert cli.main(argv) == 0
    assert_alike(world / "on", world / "six")


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("indivisible", 2, "a batch has 3 rows (--batch-size, or all of --data) and there are 2"),
        ("other-data", 2, "process 1 has another --data than process 0"),
        ("other-model", 2, "process 1 has another --model than process 0"),
        ("evaluate", 2, "torchrun is for one training; run evaluate by `python -m perl evaluate`"),
        ("fails", 2, "raised AssertionError: on rank 1"),
        ("late", 4, "raised AssertionError: late on line 24 for 2 prompts (the first"),
        ("late", 4, "late/checkpoints/step-2 is kept; go on with: torchrun --nproc-per-node"),
        ("diverges", 3, "; no checkpoint was written before it; start again with a lower --lr"),
        ("interrupts", 130, "checkpoint of step 2 written; go on with: torchrun --nproc-per-node"),
    ],
)
def test_all_stop_with_one_message(world, printed, name, code, message):
    ranks = printed[name]
    speaks = [rank for rank in ranks if rank["err"]]
    assert len(speaks) == 1 and message in speaks[0]["err"], ranks
    assert len(speaks[0]["err"].splitlines()) == 1 and speaks[0]["code"] == code
    assert all(rank["code"] for rank in ranks) and not any(rank["out"] for rank in ranks)
    # a refusal leaves nothing; of the others the run folder says how far they came
    assert (world / name).exists() == (name in ("fails", "late", "diverges", "interrupts"))


def test_a_model_is_not_spread_over_one_process(world, capsys):
    assert cli.main(command(world, "alone", SFT + SHARD)) == 2
    assert "--shard spreads the model over several processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MASTER_PORT": None}, "the environment has RANK but no MASTER_PORT"),
        ({"RANK": None}, "the environment has WORLD_SIZE but no RANK"),
        ({"WORLD_SIZE": "two"}, "want numbers"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
    ],
)
def test_variables_of_torchrun_are_checked(world, monkeypatch, capsys, changes, message):
    variables = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="::1", MASTER_PORT="1")
    for name, value in (variables | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cli.main(command(world, "alone", SFT)) == 2
    assert message in capsys.readouterr().err and not (world / "alone").exists()


# ------------------------------------------------------------------------------- torchrun itself


def torchrun(argv: list[str]) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--standalone", "-m", "perl", *argv], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun(world):
    assert cli.main(command(world, "alone", SFT)) == 0
    running = torchrun(command(world, "torchrun", SFT))
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert json.loads(out)["step"] > 0
    assert_alike(world / "torchrun", world / "alone")


@pytest.mark.slow
def test_ctrl_c_to_torchrun_and_resume(world):
    forever = SFT + ["--steps", "100000", "--validate-every", "100000"]
    running = torchrun(command(world, "stopped", forever))
    deadline = time.monotonic() + 60
    while not (world / "stopped/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    out, err = running.communicate(timeout=60)
    assert not out and err.count("stopped: checkpoint of step") == 1, err
    step = max(int(f.name[5:]) for f in (world / "stopped/checkpoints").glob("step-*"))
    more = ["--out", str(world / "stopped"), "--resume", "--steps", str(step + 2)]
    running = torchrun(["sft", *more])
    assert json.loads(running.communicate(timeout=120)[0])["step"] == step + 2
