"""`python -m perl compare FIRST SECOND`: which of two policies answers held-out prompts better.

Everything is read and checked before the first answer is asked for. Then both policies answer
windows of the prompts, and a judge (perl/judge.py) compares the answers in both orders. Rows are
written in the file's order to OUT.part/, which becomes OUT when all are there; after a kill the
same command goes on behind the last row written. A page beside OUT shows the answers side by side.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perl import judge, policies
from perl.config import CompareConfig, UsageError
from perl.data import Encoded, read_rows
from perl.ensemble import WINDOW, Rewards, base_of_reward_model
from perl.files import GrowingRows, new_file, settings
from perl.policies import Answer
from perl.progress import progress
from perl.report import write_verdicts
from perl.reward_sources import open_text_source
from perl.run import role_weights
from perl.training import open_backbone

SIDES = ("first", "second")


def compare(config: CompareConfig) -> dict[str, Any]:
    """Writes `config.out` and its page, and returns the figures of both policies."""
    # ---- load: everything that can be refused is refused before anything is written
    out, page = new_file(config.out), Path(config.out).with_suffix(".html")
    rows = read_rows(config.data, config.format).first(config.rows)
    policies.want_prompts(config, rows)
    config = dataclasses.replace(config, model=base(config))
    template = judge.read_template(config.judge_template, judge.COMPARISON, judge.PAIR)
    function = None
    if config.judge_function:
        function = judge.load_judge_function(
            config.judge_function, config.judge_timeout, config.batch_size
        )
    source = open_text_source(config, lambda: rows[0]["prompt"])
    file = GrowingRows(out, depends_on(config, template), mendable=functions(config))
    if not file.folder.exists():
        new_file(page)
    backbone = open_backbone(config)
    prompts = policies.encode(config, backbone, rows)
    names = (config.first, config.second)
    both = policies.open_policies(config, backbone, names, prompts)
    rewards_of = policies.open_rewards(config, backbone, source)
    opinions_of = None
    if config.judge_model:
        reader = judge.open_reader(config, backbone, template, ["A", "B"])
        judge.check_room(reader, judge.PAIR, prompts, config.max_new_tokens)
        opinions_of = in_both_orders(judge.language_judge(reader))
    elif function:
        opinions_of = in_both_orders(function)

    # ---- loop
    window = WINDOW * config.batch_size
    with file, progress(len(prompts), "compare", "prompt", done=file.count) as bar:
        for start in range(file.count, len(prompts), window):
            part = prompts.part(slice(start, start + window))
            answers = [policies.answers_of(config, backbone, p, part, start) for p in both]
            rewards = [rewards_of(part, given) for given in answers] if rewards_of else None
            opinions = opinions_of(part, *answers) if opinions_of else by_reward(*rewards)
            kl = [
                policies.kl_to_base(config, backbone, policy, part, given)
                for policy, given in zip(both, answers, strict=True)
            ]
            file.append(rows_of(config, part, answers, opinions, rewards, kl))
            bar.update(len(part))

    # ---- figures
    judged = file.read()
    figures = figures_of(config, judged)
    write_verdicts(page, names, figures, judged)
    file.finish()
    return {"data": config.data, "out": str(out), "page": str(page)} | figures


# ------------------------------------------------------------------------------------- loading


def base(config: CompareConfig) -> str:
    """--model, or what names it: a policy's adapter, a reward model, the judge."""
    model = config.model or policies.base_of_policies([config.first, config.second])
    if model is None and config.reward_model:
        model = base_of_reward_model(config.reward_model[0])
    model = model or config.judge_model
    if model is None:
        raise UsageError("neither policy says which base it is of; give that as --model")
    return model


def depends_on(config: CompareConfig, template: str) -> dict[str, Any]:
    """What the verdicts depend on: flags, and the files of data, functions and models as now."""
    files = [*policies.files_of(config, (config.first, config.second)), *functions(config)]
    for folder in config.reward_model or []:
        files += role_weights(folder, "reward")
    patience = ("judge_timeout", "reward_timeout", "reward_retries")
    return settings(config, files, without=patience) | {"judge_template": template}


def functions(config: CompareConfig) -> list[str]:
    """The files of functions, which may be mended where they fail."""
    named = filter(None, (config.judge_function, config.reward_function))
    return [target.rpartition(":")[0] for target in named]


# ----------------------------------------------------------------------------------- judgement

# of the first policy's answers: shown first, and shown second
Opinions = tuple[list[judge.Opinion], list[judge.Opinion]]


def in_both_orders(
    ask: judge.Judge,
) -> Callable[[Encoded, Sequence[Answer], Sequence[Answer]], Opinions]:
    """A judge of two texts as one of two policies' answers."""

    def opinions(part: Encoded, first: Sequence[Answer], second: Sequence[Answer]) -> Opinions:
        one, other = ([answer.text for answer in answers] for answers in (first, second))
        asked = [row["prompt"] for row in part.rows]
        turned = ask(asked, other, one, part.places)
        return ask(asked, one, other, part.places), [-opinion for opinion in turned]

    return opinions


def by_reward(first: Rewards, second: Rewards) -> Opinions:
    """The difference of rewards, which is the same in any order."""
    found = [judge.Opinion(p) for p in (first.reward - second.reward).tolist()]
    return found, found


# --------------------------------------------------------------------------------------- rows


def rows_of(
    config: CompareConfig,
    part: Encoded,
    answers: Sequence[Sequence[Answer]],
    opinions: Opinions,
    rewards: Sequence[Rewards] | None,
    kl: Sequence[Sequence[float] | None],
) -> list[dict[str, Any]]:
    """{prompt, verdict, preference, first, second}; what is not known is left out."""
    rows = []
    for i, source in enumerate(part.rows):
        both = [of_order[i] for of_order in opinions]
        preference = [opinion.preference for opinion in both]
        row = {
            "prompt": source["prompt"],
            "verdict": judge.verdict(preference, config.tie_margin),
            "preference": preference,
        }
        if both[0].mass is not None:
            row["judge_mass"] = statistics.fmean(opinion.mass for opinion in both)
        for k, side in enumerate(SIDES):
            answer = answers[k][i]
            row[side] = {"completion": answer.text, "tokens": len(answer.ids)}
            if answer.ended is not None:
                row[side]["ended"] = answer.ended
            if rewards:
                row[side]["reward"] = rewards[k].reward[i].item()
            if kl[k]:
                row[side]["kl"] = kl[k][i]
        rows.append(row)
    return rows


def figures_of(config: CompareConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`judge.win_figures` and, of each policy, means over its answers."""
    judges = (config.judge_model, config.judge_function, config.reward_function, config.reward_url)
    who = next(filter(None, judges), None) or " ".join(config.reward_model)
    figures = {"prompts": len(rows), "judge": who}
    figures |= judge.win_figures([row["preference"] for row in rows], config.tie_margin)
    if "judge_mass" in rows[0]:
        figures["judge_mass"] = statistics.fmean(row["judge_mass"] for row in rows)
    for side, name in zip(SIDES, (config.first, config.second), strict=True):
        given = [row[side] for row in rows]
        figures[side] = {"policy": name} | {
            label: statistics.fmean(answer[key] for answer in given)
            for key, label in _MEANS.items()
            if key in given[0]
        }
    return figures


_MEANS = {"reward": "reward", "kl": "kl", "tokens": "length", "ended": "ended"}
