"""`python -m perl study reward` and `python -m perl study policy`."""

from __future__ import annotations

from perl.config import StudyConfig
from perl.study_policy import PolicyStudy
from perl.study_reward import RewardStudy

STUDIES = {"reward": RewardStudy, "policy": PolicyStudy}


def run(config: StudyConfig) -> None:
    """Does what is not done yet, prints the tables and writes study.json, table.md, figure.svg."""
    STUDIES[config.task](config).run()
