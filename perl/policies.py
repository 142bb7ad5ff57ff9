"""Policies and what they answer, for `evaluate`, `generate` and `compare`.

A policy is named by a word of the command line:

    base            --model itself
    FOLDER          a run, an adapter of --model, or a model of its own with --model's tokenizer
    FILE            {prompt, completion} rows that hold an answer to every prompt, from anywhere

All of the first two kinds are roles of one backbone and draw the same numbers, so two equal ones
give equal answers, and two like ones differ by no more than they have to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perl.backbone import Backbone, base_of, is_adapter
from perl.config import CompareConfig, EvaluateConfig, GenerateConfig, UsageError
from perl.data import (
    KINDS,
    Encoded,
    Example,
    Rows,
    answer_ids,
    encode_prompts,
    prompt_room,
    read_rows,
    row_kind,
    want_kind,
)
from perl.ensemble import Rewards, check_finite, combine, load_reward_models, score_rewards
from perl.progress import progress
from perl.reward_sources import TextSource, reencode
from perl.rollout import generate
from perl.run import derived_seed, role_folder, role_weights
from perl.training import by_length, learned_log_prob

BASE = "base"


@dataclass(frozen=True)
class Answer:
    """One answer; log_prob is log π of it in nats. None is not known, where others gave it."""

    text: str
    ids: list[int]  # with the end-of-sequence token where it ended, or others gave it
    ended: bool | None = None
    log_prob: float | None = None


@dataclass(frozen=True)
class Policy:
    """Answers by a role of the backbone (None: the base), or by the given ones where there are."""

    name: str
    role: str | None = None
    given: dict[str, Answer] | None = None  # by prompt, as JSON


def open_policies(
    config: EvaluateConfig | GenerateConfig | CompareConfig,
    backbone: Backbone,
    names: Sequence[str],
    data: Encoded,
) -> list[Policy]:
    """The policies of these names, as roles of the backbone or with their answers to the prompts.

    Raises UsageError, naming the word, for a folder that holds no policy of this base, and for a
    file without an answer to each prompt.
    """
    policies = []
    for i, name in enumerate(names, 1):
        if name == BASE:
            policies.append(Policy(name))
        elif Path(name).is_file():
            policies.append(Policy(name, given=_read_answers(config, backbone, name, data)))
        else:
            role = f"policy_{i}"
            backbone.load_role(role, role_folder(name, "policy"))
            if backbone.is_scalar(role):
                raise UsageError(f"{name} is a reward or value model, not a policy")
            policies.append(Policy(name, role))
    return policies


def want_prompts(config: EvaluateConfig | GenerateConfig | CompareConfig, rows: Rows) -> None:
    kind = row_kind(rows)
    if "prompt" not in KINDS[kind]:
        raise UsageError(
            f"{config.data} holds {kind} rows, which have no prompts to answer; give "
            "rows with a prompt column"
        )


def encode(
    config: EvaluateConfig | GenerateConfig | CompareConfig, backbone: Backbone, rows: Rows
) -> Encoded:
    """The rows' prompts, as tokens that leave room for an answer; what was cut goes to stderr."""
    longest = getattr(config, "max_tokens", 0)
    prompts = encode_prompts(
        rows,
        backbone.tokenizer,
        prompt_room(longest, config.max_new_tokens, backbone.config.max_position_embeddings),
        truncate_prompts=config.truncate_prompts,
        drop_long=getattr(config, "drop_long", False),
    )
    say_notes(config, prompts)
    return prompts


def say_notes(config: EvaluateConfig | GenerateConfig | CompareConfig, encoded: Encoded) -> None:
    for note in encoded.notes:
        print(f"{config.data or '--prompt'}: {note}", file=sys.stderr)


def base_of_policies(names: Sequence[str]) -> str | None:
    """The model that the first adapter among the names was trained on; None where none is."""
    for name in names:
        if name != BASE and not Path(name).is_file() and is_adapter(role_folder(name, "policy")):
            return base_of(role_folder(name, "policy"))
    return None


def files_of(config: GenerateConfig | CompareConfig, names: Sequence[str]) -> list[Path]:
    """The files that answers depend on: the rows, files of answers, weights of policies."""
    files = [Path(config.data)] if config.data else []
    for name in names:
        if Path(name).is_file():
            files.append(Path(name))
        elif name != BASE:
            files += role_weights(name, "policy")
    return files


def answers_of(
    config: EvaluateConfig | GenerateConfig | CompareConfig,
    backbone: Backbone,
    policy: Policy,
    data: Encoded,
    seed: int = 0,
) -> list[Answer]:
    """A policy's answers to the prompts; `seed` and --seed alone decide the draws."""
    if policy.given is not None:
        return [policy.given[_key(row["prompt"])] for row in data.rows]
    generator = torch.Generator(backbone.device).manual_seed(derived_seed(config.seed, seed))
    with progress(len(data), f"generate {policy.name}", "answer") as bar:
        rollout = generate(
            backbone,
            policy.role,
            list(data),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=getattr(config, "top_k", 0),
            top_p=getattr(config, "top_p", 1.0),
            stop=config.stop or (),
            batch_size=config.batch_size,
            generator=generator,
            ended=bar.update,
        )
    texts, ended = rollout.texts(backbone.tokenizer), rollout.ended.tolist()
    log_prob = rollout.log_prob.sum(1).tolist()
    return [Answer(*each) for each in zip(texts, rollout.answers(), ended, log_prob, strict=True)]


@torch.no_grad()
def kl_to_base(
    config: EvaluateConfig | CompareConfig,
    backbone: Backbone,
    policy: Policy,
    data: Encoded,
    answers: Sequence[Answer],
) -> list[float] | None:
    """log π − log π_base of each answer, in nats at the sampling temperature.

    Its mean over answers drawn from π is an unbiased estimate of KL(π ‖ base). None for the base
    itself, for answers from a file, and for greedy ones, which are no draws.
    """
    if policy.role is None or config.temperature == 0:
        return None
    examples = [
        Example(prompt + answer.ids, [False] * len(prompt) + [True] * len(answer.ids))
        for prompt, answer in zip(data, answers, strict=True)
    ]
    kl = [0.0] * len(examples)
    with progress(len(examples), f"KL of {policy.name}", "answer") as bar:
        for rows in by_length(examples, config.batch_size):
            batch = [examples[i] for i in rows]
            log_prob = learned_log_prob(backbone, None, batch, config.temperature)
            parts = log_prob.split([len(answers[i].ids) for i in rows])
            for i, part in zip(rows, parts, strict=True):
                kl[i] = answers[i].log_prob - part.sum().item()
            bar.update(len(rows))
    return kl


RewardOf = Callable[[Encoded, Sequence[Answer]], Rewards]


def open_rewards(
    config: EvaluateConfig | CompareConfig, backbone: Backbone, source: TextSource | None
) -> RewardOf | None:
    """What answers to prompts are rewarded by: `source`, else reward models; None without any."""
    if source is not None:

        def of_text(data: Encoded, answers: Sequence[Answer]) -> Rewards:
            asked, texts = _texts(data, answers)
            rewards: list[float] = []
            with progress(len(texts), "score", "answer") as bar:
                for start in range(0, len(texts), config.batch_size):
                    some = slice(start, start + config.batch_size)
                    rewards += source(asked[some], texts[some])
                    bar.update(len(texts[some]))
            return Rewards(torch.tensor(rewards))

        return of_text
    if not config.reward_model:
        return None
    roles = load_reward_models(backbone, config.reward_model, own_tokenizer=True)

    def of_models(data: Encoded, answers: Sequence[Answer]) -> Rewards:
        both = [prompt + answer.ids for prompt, answer in zip(data, answers, strict=True)]
        scores = []
        for role in roles:
            read = both
            if backbone.tokenizer_of(role) is not backbone.tokenizer:
                read = reencode(backbone, role, *_texts(data, answers), config.truncate_prompts)
            scores.append(score_rewards(backbone, [role], read, config.batch_size).reward)
        rewards = combine(torch.stack(scores), config.ensemble)
        check_finite(rewards, data.places)
        return rewards

    return of_models


def _texts(data: Encoded, answers: Sequence[Answer]) -> tuple[list[Any], list[str]]:
    return [row["prompt"] for row in data.rows], [answer.text for answer in answers]


def _read_answers(
    config: EvaluateConfig | CompareConfig, backbone: Backbone, path: str, data: Encoded
) -> dict[str, Answer]:
    rows = read_rows(path)
    want_kind(rows, ["completion"], "a file of answers")
    tokenizer, given = backbone.tokenizer, {}
    context = config.max_tokens or backbone.config.max_position_embeddings
    for row, place in zip(rows, rows.places, strict=True):
        ids = answer_ids(row["prompt"], row["completion"], tokenizer, place)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        given.setdefault(_key(row["prompt"]), Answer(text, ids))
    for prompt, row, place in zip(data, data.rows, data.places, strict=True):
        answer = given.get(_key(row["prompt"]))
        if answer is None:
            raise UsageError(f"{path} has no answer to the prompt at {place}; give one to each")
        if len(prompt) + len(answer.ids) > context:
            raise UsageError(
                f"{path}: the answer to {place} has {len(answer.ids)} tokens, with its prompt "
                f"{len(prompt) + len(answer.ids)}, but at most {context} fit; shorten it"
            )
    return given


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
