"""Trained models as folders for others: `python -m perl export` and `python -m perl average`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perl.backbone import Backbone, base_of, is_adapter
from perl.config import AverageConfig, ExportConfig, UsageError
from perl.files import empty_folder, new_folder
from perl.run import role_folder
from perl.training import open_backbone

# ---------------------------------------------------------------------------------------------
# export


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes a policy's or reward model's adapter, merged into its base or for PEFT, to `out`."""
    out, folder = empty_folder(config.out), trained_adapter(config.model)
    base = config.base or base_of(folder)
    if config.form == "adapter" and Path(base).is_dir() and not is_model(base):
        raise UsageError(
            f"the base of {folder} is {base}, a run or adapter itself, which PEFT cannot load: "
            f"`python -m perl export --model {shlex.quote(base)} --out BASE` first, then give "
            "--base BASE"
        )
    backbone = open_backbone(dataclasses.replace(config, model=base))
    backbone.load_role("exported", folder)
    with new_folder(out) as temporary:
        if config.form == "merged":
            backbone.merged("exported").save_pretrained(temporary)
        else:
            backbone.save_role("exported", temporary)
        backbone.tokenizer.save_pretrained(temporary)
    tokenizer = backbone.tokenizer
    pad = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    return {"model": str(out), "form": config.form, "base": base, "pad_token_id": pad}


def is_model(folder: str | Path) -> bool:
    """Whether transformers can load the folder as it is."""
    return (Path(folder) / "config.json").is_file()


def trained_adapter(path: str | Path) -> Path:
    """The adapter of a run (its policy or reward model), or the adapter folder itself."""
    folder = Path(path)
    found = [folder / role for role in ("policy", "reward") if (folder / role).is_dir()]
    folder = found[0] if found else role_folder(folder, "policy or reward")
    if is_adapter(folder):
        return folder
    if is_model(folder):
        raise UsageError(
            f"{folder} holds no adapter but a model of its own, which transformers loads as it is; "
            "give a run or folder with an adapter"
        )
    raise UsageError(f"{folder} holds neither an adapter nor a run that trained one")


# ---------------------------------------------------------------------------------------------
# average


def average(config: AverageConfig) -> dict[str, Any]:
    """Writes the weighted average of the runs' adapters and score heads to `out`."""
    out, folders = empty_folder(config.out), [trained_adapter(run) for run in config.runs]
    base = config.model or base_of(folders[0])
    backbone = open_backbone(dataclasses.replace(config, model=base))
    names = [f"run_{i}" for i in range(1, len(folders) + 1)]
    for name, folder in zip(names, folders, strict=True):
        backbone.load_role(name, folder, trainable=True)
    check_alike(backbone, names, folders)
    weights = config.weights or [1.0] * len(names)
    weights = [weight / sum(weights) for weight in weights]
    backbone.average_roles("average", names, weights, config.rank)
    with new_folder(out) as temporary:
        backbone.save_role("average", temporary)
    return {"model": str(out), "base": base, "runs": list(map(str, folders)), "weights": weights}


def check_alike(backbone: Backbone, names: Sequence[str], folders: Sequence[Path]) -> None:
    """Same targets, same rank, and all with a score head or all without."""
    first, *others = ({key: tuple(p.shape) for key, p in backbone.trainable(n)} for n in names)
    for folder, shapes in zip(folders[1:], others, strict=True):
        if different := sorted(first.keys() ^ shapes.keys()):
            only = folders[0] if different[0] in first else folder
            raise UsageError(
                f"{folders[0]} and {folder} do not have the same parts: only {only} has "
                f"{different[0]}; average runs that were trained alike"
            )
        for key, shape in first.items():
            if shapes[key] != shape:
                raise UsageError(
                    f"{key} is {shape} in {folders[0]} and {shapes[key]} in {folder}; average runs "
                    "of one rank"
                )
