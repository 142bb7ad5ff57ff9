"""`python -m perl score`: what a reward model says of every answer in a file.

Rows are read, encoded and checked before the first is scored. Then windows of them are scored, each
in batches of like length, and written in the file's order to OUT.part/, which becomes OUT when all
are there; after a kill the same command goes on behind the last row written.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from perl.backbone import Backbone
from perl.config import ScoreConfig, UsageError
from perl.data import Encoded, Rows, encode_examples, encode_pairs, read_rows, want_kind
from perl.ensemble import (
    WINDOW,
    Rewards,
    base_of_reward_model,
    check_finite,
    load_reward_models,
    score_window,
)
from perl.files import GrowingRows, new_file, settings
from perl.progress import progress
from perl.reward import sequences
from perl.run import role_weights
from perl.training import length_limit, open_backbone

KINDS = ["completion", "pairwise", "pointwise", "messages"]


def score(config: ScoreConfig) -> dict[str, Any]:
    """Writes `config.out` and returns how many rows it has, and how many were left out."""
    # ---- load: everything that can be refused is refused before anything is written
    out = new_file(config.out)
    rows = read_rows(config.data, config.format).first(config.rows)
    kind = want_kind(rows, KINDS, "score")
    columns = new_columns(config, rows, kind)
    config = dataclasses.replace(
        config, model=config.model or base_of_reward_model(config.reward_model[0])
    )
    weights = [path for folder in config.reward_model for path in role_weights(folder, "reward")]
    file = GrowingRows(out, settings(config, [config.data, *weights]))
    backbone = open_backbone(config)
    roles = load_reward_models(backbone, config.reward_model)
    examples = encode(config, backbone, rows, kind)
    for note in examples.notes:
        print(f"{config.data}: {note}", file=sys.stderr)

    # ---- loop
    window = WINDOW * config.batch_size
    with file, progress(len(examples), "score", "row", done=file.count) as bar:
        for start in range(file.count, len(examples), window):
            part, sources, places = (
                each[start : start + window] for each in (examples, examples.rows, examples.places)
            )
            rewards = score_window(
                backbone, roles, sequences(part), config.batch_size, config.ensemble
            )
            check_finite(rewards, places)
            file.append([
                row | dict(zip(columns, values, strict=True))
                for row, values in zip(sources, by_row(rewards, kind), strict=True)
            ])  # fmt: skip
            bar.update(len(part))
    file.finish()
    return {"out": str(out), "rows": len(examples), "left_out": len(rows) - len(examples)}


def new_columns(config: ScoreConfig, rows: Rows, kind: str) -> list[str]:
    """The columns to add, which no row has."""
    column, pairs = config.column, kind == "pairwise"
    columns = [f"{column}_chosen", f"{column}_rejected"] if pairs else [column]
    if len(config.reward_model) > 1:
        columns += [f"{name}_std" for name in columns]
    for row, place in zip(rows, rows.places, strict=True):
        if there := [name for name in columns if name in row]:
            raise UsageError(f"{place}: column {there[0]} is there already; give another --column")
    return columns


def encode(config: ScoreConfig, backbone: Backbone, rows: Rows, kind: str) -> Encoded:
    limit = length_limit(config, backbone)
    if kind == "pairwise":
        return encode_pairs(rows, backbone.tokenizer, limit)
    as_read = "completion" if kind == "pointwise" else kind
    return encode_examples(rows, as_read, backbone.tokenizer, limit)


def by_row(rewards: Rewards, kind: str) -> list[list[float]]:
    """The values of each row's new columns; of pairs, all chosen come first in `rewards`."""
    columns = torch.stack([values for values in rewards if values is not None])
    return columns.view(-1, columns.shape[1] // (2 if kind == "pairwise" else 1)).T.tolist()
