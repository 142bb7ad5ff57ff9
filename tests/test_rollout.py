"""Sampling: the tokens transformers would take, the log-probabilities training will see."""

from __future__ import annotations

import pytest
import torch
from _tiny import FAMILIES, perturb, tiny_model, tiny_tokenizer

import perl_kernels as pk
from perl.backbone import Backbone
from perl.data import pad
from perl.rollout import generate, truncate

PROMPTS = [[1, 7, 9, 30, 55, 3, 12, 13, 90, 4, 77], [1, 200], [1, 8, 17, 260]]


def make(family="llama", targets="all-linear", **keywords) -> Backbone:
    lora = pk.LoRAConfig(r=3, target_modules=targets)
    return Backbone.load(
        model=tiny_model(family), tokenizer=tiny_tokenizer(), lora=lora, **keywords
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformers_greedy(backbone: Backbone, prompts, max_new_tokens: int) -> torch.Tensor:
    ids, mask = pad(prompts, backbone.tokenizer.pad_token_id, left=True)
    return backbone.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=backbone.tokenizer.pad_token_id,
        eos_token_id=backbone.tokenizer.eos_token_id,
    )


@pytest.mark.parametrize("family", FAMILIES)  # gemma2: softcap, and a window of 8 that is passed
def test_greedy_is_transformers_generate(family):
    backbone = make(family)
    rollout = generate(backbone, None, PROMPTS, max_new_tokens=20, temperature=0)
    wanted = transformers_greedy(backbone, PROMPTS, 20)
    assert rollout.sequences.equal(wanted)
    assert len(set(rollout.completion_ids.flatten().tolist())) > 3  # not one token over and over


def test_greedy_is_transformers_generate_on_a_pretrained_model(stories260k):
    backbone = Backbone.load(stories260k)
    texts = ["Once upon a time", "Lily and Tom went to the big", "The"]
    prompts = [backbone.tokenizer(text)["input_ids"] for text in texts]
    rollout = generate(backbone, None, prompts, max_new_tokens=60, temperature=0)
    assert rollout.sequences.equal(transformers_greedy(backbone, prompts, 60))
    assert rollout.texts(backbone.tokenizer)[0].startswith(", there was a little girl named")


def test_an_answer_ends_with_its_end_of_sequence_token():
    backbone = make()
    free = generate(backbone, None, PROMPTS, max_new_tokens=12, temperature=0)
    # Declare the second distinct token of the first answer to be the end.
    first = free.completion_ids[0].tolist()
    end = next(token for token in first if token != first[0])
    ended = first.index(end) + 1
    assert 1 < ended < 12
    backbone.tokenizer.eos_token = backbone.tokenizer.convert_ids_to_tokens(end)
    rollout = generate(backbone, None, PROMPTS, max_new_tokens=12, temperature=0)
    width = rollout.completion_ids.shape[1]
    for row in range(3):
        answer = free.completion_ids[row].tolist()
        length = answer.index(end) + 1 if end in answer else 12
        assert rollout.completion_ids[row, :length].tolist() == answer[:length]
        assert rollout.completion_mask[row].tolist() == [t < length for t in range(width)]
        assert (rollout.completion_ids[row, length:] == backbone.tokenizer.pad_token_id).all()
        assert (rollout.log_prob[row, length:] == 0).all()
    assert rollout.completion_mask[0].sum() == ended
    assert rollout.attention_mask[:, rollout.prompt_len :].equal(rollout.completion_mask.long())
    assert rollout.sequences.equal(transformers_greedy(backbone, PROMPTS, 12))
    # With every row at its end, nothing more is sampled.
    alone = generate(backbone, None, PROMPTS[:1], max_new_tokens=12, temperature=0)
    assert alone.completion_ids.shape == (1, ended)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_log_prob_is_the_learners_with_temperature_and_before_truncation(family, targets):
    backbone = make(family, targets)
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))
    rollout = generate(
        backbone, "policy", PROMPTS, max_new_tokens=10, temperature=0.7, top_k=20, top_p=0.9,
        generator=seeded(),
    )  # fmt: skip
    hidden = backbone.hidden("policy", rollout.sequences[:, :-1], rollout.attention_mask[:, :-1])
    head = backbone.head("policy")
    again = pk.linear_log_prob(
        hidden[:, rollout.prompt_len - 1 :], head.weight, rollout.completion_ids,
        temperature=0.7, **head.options,
    )  # fmt: skip
    # one token at a time and all at once round differently, in proportion to the logits
    unit = torch.finfo(torch.float32).eps * (hidden @ head.weight.T).abs().max().item() / 0.7

    def assert_near(found, wanted):
        off = (found - wanted).detach() / unit
        assert off.square().mean().sqrt() < 16 and off.abs().max() < 64

    assert_near(rollout.log_prob, again * rollout.completion_mask)
    pk.set_adapter(backbone.model, "policy")
    with torch.no_grad():  # row 0 has no padding: the plain model needs no positions for it
        logits = backbone.model(rollout.sequences[:1]).logits[:, rollout.prompt_len - 1 : -1]
    plain = (logits / 0.7).log_softmax(-1).gather(-1, rollout.completion_ids[:1, :, None])
    plain_log_prob = plain[..., 0] * rollout.completion_mask[:1]
    assert_near(rollout.log_prob[:1], plain_log_prob)


def test_tokens_are_drawn_from_the_truncated_distribution():
    """4000 draws of one next token: each frequency within 4.5 standard errors."""
    backbone, draws = make(), 4000
    prompt = PROMPTS[0]
    rollout = generate(
        backbone, None, [prompt] * draws, max_new_tokens=1, temperature=0.8, top_k=4,
        generator=seeded(),
    )  # fmt: skip
    with torch.no_grad():
        probs = (backbone.model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    likeliest = probs.topk(4)
    wanted = likeliest.values / likeliest.values.sum()
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(probs))
    assert counts[likeliest.indices].sum() == draws
    error = (counts[likeliest.indices] / draws - wanted).abs()
    assert (error < 4.5 * (wanted * (1 - wanted) / draws).sqrt()).all()


def test_the_generator_alone_decides_the_draws():
    backbone = make()

    def draw(seed):
        return generate(
            backbone, None, PROMPTS, max_new_tokens=8, temperature=1.5, generator=seeded(seed)
        ).sequences

    before = torch.get_rng_state()
    first, second, other = draw(0), draw(0), draw(1)
    assert first.equal(second) and not first.equal(other)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(3)
    one = generate(backbone, None, PROMPTS, max_new_tokens=8).sequences
    torch.manual_seed(3)
    assert generate(backbone, None, PROMPTS, max_new_tokens=8).sequences.equal(one)


def test_a_role_samples_as_itself_and_neighbours_do_not_matter():
    backbone = make()
    backbone.add_role("policy")
    base = generate(backbone, None, PROMPTS, max_new_tokens=10, temperature=0)
    assert generate(backbone, "policy", PROMPTS, max_new_tokens=10, temperature=0).sequences.equal(
        base.sequences
    )
    perturb(backbone.trainable("policy"))
    policy = generate(backbone, "policy", PROMPTS, max_new_tokens=10, temperature=0)
    assert not policy.sequences.equal(base.sequences)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(backbone, "policy", [prompt], max_new_tokens=10, temperature=0)
        assert alone.completion_ids[0].equal(policy.completion_ids[row])


def test_truncate_by_hand():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    for top_k, top_p, kept in (
        (0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (2, 1.0, [0.0, 0.4, 0.0, 0.3]),
        (9, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0, 0.4, [0.0, 0.4, 0.0, 0.0]),  # 0.4 alone holds the mass 0.4
        (0, 0.65, [0.0, 0.4, 0.0, 0.3]),  # 0.4 does not, 0.7 does
        (0, 0.01, [0.0, 0.4, 0.0, 0.0]),  # the likeliest always stays
        (2, 0.6, [0.0, 0.4, 0.0, 0.3]),  # 0.4 of the 0.7 that top_k left is 0.57
        (2, 0.5, [0.0, 0.4, 0.0, 0.0]),
    ):
        assert truncate(probs, top_k, top_p).tolist() == pytest.approx(kept), (top_k, top_p)


def test_bad_arguments_are_named():
    backbone = make()
    for keywords, message in (
        ({"prompts": [[1], []]}, "empty prompt"),
        ({"prompts": []}, "prompts is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 54}, "11 tokens and 54 new ones exceed the model's context of 64"),
    ):
        arguments = {"prompts": PROMPTS, "max_new_tokens": 4} | keywords
        with pytest.raises(ValueError, match=message):
            generate(backbone, None, **arguments)
