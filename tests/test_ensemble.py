"""Several reward models as one: in evaluate and in reinforce, by hand-computed scores."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from _commands import read_jsonl, refused, run, save_reward, scores_of, write_jsonl
from _tiny import save_tiny

from perl.config import ReinforceConfig
from perl.ensemble import Rewards, combine, joined
from perl.train_policy import train

PAIRS = [
    {"prompt": "a tea", "chosen": " two scones", "rejected": " Anything else?"},
    {"prompt": "one latte please", "chosen": " 7 euros", "rejected": ""},
    {"prompt": "two", "chosen": " scones and tea", "rejected": " tea"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    save_tiny(folder / "base")
    for seed in (1, 2):
        save_reward(folder / f"run{seed}", folder / "base", seed)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in PAIRS])
    return folder


def test_mean_and_min_by_hand():
    scores = torch.tensor([[1.0, -2.0], [4.0, -2.0], [1.0, -5.0]])
    mean, low = combine(scores), combine(scores, "min")
    assert mean.reward.tolist() == [2.0, -3.0] and low.reward.tolist() == [1.0, -5.0]
    spread = [statistics.pstdev([1, 4, 1]), statistics.pstdev([-2, -2, -5])]
    assert mean.disagreement.tolist() == low.disagreement.tolist() == pytest.approx(spread)
    assert mean.figures() == pytest.approx(
        {"reward": -0.5, "reward_std": 2.5, "disagreement": statistics.fmean(spread)}
    )
    assert combine(scores, "mean").reward.equal(mean.reward)
    alone = combine(scores[:1])
    assert alone.reward.equal(scores[0]) and alone.disagreement is None
    assert "disagreement" not in alone.figures()


def test_parts_are_joined_in_order():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    for models in (scores, scores[:1]):
        whole = combine(models)
        parts = joined([combine(models[:, :4]), combine(models[:, 4:])])
        assert isinstance(parts, Rewards) and parts.figures() == whole.figures()


def test_evaluate_takes_several_reward_models_and_finds_their_base(files, capsys):
    models = [files / "run1", files / "run2"]
    words = ["evaluate", "--data", files / "pairs.jsonl", "--reward-model", *models]
    texts = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in PAIRS]
    each = list(zip(*(scores_of(files / "base", model, texts) for model in models), strict=True))
    for how, combined in (("mean", statistics.fmean), ("min", min)):
        figures = json.loads(run(capsys, *words, "--ensemble", how))
        rewards = [combined(scores) for scores in each]
        right = [a > b for a, b in zip(rewards[:3], rewards[3:], strict=True)]
        assert figures["accuracy"] == pytest.approx(statistics.fmean(right))
        assert figures["reward"] == pytest.approx(statistics.fmean(rewards), rel=1e-4)
        assert figures["reward_std"] == pytest.approx(statistics.pstdev(rewards), rel=1e-3)
        spread = statistics.fmean(map(statistics.pstdev, each))
        assert figures["disagreement"] == pytest.approx(spread, rel=1e-3)
    alone = json.loads(run(capsys, *words[:-1]))
    assert "disagreement" not in alone and alone["rows"] == 3


def test_reinforce_logs_how_far_reward_models_differ(files, tmp_path):
    settings = dict(
        model=str(files / "base"), data=str(files / "prompts.jsonl"), steps=1, max_new_tokens=4,
        validation=str(files / "prompts.jsonl"),
    )  # fmt: skip
    models = [str(files / "run1"), str(files / "run2")]
    for name, ensemble in (("two", "min"), ("one", None)):
        out = str(tmp_path / name)
        given = models if ensemble else models[0]
        train(ReinforceConfig(reward_model=given, ensemble=ensemble, out=out, **settings))
    before, after = read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert before["validation_disagreement"] > 0 and before["validation_reward_std"] > 0
    assert after["disagreement"] > 0 and after["reward_std"] > 0
    assert 'ensemble = "min"' in (tmp_path / "two" / "config.toml").read_text()
    assert "disagreement" not in read_jsonl(tmp_path / "one" / "metrics.jsonl")[-1]


def test_bad_ensembles_are_refused(files, tmp_path, capsys):
    words = ["evaluate", "--data", files / "pairs.jsonl"]
    assert "wants --model" in refused(capsys, *words)
    words += ["--reward-model", files / "run1"]
    assert "at least two" in refused(capsys, *words, "--ensemble", "mean")
    assert "want one of mean, min" in refused(capsys, *words, files / "run2", "--ensemble", "max")
    assert "names a folder twice" in refused(capsys, *words, files / "run2" / ".." / "run1")
