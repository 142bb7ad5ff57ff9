"""The command `perl bench`: which benchmarks it starts, and what it refuses."""

import argparse
import subprocess
import typing
from pathlib import Path

import pytest

from benchmarks import ALSO, PRESETS, _measure, gpu, peers_of
from perl import bench, cli
from perl.config import BENCH_PEERS, BenchConfig

ROOT = Path(__file__).resolve().parents[1]


def command(**options):
    return bench.command(BenchConfig(**options), ROOT / "benchmarks")


def test_every_room_is_of_one_kind():
    rooms = {what: set(command(what=what, preset="h200")[5:]) for what in ("all", "kernels")}
    assert rooms["all"] == set(gpu.ROOMS)
    steps = {room for of_one in bench.STEPS.values() for room in of_one}
    assert rooms["all"] - rooms["kernels"] == steps & rooms["all"] and rooms["kernels"]
    assert command(what="reward")[:3] == ["pytest", "benchmarks/bench_reward_step.py", "-q"]


def test_options_reach_pytest_and_the_campaign():
    line = command(what="reward", preset="cpu", against="peft,trl", threads=2, select="fp32")
    assert line[3:] == ["--preset", "cpu", "--against", "peft,trl", "--threads", "2", "-k", "fp32"]
    assert command(what="reward", results="x")[-2:] == ["--results", str(Path("x").resolve())]
    line = command(what="reward", preset="h200", against="none")
    assert line == ["benchmarks.gpu", "--skip-build", "--skip-tests", "--skip-study",
                    "--rooms", "reward_step", "--against", "none"]  # fmt: skip


def test_names_are_the_same_on_both_sides():
    assert tuple(_measure.PEERS) == BENCH_PEERS
    presets = typing.get_args(typing.get_type_hints(BenchConfig)["preset"])
    assert {*PRESETS, *ALSO, "h200"} == set(presets)
    assert peers_of("none") == () and peers_of("trl,peft") == ("trl", "peft")
    with pytest.raises(argparse.ArgumentTypeError, match="'nobody' is no peer; choose from peft,"):
        peers_of("trl,nobody")


def test_a_run_that_fails_is_told(monkeypatch, capsys):
    commands = []

    def fake_run(command, cwd):
        commands.append((command[1:3], Path(cwd).resolve()))
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(subprocess, "run", fake_run)
    assert cli.main(["bench", "--select", "head"]) == 2
    assert "exit code 5" in capsys.readouterr().err
    assert commands == [(["-m", "pytest"], ROOT)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--against", "peft,nobody"], "--against names nobody; there are peft, trl"),
        (["everything"], "WHAT is 'everything'"),
        (["--preset", "huge"], "--preset is 'huge'"),
        (["--preset", "h200", "--threads", "2"], "--preset h200 takes neither"),
    ],
)
def test_what_is_refused_starts_nothing(monkeypatch, capsys, given, message):
    monkeypatch.setattr(subprocess, "run", None)
    assert cli.main(["bench", *given]) == 2
    assert message in capsys.readouterr().err
