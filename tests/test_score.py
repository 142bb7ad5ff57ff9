"""`python -m perl score`: equal to one pass for each answer, in the file's order, killed or not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _commands import read_jsonl, refused, run, save_reward, scores_of, write_jsonl
from _tiny import save_tiny
from safetensors.torch import load_file, save_file

from perl import cli, score
from perl.config import Unfinished, UsageError
from perl.data import read_rows
from perl.files import GrowingRows, new_folder, write_rows

REPO = Path(__file__).parent.parent
# Lengths out of order, so that batches by length are not the file's order; one answer is empty.
ANSWERS = [" two scones and a large tea please", " tea", "", " one latte", " a latte and scones"]
ROWS = [{"prompt": f"order {i}", "completion": ANSWERS[i % 5], "id": i} for i in range(12)]
PAIRS = [{"prompt": "a tea", "chosen": a, "rejected": b} for a, b in itertools.pairwise(ANSWERS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    save_tiny(folder / "base")
    for seed in (1, 2, 3):
        save_reward(folder / f"run{seed}", folder / "base", seed)
    save_reward(folder / "full", folder / "base", 4, tuning="full")
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


def test_each_answer_gets_its_own_score_in_the_files_order(files, tmp_path, capsys):
    out = tmp_path / "new" / "scored.jsonl"
    words = ["--data", files / "rows.jsonl", "--out", out, "--batch-size", 2]
    said = json.loads(run(capsys, "score", "--reward-model", files / "run1", *words))
    assert said == {"out": str(out), "rows": 12, "left_out": 0}
    texts = [(row["prompt"], row["completion"]) for row in ROWS]
    wanted = scores_of(files / "base", files / "run1", texts)
    rows = read_jsonl(out)
    assert [row.pop("score") for row in rows] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert rows == ROWS and statistics.pstdev(wanted) > 0.05
    assert not list(out.parent.glob("*.part"))
    assert "exists" in refused(capsys, "score", "--reward-model", files / "run1", *words)


def test_pairs_get_two_columns_and_ensembles_their_spread(files, tmp_path, capsys):
    models = [files / "run1", files / "run2" / "reward", files / "full"]
    words = ["score", "--data", files / "pairs.jsonl", "--column", "r", "--ensemble", "min"]
    out = tmp_path / "pairs.jsonl"
    run(capsys, *words, "--out", out, "--reward-model", *models)
    rows = read_jsonl(out)
    for side in ("chosen", "rejected"):
        texts = [(row["prompt"], row[side]) for row in PAIRS]
        each = zip(*(scores_of(files / "base", model, texts) for model in models), strict=True)
        for row, values in zip(rows, each, strict=True):
            assert row[f"r_{side}"] == pytest.approx(min(values), rel=1e-4, abs=1e-5)
            spread = statistics.pstdev(values)
            assert row[f"r_{side}_std"] == pytest.approx(spread, rel=1e-3, abs=1e-5)


def test_messages_and_labelled_rows_are_scored_as_completions_are(files, tmp_path, capsys):
    labelled = [row | {"label": True} for row in ROWS]
    dialogs = [
        {"messages": [{"role": "user", "content": "tea"}, {"role": "assistant", "content": "5"}]}
    ]
    for name, rows in (("labelled", labelled), ("dialogs", dialogs)):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        out = tmp_path / f"{name}.out"
        run(capsys, "score", "--reward-model", files / "run1", "--data", data, "--out", out)
    run(
        capsys, "score", "--reward-model", files / "run1", "--data", files / "rows.jsonl",
        "--out", tmp_path / "plain.out",
    )  # fmt: skip
    scores = [
        [r["score"] for r in read_jsonl(tmp_path / f"{n}.out")] for n in ("labelled", "plain")
    ]
    assert scores[0] == scores[1]
    wanted = scores_of(files / "base", files / "run1", [("user: tea\nassistant:", " 5")])
    assert read_jsonl(tmp_path / "dialogs.out")[0]["score"] == pytest.approx(wanted[0], rel=1e-4)


def command(files: Path, tmp_path: Path) -> list[object]:
    """Words of a command that scores three windows of 16 rows into tmp_path/out.jsonl."""
    many = write_jsonl(tmp_path / "many.jsonl", [row | {"id": i} for i, row in enumerate(ROWS * 4)])
    words = ["score", "--reward-model", files / "run1", "--data", many, "--batch-size", 1]
    return [*words, "--out", tmp_path / "out.jsonl"]


def act_at(monkeypatch, act, window: int) -> list[int]:
    """Calls `act` when that window is to be scored; returns the sizes of windows, as they come."""
    whole, sizes = score.score_window, []

    def score_window(backbone, roles, sequences, *more):
        sizes.append(len(sequences))
        if len(sizes) == window:
            act()
        return whole(backbone, roles, sequences, *more)

    monkeypatch.setattr(score, "score_window", score_window)
    return sizes


def test_after_ctrl_c_the_same_command_goes_on_behind_the_last_row(
    files, tmp_path, monkeypatch, capsys
):
    words = command(files, tmp_path)

    def press_ctrl_c():
        raise KeyboardInterrupt

    act_at(monkeypatch, press_ctrl_c, 3)
    assert cli.main([str(word) for word in words]) == 130
    assert "32 rows are in" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.undo()
    sizes = act_at(monkeypatch, None, 0)
    run(capsys, *words)
    assert sizes == [16] and [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == [
        *range(48)
    ]


KILLED = """
import os, signal, sys
from perl import cli, score
whole, windows = score.score_window, []

def score_window(*given):
    windows.append(given)
    if len(windows) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given)

score.score_window = score_window
cli.main(sys.argv[1:])
"""


def test_after_a_kill_the_same_command_goes_on_behind_the_last_row(
    files, tmp_path, monkeypatch, capsys
):
    words = [str(word) for word in command(files, tmp_path)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=REPO)
    assert done.returncode == -signal.SIGKILL
    with open(tmp_path / "out.jsonl.part" / "rows.jsonl", "a") as file:
        file.write('{"prompt": "torn')
    sizes = act_at(monkeypatch, None, 0)
    run(capsys, *words)
    assert sizes == [16]
    rows = read_jsonl(tmp_path / "out.jsonl")
    first = [row["score"] for row in rows[:12]]
    assert [row["score"] for row in rows] == pytest.approx(first * 4, rel=1e-5)
    assert [row["id"] for row in rows] == [*range(48)]


def test_rows_begun_with_other_settings_or_another_model_are_not_gone_on_with(
    files, tmp_path, capsys, monkeypatch
):
    words = command(files, tmp_path)
    words[2] = save_reward(tmp_path / "run", files / "base", 1)

    def stop():
        raise UsageError("stopped")

    sizes = act_at(monkeypatch, stop, 2)
    assert cli.main([str(word) for word in words]) == 4
    said = f"stopped: stopped; 16 rows are in {tmp_path}/out.jsonl.part; the same command goes on"
    assert said in capsys.readouterr().err
    assert "was begun with max_tokens 0, not 32" in refused(capsys, *words, "--max-tokens", 32)
    save_reward(tmp_path / "run", files / "base", 2)
    assert "adapter_model.safetensors" in refused(capsys, *words)
    assert len(sizes) == 2


def test_what_cannot_be_scored_is_refused_by_name(files, tmp_path, capsys):
    words = ["score", "--reward-model", files / "run1", "--out", tmp_path / "out", "--data"]
    there = write_jsonl(tmp_path / "there.jsonl", [ROWS[0], ROWS[1] | {"score": 1}])
    assert f"{there}:2: column score is there already" in refused(capsys, *words, there)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "tea"}])
    assert "score wants {prompt, completion}" in refused(capsys, *words, prompts)
    long = write_jsonl(tmp_path / "long.jsonl", [ROWS[0], {"prompt": "x " * 99, "completion": "y"}])
    assert f"{long}:2: " in refused(capsys, *words, long)
    said = json.loads(run(capsys, *words, long, "--drop-long"))
    assert (said["rows"], said["left_out"]) == (1, 1)
    words[4] = tmp_path / "out2"
    rows = files / "rows.jsonl"
    assert "at least two" in refused(capsys, *words, rows, "--ensemble", "min")
    words[2:3] = [files / "run1", files / "run1"]
    assert "names a folder twice" in refused(capsys, *words, rows)
    other = save_tiny(tmp_path / "other", seed=7)
    words[2:4] = [files / "run1", save_reward(tmp_path / "run", other, 1)]
    assert f"adapter {tmp_path / 'run' / 'reward'} belongs to another base" in refused(
        capsys, *words, rows
    )
    words[2:4] = [files / "full" / "reward"]
    assert "give that as --model" in refused(capsys, *words, rows)
    assert not (tmp_path / "out2").exists() and not (tmp_path / "out2.part").exists()


def test_a_score_that_is_not_finite_names_its_row(files, tmp_path, capsys):
    broken = save_reward(tmp_path / "run", files / "base", 1)
    path = broken / "reward" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("score.weight"))
    save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, path)
    rows = files / "rows.jsonl"
    for command in (["score", "--out", tmp_path / "out"], ["evaluate", "--max-new-tokens", 2]):
        error = refused(capsys, *command, "--reward-model", broken, "--data", rows)
        assert f"{rows}:1: the score is nan" in error
    assert not list(tmp_path.glob("out*"))


def test_growing_rows_write_nothing_before_they_are_entered(tmp_path):
    GrowingRows(tmp_path / "a" / "out.jsonl", {"x": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_rows_on_a_full_disk_are_kept_and_told(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(Unfinished, match="No space left on device; mend that: 2 rows are in"):
        with GrowingRows(out, {"x": 1}) as file:
            file.append([{"a": 1}, {"a": 2}])
            file._file.close()
            file._file = open("/dev/full", "ab")
            file.append([{"a": 3}])
    assert GrowingRows(out, {"x": 1}).count == 2


def test_rows_written_at_once_are_whole_or_absent(tmp_path, monkeypatch):
    out = tmp_path / "a" / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        write_rows(out, [{"a": 1}])
    assert not list(out.parent.iterdir())
    write_rows(out, [{"a": 1}])
    assert [path.read_text() for path in out.parent.iterdir()] == ['{"a": 1}\n']


def test_a_new_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert not list((tmp_path / "a").iterdir())
    with new_folder(tmp_path / "a" / "out") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["out", "whole"]
    with pytest.raises(UsageError, match="not empty"), new_folder(tmp_path / "a" / "out"):
        pass


def test_the_first_rows_keep_their_places(files):
    rows = read_rows(files / "rows.jsonl")
    assert rows.first(0) is rows
    assert (rows.first(2), rows.first(2).places) == (rows[:2], rows.places[:2])
