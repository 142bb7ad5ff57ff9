"""`perl reward` from end to end on a mini model: learning, resume after a kill, refusals, PEFT."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import perl_kernels as pk
from perl import cafe, cli, report, reward, train_reward
from perl import config as cfg
from perl.backbone import Backbone
from perl.data import Batches, load_files
from perl.optimizer import Optimizer
from perl.reward import score_batch, sequences
from perl.run import seed_everything

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
    tables = {"pairs": pairs[:100], "held_out": pairs[100:]}
    tables |= {"labels": labels[:200], "held_out_labels": labels[200:]}
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(cli, "_report", lambda config: None)


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
                str(files / "held_out_labels.jsonl"),
                "--balance-labels",
                "--label-smoothing",
                "0.01",
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
        assert split.pop("padding") <= whole.pop("padding")
        assert split == pytest.approx(whole, rel=1e-4)


LOSSES, ACCURACIES = [0.3, 0.2, 0.1, 0.4], [0.5, 0.9, 0.7, 0.6]


@pytest.mark.parametrize("extra, best", [([], 4), (["--best-metric", "loss"], 6)])
def test_the_best_checkpoint_becomes_the_result(files, tmp_path, monkeypatch, extra, best):
    figures = iter(
        {"loss": loss, "accuracy": accuracy}
        for loss, accuracy in zip(LOSSES, ACCURACIES, strict=True)
    )
    monkeypatch.setattr(train_reward, "reward_figures", lambda *_: next(figures))
    run = tmp_path / "run"
    validation = ["--validation", str(files / "held_out.jsonl"), "--validate-every", "2"]
    cli.main(arguments(files, run, "--steps", "8", *validation, "--keep-checkpoints", "1", *extra))
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"step-{best}", "step-8"]
    weights = [
        (path / "reward" / "adapter_model.safetensors").read_bytes()
        for path in (run, run / f"checkpoints/step-{best}", run / "checkpoints/step-8")
    ]
    assert weights[0] == weights[1] != weights[2]
    metric = extra[-1] if extra else "accuracy"
    assert f'best_metric = "{metric}"' in (run / "config.toml").read_text()


def test_early_stop_ends_the_run_after_validations_without_a_better_one(
    files, tmp_path, monkeypatch, capsys
):
    accuracies = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: 0.95, 12: 0.9}
    steps = iter(accuracies)

    def figures(*_):
        return {"loss": 1.0, "accuracy": accuracies[next(steps)]}

    monkeypatch.setattr(train_reward, "reward_figures", figures)
    run = tmp_path / "run"
    validation = ["--validation", str(files / "held_out.jsonl"), "--validate-every", "2"]
    extra = ["--steps", "30", *validation, "--early-stop", "2"]
    assert cli.main(arguments(files, run, *extra)) == 0
    said = capsys.readouterr()
    assert "stopped early at step 8: accuracy was best at step 4" in said.err
    assert json.loads(said.out)["step"] == 4 and metrics(run)[-1]["step"] == 8
    # more patience, and the run goes on from its last checkpoint, that of step 4
    steps = iter([6, 8, 10, 12])
    go_on = ["reward", "--out", str(run), "--resume", "--early-stop", "3", "--steps", "12"]
    assert cli.main(go_on) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 10 and metrics(run)[-1]["step"] == 12


def test_held_out_figures_are_logged_and_drawn(files, tmp_path, capsys):
    run = tmp_path / "run"
    validation = ["--validation", str(files / "held_out.jsonl"), "--validate-every", "3"]
    assert cli.main(arguments(files, run, "--steps", "3", *validation)) == 0
    [row] = [row for row in metrics(run) if "validation_loss" in row]
    for name in ("accuracy", "auc", "gap", "gap_std", "ece"):
        assert math.isfinite(row[f"validation_{name}"]), name
    assert sum(row["validation_reliability"]["count"]) == 21  # pairs held out
    assert sum(row["validation_histogram"]["bad"]) == 21
    report.write_run_report(run)
    assert (run / "held_out.png").is_file()
    summary = json.loads(capsys.readouterr().out)
    assert summary["validation_gap"] == row["validation_gap"]
    assert all(isinstance(value, int | float | str) for value in summary.values())


# A margin, weights of two files, smoothing and centring: the loss that is logged, by hand.
def test_the_loss_of_a_step_is_that_of_its_options(files, tmp_path, capsys):
    with_margin = tmp_path / "margin.jsonl"
    rows = [json.loads(line) for line in (files / "held_out.jsonl").read_text().splitlines()]
    with_margin.write_text("".join(json.dumps(row | {"margin": 2}) + "\n" for row in rows))
    options = ["--label-smoothing", "0.1", "--center-rewards", "3", "--batch-size", "121"]
    data = ["--data", f"{files / 'pairs.jsonl'}=1", f"{with_margin}=2"]
    assert cli.main(arguments(files, tmp_path / "run", "--steps", "1", *options, *data)) == 0

    seed_everything(0)
    backbone = Backbone.load(files / "model", lora=pk.LoRAConfig(r=4), dtype="float32")
    backbone.add_role("reward", scalar=True)
    load = functools.partial(
        train_reward.load_examples,
        cfg.RewardConfig(model="m", data="d", out="o"),
        backbone,
    )
    examples, _ = load_files(data[1:], None, load)
    batch = next(Batches(examples, 121, 0, examples.mixture))
    assert sum(pair.margin for pair in batch) == 2 * 81  # two in three are of the second file
    with torch.no_grad():
        chosen, rejected = score_batch(backbone, "reward", sequences(batch)).double().view(2, -1)
    d = chosen - rejected - torch.tensor([pair.margin for pair in batch])
    loss = -0.9 * d.sigmoid().log() - 0.1 * (-d).sigmoid().log() + 3 * (chosen + rejected) ** 2
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_checkpointed_activations_change_nothing_but_memory(files, tmp_path, monkeypatch, tuning):
    saved = []

    def counted(*args):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            return batch_loss(*args)

    batch_loss = train_reward.batch_loss
    monkeypatch.setattr(train_reward, "batch_loss", counted)
    sizes = []
    for name, extra in (("kept", []), ("again", ["--checkpoint-activations"])):
        saved.clear()
        options = ["--tuning", tuning, "--lora-dropout", "0.2", "--lr", "1e-2", "--steps", "3"]
        assert cli.main(arguments(files, tmp_path / name, *options, *extra)) == 0
        sizes.append(sum(saved))
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "again")
    assert sizes[1] < sizes[0] / 2


def test_adapters_and_their_moments_are_float32_over_a_bfloat16_base(files, tmp_path):
    run = tmp_path / "run"
    assert cli.main(arguments(files, run, "--dtype", "bfloat16", "--steps", "2")) == 0
    kept = run / "checkpoints" / "step-2"
    for path in (run / "reward/adapter_model.safetensors", kept / "reward_optimizer.safetensors"):
        tensors = load_file(path)
        assert len(tensors) > 8 and {t.dtype for t in tensors.values()} == {torch.float32}


def test_peft_loads_the_adapter_with_equal_scores(files, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

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

    def failing_loss(*args, **options):
        calls.append(0)
        return loss(*args, **options) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train_reward, "bradley_terry_loss", failing_loss)
    run = tmp_path / "run"
    assert cli.main(arguments(files, run, "--steps", "9", "--checkpoint-every", "2")) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "loss is nan at step 4" in error and str(run / "checkpoints" / "step-2") in error
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]


def test_a_score_that_is_nan_stops_with_the_row_it_is_of(files, tmp_path, monkeypatch, capsys):
    score_all = reward.score_all

    def failing(*args):
        scores = score_all(*args)
        scores[21 + 3] = float("nan")  # the rejected answer of the fourth of 21 pairs
        return scores

    monkeypatch.setattr(reward, "score_all", failing)
    held_out = files / "held_out.jsonl"
    argv = arguments(files, tmp_path / "run", "--steps", "1", "--validation", str(held_out))
    assert cli.main(argv) == 3
    assert f"{held_out}:4: the score is nan" in capsys.readouterr().err


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
        (["--device", "mps"], "--device is 'mps'"),
        (["--max-tokens", "65"], "the model's context is 64 tokens"),
        (["--max-tokens", "4"], "but at most 4 fit"),
        (["--balance-labels"], "--balance-labels is for"),
        (["--validation", "LABELS"], "different kinds of rows"),
        (["--data", "PAIRS", "LABELS"], "pairs and labels cannot be mixed"),
        (["--data", "LABELS", "--center-rewards", "0.1"], "--center-rewards is for"),
        (["--validation", "PAIRS"], "is a training file too"),
        (["--data", "HELD=1", "PAIRS=1", "--validation", "PAIRS"], "is a training file too"),
        (["--early-stop", "2"], "is for runs with --validation"),
        (["--best-metric", "auc"], "is for runs with --validation"),
        (
            ["--validation", "HELD", "--best-metric", "balanced_accuracy"],
            "but pairs have accuracy, auc or loss",
        ),
        (["--label-smoothing", "0.5"], "--label-smoothing is 0.5; want at most 0.49"),
    ],
)
def test_bad_flags_stop_before_anything_is_written(files, tmp_path, capsys, extra, words):
    names = {"LABELS": "labels", "PAIRS": "pairs", "HELD": "held_out"}
    for name, stem in names.items():
        extra = [word.replace(name, str(files / f"{stem}.jsonl")) for word in extra]
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
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 2, "chosen and rejected are equal"),
        ('{"prompt": "a", "completion": "b", "label": 1}\n' * 2, "are 1, so there is nothing"),
        ('{"prompt": "a", "completion": "b", "label": "true"}\n', "x.jsonl:1: label is 'true'"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}\n',
            "x.jsonl:1: margin is -1; want a number of at least 0",
        ),
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


def test_odd_rows_are_counted_and_named(files, tmp_path, capsys):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()][:12]
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[7]["chosen"] = " "
    data, held_out = tmp_path / "d.jsonl", tmp_path / "h.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (files / "held_out.jsonl").read_text()
    held_out.write_text(more + json.dumps(rows[0] | {"chosen": " well"}) + "\n")
    extra = ["--data", str(data), "--validation", str(held_out), "--steps", "1"]
    assert cli.main(arguments(files, tmp_path / "run", *extra)) == 0
    said = capsys.readouterr().err
    assert f"{data}: 1 pairs with equal answers left out, the first at {data}:5\n" in said
    assert f"{data}: 1 rows with an empty answer, the first at {data}:8\n" in said
    assert f"{held_out}: 1 of 22 prompts are in the training data too" in said
