"""The study: its plan, that finished work is kept, and what is told from the figures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from perl import cli, study
from perl.config import StudyConfig, UsageError
from perl.run import Interrupted


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No real rows at hand."""
    monkeypatch.setenv("PERL_SHARED", str(tmp_path / "none"))


def config(tmp_path, **changes):
    return StudyConfig(**{"task": "reward", "out": str(tmp_path / "study")} | changes)


def jobs(plan):
    return [job for stage in plan.learning() for job in stage]


def figure(job):
    """Figures that a job might tell: quality grows with rank and size, full tuning costs double."""
    name = job.name
    rank = job.flags.get("lora_rank", 64)
    value = (
        0.9
        + rank / 1000
        + 0.02 * ("tiny" in name or "sweeps" in name)
        + job.flags.get("seed", 0) / 100
    )
    cost = {"step_ms": 10.0, "peak_mb": 300.0}
    if name.startswith("cost") and name.endswith("full"):
        cost = {"step_ms": 20.0, "peak_mb": 400.0}
    return cost | {"validation_accuracy": value, "validation_auc": value, "lr": 0.5}


@pytest.fixture
def pretended(monkeypatch):
    """Nothing is trained. (the jobs that ran, in order; the names at which Ctrl-C comes)."""
    ran, stop = [], set()

    def run_all(lines, logs, *, at_once, done):
        for name in lines:
            if name in stop:
                raise KeyboardInterrupt
            ran.append((name, lines[name], at_once))
            done(name)

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(study.Study, "figures", lambda self, job: figure(job))
    names = ("cafe/mini", "cafe/tiny", "cafe/small", "81M")
    parameters = {name: 10**6 * number for number, name in enumerate(names, 1)}

    def make_models(self):
        self.record.update(parameters=parameters)

    monkeypatch.setattr(study.Study, "make_models", make_models)
    return ran, stop


def test_the_plan_has_every_cell_once_and_sweeps_first(tmp_path, alone):
    plan = study.Study(config(tmp_path))
    names = [job.name for job in jobs(plan)]
    assert len(names) == len(set(names))
    cells = (1 + 3 + 1) * 6  # seeds of three sizes; five ranks and full
    assert len([n for n in names if n.startswith("cells")]) == cells - 2  # two are in the sweeps
    assert names.index("sweeps/cafe-pairs/full") < min(
        i for i, name in enumerate(names) if name.startswith("cells")
    )
    assert len(list(plan.costs())) == 6 + 2 * 2 + 6  # a size whole, two by rank 16 and full, 81M
    told = {
        plan.cell_name(study.CAFE_PAIRS, size, arm, seed)
        for size in study.CAFE.sizes
        for arm in plan.preset.arms
        for seed in range(study.CAFE_PAIRS.seeds_of(size))
    }
    assert told == {name for name in names if name.startswith(("cells", "sweeps"))}


def test_cells_differ_in_what_they_compare_and_in_nothing_else(tmp_path, alone):
    plan = study.Study(config(tmp_path))
    full, lora = (plan.cell(study.CAFE_PAIRS, "tiny", arm, 2) for arm in ("full", "rank 4"))
    assert full.flags | {"tuning": "lora", "lora_rank": 4} == lora.flags
    assert (full.lr_of, lora.lr_of) == ("sweeps/cafe-pairs/full", "sweeps/cafe-pairs/lora")


def test_what_is_done_is_kept_and_costs_wait_for_their_time(
    tmp_path, alone, pretended, monkeypatch
):
    monkeypatch.setattr(study, "write_figure", lambda path, drawings: None)  # a second each
    ran, stop = pretended
    stop.add("cells/cafe-pairs/tiny/rank-8/seed-1")
    with pytest.raises(Interrupted, match="go on with: python -m perl study reward"):
        study.run(config(tmp_path, cost=False))
    first = [name for name, _, _ in ran]
    record = json.loads((tmp_path / "study/study.json").read_text())
    assert list(record["jobs"]) == first and first[0] == "bases/cafe/mini/0"
    with pytest.raises(UsageError, match="or --resume to go on with the study"):
        study.run(config(tmp_path))
    stop.clear()
    study.run(config(tmp_path, resume=True, cost=False, at_once=3))
    names = [name for name, _, _ in ran]
    assert len(names) == len(set(names)) and not any(n.startswith("cost") for n in names)
    study.run(config(tmp_path, resume=True, threads=2))
    costs = [(line, at_once) for name, line, at_once in ran if name.startswith("cost")]
    assert len(costs) == 16 and all(at_once == 1 for _, at_once in costs)
    assert all(line[line.index("--threads") + 1] == "2" for line, _ in costs)
    cell = next(line for name, line, _ in ran if name.startswith("cells"))
    assert cell[cell.index("--lr") + 1] == "0.5"  # the sweep's


def test_tables_bars_and_figure(tmp_path, alone, pretended, capsys):
    study.run(config(tmp_path))
    text = (tmp_path / "study/table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| rank 16 | 0.916 | 0.946 ± 0.010 | 0.916 |" in text
    assert "| rank 16 | 10 ms (0.50) | 300 MB (0.75) | 10 ms (0.50) |" in text
    assert "| rank 1 | – | – | 10 ms (0.50) | 300 MB (0.75) | – | – |" in text
    assert "| Embedded world, pairs: accuracy, rank 16, tiny | ≥ 0.95 | 0.946 | missed |" in text
    assert "| Embedded world, pairs: full less rank 16, tiny | ≤ 0.02 | 0.048 | missed |" in text
    drawn = ElementTree.parse(tmp_path / "study/figure.svg").getroot()
    style = next(node.text for node in drawn.iter() if node.tag.endswith("style"))
    assert "prefers-color-scheme: dark" in style
    assert "#1f6feb" not in ElementTree.tostring(drawn, "unicode").replace(style, "")


def test_without_real_rows_it_says_so_and_with_them_every_task_is_there(
    tmp_path, alone, shared_data, monkeypatch, capsys
):
    assert [t.name for t in study.Study(config(tmp_path)).preset.tasks] == ["cafe-pairs"]
    assert "the study is of the embedded world alone" in capsys.readouterr().err
    monkeypatch.setenv("PERL_SHARED", str(shared_data.parent))
    plan = study.Study(config(tmp_path))
    assert len(plan.preset.tasks) == 3 and not capsys.readouterr().err
    with pytest.raises(UsageError, match="--data-folder .* has no data/ and models/"):
        study.Study(config(tmp_path, data_folder=str(tmp_path)))


def test_depths_of_a_real_model(shared_data):
    import torch

    wanted = {"2 layers": [0, 2], "3 layers": [0, 1, 3], "5 layers": [0, 1, 2, 3, 4]}
    whole = study._stories(shared_data.parent, "5 layers")[0].model.layers
    for size, first in wanted.items():
        model, _ = study._stories(shared_data.parent, size)
        assert len(model.model.layers) == model.config.num_hidden_layers == int(size.split()[0])
        for layer, i in zip(model.model.layers, first, strict=False):
            assert torch.equal(layer.mlp.up_proj.weight, whole[i].mlp.up_proj.weight)


def test_the_tiny_preset_runs_whole(tmp_path, monkeypatch):
    def run_all(lines, logs, *, at_once, done):
        for name, line in lines.items():
            assert cli.main(line) == 0, name
            done(name)

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(cli, "_report", lambda config: None)
    study.run(config(tmp_path, preset="tiny", threads=1, device="cpu"))
    folder = tmp_path / "study"
    record = json.loads((folder / "study.json").read_text())
    assert set(record["jobs"]) == {"cost/mini/full", "cost/mini/rank-4"}
    assert all(cost["step_ms"] > 0 and cost["peak_mb"] > 0 for cost in record["jobs"].values())
    assert not list(folder.rglob("checkpoints")) and "(1.00)" in (folder / "table.md").read_text()
    rows = (folder / "cost/mini/full/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["tokens"] > 0.9 * 2 * 2 * 64  # sequences as long as the shape says
