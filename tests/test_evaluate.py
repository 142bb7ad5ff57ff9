"""Commands that train nothing: evaluate, generate, data."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from _commands import refused, run, save_reward, write_jsonl
from _tiny import perturb, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import perl_kernels as pk
from perl import cafe, cli, evaluate, judge, policies
from perl.backbone import Backbone
from perl.data import read_rows

ROWS = [
    {"prompt": "a large tea and", "completion": " two scones"},
    {"prompt": "one latte please", "completion": " Anything else? That is 7 euros."},
    {"prompt": "two", "completion": " scones"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a tiny model, an adapter of it that is not zero, and rows."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    backbone = Backbone.load(folder / "model", lora=pk.LoRAConfig(r=3))
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))
    backbone.save_role("policy", folder / "adapter")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "score.py").write_text(
        "def tokens(prompts, completions):\n    return [len(c) for c in completions]\n"
    )
    return folder


def test_evaluate_gives_the_loss_per_completion_token(files, tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    figures = json.loads(
        run(
            capsys,
            "evaluate",
            "--model",
            files / "model",
            "--data",
            files / "rows.jsonl",
            "--batch-size",
            "2",
            "--out",
            out,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    nll = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [2]
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nll += [-log_p[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer)]
    assert figures["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert figures["rows"] == 3 and json.loads(out.read_text()) == figures
    assert "exists" in refused(
        capsys, "evaluate", "--model", files / "model", "--data", files / "rows.jsonl", "--out", out
    )


def test_evaluate_and_generate_agree_on_greedy_answers(files, tmp_path, capsys):
    where = [
        "--model",
        files / "model",
        "--policy",
        files / "adapter",
        "--data",
        files / "rows.jsonl",
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
    ]
    scorer = f"{files / 'score.py'}:tokens"
    figures = run(capsys, "evaluate", *where, "--reward-function", scorer, "--batch-size", "1")
    figures = json.loads(figures)
    rows = [json.loads(line) for line in run(capsys, "generate", *where).splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    lengths = [len(row["completion"]) for row in rows]
    assert figures["reward"] == pytest.approx(sum(lengths) / 3) and max(lengths) > 0
    letter = rows[0]["completion"][1]
    stopped = run(capsys, "generate", *where, "--stop", letter).splitlines()
    stopped = [json.loads(line)["completion"] for line in stopped]
    assert letter in stopped[0] and len(stopped[0]) < lengths[0]
    assert all(row["completion"].startswith(text) for row, text in zip(rows, stopped, strict=True))
    shorter = run(capsys, "evaluate", *where, "--stop", letter, "--reward-function", scorer)
    assert json.loads(shorter)["reward"] == pytest.approx(sum(map(len, stopped)) / 3)
    out = tmp_path / "answers.jsonl"
    assert run(capsys, "generate", *where, "--rows", "2", "--out", out) == ""
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[:2]
    before = out.read_bytes()
    assert "exists" in refused(capsys, "generate", *where, "--out", out)
    assert out.read_bytes() == before


def test_generate_goes_on_behind_the_last_row(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "WINDOW", 1)
    argv = ["generate", "--model", files / "model", "--data", files / "rows.jsonl"]
    argv += ["--max-new-tokens", 4, "--batch-size", 1, "--policy", files / "adapter", "--out"]
    run(capsys, *argv, tmp_path / "whole.jsonl")
    whole, starts = policies.answers_of, []

    def answers_of(*given):
        starts.append(given[-1])
        if len(starts) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(policies, "answers_of", answers_of)
    words = [str(word) for word in [*argv, tmp_path / "out.jsonl"]]
    assert cli.main(words) == 130 and "1 rows are in" in capsys.readouterr().err
    changed = [*words, "--temperature", "0.5"]
    assert "was begun with temperature 0.9, not 0.5" in refused(capsys, *changed)
    assert cli.main(words) == 0 and starts == [0, 1, 1, 2]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not (tmp_path / "out.jsonl.part").exists()


def test_several_policies_stand_in_one_table_as_each_alone(files, tmp_path, capsys):
    answers = write_jsonl(tmp_path / "answers.jsonl", ROWS)
    names = ["base", files / "adapter", answers]
    question = "{prompt} {completion} right?"
    words = ["evaluate", "--data", files / "rows.jsonl", "--max-new-tokens", 6]
    words += ["--judge-model", files / "model", "--judge-template", question]
    words += ["--judge-labels", "one", "two", "--reward-function", f"{files / 'score.py'}:tokens"]
    words += ["--model", files / "model"]
    assert cli.main([str(word) for word in [*words, "--policy", *names]]) == 0
    said = capsys.readouterr()
    table = json.loads(said.out)["policies"]
    assert [row["policy"] for row in table] == [str(name) for name in names]
    assert [line.split()[0] for line in said.err.splitlines()[-3:]] == [str(n) for n in names]
    for name, row in zip(names, table, strict=True):
        alone = json.loads(run(capsys, *words, "--policy", name))
        assert {key: alone[key] for key in row} == row
    base, adapter, given = table
    assert "kl" not in base and "kl" not in given and adapter["kl"] > 0
    assert "ended" in base and "ended" not in given
    assert len({row["reward"] for row in table}) > 1
    lengths = [len(row["completion"]) for row in ROWS]
    assert given["reward"] == pytest.approx(statistics.fmean(lengths))
    reader = judge.LabelReader(Backbone.load(files / "model"), question, ["one", "two"], 1)
    for key, value in judge.yes_figures(reader.read(ROWS, ["", "", ""])).items():
        assert given[key] == pytest.approx(value, rel=1e-4)


def test_another_padding_token_changes_no_figure(files, tmp_path, capsys):
    """An adapter's folder does not say which there was in training: it is filler everywhere."""
    shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.pad_token = tokenizer.bos_token  # another one, of a prompt even
    tokenizer.save_pretrained(tmp_path / "model")
    judged = ["--judge-template", "{prompt} {completion} right?", "--judge-labels", "one", "two"]
    reward = save_reward(tmp_path / "run", files / "model", 3)
    found = [
        json.loads(run(
            capsys, "evaluate", "--model", model, "--policy", files / "adapter", "--data",
            files / "rows.jsonl", "--reward-model", reward, "--judge-model", model, *judged,
            "--max-new-tokens", 6,
        )) for model in (files / "model", tmp_path / "model")
    ]  # fmt: skip
    names = ("reward", "reward_std", "kl", "length", "judge_mass", "yes_probability")
    one, other = ([figures[name] for name in names] for figures in found)
    assert one == pytest.approx(other, rel=1e-5) and found[0]["kl"] > 0


def test_a_story_model_knows_who_is_happy(stories260k, tmp_path, capsys):
    """A judge that was pretrained: what it says of an answer follows from the answer."""
    answers = {
        "glad": "Tim got a big toy and a hug from his mom. He smiled.",
        "hurt": "Tim fell down and hurt his leg. He cried and cried.",
    }
    prompt = "Once upon a time, there was a little boy named Tim."
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt}])
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "completion": text}])
        for name, text in answers.items()
    ]
    said = run(
        capsys, "evaluate", "--model", stories260k, "--data", data, "--policy", *files,
        "--judge-model", stories260k, "--judge-template", "{prompt} {completion} Tim was very",
        "--judge-labels", "happy", "sad",
    )  # fmt: skip
    glad, hurt = json.loads(said)["policies"]
    assert glad["yes_probability"] > 0.5 > hurt["yes_probability"]
    assert (glad["yes_rate"], hurt["yes_rate"]) == (1, 0)
    assert min(glad["judge_mass"], hurt["judge_mass"]) > 0.1


def test_evaluate_refuses_what_it_cannot_score(files, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "tea"}')
    model = ["evaluate", "--model", files / "model", "--data"]
    assert "wants --reward-model FOLDER" in refused(capsys, *model, pairs)
    assert "no prompts to answer" in refused(
        capsys, *model, texts, "--reward-function", f"{files / 'score.py'}:tokens"
    )
    assert "holds no reward" in refused(capsys, *model, pairs, "--reward-model", make_run(tmp_path))
    scored = "--stop is for answers to prompts, and the {} rows"
    assert scored.format("text") in refused(capsys, *model, texts, "--stop", "x")
    reward = ["--reward-model", tmp_path / "run", "--stop", "x"]
    assert scored.format("pairwise") in refused(capsys, *model, pairs, *reward)


def make_run(folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text("")
    return folder / "run"


def test_data_shows_kind_counts_lengths_and_balance(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "x" * n, "completion": "y", "label": n > 3, "id": n} for n in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run(capsys, "data", path, "--rows", "1")
    assert f"{path}: 5 pointwise rows {{prompt, completion, label}}" in text
    assert "characters: shortest 1, median 3, 95 % 4, longest 5" in text
    assert "0: 3 (60.0%), 1: 2 (40.0%)" in text
    assert "other columns, ignored: id" in text
    assert text.splitlines()[-1] == '{"prompt": "x", "completion": "y", "label": false}'


def test_data_counts_margins(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": m} for m in (0.5, 2, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run(capsys, "data", path, "--rows", "0")
    assert f"{path}: 3 pairwise rows {{prompt, chosen, rejected, margin}}" in text
    assert "margin       0.5: 1 (33.3%), 2: 2 (66.7%)" in text


def test_data_counts_tokens_and_rewrites_published_formats(files, tmp_path, capsys):
    dialog = "\n\nHuman: hi\n\nAssistant:"
    path = tmp_path / "hh.jsonl"
    path.write_text(json.dumps({"chosen": dialog + " a", "rejected": dialog + " b"}))
    text = run(capsys, "data", path, "--model", files / "model", "--out", tmp_path / "new.jsonl")
    length = len(AutoTokenizer.from_pretrained(files / "model")(dialog)["input_ids"])
    assert f"tokens: shortest {length}" in text
    assert json.loads((tmp_path / "new.jsonl").read_text()) == {
        "prompt": dialog,
        "chosen": " a",
        "rejected": " b",
    }


def test_data_writes_the_embedded_world(tmp_path, capsys, monkeypatch):
    names = ("general", "demonstrations", "pairs", "prompts", "heldout_pairs", "heldout_prompts")
    world = cafe.build_world(3, **dict.fromkeys(names, 2))
    monkeypatch.setattr(cafe, "build_world", lambda seed: {3: world}[seed])
    run(capsys, "data", "cafe", "--out", tmp_path / "cafe", "--seed", "3")
    written = {path.stem: read_rows(path) for path in (tmp_path / "cafe").glob("*.jsonl")}
    assert written == dataclasses.asdict(world)
    AutoModelForCausalLM.from_pretrained(tmp_path / "cafe" / "init")
    assert AutoTokenizer.from_pretrained(tmp_path / "cafe" / "init").eos_token == "<eos>"
    capsys.readouterr()
    assert "exists" in refused(capsys, "data", "cafe", "--out", tmp_path / "cafe")
