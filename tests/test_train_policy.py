"""REINFORCE end to end: its gradients, that it learns, that it survives a kill, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from _tiny import SHAPE, perturb, save_tiny, tiny_model, tiny_tokenizer
from peft import PeftModel

import perl_kernels as pk
from perl.backbone import Backbone
from perl.config import ReinforceConfig, UsageError
from perl.policy_step import ask_anchor, estimate_kl, learn, reward_returns
from perl.reward_sources import Prompt, Unrewarded, make_scorer
from perl.rollout import generate
from perl.train_policy import train

PROMPTS = ["one latte please", "a large tea", "two scones and a tea", "a latte", "tea", "scones"]
# The share of an answer's letters that are vowels.
VOWELS = """
def vowels(prompts, completions):
    assert len(prompts) == len(completions)
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture
def world(tmp_path):
    """A base model, prompts and a reward function on disk."""
    save_tiny(tmp_path / "base")
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    (tmp_path / "reward.py").write_text(VOWELS)
    return tmp_path


def make_config(world, out="run", **changes) -> ReinforceConfig:
    settings = dict(
        model=str(world / "base"),
        data=str(world / "prompts.jsonl"),
        out=str(world / out),
        reward_function=f"{world / 'reward.py'}:vowels",
        lora_rank=3,
        steps=3,
        prompts_per_step=4,
        max_new_tokens=6,
        device="cpu",
    )
    return ReinforceConfig(**settings | changes)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run) -> list[dict]:
    """What must repeat: everything but times and memory."""
    rows = lines(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.endswith("_s") and k != "peak_memory_bytes"}
        for row in rows
    ]


# ----------------------------------------------------------------------------------- gradients


def scene(world, tuning: str, dtype: str, targets="all-linear"):
    """A perturbed policy and value, one rollout with answers of different lengths, returns."""
    lora = pk.LoRAConfig(r=3, target_modules=targets)
    backbone = Backbone.load(world / "base", tuning=tuning, reference=True, lora=lora, dtype=dtype)
    for role, scalar in (("policy", False), ("value", True)):
        backbone.add_role(role, scalar=scalar)
        perturb(backbone.trainable(role), scale=0.05)
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, 7, 9, 30], [1, 200], [1, 8, 17]]
    rollout = generate(backbone, "policy", prompts, max_new_tokens=6, temperature=0.9,
                       generator=generator)  # fmt: skip
    mask = rollout.completion_mask.clone()
    mask[1, 3:] = False  # as if the second answer had ended
    attention_mask = torch.cat([rollout.attention_mask[:, :4], mask.long()], 1)
    rollout = rollout._replace(completion_mask=mask, attention_mask=attention_mask)
    returns = torch.randn(mask.shape, generator=generator).masked_fill(~mask, 0.0)
    return backbone, rollout, returns


def plain_losses(config, backbone, rollout, returns):
    """The two losses from full logits, by the definition: mean over answer tokens."""
    mask, start = rollout.completion_mask, rollout.prompt_len - 1
    inputs = (rollout.sequences, rollout.attention_mask)
    values = backbone.values("value", *inputs)[:, start:-1]
    value_loss = ((returns - values)[mask] ** 2).mean()
    advantage = (returns - values.detach()) if config.baseline == "value" else returns.clone()
    if config.baseline == "batch_mean":
        advantage = returns - returns[mask].mean()
    if config.whiten_advantages:
        chosen = advantage[mask]
        advantage = (advantage - chosen.mean()) / (chosen.std(unbiased=False) + 1e-8)

    def log_softmax(role):
        hidden, head = backbone.hidden(role, *inputs)[:, start:-1], backbone.head(role)
        logits = hidden @ head.weight.T
        if head.a is not None:
            logits = logits + head.scale * (hidden @ head.a.T) @ head.b.T
        return (logits / config.temperature).log_softmax(-1)

    ours, anchor = log_softmax("policy"), log_softmax(None).detach()
    log_prob = ours.gather(-1, rollout.completion_ids[..., None]).squeeze(-1)
    loss = -advantage * log_prob
    if config.kl_in == "loss":
        loss = loss + config.beta * (ours.exp() * (ours - anchor)).sum(-1)
    return loss[mask].mean(), value_loss


def gradients(backbone):
    found = {}
    for role in ("policy", "value"):
        for key, parameter in backbone.trainable(role):
            found[role, key] = None if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return found


@pytest.mark.parametrize(
    "tuning, changes",
    [
        ("lora", {}),
        ("lora", {"kl_in": "loss", "beta": 0.4}),
        ("lora", {"micro_batch_size": 2, "kl_in": "loss", "beta": 0.4}),
        ("lora", {"whiten_advantages": True}),
        ("lora", {"baseline": "batch_mean"}),
        ("lora", {"baseline": "none", "micro_batch_size": 1}),
        ("lora", {"lora_targets": ["q_proj", "lm_head"]}),
        ("lora", {"lora_targets": ["q_proj", "lm_head"], "kl_in": "loss", "beta": 0.4}),
        ("full", {}),
        ("full", {"micro_batch_size": 2}),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("float32", 1e-4)])
def test_gradients_are_those_of_the_definition(world, tuning, changes, dtype, tolerance):
    """float64 is bounded by the value head and the rollout's log-probabilities, kept in float32."""
    config = make_config(world, tuning=tuning, **changes)
    targets = changes.get("lora_targets", "all-linear")
    backbone, rollout, returns = scene(world, tuning, dtype, targets)
    policy_loss, value_loss = plain_losses(config, backbone, rollout, returns)
    (policy_loss + (value_loss if config.baseline == "value" else 0.0)).backward()
    wanted = gradients(backbone)
    anchor = ask_anchor(config, backbone, rollout)
    facts = next(learn(config, backbone, rollout, returns, anchor, config.beta))
    assert facts["loss"] == pytest.approx(policy_loss.item(), rel=tolerance, abs=tolerance)
    if config.baseline == "value":
        assert facts["value_loss"] == pytest.approx(value_loss.item(), rel=tolerance)
    assert facts["max_abs_dlogp"] < 1e-4
    norms = {"policy": 0.0, "value": 0.0}
    for key, gradient in gradients(backbone).items():
        assert (gradient is None) == (wanted[key] is None), key
        if gradient is not None:
            scale = wanted[key].abs().max().clamp(min=1e-6)
            assert ((gradient - wanted[key]).abs().max() / scale) < 10 * tolerance, key
            norms[key[0]] += gradient.abs().sum().item()
    assert norms["policy"] > 0 and (norms["value"] > 0) == (config.baseline == "value")
    of_head = [key for key in wanted if "lm_head.lora_" in key[1]]
    assert len(of_head) == 2 * ("lm_head" in targets)


@pytest.mark.parametrize("rows", [0, 2])
def test_importance_cap_weighs_what_sampling_found_more_or_less_likely(world, rows):
    config = make_config(world, baseline="none", importance_cap=1.5, micro_batch_size=rows)
    backbone, rollout, returns = scene(world, "lora", "float64")
    gap = torch.randn(rollout.log_prob.shape)
    weights = gap.exp().clamp(max=1.5)
    policy_loss, _ = plain_losses(config, backbone, rollout, returns * weights)
    policy_loss.backward()
    wanted = gradients(backbone)
    drawn_from_another = rollout._replace(log_prob=rollout.log_prob - gap)
    anchor = ask_anchor(config, backbone, rollout)
    facts = next(learn(config, backbone, drawn_from_another, returns, anchor, config.beta))
    assert facts["loss"] == pytest.approx(policy_loss.item(), rel=1e-5)
    kept = gap.abs()[rollout.completion_mask]
    assert facts["mean_abs_dlogp"] == pytest.approx(kept.mean().item(), rel=1e-5)
    assert facts["max_abs_dlogp"] == pytest.approx(kept.max().item(), rel=1e-5)
    for key, gradient in gradients(backbone).items():
        if key[0] == "policy":
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-7)


def test_sampled_kl_is_the_log_ratio_and_its_mean_the_exact_kl(world):
    config = make_config(world, temperature=0.9)
    backbone, _, _ = scene(world, "lora", "float32")
    rollout = generate(
        backbone, "policy", [[1, 7, 9]] * 3000, max_new_tokens=1, temperature=0.9,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    kl = estimate_kl(config, backbone, rollout, ask_anchor(config, backbone, rollout))[:, 0]
    ids, mask, head = torch.tensor([[1, 7, 9]]), torch.ones(1, 3).long(), backbone.head()
    with torch.no_grad():
        ours, anchor = (
            (backbone.hidden(role, ids, mask)[0, -1] @ head.weight.T / 0.9).log_softmax(-1)
            for role in ("policy", None)
        )
    tokens = rollout.completion_ids[:, 0]
    torch.testing.assert_close(kl, (ours - anchor)[tokens], rtol=1e-4, atol=1e-5)
    exact = (ours.exp() * (ours - anchor)).sum().item()
    assert exact > 0.01
    assert abs(kl.mean().item() - exact) < 4 * kl.std().item() / 3000**0.5


def test_the_return_follows_the_convention(world):
    _, rollout, _ = scene(world, "lora", "float32")
    scores, kl = torch.ones(3), torch.ones_like(rollout.log_prob)
    lengths = rollout.completion_mask.sum(1)
    for changes, wanted in (
        ({"beta": 0.25}, 0.75 - 0.25 * lengths),
        ({"beta": 0.25, "kl_convention": "trl"}, 1.0 - 0.25 * lengths),
        ({"beta": 0.25, "kl_in": "loss"}, 0.75 + 0.0 * lengths),
    ):
        config = make_config(world, **changes)
        returns = reward_returns(config, scores, kl, rollout, config.beta)
        torch.testing.assert_close(returns[:, 0], wanted)


# -------------------------------------------------------------------------------------- learns


# 30 steps are few: some seeds are still at an answer that is half right
@pytest.mark.parametrize("tuning, lr, seed", [("lora", 5e-3, 2), ("full", 3e-3, 2)])
def test_the_policy_learns_on_held_out_prompts(world, tuning, lr, seed):
    config = make_config(
        world, tuning=tuning, lr=lr, seed=seed, steps=30, prompts_per_step=16, beta=0.01,
        warmup_steps=2, validation=str(world / "prompts.jsonl"), validate_every=30,
        samples_every=20,
    )  # fmt: skip
    (world / "prompts.jsonl").write_text((world / "prompts.jsonl").read_text() * 4)
    summary = train(config)
    rows = lines(world / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(31))
    before, after = rows[0]["validation_reward"], rows[-1]["validation_reward"]
    assert before < 0.25 and after > 0.7, (before, after)
    assert abs(rows[0]["validation_kl"]) < 1e-4 < rows[-1]["validation_kl"]
    assert all(row["max_abs_dlogp"] < 1e-3 for row in rows[1:])
    assert summary["reward"] == rows[-1]["reward"] and summary["step"] == 30
    samples = lines(world / "run/samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 4 + [20] * 4 + [30] * 4
    assert [s["prompt"] for s in samples[:4]] == [s["prompt"] for s in samples[4:8]] == PROMPTS[:4]


def test_a_step_says_what_it_did_and_the_policy_loads_in_peft(world):
    train(make_config(world, lr=1e-2, warmup_steps=0, baseline="value"))
    row = lines(world / "run/metrics.jsonl")[-1]
    wanted = {
        "reward", "kl", "entropy", "loss", "value_loss", "length", "tokens_per_s", "rollout_s",
        "score_s", "learn_s", "step_s", "max_abs_dlogp", "mean_abs_dlogp", "peak_memory_bytes",
        "policy_grad_norm", "value_grad_norm", "role_bytes",
    }  # fmt: skip
    assert wanted <= row.keys() and all(row[key] is not None for key in wanted)
    assert row["rollout_s"] + row["score_s"] + row["learn_s"] == pytest.approx(row["step_s"])
    assert row["role_bytes"].keys() == {"policy", "value", "reference"}
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "base")
    ids = torch.tensor([[1, 7, 9, 30]])
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, world / "run/policy")(input_ids=ids).logits
    merged = Backbone.load(world / "run")
    hidden = merged.hidden(None, ids, torch.ones_like(ids))
    torch.testing.assert_close(hidden @ merged.head().weight.T, after)
    assert not after.allclose(before, atol=1e-3)


@pytest.mark.parametrize("kinds, ensemble", [
    (["lora"], None), (["full"], None), (["lora", "full"], None), (["lora", "lora"], "min"),
])  # fmt: skip
def test_reward_models_folders_give_the_reward(world, kinds, ensemble):
    """Each answer's score is what the saved reward models say of it alone, without padding."""
    sources, folders = [], []
    for i, kind in enumerate(kinds):
        sources.append(Backbone.load(world / "base", tuning=kind, lora=pk.LoRAConfig(r=2)))
        sources[-1].add_role("reward", scalar=True)
        perturb(sources[-1].trainable("reward"), seed=i)
        folders.append(str(world / f"reward{i}"))
        sources[-1].save_role("reward", folders[-1])
    config = make_config(
        world, reward_function=None, reward_model=folders, ensemble=ensemble, micro_batch_size=2
    )
    backbone, rollout, _ = scene(world, "lora", "float32")
    rewards = make_scorer(config, backbone, None)(rollout, [Prompt("", [])] * 3)
    alone = torch.stack([
        torch.cat([
            source.score("reward", ids[mask.bool()][None], mask[mask.bool()][None])
            for ids, mask in zip(*rollout[:2], strict=True)
        ])
        for source in sources
    ]).detach()  # fmt: skip
    wanted = alone.amin(0) if ensemble == "min" else alone.mean(0)
    torch.testing.assert_close(rewards.reward, wanted)
    assert wanted.std() > 1e-3
    if len(kinds) == 1:
        assert rewards.disagreement is None
    else:
        torch.testing.assert_close(rewards.disagreement, (alone[0] - alone[1]).abs() / 2)


def test_reward_models_train_a_policy(world):
    source = Backbone.load(world / "base", lora=pk.LoRAConfig(r=2))
    source.add_role("reward", scalar=True)
    source.save_role("reward", world / "reward")
    train(make_config(world, reward_function=None, reward_model=str(world / "reward")))
    assert lines(world / "run/metrics.jsonl")[-1]["reward"] is not None


def test_exact_kl_in_the_loss_is_logged(world):
    train(make_config(world, kl_in="loss", lr=1e-2, warmup_steps=0, beta=0.1, steps=4))
    rows = lines(world / "run/metrics.jsonl")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)  # the first batch is the anchor's own
    assert all(row["kl"] > 1e-4 for row in rows[1:])


# -------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("changes", [{"tuning": "full"}, {"baseline": "batch_mean"}])
def test_a_crash_and_resume_repeat_the_run_in_every_tuning(world, changes):
    settings = dict(steps=5, checkpoint_every=2, lr=1e-3, warmup_steps=1, **changes)
    train(make_config(world, "whole", **settings))
    (world / "crash.py").write_text(
        "calls = 0\n" + VOWELS.replace(
            "    assert", "    global calls\n    calls += 1\n    assert calls != 5\n    assert"
        )
    )  # fmt: skip
    crash = dict(reward_function=f"{world / 'crash.py'}:vowels")
    with pytest.raises(Unrewarded, match="raised AssertionError"):
        train(make_config(world, "part", **settings | crash))
    assert (world / "part/checkpoints/step-3").is_dir()  # of the last finished step
    train(make_config(world, "part", **settings, resume=True))
    assert metrics(world / "part") == metrics(world / "whole")


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(world):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(make_config(world, out, seed=seed, steps=2, lr=1e-2))
    assert metrics(world / "a") == metrics(world / "b") != metrics(world / "c")


# ------------------------------------------------------------------------------------- refusals


def refused(world, message: str, **changes) -> None:
    with pytest.raises(UsageError, match=message):
        train(make_config(world, **changes))
    assert not (world / "run").exists()


def test_bad_input_is_refused_before_anything_is_written(world):
    refused(world, "no room is left", max_new_tokens=SHAPE["max_position_embeddings"])
    refused(world, "at most 10 fit", max_new_tokens=54, data=long_prompts(world))
    refused(world, "does not exist", data=str(world / "absent.jsonl"))
    refused(world, "has no function other", reward_function=f"{world / 'reward.py'}:other")
    refused(world, "exact wants one head", kl_in="loss", tuning="full")
    refused(world, "exactly one of", reward_model=str(world))
    other = Backbone.load(model=tiny_model(seed=9), tokenizer=tiny_tokenizer())
    other.add_role("reward", scalar=True)
    other.save_role("reward", world / "reward")
    refused(world, "another base", reward_function=None, reward_model=str(world / "reward"))
    tokenizer = json.loads((world / "base/tokenizer_config.json").read_text())
    del tokenizer["eos_token"]
    (world / "base/tokenizer_config.json").write_text(json.dumps(tokenizer))
    refused(world, "no end-of-sequence token")


def long_prompts(world) -> str:
    (world / "long.jsonl").write_text(json.dumps({"prompt": "a large tea " * 20}) + "\n")
    return str(world / "long.jsonl")


@pytest.mark.parametrize(
    "body, message",
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("return [float('nan')] * len(completions)", "returned nan"),
        ("return [1.0]", "returned 1 rewards for 4"),
        ("return ['good'] * len(completions)", "no list of numbers"),
    ],
)
def test_bad_reward_functions_are_named(world, body, message):
    (world / "bad.py").write_text(f"def f(prompts, completions):\n    {body}\n")
    with pytest.raises(UsageError, match=message):
        train(make_config(world, reward_function=f"{world / 'bad.py'}:f"))


def test_a_policy_scored_without_a_scalar_head_is_refused(world):
    source = Backbone.load(world / "base", lora=pk.LoRAConfig(r=2))
    source.add_role("policy")
    source.save_role("policy", world / "policy")
    refused(world, "no score head", reward_function=None, reward_model=str(world / "policy"))
