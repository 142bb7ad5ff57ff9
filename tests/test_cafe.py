import random
import statistics

import pytest

from perl import cafe

WORLD = cafe.build_world(
    3, general=60, demonstrations=200, pairs=200, prompts=80, heldout_pairs=60, heldout_prompts=40
)
PROMPTS = [row["prompt"] for row in WORLD.prompts]


def test_a_world_is_a_function_of_its_seed():
    counts = dict(general=20, demonstrations=20, pairs=20, prompts=20)
    counts |= dict(heldout_pairs=10, heldout_prompts=10)
    assert cafe.build_world(1, **counts) == cafe.build_world(1, **counts)
    assert cafe.build_world(1, **counts) != cafe.build_world(2, **counts)


def test_held_out_dialogs_occur_in_no_training_set():
    trained = {row["prompt"] for row in WORLD.sft + WORLD.pairs + WORLD.prompts}
    held_out = {row["prompt"] for row in WORLD.heldout_pairs + WORLD.heldout_prompts}
    assert held_out and not trained & held_out


def test_good_answers_score_one_and_every_flaw_less():
    rng = random.Random(0)
    kinds = {cafe.read_prompt(prompt).kind for prompt in PROMPTS}
    assert len(kinds) >= 5, kinds
    for prompt in PROMPTS:
        assert cafe.oracle(prompt, cafe.good_answer(prompt, rng)) == 1.0, prompt
    for flaw in cafe.FLAWS:
        scores = [cafe.oracle(p, cafe.flawed_answer(p, flaw, rng)) for p in PROMPTS]
        assert max(scores) < 1.0 and statistics.mean(scores) < 0.9, flaw


def test_the_oracle_is_not_won_by_stuffing():
    rng = random.Random(1)
    menu = " ".join([*cafe.DRINKS, *cafe.SIZES, *cafe.EXTRAS, *cafe.FOODS])
    for prompt in PROMPTS:
        good = cafe.good_answer(prompt, rng)
        for answer in ("", menu, good * 3, good + " " + menu, prompt, "Of course! Anything else?"):
            assert cafe.oracle(prompt, answer) < 0.75, answer
        assert 0.0 <= cafe.oracle(prompt, "\x00 ??? " * 50) < 0.2


def test_demonstrations_leave_room_and_pairs_prefer_the_better():
    demonstrated = [cafe.oracle(row["prompt"], row["completion"]) for row in WORLD.sft]
    assert 0.35 < statistics.mean(demonstrated) < 0.8
    for row in WORLD.pairs + WORLD.heldout_pairs:
        chosen, rejected = (cafe.oracle(row["prompt"], row[key]) for key in ("chosen", "rejected"))
        assert chosen > rejected


def test_reward_is_a_reward_function():
    rows = WORLD.pairs[:5]
    scores = cafe.reward([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    assert scores == [cafe.oracle(r["prompt"], r["chosen"]) for r in rows]


def test_tokenizer_and_model_fit_each_other():
    tokenizer = cafe.build_tokenizer(WORLD.all_text())
    model = cafe.build_model(len(tokenizer), seed=1)
    ids = tokenizer(PROMPTS[0]).input_ids
    assert ids[0] == tokenizer.bos_token_id and max(ids) < model.config.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPTS[0]
    with pytest.raises(ValueError, match="size is 'huge'"):
        cafe.build_model(10, "huge")
    with pytest.raises(ValueError, match="good_share"):
        cafe.build_world(0, good_share=1.5)
