"""Run folders: refusal, checkpoints that are whole or absent, resume, Ctrl-C, NaN, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import math
import mmap
import os
import random
import shlex
import signal
from pathlib import Path

import numpy
import pytest
import torch

from perl.config import RewardConfig, Unfinished, UsageError
from perl.memory import PeakMemory, in_use
from perl.optimizer import Optimizer
from perl.run import (
    Interrupted,
    NonFiniteLoss,
    Run,
    capture_rng,
    restore_rng,
    role_folder,
    seed_everything,
)


def make(folder, **changes) -> Run:
    config = RewardConfig(model="m", data="d", out=str(folder), **changes)
    return Run.create(folder, config)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists and is not empty; give another folder" in refusal(make, tmp_path)
    assert "is a file" in refusal(make, tmp_path / "notes.txt")
    assert "has no config.toml" in refusal(make, tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with make(tmp_path / "run"):
        pass
    assert "or --resume to go on with it" in refusal(make, tmp_path / "run")


def test_create_writes_nothing_until_work_starts(tmp_path):
    run = make(tmp_path / "run")
    assert not run.folder.exists()
    with run:
        assert (run.folder / "config.toml").is_file()


def test_metrics_lines(tmp_path):
    with make(tmp_path / "run") as run:
        run.log(1, loss=torch.tensor(0.5), accuracy=numpy.float32(1), note="x")
        run.log(2, loss=math.inf)
        assert lines(run.folder / "metrics.jsonl") == [
            {"step": 1, "loss": 0.5, "accuracy": 1.0, "note": "x"},
            {"step": 2, "loss": None},
        ]


def test_checkpoints_keep_the_newest_and_the_best(tmp_path):
    with make(tmp_path / "run", keep_checkpoints=2) as run:
        for step, score in [(1, 0.1), (2, 0.9), (3, 0.9), (4, None), (5, 0.2)]:
            run.save_checkpoint(
                step, {"a": {"x": torch.full((2,), step)}}, {"k": step}, score=score
            )
        assert names(run) == ["step-2", "step-4", "step-5"]
        assert run.latest_checkpoint().step == 5
        best = run.best_checkpoint()
        assert best.step == 2 and best.state == {"k": 2, "step": 2, "score": 0.9}
        assert best.tensors("a")["x"].tolist() == [2, 2]
        assert "holds no b" in refusal(best.tensors, "b")


def test_best_is_the_newest_without_scores(tmp_path):
    with make(tmp_path / "run") as run:
        assert run.best_checkpoint() is None
        for step in (9, 10):
            run.save_checkpoint(step, {}, {})
        assert run.best_checkpoint().step == 10


def test_a_checkpoint_that_fails_half_way_leaves_the_older_ones(tmp_path):
    def fail(folder):
        (folder / "reward").mkdir()
        raise OSError("disk full")

    with make(tmp_path / "run") as run:
        run.save_checkpoint(1, {}, {})
        with pytest.raises(OSError, match="disk full"):
            run.save_checkpoint(2, {}, {}, roles=fail)
        assert run.latest_checkpoint().step == 1
    with make(run.folder, resume=True) as again:
        assert again.step == 1 and names(again) == ["step-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        Exception("I/O error: No space left on device (os error 28)"),  # as Rust's libraries say it
    ],
)
def test_a_full_disk_is_told_with_what_is_kept(tmp_path, error):
    with pytest.raises(Unfinished) as caught, make(tmp_path / "a run") as run:
        run.save_checkpoint(1, {}, {})
        raise error
    said = str(caught.value)
    assert "No space left on device" in said and str(run.folder / "checkpoints/step-1") in said
    assert f"reward --out {shlex.quote(str(run.folder))} --resume" in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_line_that_found_no_room_does_not_hide_why(tmp_path):
    with pytest.raises(Unfinished, match="No space left on device"), make(tmp_path / "run") as run:
        run._files["metrics.jsonl"] = open("/dev/full", "a")
        run.log(1, loss=1)


def test_a_full_disk_leaves_the_config_of_a_run_that_is_resumed(tmp_path, monkeypatch):
    with make(tmp_path / "run") as run:
        pass
    before = (run.folder / "config.toml").read_text()

    def full(path, *_, **__):
        path.open("w").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "write_text", full)
        make(run.folder, resume=True).__enter__()
    assert (run.folder / "config.toml").read_text() == before


def test_resume_cuts_lines_behind_the_checkpoint_and_torn_ones(tmp_path):
    with make(tmp_path / "run") as run:
        for step in (1, 2, 3):
            run.log(step, loss=step)
            run.append("samples.jsonl", {"step": step, "text": "ü\u2028"})
            if step == 2:
                run.save_checkpoint(step, {}, {})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with make(run.folder, resume=True) as again:
        assert again.step == 2
        again.log(3, loss=30)
    assert [line["loss"] for line in lines(run.folder / "metrics.jsonl")] == [1, 2, 30]
    assert [line["step"] for line in lines(run.folder / "samples.jsonl")] == [1, 2]


def test_resume_of_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    with make(tmp_path / "run") as run:
        run.log(1, loss=1)
    with make(run.folder, resume=True) as again:
        assert again.step == 0 and again.latest_checkpoint() is None
        assert (again.folder / "metrics.jsonl").read_text() == ""


def test_publish_replaces_the_result(tmp_path):
    def role(text):
        def write(folder):
            (folder / "reward").mkdir()
            (folder / "reward" / "adapter_config.json").write_text(text)

        return write

    with make(tmp_path / "run") as run:
        assert "holds no reward; give a run that" in refusal(role_folder, run.folder, "reward")
        for step, text in ((1, "old"), (2, "new")):
            result = run.publish("reward", run.save_checkpoint(step, {}, {}, roles=role(text)))
        assert (result / "adapter_config.json").read_text() == "new"
        for given in (run.folder, result):
            assert role_folder(given, "reward") == result
        assert role_folder(run.latest_checkpoint().folder, "reward").parent.name == "step-2"
    assert "does not exist" in refusal(role_folder, tmp_path / "no", "reward")


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(tmp_path):
    seen, handler = [], signal.getsignal(signal.SIGINT)
    with make(tmp_path / "run", steps=5) as run:
        with pytest.raises(Interrupted) as caught:
            for step in run.steps(5, "reward"):
                seen.append(step)
                if step == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                run.log(step, loss=0.0)
                if run.checkpoint_due(step):
                    run.save_checkpoint(step, {}, {})
        assert seen == [1, 2] and run.latest_checkpoint().step == 2
        assert caught.value.exit_code == 130
        assert f"python -m perl reward --out {run.folder} --resume" in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is handler
    with make(run.folder, resume=True) as again:
        assert list(again.steps(5, "reward")) == [3, 4, 5]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with make(tmp_path / "run") as run:
            for _ in run.steps(5, "reward"):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail("the second signal was ignored")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path, value):
    with make(tmp_path / "run") as run:
        run.check_finite(1, loss=1.0, grad_norm=0.0)
        with pytest.raises(NonFiniteLoss, match="no checkpoint was written"):
            run.check_finite(1, loss=value)
        run.save_checkpoint(3, {}, {})
        with pytest.raises(NonFiniteLoss) as caught:
            run.check_finite(4, loss=1.0, grad_norm=value)
        assert f"grad_norm is {value} at step 4" in str(caught.value)
        assert str(run.folder / "checkpoints" / "step-3") in str(caught.value)
        assert caught.value.exit_code == 3


def test_tensorboard_events_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    with make(tmp_path / "run", tensorboard=True) as run:
        run.log(1, loss=0.5)
    [events] = run.folder.glob("events*")
    assert b"loss" in events.read_bytes()


# ------------------------------------------------------------------- random state, optimizer


def test_random_state_survives_json():
    seed_everything(7)
    torch.rand(3), random.random(), numpy.random.rand(2)
    state = json.loads(json.dumps(capture_rng()))

    def draw():
        return random.gauss(0, 1), numpy.random.randn(3).tolist(), torch.randn(5).tolist()

    expected = draw()
    draw()
    restore_rng(state)
    assert draw() == expected


def trained(steps: int, optimizer: Optimizer, weight: torch.nn.Parameter, first: int = 1):
    for step in range(first, first + steps):
        (weight * torch.arange(6.0).reshape(2, 3) * step).sum().backward()
        optimizer.clip()
        optimizer.step(step)
    return weight.detach().clone()


def test_a_restored_optimizer_makes_the_same_updates():
    def fresh(values):
        weight = torch.nn.Parameter(values.clone())
        return weight, Optimizer([("w", weight)], lr=0.1, warmup_steps=4, weight_decay=0.1)

    weight, optimizer = fresh(torch.ones(2, 3))
    middle = trained(3, optimizer, weight)
    state = {key: tensor.clone() for key, tensor in optimizer.state().items()}
    expected = trained(3, optimizer, weight, first=4)
    again, restored = fresh(middle)
    restored.load_state(state)
    assert torch.equal(trained(3, restored, again, first=4), expected)
    other = torch.nn.Parameter(torch.ones(3, 3))
    assert "belongs to another model or rank" in refusal(
        Optimizer([("w", other)], lr=0.1).load_state, state
    )


def test_learning_rate_schedules():
    """Warmup, then constant, or down a line or half a cosine; the last update still learns."""

    def rates(schedule):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = Optimizer([("w", weight)], lr=1.0, steps=9, schedule=schedule, warmup_steps=2)
        return [optimizer.learning_rate(step) for step in range(1, 10)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1, 1, 1, 1]
    assert rates("linear") == pytest.approx(
        [0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cosine = rates("cosine")
    assert cosine[5] == pytest.approx(0.5) and cosine[2] + cosine[8] == pytest.approx(1.0)
    assert cosine[1] == 1 and all(a > b > 0 for a, b in zip(cosine[1:], cosine[2:], strict=False))


def test_warmup_clipping_and_the_norm():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([("w", weight)], lr=1.0, warmup_steps=4, max_grad_norm=0.5)
    rates = []
    for step in range(1, 7):
        weight.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
        assert optimizer.clip() == pytest.approx(5.0)
        assert weight.grad.norm().item() == pytest.approx(0.5, rel=1e-4)
        optimizer.step(step)
        rates.append(optimizer.adamw.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] and weight.grad is None


# ----------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def touched(size):
    """`size` bytes of pages of their own: an allocator may hand out what it already held."""
    with mmap.mmap(-1, size) as pages:
        numpy.frombuffer(pages, numpy.uint8)[:] = 1
        yield


def test_peak_memory_sees_what_was_freed_and_forgets_what_came_before():
    size = 64 * 2**20
    gc.collect()  # or garbage of other tests, freed in the middle, could hide the block
    with PeakMemory("cpu") as peak, touched(size):
        pass
    assert peak.extra_bytes >= 0.95 * size
    with PeakMemory("cpu") as quiet:
        pass
    if quiet.resettable:
        assert quiet.bytes < peak.bytes - 0.5 * size


def test_memory_in_use_follows_what_is_taken_and_freed():
    size = 64 * 2**20
    gc.collect()
    before = in_use()
    with touched(size):
        held = in_use()
    assert 0.95 * size <= held - before and in_use() < held - 0.5 * size


def test_config_is_written_as_resolved(tmp_path):
    with make(tmp_path / "run", tuning="full") as run:
        text = (run.folder / "config.toml").read_text()
    assert "lr = 1e-05" in text and "resume" not in text
    assert {line.split(" = ")[0] for line in text.splitlines()} == {
        f.name for f in dataclasses.fields(RewardConfig)
    } - {"resume", "validation"}
