"""`python -m perl study reward` and `python -m perl study policy`."""

from __future__ import annotations

import json
from pathlib import Path

from perl.config import StudyConfig
from perl.study import Study
from perl.study_policy import PolicyStudy
from perl.study_reward import RewardStudy

STUDIES = {"reward": RewardStudy, "policy": PolicyStudy}


def run(config: StudyConfig) -> None:
    """Does what is not done yet, prints the tables and writes study.json, table.md, figure.svg."""
    STUDIES[config.task](config).run()


def told_by(folder: Path) -> Study:
    """The study whose study.json is in a folder called study-TASK..., to tell of."""
    record = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    task = next(task for task in STUDIES if folder.name.startswith(f"study-{task}"))
    config = StudyConfig(task=task, preset=record["preset"], out=str(folder))
    return STUDIES[task](config, record)
