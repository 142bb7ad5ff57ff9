"""`perl reward` from end to end on a mini model: learning, resume after a kill, refusals, PEFT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perl import cafe, cli, train_reward
from perl.optimizer import Optimizer

REPO = Path(__file__).parent.parent
NOT_REPEATABLE = {"step_s", "tokens_per_s", "peak_memory_bytes"}
WORDS = "tea coffee cocoa latte juice mocha cookie muffin scone brownie bagel".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a mini model, another one of the same shape, and small data files."""
    folder = tmp_path_factory.mktemp("files")
    pairs = [
        {"prompt": f"one {a} and a {b}", "chosen": f" yes, {b}", "rejected": f" no, {b}"}
        for a in WORDS
        for b in WORDS
    ]
    labels = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    tokenizer = cafe.build_tokenizer(
        [row["prompt"] + row["chosen"] + row["rejected"] for row in pairs], vocab_size=300
    )
    for name, seed in (("model", 0), ("other", 1)):
        cafe.build_model(
            len(tokenizer), "mini", max_position_embeddings=64, seed=seed
        ).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, rows in (("pairs", pairs[:100]), ("held_out", pairs[100:]), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(files: Path, out: Path, *extra: str, model="model", data="pairs") -> list[str]:
    return [
        "reward",
        "--model",
        str(files / model),
        "--data",
        str(files / f"{data}.jsonl"),
        "--out",
        str(out),
        "--threads",
        "1",
        "--batch-size",
        "8",
        "--lora-rank",
        "4",
        *extra,
    ]


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in NOT_REPEATABLE} for row in rows]


# --------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("tuning, lr", [("lora", "1e-2"), ("full", "3e-3")])
def test_it_learns_pairs_it_has_not_seen(files, tmp_path, tuning, lr, capsys):
    run = tmp_path / "run"
    assert (
        cli.main(
            arguments(
                files,
                run,
                "--tuning",
                tuning,
                "--lr",
                lr,
                "--steps",
                "40",
                "--validate-every",
                "20",
                "--validation",
                str(files / "held_out.jsonl"),
            )
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["validation_accuracy"] >= 0.95
    assert metrics(run)[0]["loss"] > 0.5

    assert (
        cli.main(
            [
                "evaluate",
                "--model",
                str(files / "model"),
                "--reward-model",
                str(run),
                "--data",
                str(files / "held_out.jsonl"),
            ]
        )
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["accuracy"] == summary["validation_accuracy"]
    assert figures["loss"] == pytest.approx(summary["validation_loss"], rel=1e-4)


def test_it_learns_labels_and_reports_auc(files, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        cli.main(
            arguments(
                files,
                run,
                "--lr",
                "1e-2",
                "--steps",
                "40",
                "--validate-every",
                "40",
                "--validation",
                str(files / "labels.jsonl"),
                "--balance-labels",
                data="labels",
            )
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["validation_auc"] >= 0.95 and summary["validation_balanced_accuracy"] >= 0.9


def test_micro_batches_give_the_gradient_of_the_whole_batch(files, tmp_path):
    for size in ("0", "3"):
        cli.main(
            arguments(
                files, tmp_path / size, "--micro-batch-size", size, "--steps", "3", "--lr", "1e-2"
            )
        )
    for whole, split in zip(metrics(tmp_path / "0"), metrics(tmp_path / "3"), strict=True):
        assert split == pytest.approx(whole, rel=1e-4)


def test_the_best_checkpoint_becomes_the_result(files, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(
        train_reward, "reward_figures", lambda *_: {"loss": 0.0, "accuracy": next(accuracies)}
    )
    run = tmp_path / "run"
    cli.main(
        arguments(
            files,
            run,
            "--steps",
            "6",
            "--validate-every",
            "2",
            "--validation",
            str(files / "held_out.jsonl"),
            "--keep-checkpoints",
            "1",
        )
    )
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-4", "step-6"]
    weights = [
        (path / "reward" / "adapter_model.safetensors").read_bytes()
        for path in (run, run / "checkpoints/step-4", run / "checkpoints/step-6")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_peft_loads_the_adapter_with_equal_scores(files, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from perl.backbone import Backbone
    from perl.reward import score_batch

    run = tmp_path / "run"
    cli.main(arguments(files, run, "--steps", "5", "--lr", "1e-2"))
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    base = AutoModelForSequenceClassification.from_pretrained(
        files / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    theirs = peft.PeftModel.from_pretrained(base, run / "reward").eval()
    ids = [tokenizer("one tea and a scone yes")["input_ids"], tokenizer("no")["input_ids"]]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    ours = Backbone.load(files / "model")
    ours.load_role("reward", run)
    with torch.no_grad():
        torch.testing.assert_close(
            score_batch(ours, "reward", ids),
            theirs(**batch).logits.squeeze(-1),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_real_model_on_real_thumbs(stories260k, shared_data, tmp_path, capsys, tuning):
    run, data = tmp_path / "run", shared_data / "raw" / "taskmaster_coffee" / "reward_00.json"
    assert (
        cli.main(
            [
                "reward",
                "--model",
                str(stories260k),
                "--data",
                str(data),
                "--format",
                "taskmaster",
                "--out",
                str(run),
                "--tuning",
                tuning,
                "--steps",
                "6",
                "--batch-size",
                "8",
                "--max-tokens",
                "192",
                "--truncate-prompts",
                "--drop-long",
                "--lr",
                "1e-3",
                "--warmup-steps",
                "0",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "prompts cut on the left: longer than 192 tokens" in said
    assert "rows left out: longer than 192 tokens" in said
    losses = [row["loss"] for row in metrics(run)]
    assert min(losses[3:]) < losses[0]  # 86 % thumbs up: the mean label is learned at once


# --------------------------------------------------------------------------- stop and resume

# Dropout, validation, micro-batches and several epochs: all that a resumed run must get right.
LONG = [
    "--steps",
    "12",
    "--checkpoint-every",
    "4",
    "--lora-dropout",
    "0.2",
    "--lr",
    "1e-3",
    "--validate-every",
    "3",
    "--batch-size",
    "16",
    "--micro-batch-size",
    "12",
    "--lora-targets",
    "q_proj",
    "v_proj",
]
DIES = """
import os, signal, sys
from perl import cli, optimizer, run
clip, replace, clips = optimizer.Optimizer.clip, os.replace, []
def dying_clip(self):
    clips.append(0)
    if len(clips) == 11: os.kill(os.getpid(), signal.SIGKILL)
    return clip(self)
def dying_replace(source, target):
    if str(target).endswith("step-12"): os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
if sys.argv[1] == "step": optimizer.Optimizer.clip = dying_clip
else: run.os.replace = dying_replace
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    validation = ["--validation", str(files / "held_out.jsonl")]
    assert cli.main(arguments(files, run, *LONG, *validation)) == 0
    assert len(metrics(run)) == 12
    return run


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_run_killed_in_mid_step_or_mid_checkpoint_resumes_bit_for_bit(
    files, tmp_path, uninterrupted, where
):
    run = tmp_path / "run"
    command = arguments(files, run, *LONG, "--validation", str(files / "held_out.jsonl"))
    killed = subprocess.run(
        [sys.executable, "-c", DIES, where, *command], cwd=REPO, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(metrics(run)) == (10 if where == "step" else 12)
    assert not (run / "checkpoints" / f"step-{len(metrics(run))}").exists()
    assert not (run / "reward").exists()

    assert cli.main(["reward", "--out", str(run), "--resume"]) == 0
    assert metrics(run) == metrics(uninterrupted)
    name = "reward/adapter_model.safetensors"
    assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_ctrl_c_writes_a_checkpoint_and_resumes_bit_for_bit(
    files, tmp_path, uninterrupted, monkeypatch, capsys
):
    run, clips = tmp_path / "run", []
    clip = Optimizer.clip

    def interrupted_clip(self):
        clips.append(0)
        if len(clips) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(self)

    monkeypatch.setattr(Optimizer, "clip", interrupted_clip)
    assert (
        cli.main(arguments(files, run, *LONG, "--validation", str(files / "held_out.jsonl"))) == 130
    )
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"python -m perl reward --out {run} --resume" in message
    assert len(metrics(run)) == 7 and (run / "checkpoints" / "step-7").is_dir()
    assert cli.main(["reward", "--out", str(run), "--resume"]) == 0
    assert metrics(run) == metrics(uninterrupted)


def test_full_tuning_resumes_bit_for_bit(files, tmp_path, monkeypatch):
    extra = ["--tuning", "full", "--steps", "6", "--checkpoint-every", "2"]
    assert cli.main(arguments(files, tmp_path / "whole", *extra)) == 0
    clip, clips = Optimizer.clip, []

    def failing_clip(self):
        clips.append(0)
        if len(clips) == 4:
            raise KeyboardInterrupt  # as a second Ctrl-C: no checkpoint is written
        return clip(self)

    monkeypatch.setattr(Optimizer, "clip", failing_clip)
    assert cli.main(arguments(files, tmp_path / "cut", *extra)) == 130
    assert cli.main(["reward", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_loss_that_is_nan_stops_with_the_last_good_checkpoint(
    files, tmp_path, monkeypatch, capsys
):
    calls, loss = [], train_reward.bradley_terry_loss

    def failing_loss(chosen, rejected):
        calls.append(0)
        return loss(chosen, rejected) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train_reward, "bradley_terry_loss", failing_loss)
    run = tmp_path / "run"
    assert cli.main(arguments(files, run, "--steps", "9", "--checkpoint-every", "2")) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "loss is nan at step 4" in error and str(run / "checkpoints" / "step-2") in error
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]


# --------------------------------------------------------------------------------- refusals


def refused(capsys, argv: list[str]) -> str:
    """The one line with which a command refuses its input."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--data", "absent.jsonl"], "absent.jsonl does not exist"),
        (["--model", "./absent"], "no model folder ./absent"),
        (["--lora-targets", "q_prox"], "q_prox"),
        (["--lora-rank", "0"], "--lora-rank is 0; want at least 1"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--device", "tpu9"], "--device is 'tpu9'"),
        (["--max-tokens", "65"], "the model's context is 64 tokens"),
        (["--max-tokens", "4"], "but at most 4 fit"),
        (["--balance-labels"], "--balance-labels is for"),
        (["--validation", "LABELS"], "different kinds of rows"),
    ],
)
def test_bad_flags_stop_before_anything_is_written(files, tmp_path, capsys, extra, words):
    extra = [str(files / "labels.jsonl") if word == "LABELS" else word for word in extra]
    assert words in refused(capsys, arguments(files, tmp_path / "run", *extra))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "holds no rows"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt"\n', "x.jsonl:2: bad JSON"),
        ('{"prompt": "a", "chosen": "b"}\n', "x.jsonl:1: no rejected"),
        ('{"text": "a"}\n', "reward wants {prompt, chosen, rejected}"),
        (json.dumps({"prompt": "tea " * 70, "chosen": "b", "rejected": "c"}), "x.jsonl:1: "),
    ],
)
def test_bad_data_stops_before_anything_is_written(files, tmp_path, capsys, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    argv = arguments(files, tmp_path / "run", "--data", str(tmp_path / "x.jsonl"))
    assert words in refused(capsys, argv)
    assert not (tmp_path / "run").exists()


def test_runs_of_another_model_or_in_use_are_refused(files, tmp_path, capsys):
    run = tmp_path / "run"
    cli.main(arguments(files, run, "--steps", "2"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "--resume to go on with it" in refused(capsys, arguments(files, run))
    assert "--lora-rank is 5 but the run was started with 4" in refused(
        capsys, ["reward", "--out", str(run), "--resume", "--lora-rank", "5"]
    )
    assert "another base" in refused(
        capsys,
        [
            "evaluate",
            "--model",
            str(files / "other"),
            "--reward-model",
            str(run),
            "--data",
            str(files / "pairs.jsonl"),
        ],
    )
    moved = (run / "config.toml").read_text().replace(str(files / "model"), str(files / "other"))
    (run / "config.toml").write_text(moved)
    assert "another base" in refused(
        capsys, ["reward", "--out", str(run), "--resume", "--steps", "3"]
    )
    before.pop(run / "config.toml")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_resume_on_other_data_is_refused(files, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    lines = (files / "pairs.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:20]))
    run = tmp_path / "run"
    cli.main(arguments(files, run, "--data", str(data), "--steps", "2"))
    data.write_text("".join(lines[:19]))
    assert "was started on 20 examples" in refused(
        capsys, ["reward", "--out", str(run), "--resume", "--steps", "3"]
    )
