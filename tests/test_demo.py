import json

import pytest

from perl import demo
from perl.config import DemoConfig, UsageError


def figures(step_ms):
    phase = {"step_ms": step_ms, "peak_mb": 500.0, "trainable_parameters": 40960}
    scores = {"reward_accuracy": 0.9, "oracle_before": 0.5, "oracle_after": 0.7, "kl": 1.0}
    return {name: phase for name in demo.ROLES} | scores


def test_the_table_has_a_row_for_each_figure_and_a_column_for_each_arm():
    table = demo.results_table({"arms": {"LoRA": figures(10.0), "full": figures(20.0)}})
    by_name = {row[""]: row for row in table}
    assert by_name["reward: step, ms"] == {"": "reward: step, ms", "LoRA": "10", "full": "20"}
    assert by_name["oracle after REINFORCE, 0 to 1"]["LoRA"] == "0.700"
    assert len(table) == 3 * len(demo.ROLES) + 4


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        demo.run(DemoConfig(out=str(tmp_path)))


@pytest.mark.slow
def test_the_whole_demo_in_a_few_steps(tmp_path):
    demo.run(DemoConfig(out=str(tmp_path / "demo"), quick=True))
    results = json.loads((tmp_path / "demo/results.json").read_text())
    lora, full = results["arms"]["LoRA"], results["arms"]["full"]
    assert lora["SFT"]["trainable_parameters"] < full["SFT"]["trainable_parameters"]
    assert lora["reward"]["step_ms"] > 0 and full["REINFORCE"]["peak_mb"] > 0
    page = (tmp_path / "demo/report.html").read_text()
    assert "oracle after REINFORCE" in page and "<svg" in page
