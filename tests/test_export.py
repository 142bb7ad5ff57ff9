"""Exported and averaged models: what transformers and PEFT load scores as ours does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _commands import read_jsonl, refused, run, save_reward, write_jsonl
from _tiny import perturb, save_tiny, tiny_model, tiny_tokenizer
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import perl_kernels as pk
from perl.backbone import Backbone

ROWS = [
    {"prompt": "a large tea and", "completion": " two scones"},
    {"prompt": "one latte please", "completion": " Anything else? That is 7 euros."},
    {"prompt": "two", "completion": " scones"},
]


def score(capsys, folder: Path, reward_model: Path, *more: object) -> list[float]:
    data, out = write_jsonl(folder / "rows.jsonl", ROWS), folder / "scored.jsonl"
    out.unlink(missing_ok=True)
    run(capsys, "score", "--reward-model", reward_model, "--data", data, "--out", out, *more)
    return [row["score"] for row in read_jsonl(out)]


def their_scores(model, folder: Path) -> list[float]:
    """A batch padded on the right by the exported tokenizer, scored by transformers' own code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [
        tokenizer(row["prompt"])["input_ids"]
        + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
        for row in ROWS
    ]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        return model.eval()(**batch).logits.squeeze(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_both_forms_of_a_reward_model_score_as_perl_score_does(tmp_path, capsys, family):
    base = save_tiny(tmp_path / "base", family)
    trained = save_reward(tmp_path / "run", base, 1)
    wanted = pytest.approx(score(capsys, tmp_path, trained), rel=1e-4, abs=1e-5)
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    run(capsys, "export", "--model", trained, "--out", merged)
    assert (
        their_scores(AutoModelForSequenceClassification.from_pretrained(merged), merged) == wanted
    )
    assert score(capsys, tmp_path, merged, "--model", base) == wanted

    said = json.loads(
        run(capsys, "export", "--model", trained, "--form", "adapter", "--out", adapter)
    )
    options = {"num_labels": 1, "pad_token_id": said["pad_token_id"]}
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(adapter, **options)
    assert their_scores(theirs, adapter) == wanted
    plain = AutoModelForSequenceClassification.from_pretrained(base, **options)
    assert their_scores(PeftModel.from_pretrained(plain, adapter), adapter) == wanted
    assert score(capsys, tmp_path, adapter) == wanted


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_padding_is_never_the_end_of_a_sequence(tmp_path, capsys, tuning):
    """transformers scores the last token that is not padding, and ours ends in <eos>."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    trained = save_reward(tmp_path / "run", tmp_path / "base", 1, tuning)
    wanted = score(capsys, tmp_path, trained)
    folder = trained / "reward"
    if tuning == "lora":
        folder = tmp_path / "out"
        run(capsys, "export", "--model", trained, "--out", folder)
    theirs = their_scores(AutoModelForSequenceClassification.from_pretrained(folder), folder)
    assert theirs == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_tokenizer_with_no_other_token_makes_transformers_refuse_batches(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    for name in ("pad_token", "unk_token", "bos_token"):
        setattr(tokenizer, name, None)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    trained = save_reward(tmp_path / "run", tmp_path / "base", 1)
    said = json.loads(run(capsys, "export", "--model", trained, "--out", tmp_path / "out"))
    assert said["pad_token_id"] is None
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="no padding token"):
        their_scores(model, tmp_path / "out")


@pytest.fixture
def policy(tmp_path) -> Path:
    """The run folder of a policy, on tmp_path/base."""
    backbone = Backbone.load(save_tiny(tmp_path / "base"), lora=pk.LoRAConfig(r=3))
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))
    backbone.save_role("policy", tmp_path / "sft" / "policy")
    (tmp_path / "sft" / "config.toml").write_text("")
    return tmp_path / "sft"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def test_both_forms_of_a_policy_are_the_model_that_peft_makes(policy, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, policy / "policy"))
    run(capsys, "export", "--model", policy, "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 0.1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 300
    words = ["export", "--form", "adapter", "--model", policy / "policy"]
    run(capsys, *words, "--out", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert logits(PeftModel.from_pretrained(base, tmp_path / "adapter")).equal(wanted)


def test_a_reward_model_on_an_sft_run_is_exported_over_the_merged_run(policy, tmp_path, capsys):
    trained = save_reward(tmp_path / "run", policy, 1)
    wanted = pytest.approx(score(capsys, tmp_path, trained), rel=1e-4, abs=1e-5)
    out = tmp_path / "out"
    run(capsys, "export", "--model", trained, "--out", tmp_path / "merged")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert their_scores(theirs, tmp_path / "merged") == wanted

    words = ["export", "--model", trained, "--form", "adapter", "--out", out]
    assert f"export --model {policy} --out BASE` first" in refused(capsys, *words)
    run(capsys, "export", "--model", policy, "--out", tmp_path / "plain")
    said = json.loads(run(capsys, *words, "--base", tmp_path / "plain"))
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        out, num_labels=1, pad_token_id=said["pad_token_id"]
    )
    assert their_scores(theirs, out) == wanted


def test_a_base_that_moved_is_named_and_can_be_given(policy, tmp_path, capsys):
    trained = save_reward(tmp_path / "run", tmp_path / "base", 1)
    wanted = score(capsys, tmp_path, trained)
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    words = ["export", "--model", trained, "--out", tmp_path / "out"]
    assert f"was trained on {tmp_path / 'base'}, which is no folder" in refused(capsys, *words)
    run(capsys, *words, "--base", moved)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert their_scores(theirs, tmp_path / "out") == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert score(capsys, tmp_path, trained, "--model", moved) == wanted


def test_what_cannot_be_exported_is_refused_by_name(policy, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no adapter but a model" in refused(
        capsys, "export", "--model", tmp_path / "base", "--out", out
    )
    assert "does not exist" in refused(capsys, "export", "--model", tmp_path / "no", "--out", out)
    full = save_reward(tmp_path / "full", tmp_path / "base", 1, tuning="full")
    assert "no adapter but a model" in refused(capsys, "export", "--model", full, "--out", out)
    assert "not empty" in refused(capsys, "export", "--model", policy, "--out", policy)
    other = save_tiny(tmp_path / "other", seed=9)
    assert "another base" in refused(
        capsys, "export", "--model", policy, "--base", other, "--out", out
    )
    assert not out.exists()


# ------------------------------------------------------------------------------------- average


def merged_weights(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Every weight of the classifier that transformers and PEFT make of a reward model."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("weights", [[], [3, 1]])
def test_an_average_is_the_average_of_the_merged_weights(tmp_path, capsys, weights):
    base = save_tiny(tmp_path / "base")
    runs = [save_reward(tmp_path / f"run{seed}", base, seed) for seed in (1, 2)]
    words = ["average", *runs, "--out", tmp_path / "mean"]
    said = json.loads(run(capsys, *words, *(["--weights", *weights] if weights else [])))
    shares = [0.75, 0.25] if weights else [0.5, 0.5]
    assert said["weights"] == shares and said["base"] == str(base)
    parts = [merged_weights(run / "reward", base) for run in runs]
    ours = merged_weights(tmp_path / "mean", base)
    for key, weight in ours.items():
        wanted = sum(share * part[key] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)
    assert (parts[0]["score.weight"] - ours["score.weight"]).abs().max() > 0.01
    assert len(score(capsys, tmp_path, tmp_path / "mean")) == 3
    run(capsys, "export", "--model", tmp_path / "mean", "--out", tmp_path / "plain")
    assert len(set(score(capsys, tmp_path, tmp_path / "plain", "--model", base))) == 3


def test_an_average_of_one_run_with_itself_survives_the_cut_to_its_rank(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    runs = [save_reward(tmp_path / name, base, 1) for name in ("a", "b")]
    run(capsys, "average", *runs, "--rank", 3, "--out", tmp_path / "mean")
    config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert config["r"] == 3
    wanted = score(capsys, tmp_path, runs[0])
    assert score(capsys, tmp_path, tmp_path / "mean") == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_averages_that_mean_nothing_are_refused_by_name(policy, tmp_path, capsys):
    base, other = tmp_path / "base", save_tiny(tmp_path / "other", seed=9)
    first = save_reward(tmp_path / "first", base, 1)
    wrong = {
        "belongs to another base": save_reward(tmp_path / "b", other, 1),
        "runs of one rank": save_reward(tmp_path / "r", base, 1, r=4),
        "trained alike": save_reward(tmp_path / "t", base, 1, target_modules=["q_proj", "v_proj"]),
        "only": policy,
        "no adapter but a model": save_reward(tmp_path / "f", base, 1, tuning="full"),
    }
    for words, folder in wrong.items():
        error = refused(capsys, "average", first, folder, "--out", tmp_path / "out")
        assert words in error and str(folder) in error
    words = ["average", first, "--out", tmp_path / "out"]
    assert "two RUNS or more" in refused(capsys, *words)
    words.insert(2, tmp_path / "b")
    assert "3 values for 2 runs" in refused(capsys, *words, "--weights", 1, 2, 3)
    assert "no negative ones" in refused(capsys, *words, "--weights", -1, 2)
    assert "invalid float" in refused(capsys, *words, "--weights", "x", 2)
    assert not (tmp_path / "out").exists()
