"""docs/compatibility.md is what the tests say."""

from __future__ import annotations

from compatibility import COMMAND, FILE, page


def test_page_is_current():
    assert FILE.read_text(encoding="utf-8") == page(), f"run {COMMAND}"
