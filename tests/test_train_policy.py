"""REINFORCE end to end: its gradients, that it learns, that it survives a kill, what it refuses."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
import transformers
from _tiny import SHAPE, perturb, save_tiny, tiny_model, tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file

import perl_kernels as pk
from perl import reinforce
from perl.backbone import Backbone
from perl.config import ReinforceConfig, Unfinished, UsageError
from perl.policy_step import ask_anchor, estimate_kl, learn, reward_returns
from perl.reward_sources import Prompt, make_scorer
from perl.rollout import generate
from perl.run import NonFiniteLoss
from perl.train_policy import episodes, sample, train
from perl.training import make_optimizer

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
    torch.manual_seed(0)
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


def plain_losses(config, backbone, rollout, returns, rows=slice(None), baseline=None):
    """The two losses from full logits, by the definition: means over the answer tokens of rows.

    baseline: the values' before the first of several updates.
    """
    mask, start = rollout.completion_mask, rollout.prompt_len - 1
    inputs = (rollout.sequences, rollout.attention_mask)
    values = backbone.values("value", *inputs)[:, start:-1]
    value_loss = ((returns - values)[rows][mask[rows]] ** 2).mean()
    if config.baseline == "value":
        advantage = returns - (values.detach() if baseline is None else baseline)
    elif config.baseline == "batch_mean":
        advantage = returns - returns[mask].mean()
    elif config.baseline == "leave_one_out":  # all of one prompt
        total = returns[:, 0]
        others = [torch.cat([total[:i], total[i + 1 :]]).mean() for i in range(len(total))]
        advantage = returns - torch.stack(others)[:, None]
    else:
        advantage = returns.clone()
    if config.whiten_advantages:
        chosen = advantage[mask]
        advantage = (advantage - chosen.mean()) / (chosen.std(unbiased=False) + 1e-8)

    def log_softmax(role):
        hidden, head = backbone.hidden(role, *inputs)[:, start:-1], backbone.head(role)
        logits = hidden @ head.weight.T
        if head.a is not None:
            logits = logits + head.scale * (hidden @ head.a.T) @ head.b.T
        return (logits / config.temperature).log_softmax(-1)

    def of_tokens(log_p):
        return log_p.gather(-1, rollout.completion_ids[..., None]).squeeze(-1)

    ours, anchor = log_softmax("policy"), log_softmax(None).detach()
    loss = -advantage * of_tokens(ours)
    if config.epochs_per_batch * config.minibatches > 1:
        ratio, epsilon = (of_tokens(ours) - rollout.log_prob).exp(), config.clip_epsilon
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if config.kl_estimator == "exact":
        loss = loss + config.beta * (ours.exp() * (ours - anchor)).sum(-1)
    elif config.kl_in == "loss":
        log_ratio = of_tokens(anchor) - of_tokens(ours)
        loss = loss + config.beta * (log_ratio.exp() - 1 - log_ratio)
    loss = loss + config.entropy_coef * (ours.exp() * ours).sum(-1)
    return loss[rows][mask[rows]].mean(), value_loss


def gradients(backbone):
    found = {}
    for role in ("policy", "value"):
        for key, parameter in backbone.trainable(role):
            found[role, key] = None if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return found


def compare(config, backbone, rollout, returns, tolerance):
    """The first update's facts and gradients against the definition; returns the facts."""
    policy_loss, value_loss = plain_losses(config, backbone, rollout, returns)
    (policy_loss + (value_loss if config.baseline == "value" else 0.0)).backward()
    wanted = gradients(backbone)
    anchor = ask_anchor(config, backbone, rollout)
    facts = next(learn(config, backbone, rollout, returns, anchor, config.beta))
    assert facts["loss"] == pytest.approx(policy_loss.item(), rel=tolerance, abs=tolerance)
    if config.baseline == "value":
        assert facts["value_loss"] == pytest.approx(value_loss.item(), rel=tolerance)
    norms = {"policy": 0.0, "value": 0.0}
    for key, gradient in gradients(backbone).items():
        assert (gradient is None) == (wanted[key] is None), key
        if gradient is not None:
            scale = wanted[key].abs().max().clamp(min=1e-6)
            assert ((gradient - wanted[key]).abs().max() / scale) < 10 * tolerance, key
            norms[key[0]] += gradient.abs().sum().item()
    assert norms["policy"] > 0 and (norms["value"] > 0) == (config.baseline == "value")
    return facts


HEAD = {"lora_targets": ["q_proj", "lm_head"]}


@pytest.mark.parametrize(
    "tuning, changes",
    [
        ("lora", {}),
        ("lora", {"kl_in": "loss", "beta": 0.4}),
        ("lora", {"micro_batch_size": 2, "kl_in": "loss", "beta": 0.4}),
        ("lora", {"whiten_advantages": True}),
        ("lora", {"baseline": "batch_mean"}),
        ("lora", {"baseline": "none", "micro_batch_size": 1}),
        ("lora", HEAD),
        ("lora", {"kl_in": "loss", "beta": 0.4} | HEAD),
        ("lora", {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.3} | HEAD),
        ("full", {}),
        ("full", {"micro_batch_size": 2, "entropy_coef": 0.3}),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("float32", 1e-4)])
def test_gradients_are_those_of_the_definition(world, tuning, changes, dtype, tolerance):
    """float64 is bounded by the value head and the rollout's log-probabilities, kept in float32."""
    config = make_config(world, tuning=tuning, **changes)
    targets = changes.get("lora_targets", "all-linear")
    backbone, rollout, returns = scene(world, tuning, dtype, targets)
    facts = compare(config, backbone, rollout, returns, tolerance)
    assert facts["max_abs_dlogp"] < 1e-4
    of_head = [key for key, _ in backbone.trainable("policy") if "lm_head.lora_" in key]
    assert len(of_head) == 2 * ("lm_head" in targets)


KINDS = [("reward", "k1"), ("reward", "k3"), ("loss", "k3"), ("reward", "exact"), ("loss", "exact")]
BASELINES = ["value", "batch_mean", "leave_one_out", "none"]


@pytest.mark.parametrize("tuning, kinds", [("lora", KINDS), ("full", KINDS[:3])])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_gradients_of_every_kl_baseline_and_clip(world, tuning, kinds, every):
    """Tokens are from another policy than the one that learns, so that ratios are clipped."""
    backbone, rollout, returns = scene(world, tuning, "float64")
    gap = torch.randn(returns.shape, generator=torch.Generator().manual_seed(3))
    rollout = rollout._replace(log_prob=(rollout.log_prob - 0.5 * gap) * rollout.completion_mask)
    combinations = list(product(kinds, BASELINES, (1, 2)))[::every]
    for (kl_in, estimator), baseline, epochs in combinations:
        config = make_config(
            world, tuning=tuning, kl_in=kl_in, kl_estimator=estimator, baseline=baseline, beta=0.4,
            answers_per_prompt=3, epochs_per_batch=epochs, entropy_coef=0.2 * (estimator == "k3"),
        )  # fmt: skip
        facts = compare(config, backbone, rollout, returns, 1e-6)
        assert ("clip_fraction" in facts) == (epochs == 2)
        if epochs == 2:
            assert 0.1 < facts["clip_fraction"] < 0.6 and facts["approx_kl"] > 0.05


@pytest.mark.parametrize("tuning, changes", [
    ("lora", {"baseline": "value", "kl_estimator": "exact"}),
    ("full", {"baseline": "leave_one_out", "answers_per_prompt": 3, "whiten_advantages": True}),
])  # fmt: skip
def test_several_updates_are_a_naive_loop_of_them(world, tuning, changes):
    config = make_config(
        world, tuning=tuning, beta=0.4, lr=2e-2, warmup_steps=0, epochs_per_batch=2, minibatches=3,
        entropy_coef=0.1, **changes,
    )  # fmt: skip
    roles = ["policy", "value"] if config.baseline == "value" else ["policy"]

    naive, rollout, returns = scene(world, tuning, "float64")
    before = [p.detach().clone() for role in roles for _, p in naive.trainable(role)]
    inputs = (rollout.sequences, rollout.attention_mask)
    baseline = naive.values("value", *inputs)[:, rollout.prompt_len - 1 : -1].detach()
    groups = {role: [p for _, p in naive.trainable(role)] for role in roles}
    adam = {role: torch.optim.AdamW(groups[role], lr=2e-2, weight_decay=0.0) for role in roles}
    for row in (0, 1, 2, 0, 1, 2):
        rows = slice(row, row + 1)
        losses = dict(zip(("policy", "value"), plain_losses(
            config, naive, rollout, returns, rows, baseline
        ), strict=True))  # fmt: skip
        for role in roles:
            adam[role].zero_grad()
            losses[role].backward(inputs=groups[role])
            torch.nn.utils.clip_grad_norm_(groups[role], 1.0)
        for role in roles:
            adam[role].step()

    ours, rollout, returns = scene(world, tuning, "float64")
    optimizers = {role: make_optimizer(config, ours, role, 2e-2) for role in roles}
    anchor, updates = ask_anchor(config, ours, rollout), []
    for facts in learn(config, ours, rollout, returns, anchor, config.beta):
        for optimizer in optimizers.values():
            optimizer.clip()
            optimizer.step(1)
        updates.append(facts)
    wanted = [p for role in roles for _, p in naive.trainable(role)]
    found = [p for role in roles for _, p in ours.trainable(role)]
    moved = max((p - q).abs().max() for p, q in zip(wanted, before, strict=True))
    assert moved > 5e-2
    for p, q in zip(found, wanted, strict=True):
        assert (p - q).abs().max() < 1e-4
    first, last = updates[0], updates[-1]
    assert len(updates) == 6 and [("max_abs_dlogp" in u) for u in updates] == [True] + [False] * 5
    assert (
        first["clip_fraction"] == 0 and first["approx_kl"] < 1e-8 and first["max_abs_dlogp"] < 1e-4
    )
    assert last["approx_kl"] > 1e-3 and max(u["clip_fraction"] for u in updates) > 0


@pytest.mark.parametrize("kl_in, estimator, per", [
    ("reward", "k1", "token"), ("reward", "k1", "sequence"), ("reward", "k3", "token"),
    ("reward", "exact", "token"), ("reward", "exact", "sequence"), ("loss", "exact", "token"),
])  # fmt: skip
def test_the_kl_in_the_reward_is_the_definition(world, kl_in, estimator, per):
    """Penalties are of the score, and taken with it."""
    config = make_config(
        world, kl_in=kl_in, kl_estimator=estimator, kl_per=per, length_penalty=0.1,
        no_end_penalty=0.7, micro_batch_size=2,
    )  # fmt: skip
    backbone, rollout, _ = scene(world, "lora", "float64")
    rollout = rollout._replace(ended=torch.tensor([False, True, False]))
    mask, start = rollout.completion_mask, rollout.prompt_len - 1
    anchor, kl = ask_anchor(config, backbone, rollout), torch.zeros(mask.shape)
    if kl_in == "reward":
        kl = estimate_kl(config, backbone, rollout, anchor)
    found = reward_returns(config, torch.tensor([1.0, 2.0, 3.0]), kl, rollout, 0.25)
    with torch.no_grad():
        ours, ref = (
            (backbone.hidden(role, *rollout[:2])[:, start:-1] @ backbone.head().weight.T / 0.9)
            .log_softmax(-1) for role in ("policy", None)
        )  # fmt: skip
    log_ratio = (ours - ref).gather(-1, rollout.completion_ids[..., None]).squeeze(-1)
    wanted_kl = {
        "k1": log_ratio, "k3": (-log_ratio).exp() - 1 + log_ratio,
        "exact": (ours.exp() * (ours - ref)).sum(-1),
    }[estimator] * mask * (kl_in == "reward")  # fmt: skip
    lengths = mask.sum(1)
    assert lengths.tolist() == [6, 3, 6]
    scores = torch.tensor([1.0 - 0.6 - 0.7, 2.0 - 0.3, 3.0 - 0.6 - 0.7])
    for row, length in enumerate(lengths):
        for t in range(length):
            still = wanted_kl[row].sum() if per == "sequence" else wanted_kl[row, t:].sum()
            wanted = 0.75 * scores[row] - 0.25 * still
            assert found[row, t].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert (found[1, 3:] == 0).all()


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


def test_minibatches_have_short_prompts_and_long_ones(world):
    batch = [Prompt(None, [1] * n) for n in range(1, 7)]
    assert episodes(make_config(world), batch) == batch
    config = make_config(world, minibatches=2, answers_per_prompt=2)
    assert [len(p) for p in episodes(config, batch)] == [1, 3, 5, 2, 4, 6] * 2


def test_few_tokens_to_sample_from_make_answers_greedy(world):
    backbone, _, _ = scene(world, "lora", "float32")
    prompts = [Prompt(None, [1, 7, 9]), Prompt(None, [1, 200])]

    def answers(**changes):
        config = make_config(world, **changes)
        return [sample(config, backbone, prompts, seed).answers() for seed in (0, 1)]

    for few in ({"top_k": 1}, {"top_p": 1e-6}):
        assert len(set(map(str, answers(**few)))) == 1
    assert len(set(map(str, answers()))) == 2


def test_an_answer_that_a_stop_string_ends_counts_as_ended(world):
    train(make_config(world, stop=["a", "t"], steps=1, max_new_tokens=12))
    (row,) = metrics(world / "run")
    assert row["ended"] > 0 and row["length"] < 12


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
    train(make_config(world, lr=1e-2, warmup_steps=0, baseline="value", value_lr=1e-12))
    row = lines(world / "run/metrics.jsonl")[-1]
    wanted = {
        "reward", "kl", "entropy", "loss", "value_loss", "length", "tokens_per_s", "rollout_s",
        "score_s", "learn_s", "step_s", "max_abs_dlogp", "mean_abs_dlogp", "peak_memory_bytes",
        "policy_grad_norm", "value_grad_norm", "role_bytes",
    }  # fmt: skip
    assert wanted <= row.keys() and all(row[key] is not None for key in wanted)
    assert row["rollout_s"] + row["score_s"] + row["learn_s"] == pytest.approx(row["step_s"])
    assert row["role_bytes"].keys() == {"policy", "value", "reference"}
    value = load_file(world / "run/checkpoints/step-3/value/adapter_model.safetensors")
    (head,) = (tensor for name, tensor in value.items() if name.endswith("score.weight"))
    assert 0 < head.abs().max() < 1e-10  # it began at 0, and has a learning rate of its own
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


def test_gradients_that_are_not_finite_stop_before_the_update(world, monkeypatch):
    def of_nothing(values, returns, mask):
        return values.sum() * float("nan")

    monkeypatch.setattr(reinforce, "value_loss", of_nothing)
    with pytest.raises(NonFiniteLoss, match="value_grad_norm is nan at step 1; no checkpoint was"):
        train(make_config(world))
    assert NonFiniteLoss.exit_code == 3


# -------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("changes", [
    {"tuning": "full"},
    {"baseline": "leave_one_out", "answers_per_prompt": 2, "prompts_per_step": 2,
     "epochs_per_batch": 2, "minibatches": 2, "kl_target": 0.01, "lora_dropout": 0.1},
])  # fmt: skip
def test_a_crash_and_resume_repeat_the_run_in_every_tuning(world, capsys, changes):
    settings = dict(steps=5, checkpoint_every=2, lr=1e-3, warmup_steps=1, **changes)
    train(make_config(world, "whole", **settings))
    full = "tuning" in changes
    assert ("of no use here: --lora-rank\n" in capsys.readouterr().err) == full
    (world / "crash.py").write_text(
        "calls = 0\n" + VOWELS.replace(
            "    assert", "    global calls\n    calls += 1\n    assert calls != 5\n    assert"
        )
    )  # fmt: skip
    crash = dict(reward_function=f"{world / 'crash.py'}:vowels")
    with pytest.raises(Unfinished, match="raised AssertionError"):
        train(make_config(world, "part", **settings | crash))
    assert (world / "part/checkpoints/step-3").is_dir()  # of the last finished step
    train(make_config(world, "part", **settings, resume=True))
    assert metrics(world / "part") == metrics(world / "whole")
    if "kl_target" in changes:
        rows = metrics(world / "whole")
        assert rows[0]["beta"] == 0.05 and len({row["beta"] for row in rows}) == 5
        for row, after in zip(rows, rows[1:], strict=False):
            assert after["beta"] == reinforce.adapted(row["beta"], row["kl"], 0.01, 10)


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
    refused(world, "no gradient on average", kl_in="loss", kl_estimator="k1")
    refused(world, "in the loss it is per token", kl_in="loss", kl_per="sequence")
    refused(world, "adaptive beta of --kl-target", kl_horizon=5)
    refused(world, "starts at 0", kl_target=1.0, beta=0.0)
    refused(world, "--answers-per-prompt 2 or more", baseline="leave_one_out")
    refused(world, "the ratio is 1 in the first", clip_epsilon=0.2)
    refused(world, "learn and clip that ratio already", importance_cap=2.0, minibatches=2)
    refused(world, "--value-lr is for --baseline value", baseline="none", value_lr=1e-3)
    refused(world, "none of them empty", stop=["a", ""])
    refused(world, "4 rows .*each of 3 --minibatches; give a multiple of 3", minibatches=3)
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
