"""Sampling: the tokens transformers would take, the log-probabilities training will see."""

from __future__ import annotations

import pytest
import torch
import transformers
from _architectures import build
from _tiny import FAMILIES, SHAPE, perturb, tiny_model, tiny_tokenizer

import perl_kernels as pk
from perl import kv_cache, rollout
from perl.backbone import Backbone
from perl.data import pad
from perl.rollout import draw, generate, truncate

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
    found = generate(backbone, None, PROMPTS, max_new_tokens=20, temperature=0)
    wanted = transformers_greedy(backbone, PROMPTS, 20)
    assert found.sequences.equal(wanted)
    assert len(set(found.completion_ids.flatten().tolist())) > 3  # not one token over and over


def test_greedy_is_transformers_generate_on_a_pretrained_model(stories260k):
    backbone = Backbone.load(stories260k)
    texts = ["Once upon a time", "Lily and Tom went to the big", "The"]
    prompts = [backbone.tokenizer(text)["input_ids"] for text in texts]
    found = generate(backbone, None, prompts, max_new_tokens=60, temperature=0)
    assert found.sequences.equal(transformers_greedy(backbone, prompts, 60))
    assert found.texts(backbone.tokenizer)[0].startswith(", there was a little girl named")


def test_an_answer_ends_with_its_end_of_sequence_token():
    backbone = make()
    free = generate(backbone, None, PROMPTS, max_new_tokens=12, temperature=0)
    # Declare the second distinct token of the first answer to be the end.
    first = free.completion_ids[0].tolist()
    end = next(token for token in first if token != first[0])
    ended = first.index(end) + 1
    assert 1 < ended < 12
    backbone.tokenizer.eos_token = backbone.tokenizer.convert_ids_to_tokens(end)
    found = generate(backbone, None, PROMPTS, max_new_tokens=12, temperature=0)
    width = found.completion_ids.shape[1]
    for row in range(3):
        answer = free.completion_ids[row].tolist()
        length = answer.index(end) + 1 if end in answer else 12
        assert found.completion_ids[row, :length].tolist() == answer[:length]
        assert found.completion_mask[row].tolist() == [t < length for t in range(width)]
        assert (found.completion_ids[row, length:] == backbone.tokenizer.pad_token_id).all()
        assert (found.log_prob[row, length:] == 0).all()
    assert found.completion_mask[0].sum() == ended
    assert found.attention_mask[:, found.prompt_len :].equal(found.completion_mask.long())
    assert found.sequences.equal(transformers_greedy(backbone, PROMPTS, 12))
    # With every row at its end, nothing more is sampled.
    alone = generate(backbone, None, PROMPTS[:1], max_new_tokens=12, temperature=0)
    assert alone.completion_ids.shape == (1, ended)


@pytest.mark.parametrize("batch_size", [0, 9])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(batch_size):
    """The strings straddle tokens, some of them mere bytes of a character."""
    backbone = make()

    def draw_answers(**settings):
        draws = draw(40, 24, backbone.device, seeded())
        return generate(
            backbone, None, PROMPTS[1:2] * 40, max_new_tokens=24, draws=draws, **settings
        )

    free, decode = draw_answers(), backbone.tokenizer.decode
    answers = free.answers()
    texts = [decode(ids) for ids in answers]
    pieces = [[decode([token]) for token in ids] for ids in answers]
    straddles = next(
        one[-1] + two[0]
        for row in pieces for one, two in zip(row, row[1:], strict=False)
        if one.isascii() and two.isascii() and len(one) > 1 and len(two) > 1
    )  # fmt: skip
    others = "".join(text for text in texts if straddles not in text)
    letter = next(c for c in others if c.isalpha() and not c.isascii())
    stops = [straddles, letter]
    found = draw_answers(stop=stops, batch_size=batch_size)
    seen = set()
    for row, ids in enumerate(answers):
        counts = range(1, len(ids) + 1)
        ends = [n for n in counts if any(stop in decode(ids[:n]) for stop in stops)]
        length = min(ends, default=len(ids))
        seen |= {stop for stop in stops if ends and stop in decode(ids[:length])}
        assert found.answers()[row] == ids[:length]
        assert found.ended[row] == (bool(ends) or ids[-1] == backbone.tokenizer.eos_token_id)
    assert straddles in seen and letter in seen and not found.ended.all()


def test_stop_strings_are_checked():
    for stop in ("a", ["a", ""]):
        with pytest.raises(ValueError, match="want a list of strings, none of them empty"):
            generate(make(), None, PROMPTS, max_new_tokens=2, stop=stop)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_log_prob_is_the_learners_with_temperature_and_before_truncation(family, targets):
    backbone = make(family, targets)
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))
    found = generate(
        backbone, "policy", PROMPTS, max_new_tokens=10, temperature=0.7, top_k=20, top_p=0.9,
        generator=seeded(),
    )  # fmt: skip
    hidden = backbone.hidden("policy", found.sequences[:, :-1], found.attention_mask[:, :-1])
    head = backbone.head("policy")
    again = pk.linear_log_prob(
        hidden[:, found.prompt_len - 1 :], head.weight, found.completion_ids,
        temperature=0.7, **head.options,
    )  # fmt: skip
    # one token at a time and all at once round differently, in proportion to the logits
    unit = torch.finfo(torch.float32).eps * (hidden @ head.weight.T).abs().max().item() / 0.7

    def assert_near(found, wanted):
        off = (found - wanted).detach() / unit
        assert off.square().mean().sqrt() < 16 and off.abs().max() < 64

    assert_near(found.log_prob, again * found.completion_mask)
    pk.set_adapter(backbone.model, "policy")
    with torch.no_grad():  # row 0 has no padding: the plain model needs no positions for it
        logits = backbone.model(found.sequences[:1]).logits[:, found.prompt_len - 1 : -1]
    plain = (logits / 0.7).log_softmax(-1).gather(-1, found.completion_ids[:1, :, None])
    plain_log_prob = plain[..., 0] * found.completion_mask[:1]
    assert_near(found.log_prob[:1], plain_log_prob)


def test_tokens_are_drawn_from_the_truncated_distribution():
    """4000 draws of one next token: each frequency within 4.5 standard errors."""
    backbone, draws = make(), 4000
    prompt = PROMPTS[0]
    found = generate(
        backbone, None, [prompt] * draws, max_new_tokens=1, temperature=0.8, top_k=4,
        generator=seeded(),
    )  # fmt: skip
    with torch.no_grad():
        probs = (backbone.model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    likeliest = probs.topk(4)
    wanted = likeliest.values / likeliest.values.sum()
    counts = torch.bincount(found.completion_ids[:, 0], minlength=len(probs))
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


@pytest.mark.parametrize("vocabulary", [3, 256, 1003])  # one block, just one, odd ones
def test_top_p_without_sorting_the_rare(vocabulary):
    probs = (5 * torch.randn(40, vocabulary, generator=seeded())).softmax(-1)
    for top_p in (0.01, 0.5, 0.9, 0.999):
        kept = truncate(probs, 0, top_p)
        least = kept.where(kept > 0, 1.0).amin(-1, keepdim=True)
        assert kept.equal(probs.where(probs >= least, 0.0))
        mass = kept.double().sum(-1)
        assert (mass >= top_p - 1e-6).all() and (mass - least[:, 0] < top_p + 1e-6).all()


@pytest.mark.parametrize("vocabulary", [3, 256, 1003, 50257])
def test_a_number_decides_the_token_whose_share_of_the_mass_it_falls_into(vocabulary):
    """Up to rounding at its two ends; never a token without mass. The last one's end is 1."""
    mass = (6 * torch.randn(400, vocabulary, generator=seeded())).exp()
    mass[:, 1::3] = 0.0
    draws = draw(400, 1, "cpu", seeded(1))[:, 0]
    draws[0], draws[1] = 0.0, 1.0 - 2.0**-53
    found = rollout._draw(mass, draws)
    ends = mass.double().cumsum(-1)
    number = draws * ends[:, -1]
    end = ends.gather(-1, found[:, None])[:, 0]
    own = mass.double().gather(-1, found[:, None])[:, 0]
    off = torch.maximum(number - end, end - own - number) / ends[:, -1]
    assert off.max() < 1e-7 and (own > 0).all()


# ------------------------------------------------------------------------- continuous batching

MANY = [[1, 3 + 7 * i % 250, *range(20, 20 + i * 5 % 13)] for i in range(9)]  # 2 to 14 tokens


def ending(model) -> tuple[Backbone, torch.Tensor]:
    """A backbone whose answers end early and at different tokens; transformers' greedy ones."""
    backbone = Backbone.load(model=model, tokenizer=tiny_tokenizer())
    free = transformers_greedy(backbone, MANY, 16)[:, -16:]
    candidates = [(free == token).any(1).sum().item() for token in range(300)]
    firsts = [len({r.index(t) for r in free.tolist() if t in r}) for t in range(300)]
    end = max(range(3, 300), key=lambda t: (firsts[t], -candidates[t]))
    assert firsts[end] > 1, "no token ends answers at different lengths"
    backbone.tokenizer.eos_token = backbone.tokenizer.convert_ids_to_tokens(end)
    return backbone, transformers_greedy(backbone, MANY, 16)


@pytest.fixture
def few_spare_columns(monkeypatch):
    """So that columns are shifted within a few steps."""
    monkeypatch.setattr(rollout, "SPARE", 3)
    shifts = []
    shift = kv_cache.SlotCache.shift
    monkeypatch.setattr(
        kv_cache.SlotCache, "shift", lambda *a: (shifts.append(a[1:]), shift(*a))[1]
    )
    return shifts


@pytest.fixture
def in_graphs(monkeypatch):
    """The steps of a GPU, run one by one in place of replayed."""
    monkeypatch.setattr(rollout, "_in_graphs", lambda device: True)
    monkeypatch.setattr(rollout._Graph, "__call__", lambda self, step: step())


# Mistral, Gemma 2, Gemma 3: a window of 4 tokens that is passed; Phi-3, OPT: more families
@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Gemma 2", "Gemma 3", "GPT-2", "Phi-3", "OPT", "Mixtral"]
)
def test_rows_that_come_and_go_answer_as_transformers_does(name, few_spare_columns):
    backbone, wanted = ending(build(name))
    for batch_size in (0, 3):
        found = generate(
            backbone, None, MANY, max_new_tokens=16, temperature=0, batch_size=batch_size
        )
        assert found.sequences.equal(wanted), batch_size
    assert few_spare_columns or name == "Mixtral"  # whose answers are short


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2"])
def test_steps_of_a_graph_are_the_same_steps(name, few_spare_columns, in_graphs):
    backbone, wanted = ending(build(name))
    for batch_size in (0, 3):
        found = generate(
            backbone, None, MANY, max_new_tokens=16, temperature=0, batch_size=batch_size
        )
        assert found.sequences.equal(wanted), batch_size
    assert few_spare_columns


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")
def test_a_cuda_graph_replays_the_steps_that_run_without_one(monkeypatch, few_spare_columns):
    backbone = make(device="cuda")
    backbone.add_role("policy")
    for _, parameter in backbone.trainable("policy"):
        parameter.data.normal_(std=0.1)
    graphs, graph = [], rollout._Graph
    monkeypatch.setattr(rollout, "_Graph", lambda: graphs.append(graph()) or graphs[-1])

    def sampled():
        generator = torch.Generator("cuda").manual_seed(0)
        return generate(
            backbone, "policy", MANY, max_new_tokens=12, top_k=20, batch_size=3,
            generator=generator,
        )  # fmt: skip

    replayed = sampled()
    assert graphs[0].graph is not None
    monkeypatch.setattr(rollout, "_in_graphs", lambda device: False)
    stepped = sampled()
    assert len(graphs) == 1 and replayed.sequences.equal(stepped.sequences)
    torch.testing.assert_close(replayed.log_prob, stepped.log_prob, rtol=0, atol=1e-3)


def test_a_model_that_remembers_more_than_keys_and_values_answers_in_groups():
    torch.manual_seed(1)
    config = transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    assert not kv_cache.SlotCache.holds(config)
    backbone, wanted = ending(model)
    for batch_size in (0, 2):
        found = generate(
            backbone, None, MANY, max_new_tokens=16, temperature=0, batch_size=batch_size
        )
        assert found.sequences.equal(wanted), batch_size


def test_draws_belong_to_the_prompt_not_to_its_turn():
    backbone = make()
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))

    def sampled(prompts=MANY, **keywords):
        return generate(
            backbone, "policy", prompts, max_new_tokens=12, temperature=1.2, top_p=0.95, **keywords
        )

    whole = sampled(generator=seeded())
    assert len(set(map(tuple, whole.completion_ids.tolist()))) == len(MANY)
    for batch_size in (1, 2, 4):
        again = sampled(generator=seeded(), batch_size=batch_size)
        assert again.sequences.equal(whole.sequences), batch_size
        torch.testing.assert_close(again.log_prob, whole.log_prob, rtol=0, atol=1e-4)
    numbers = draw(len(MANY), 12, backbone.device, seeded())
    for mine in (slice(0, 4), slice(4, 9)):  # two processes with half of the batch each
        half = sampled(MANY[mine], draws=numbers[mine])
        assert half.answers() == whole.answers()[mine]


def test_ended_rows_cost_nothing_and_memory_is_that_of_the_batch(monkeypatch):
    backbone, wanted = ending(build("Llama"))
    passes, hidden = [], backbone.hidden

    def watched(role, ids, mask, cache):
        passes.append((len(ids), ids.shape[1], mask.shape[1]))
        states = hidden(role, ids, mask, cache)
        assert cache.layers[0].keys.shape[::2] == (3, 14 + 16 + 16)
        return states

    monkeypatch.setattr(backbone, "hidden", watched)
    found = generate(backbone, None, MANY, max_new_tokens=16, temperature=0, batch_size=3)
    lengths = found.completion_mask.sum(1)
    prefilled = sum(rows for rows, new, _ in passes if new > 1)
    decoded = sum(rows for rows, new, _ in passes if new == 1)
    assert prefilled == len(MANY)
    assert decoded == lengths.sum() - len(MANY)  # the first token of each is the prefill's
    assert max(rows for rows, _, _ in passes) == 3
    # attention goes over the columns of the rows in progress
    longest = max(len(p) + n for p, n in zip(MANY, lengths.tolist(), strict=True))
    assert max(seen for _, _, seen in passes) <= longest


def test_bad_arguments_are_named():
    backbone = make()
    for keywords, message in (
        ({"prompts": [[1], []]}, "empty prompt"),
        ({"prompts": []}, "prompts is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"draws": torch.rand(3, 5)}, r"draws is \(3, 5\); want .* \(3, 4\)"),
        ({"max_new_tokens": 54}, "11 tokens and 54 new ones exceed the model's context of 64"),
    ):
        arguments = {"prompts": PROMPTS, "max_new_tokens": 4} | keywords
        with pytest.raises(ValueError, match=message):
            generate(backbone, None, **arguments)
