"""docs/compatibility.md and README.md say what the tests hold."""

from __future__ import annotations

import compatibility
import pytest
from compatibility import COMMAND, FILE, MARKERS, README, page, readme

pytestmark = pytest.mark.filterwarnings("ignore")


def test_page_is_current():
    assert FILE.read_text(encoding="utf-8") == page(), f"run {COMMAND}"


def test_readme_is_current():
    assert README.read_text(encoding="utf-8") == readme(), f"run {COMMAND}"


def test_the_readmes_part_is_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "README", tmp_path / "README.md")
    monkeypatch.setattr(compatibility, "architectures", lambda: "| table |\n")
    compatibility.README.write_text("before\nold\n".join(MARKERS) + "after\n")
    assert readme() == f"{MARKERS[0]}\n| table |\n\n{MARKERS[1]}after\n"
