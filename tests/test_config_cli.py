"""Configs, flags and TOML files: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perl import cli
from perl import config as cfg
from perl.cafe import World
from perl.config import RewardConfig, UsageError

GIVEN = ["--model", "m", "--data", "d.jsonl", "--out", "o"]
REPO = Path(__file__).parent.parent


def parse(*argv: str, command: str = "reward"):
    """The config that a command line stands for."""
    flags = vars(cli.build_parser().parse_args([command, *argv]))
    cls, _, _ = cli.COMMANDS[flags.pop("command")]
    return cfg.load(cls, flags, config_file=flags.pop("config", None))


def refusal(*argv: str, command: str = "reward") -> str:
    with pytest.raises(UsageError) as caught:
        parse(*argv, command=command)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_then_file_then_flags(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "from file"\ndata = "d"\nout = "o"\nlora_rank = 4\nlr = 1\n')
    config = parse("--config", str(file), "--lora-rank", "2", "--no-use-rslora")
    assert (config.model, config.lora_rank, config.lr, config.batch_size) == (
        "from file",
        2,
        1.0,
        16,
    )
    assert isinstance(config.lr, float)


COMPARED = ["a", "b", "--model", "m", "--data", "d", "--out", "o", "--reward-model", "r"]
POLICY = [*GIVEN, "--reward-model", "r"]


@pytest.mark.parametrize(
    "command, argv, message",
    [
        ("reinforce", [*POLICY, "--baseline", "none", "--value-lr", "1"], "--baseline value"),
        ("reinforce", [*POLICY, "--kl-in", "loss", "--kl-per", "sequence"], "--kl-in reward (in"),
        ("reinforce", [*POLICY, "--ensemble", "min"], "at least two --reward-model folders"),
        ("reward", [*GIVEN, "--early-stop", "2"], "runs with --validation FILE"),
        ("compare", [*COMPARED, "--judge-timeout", "9"], "--judge-function"),
        ("compare", [*COMPARED, "--judge-labels", "x", "y"], "a --judge-model"),
        ("compare", [*COMPARED, "--reward-retries", "2"], "--reward-url"),
        ("generate", ["--model", "m", "--prompt", "p", "--rows", "3"], "--data"),
        ("generate", [*GIVEN, "--temperature", "0", "--top-k", "3"], "sampling, not for"),
        ("generate", [*GIVEN, "--temperature", "0", "--top-p", "0.3"], "sampling, not for"),
        ("data", ["cafe", "--format", "hh"], "a data file"),
        ("data", ["d.jsonl", "--seed", "3"], "the embedded world"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command, argv, message):
    given = [word for word in argv if word.startswith("--")][-1]
    assert refusal(*argv, command=command).startswith(f"{given} is for {message}")


def test_files_of_answers_are_not_sampled(tmp_path):
    (tmp_path / "answers.jsonl").touch()
    answers, stop = str(tmp_path / "answers.jsonl"), ["--stop", "x"]
    common = ["--model", "m", "--data", "d", "--reward-model", "r"]
    for command, policies in (
        ("evaluate", ["--policy", answers]), ("compare", [answers, answers, "--out", "o"]),
    ):  # fmt: skip
        said = refusal(*policies, *common, *stop, command=command)
        assert said.startswith("--stop is for policies that answer (files hold answers already)")
    assert parse("a", answers, "--out", "o", *common, *stop, command="compare").stop == ["x"]


def test_lora_beside_full_tuning_is_said_to_be_of_no_use():
    full = [*GIVEN, "--tuning", "full"]
    assert parse(*full).unused() == []
    given = ["--lora-rank", "4", "--lora-targets", "q_proj", "--use-rslora"]
    assert parse(*full, *given).unused() == ["--lora-rank", "--lora-targets", "--use-rslora"]
    assert parse(*GIVEN, *given).unused() == []
    assert parse(*GIVEN, "--validate-every", "7").unused() == ["--validate-every"]
    assert parse(*GIVEN, "--validate-every", "7", "--validation", "v").unused() == []


def test_toml_round_trip_keeps_every_field(tmp_path):
    config = parse(
        *GIVEN,
        "--lora-targets",
        "q_proj",
        "v_proj",
        "--lr",
        "3e-5",
        "--use-rslora",
        "--validation",
        'a "quoted" \\ näme\t😀',
    )
    cfg.write_toml(config, tmp_path / "c.toml")
    again = cfg.make(RewardConfig, cfg.read_toml(tmp_path / "c.toml", RewardConfig))
    assert again == config
    assert again.lora_targets == ["q_proj", "v_proj"] and again.use_rslora


@pytest.mark.parametrize("tuning, lr", [("lora", 1e-4), ("full", 1e-5)])
def test_learning_rate_follows_tuning_unless_given(tuning, lr):
    assert parse(*GIVEN, "--tuning", tuning).lr == lr
    assert parse(*GIVEN, "--tuning", tuning, "--lr", "0.5").lr == 0.5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lora-rank", "0"], "--lora-rank is 0; want at least 1"),
        (["--seed", str(2**63)], f"--seed is {2**63}; want at most {2**63 - 1}"),
        (["--dtype", "float8"], "--dtype is 'float8'; want one of float32, bfloat16"),
        (["--lr", "0"], "--lr is 0.0; want above 0"),
        (["--lr", "nan"], "--lr is nan; want a finite number"),
        (["--lora-dropout", "1.5"], "--lora-dropout is 1.5; want at most 0.99"),
        (["--steps", "many"], "--steps: invalid int value"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--config", "absent.toml"], "cannot read the config file absent.toml"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv, words):
    assert words in refusal(*GIVEN, *argv)


def test_missing_flags_are_named():
    assert "missing --data, --out" in refusal("--model", "m")
    assert "exactly one of --reward-model" in refusal(*GIVEN, command="reinforce")
    both = refusal(
        *GIVEN, "--reward-model", "r", "--reward-function", "f.py:f", command="reinforce"
    )
    assert "exactly one of --reward-model" in both
    assert "exactly one of --prompt" in refusal("--model", "m", command="generate")


@pytest.mark.parametrize(
    "text, words",
    [
        ("lora_rnk = 3", "unknown key 'lora_rnk'"),
        ("lora_rank = ", "is not TOML"),
        ('lora_rank = "3"', "--lora-rank is '3'; want a whole number"),
        ("steps = true", "--steps is True; want a whole number"),
        ("lora_targets = []", "--lora-targets is []; want one string or more"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)
    assert words in refusal("--config", str(file), *GIVEN)


def test_resume_reads_the_run_and_lets_only_harmless_fields_change(tmp_path):
    out = str(tmp_path / "run")
    os.makedirs(out)
    started = parse("--model", "m", "--data", "d", "--out", out, "--lora-rank", "4")
    cfg.write_toml(started, tmp_path / "run" / "config.toml")
    resumed = parse("--out", out, "--resume", "--steps", "999")
    assert dataclasses.replace(resumed, steps=started.steps, resume=False) == started
    assert resumed.steps == 999
    assert "--lora-rank is 8 but the run was started with 4" in refusal(
        "--out", out, "--resume", "--lora-rank", "8"
    )
    assert "no run folder" in refusal("--out", str(tmp_path), "--resume")
    assert "wants --out" in refusal("--resume")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_every_flag_with_default_and_unit(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.build_parser().parse_args([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(cli.COMMANDS[command][0]):
        if not field.metadata["positional"]:
            assert cfg.flag(field.name) in text
        if field.metadata["unit"]:
            assert f"in {field.metadata['unit']}" in text
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"default {field.default}" in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys, perl.cli as c\n"
        "try: c.main(['reward', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
    assert done.returncode == 0


def test_errors_leave_by_stderr_and_exit_code_2(tmp_path, capsys):
    assert (
        cli.main(
            [
                "sft",
                "--model",
                "m",
                "--data",
                "absent.jsonl",
                "--out",
                str(tmp_path / "x"),
                "--lora-rank",
                "0",
            ]
        )
        == 2
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: --lora-rank is 0; want at least 1\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "command",
    [["data", "cafe"], ["study", "reward", "--preset", "tiny"], ["demo", "--quick"]],
)
def test_a_folder_that_cannot_be_made_is_said_in_one_line(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("perl.cafe.build_world", lambda *_, **__: World(*[[]] * 6))
    (tmp_path / "file").touch()
    assert cli.main([*command, "--out", str(tmp_path / "file" / "new")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: the disk refuses {tmp_path}/file/new")
    assert last.endswith(": Not a directory")
