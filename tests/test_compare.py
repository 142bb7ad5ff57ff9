"""`perl compare`: two policies by every kind of judge, against definitions; killed or not."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from pathlib import Path

import pytest
import torch
from _commands import read_jsonl, refused, run, save_reward, write_jsonl
from _tiny import perturb, save_tiny

import perl_kernels as pk
from perl import cafe, cli, compare, judge, policies
from perl.backbone import Backbone
from perl.config import CompareConfig, EvaluateConfig
from perl.data import read_rows

PROMPTS = ["a large tea and", "one latte please", "two", "Anything else?", "scones", "a tea"]
TEMPLATE = "{prompt}: {first} or {second}?"
JUDGES = """
from perl import cafe

def place(prompts, first, second):
    return ["first"] * len(prompts)

def length(prompts, first, second):
    return [len(a) - len(b) for a, b in zip(first, second)]

def oracle(prompts, first, second):
    scores = ([cafe.judge(p, a).score for p, a in zip(prompts, given)] for given in (first, second))
    return [a - b for a, b in zip(*scores)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A tiny base, two adapters of it, a model of its own, a reward model, judges and prompts."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny(folder / "base")
    for seed in (1, 2):
        backbone = Backbone.load(folder / "base", lora=pk.LoRAConfig(r=3))
        backbone.add_role("policy")
        perturb(backbone.trainable("policy"), seed)
        backbone.save_role("policy", folder / f"run{seed}" / "policy")
    save_tiny(folder / "full", seed=5)
    save_reward(folder / "reward", folder / "base", 3)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (folder / "judges.py").write_text(JUDGES)
    return folder


def words(files: Path, first: object, second: object, out: Path, *more: object) -> list[object]:
    data = ["--data", files / "prompts.jsonl", "--max-new-tokens", 6, "--batch-size", 2]
    return ["compare", first, second, *data, "--out", out, *more]


def compared(capsys, *argv: object) -> tuple[dict, list[dict]]:
    figures = json.loads(run(capsys, *argv))
    return figures, read_jsonl(Path(figures["out"]))


def test_a_reward_model_judges_by_its_scores(files, tmp_path, capsys):
    out = tmp_path / "a" / "o.jsonl"
    figures, rows = compared(
        capsys,
        *words(files, files / "run1", files / "full", out),
        *("--reward-model", files / "reward", "--tie-margin", 0.05),
    )
    assert [row["prompt"] for row in rows] == PROMPTS
    names = [str(files / "run1"), str(files / "full")]
    config = CompareConfig(
        first=names[0], second=names[1], model=str(files / "base"), out=str(out),
        data=str(files / "prompts.jsonl"), judge_function="f.py:f", max_new_tokens=6, batch_size=1,
    )  # fmt: skip
    backbone = Backbone.load(files / "base")
    backbone.load_role("reward", files / "reward" / "reward")
    prompts = policies.encode(config, backbone, read_rows(config.data))
    opened = policies.open_policies(config, backbone, names, prompts)
    for side, policy in zip(("first", "second"), opened, strict=True):
        answers = policies.answers_of(config, backbone, policy, prompts)
        given = [row[side] for row in rows]
        assert [answer.text for answer in answers] == [row["completion"] for row in given]
        with torch.no_grad():  # the definition: each answer in a pass of its own
            for prompt, answer, row in zip(prompts, answers, given, strict=True):
                ids = torch.tensor([prompt + answer.ids])
                wanted = backbone.score("reward", ids, torch.ones_like(ids)).item()
                assert row["reward"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
                assert (row["tokens"], row["ended"]) == (len(answer.ids), answer.ids[-1] == 2)
        for key, name in {"reward": "reward", "tokens": "length", "ended": "ended"}.items():
            assert figures[side][name] == pytest.approx(statistics.fmean(row[key] for row in given))
    for row in rows:
        gap = row["first"]["reward"] - row["second"]["reward"]
        assert row["preference"] == pytest.approx([gap, gap], abs=1e-6)
        wanted = "tie" if abs(gap) <= 0.05 else "first" if gap > 0 else "second"
        assert row["verdict"] == wanted
    verdicts = [row["verdict"] for row in rows]
    assert figures["wins"] == verdicts.count("first") and figures["split"] == 0
    assert figures["losses"] == verdicts.count("second")
    assert figures["win_rate"] == (figures["wins"] + figures["ties"] / 2) / 6
    assert figures["first"]["policy"] == names[0]
    assert not list((tmp_path / "a").glob("*.part"))


def test_kl_is_the_log_ratio_of_both_models_at_the_sampling_temperature(files):
    names = [str(files / "run2"), str(files / "full"), "base"]
    config = EvaluateConfig(
        policy=names, model=str(files / "base"), data=str(files / "prompts.jsonl"),
        max_new_tokens=6, batch_size=4, temperature=0.7,
    )  # fmt: skip
    base = Backbone.load(files / "base")
    prompts = policies.encode(config, base, read_rows(config.data))
    opened = policies.open_policies(config, base, names, prompts)
    alone = [Backbone.load(files / "run2"), Backbone.load(files / "full")]
    plain = Backbone.load(files / "base")
    for policy, own in zip(opened, alone, strict=False):
        answers = policies.answers_of(config, base, policy, prompts)
        kl = policies.kl_to_base(config, base, policy, prompts, answers)
        for prompt, answer, found in zip(prompts, answers, kl, strict=True):
            ratio = log_prob(own, prompt, answer.ids, 0.7) - log_prob(
                plain, prompt, answer.ids, 0.7
            )
            assert found == pytest.approx(ratio, abs=2e-4) and abs(ratio) > 1e-2
    answers = policies.answers_of(config, base, opened[2], prompts)
    assert policies.kl_to_base(config, base, opened[2], prompts, answers) is None  # 0 by definition
    greedy = dataclasses.replace(config, temperature=0.0)
    answers = policies.answers_of(greedy, base, opened[0], prompts)
    assert policies.kl_to_base(greedy, base, opened[0], prompts, answers) is None  # no draws


def log_prob(backbone: Backbone, prompt: list[int], answer: list[int], temperature: float) -> float:
    with torch.no_grad():
        logits = backbone.model(torch.tensor([prompt + answer])).logits[0].double() / temperature
    log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return log_p[range(len(answer)), answer].sum().item()


def test_equal_policies_give_equal_answers_and_a_judge_of_places_gives_ties(
    files, tmp_path, capsys
):
    function = ("--judge-function", f"{files / 'judges.py'}:place")
    argv = words(files, "base", "base", tmp_path / "same.jsonl", "--model", files / "base")
    _, rows = compared(capsys, *argv, "--judge-function", f"{files / 'judges.py'}:length")
    assert all(row["first"] == row["second"] for row in rows)
    assert [row["verdict"] for row in rows] == ["tie"] * 6
    argv = words(files, files / "run1", files / "run2", tmp_path / "place.jsonl")
    figures, rows = compared(capsys, *argv, *function)
    assert any(row["first"]["completion"] != row["second"]["completion"] for row in rows)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (0, 6, 0)
    assert (figures["win_rate"], figures["split"], figures["shown_first"]) == (0.5, 1, 1)
    assert all(row["preference"] == [1, -1] for row in rows)


def test_a_language_model_is_shown_both_orders(files, tmp_path, capsys):
    figures, rows = compared(
        capsys,
        *words(files, "base", files / "run1", tmp_path / "o.jsonl", "--model", files / "base"),
        *("--judge-model", files / "full", "--judge-template", TEMPLATE),
        *("--judge-labels", "tea", "latte", "--reward-model", files / "reward"),
    )
    reader = judge.LabelReader(Backbone.load(files / "full"), TEMPLATE, ["tea", "latte"], 1)
    for row in rows:
        one, other = row["first"]["completion"], row["second"]["completion"]
        orders = [(one, other), (other, one)]
        values = [{"prompt": row["prompt"], "first": a, "second": b} for a, b in orders]
        shown, turned = reader.read(values, ["", ""])
        assert row["preference"] == pytest.approx([shown.preference, -turned.preference], abs=1e-4)
        assert row["judge_mass"] == pytest.approx((shown.mass + turned.mass) / 2, rel=1e-3)
    assert figures == {
        **figures,
        **judge.win_figures([row["preference"] for row in rows]),
        "judge_mass": pytest.approx(statistics.fmean(row["judge_mass"] for row in rows)),
    }
    assert "reward" in figures["first"]  # beside the verdicts, which are not its own


def test_answers_from_files_and_the_cafes_oracle(files, tmp_path, capsys):
    pairs = cafe.build_world(1, heldout_pairs=8).heldout_pairs
    for name in ("chosen", "rejected"):
        rows = [{"prompt": row["prompt"], "completion": row[name]} for row in pairs]
        write_jsonl(tmp_path / f"{name}.jsonl", rows[::-1])  # told by their prompts
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    base = save_tiny(tmp_path / "base", max_position_embeddings=512)
    argv = ["--data", data, "--model", base, "--judge-function", f"{files / 'judges.py'}:oracle"]
    good, bad = tmp_path / "chosen.jsonl", tmp_path / "rejected.jsonl"
    figures, rows = compared(capsys, "compare", good, bad, *argv, "--out", tmp_path / "o")
    assert (figures["wins"], figures["losses"]) == (8, 0)
    for row, pair in zip(rows, pairs, strict=True):
        assert row["first"]["completion"] == pair["chosen"]
        gap = cafe.judge(pair["prompt"], pair["chosen"]).score
        gap -= cafe.judge(pair["prompt"], pair["rejected"]).score
        assert row["preference"] == pytest.approx([gap, gap])
        assert row["first"].keys() == {"completion", "tokens"}  # an end is not known of them
    figures, _ = compared(capsys, "compare", bad, good, *argv, "--out", tmp_path / "turned")
    assert (figures["wins"], figures["losses"]) == (0, 8)
    write_jsonl(bad, read_jsonl(bad)[1:])
    error = refused(capsys, "compare", good, bad, *argv, "--out", tmp_path / "missing")
    assert f"{bad} has no answer to the prompt at {data}:8" in error


def test_after_ctrl_c_the_same_command_goes_on_with_the_same_rows(
    files, tmp_path, monkeypatch, capsys
):
    argv = words(files, files / "run1", "base", tmp_path / "o.jsonl", "--batch-size", 1)
    argv += ["--reward-model", files / "reward"]
    monkeypatch.setattr(compare, "WINDOW", 2)
    whole, windows = compare.rows_of, []

    def rows_of(*given):
        windows.append(given)
        if len(windows) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(compare, "rows_of", rows_of)
    assert cli.main([str(word) for word in argv]) == 130
    assert "2 rows are in" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "o.html").exists()
    changed = [*argv, "--temperature", 0.5]
    assert "was begun with temperature 0.9, not 0.5" in refused(capsys, *changed)
    weights = files / "run1/policy/adapter_model.safetensors"
    then = weights.stat()
    os.utime(weights)
    assert f"was begun with {weights} " in refused(capsys, *argv)
    os.utime(weights, ns=(then.st_atime_ns, then.st_mtime_ns))
    figures, rows = compared(capsys, *argv)
    assert len(windows) == 4
    argv[argv.index(tmp_path / "o.jsonl")] = tmp_path / "whole.jsonl"
    monkeypatch.setattr(compare, "rows_of", whole)
    at_once, whole_rows = compared(capsys, *argv)
    assert rows == whole_rows
    apart = ("out", "page")
    assert [v for k, v in figures.items() if k not in apart] == [
        v for k, v in at_once.items() if k not in apart
    ]


def test_a_judge_that_fails_keeps_what_it_judged_and_goes_on_when_mended(
    files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "WINDOW", 1)
    path, body = tmp_path / "j.py", "def j(prompts, first, second):\n    {}\n    return [1, 1]\n"
    path.write_text(body.format("assert 'two' not in prompts"))
    argv = words(files, files / "run1", "base", tmp_path / "o.jsonl")
    argv += ["--judge-function", f"{path}:j"]
    assert cli.main([str(word) for word in argv]) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert "raised AssertionError:  on line 2 for 2 prompts (the first 'two'" in said
    assert said.endswith(
        f"2 rows are in {tmp_path}/o.jsonl.part; the same command goes on with them"
    )
    kept = (tmp_path / "o.jsonl.part/rows.jsonl").read_bytes()
    path.write_text(body.format("pass"))
    assert cli.main([str(word) for word in argv]) == 0
    assert f"{path} changed after rows were written" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_bytes().startswith(kept)
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 6


def test_the_page_shows_answers_verdicts_and_rewards(files, tmp_path, capsys):
    figures, rows = compared(
        capsys,
        *words(files, "base", files / "run1", tmp_path / "o.jsonl", "--model", files / "base"),
        *("--judge-function", f"{files / 'judges.py'}:length", "--reward-model", files / "reward"),
    )
    page = Path(figures["page"]).read_text(encoding="utf-8")
    assert page.count("<article>") == 6 and "prefers-color-scheme: dark" in page
    articles = page.split("<article>")[1:]
    assert all(article.count("shown first, ") == 1 for article in articles)
    said = {"first": "The first wins.", "second": "The second wins.", "tie": "A tie."}
    for verdict, words_of_it in said.items():
        assert page.count(words_of_it) == sum(row["verdict"] == verdict for row in rows)
    assert page.count("reward ") >= 12
    assert f"second: {files / 'run1'}" in page


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "wants a judge: --judge-model MODEL, --judge-function"),
        (["--judge-template", "t"], "--judge-template is for a --judge-model"),
        (["--judge-function", "f.py:f", "--judge-model", "m"], "or --judge-function, not both"),
        (["--judge-model", "m", "--judge-labels", "x", "y"], "wants the --judge-template"),
        (["--judge-model", "m", "--judge-template", "{prompt} {first}"], "lacks {second}"),
        (
            ["--judge-model", "m", "--judge-template", TEMPLATE, "--judge-labels", "x"],
            "--judge-labels has 1 words; want two",
        ),
        (["--judge-function", "f.py:f"], "f.py does not exist; want FILE.py:NAME"),
    ],
)
def test_what_cannot_judge_is_refused_before_a_model_is_loaded(
    files, tmp_path, capsys, monkeypatch, more, said
):
    monkeypatch.setattr(Backbone, "load", None)
    argv = words(files, "base", files / "run1", tmp_path / "o.jsonl", "--model", files / "base")
    assert said in refused(capsys, *argv, *more)
    assert not list(tmp_path.iterdir())


def test_what_is_no_policy_is_refused_by_name(files, tmp_path, capsys):
    judges = ["--judge-function", f"{files / 'judges.py'}:length"]
    out = tmp_path / "o.jsonl"
    argv = words(files, "base", files / "reward" / "reward", out, "--model", files / "base")
    assert f"{files / 'reward' / 'reward'} is a reward or value model" in refused(
        capsys, *argv, *judges
    )
    argv = words(files, "base", files / "reward", out, "--model", files / "base")
    assert "holds no policy" in refused(capsys, *argv, *judges)
    argv = words(files, "base", tmp_path / "long.jsonl", out, "--model", files / "base")
    rows = [{"prompt": prompt, "completion": " tea" * 40} for prompt in PROMPTS]
    write_jsonl(tmp_path / "long.jsonl", rows)
    error = refused(capsys, *argv, *judges, "--max-tokens", 40)
    assert "long.jsonl: the answer to" in error and "but at most 40 fit; shorten it" in error
    argv = words(files, "base", files / "run1", out, "--model", files / "full")
    assert "belongs to another base" in refused(capsys, *argv, *judges)
    assert "neither policy says" in refused(capsys, *words(files, "base", "base", out), *judges)
    argv = words(files, "base", "nobody", out, "--model", files / "base")
    assert "nobody does not exist" in refused(capsys, *argv, *judges)
    (tmp_path / "o.html").write_text("mine")
    argv = words(files, "base", files / "run1", out)
    assert "o.html exists" in refused(capsys, *argv, *judges)
