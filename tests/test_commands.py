"""Commands of commands: their words, processes side by side, and what a failure says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perl import commands
from perl.config import UsageError


def test_words_of_every_kind_of_flag():
    line = commands.words("sft", lr=1e-4, use_rslora=True, resume=False, lora_targets=["q", "v"],
                          validation=None, out=Path("a b"))  # fmt: skip
    assert line == [
        "sft", "--lr", "0.0001", "--use-rslora", "--no-resume", "--lora-targets", "q", "v",
        "--out", "a b",
    ]  # fmt: skip


def test_a_training_begins_goes_on_or_begins_anew(tmp_path):
    begin = ["sft", "--out", str(tmp_path / "run"), "--lr", "1"]
    assert commands.training("sft", out=tmp_path / "run", lr=1) == begin
    (tmp_path / "run/checkpoints/.step-1").mkdir(parents=True)  # killed within its first checkpoint
    assert commands.training("sft", out=tmp_path / "run", lr=1) == begin
    assert not (tmp_path / "run").exists()
    (tmp_path / "run/checkpoints/step-1").mkdir(parents=True)
    resumed = ["sft", "--out", str(tmp_path / "run"), "--resume"]
    assert commands.training("sft", out=tmp_path / "run", lr=1) == resumed
    (tmp_path / "run/sweep.json").touch()  # a sweep wants its flags again
    assert commands.training("sft", out=tmp_path / "run", lr=1) == [*resumed, "--lr", "1"]


def fake(monkeypatch, script):
    """Commands are `python -c SCRIPT NAME` in place of `python -m perl`."""
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", script, *command[3:]], **options)

    monkeypatch.setattr(commands.subprocess, "Popen", start)


def test_commands_run_side_by_side_and_their_names_come_back(tmp_path, monkeypatch):
    meet = "import sys, pathlib, time\nhere = pathlib.Path(sys.argv[1])\nhere.touch()\n"
    meet += "while len(list(here.parent.glob('*-here'))) < 2: time.sleep(0.01)\n"
    fake(monkeypatch, meet)
    done = []
    lines = {name: [str(tmp_path / f"{name}-here")] for name in "ab"}
    commands.run_all(lines, tmp_path / "logs", at_once=2, done=done.append)
    assert sorted(done) == ["a", "b"]
    assert (tmp_path / "logs/a.log").read_text().startswith("$ python -m perl ")


def test_the_first_failure_stops_the_others_and_is_told(tmp_path, monkeypatch):
    script = "import sys, time\nif sys.argv[1] == 'bad': sys.exit('error: it broke')\n"
    fake(monkeypatch, script + "time.sleep(60)")
    done, start = [], time.monotonic()
    with pytest.raises(UsageError, match="^b failed: error: it broke .*b.log"):
        commands.run_all({"a": ["good"], "b": ["bad"]}, tmp_path, at_once=2, done=done.append)
    assert not done and time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_no_process_outlives_a_command_that_is_killed(tmp_path):
    child = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))"
    parent = (
        "import subprocess, sys\nfrom perl import commands\npopen = subprocess.Popen\n"
        f"commands.subprocess.Popen = lambda command, **options: popen([sys.executable, '-c', "
        f"{child + '; time.sleep(60)'!r}, {str(tmp_path / 'pid')!r}], **options)\n"
        "commands.start([]).wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        if not _runs(pid):
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child lived on")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
