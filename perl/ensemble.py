"""One reward from one or several reward models on one backbone.

    mean           r = 1/M sum_m r_m       what most of them say
    min            r = min_m r_m           what none of them doubts
    disagreement   std_m r_m               how far an answer's score is to be trusted

A policy learns what a single reward model gets wrong; several that were trained apart (seeds, data
order, hyperparameters) err apart (arXiv 2310.02743, 2312.09244). Each is a role of the backbone, so
M adapters cost M passes, and the memory of one base.

Scores are taken as they are. Pairs fix a reward model's scores only up to a constant, which adds
to the disagreement and decides `min`: train on labels, or on pairs with a term that centres the
scores, where that matters. Averaging the weights instead of the scores, `python -m perl average`,
costs one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from perl.backbone import Backbone, base_of, is_adapter
from perl.config import RewardConfig, UsageError, read_toml
from perl.progress import progress
from perl.reward import not_finite, score_all
from perl.run import role_folder

WINDOW = 16  # batches that are sorted by length together, between two steps of a progress bar


class Rewards(NamedTuple):
    """What answers get, and how far several reward models differ about each; None for a single."""

    reward: Tensor  # (N,)
    disagreement: Tensor | None = None  # (N,)

    def figures(self) -> dict[str, float]:
        """reward and reward_std over the answers; disagreement, its mean, where there is one."""
        figures = {
            "reward": self.reward.mean().item(),
            "reward_std": self.reward.std(correction=0).item(),
        }
        if self.disagreement is not None:
            figures["disagreement"] = self.disagreement.mean().item()
        return figures


def joined(parts: Sequence[Rewards]) -> Rewards:
    """The rewards of all parts, one after another."""
    columns = zip(*parts, strict=True)
    return Rewards(*(None if column[0] is None else torch.cat(column) for column in columns))


def combine(scores: Tensor, how: str | None = None) -> Rewards:  # (M, N)
    """One reward from M models' scores; how: "mean" (None too) or "min"."""
    if len(scores) == 1:
        return Rewards(scores[0])
    reward = scores.amin(0) if how == "min" else scores.mean(0)
    return Rewards(reward, scores.std(0, correction=0))


def load_reward_models(
    backbone: Backbone, folders: Sequence[str], own_tokenizer: bool = False
) -> list[str]:
    """Adds a role for each folder (a run's, or the reward model's own) and returns their names.

    own_tokenizer: see `Backbone.load_role`.
    """
    if len(folders) == 1:
        names = ["reward"]
    else:
        names = [f"reward_{i}" for i in range(1, len(folders) + 1)]
    for name, folder in zip(names, folders, strict=True):
        folder = role_folder(folder, "reward")
        backbone.load_role(name, folder, scalar=True, own_tokenizer=own_tokenizer)
    return names


def score_window(
    backbone: Backbone,
    roles: Sequence[str],
    sequences: Sequence[list[int]],
    batch_size: int,
    how: str | None = None,
) -> Rewards:  # (N,) float32 on the CPU
    """Rewards of a few token sequences, prompt and answer together, by the models of the roles."""
    scores = [score_all(backbone, role, sequences, batch_size) for role in roles]
    return combine(torch.stack(scores), how)


def score_rewards(
    backbone: Backbone,
    roles: Sequence[str],
    sequences: Sequence[list[int]],
    batch_size: int,
    how: str | None = None,
) -> Rewards:  # (N,) float32 on the CPU
    """`score_window` of any number, behind a progress bar."""
    parts, window = [], WINDOW * batch_size
    with progress(len(sequences), "score", "answer") as bar:
        for start in range(0, len(sequences), window):
            part = sequences[start : start + window]
            parts.append(score_window(backbone, roles, part, batch_size, how))
            bar.update(len(part))
    return joined(parts)


def check_finite(rewards: Rewards, places: Sequence[str]) -> None:
    """UsageError that names the row whose answer has no finite reward; see `not_finite`."""
    if wrong := not_finite(rewards.reward, places):
        raise UsageError(f"{wrong}; the reward model is broken, or overflows in this --dtype")


def base_of_reward_model(folder: str) -> str:
    """The model that a reward model (a run's, or its own folder) was trained on."""
    trained = role_folder(folder, "reward")
    if is_adapter(trained):
        return base_of(trained)
    if (Path(folder) / "config.toml").is_file():
        return read_toml(Path(folder) / "config.toml", RewardConfig)["model"]
    raise UsageError(f"{folder} does not say which base it was trained on; give that as --model")
