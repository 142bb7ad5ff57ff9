"""The study: its plan, that finished work is kept, and what is told from the figures."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from perl import cli, stories, studies, study
from perl.config import StudyConfig, UsageError, make
from perl.run import Interrupted
from perl.study_policy import CAFE_ANSWERS, TASKS, PolicyStudy
from perl.study_reward import CAFE_PAIRS, RewardStudy


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
    rank = re.search(r"rank-(\d+)", name)
    rank = int(rank[1]) if rank else job.flags.get("lora_rank", 64)
    value = (
        0.9
        + rank / 1000
        + 0.02 * ("tiny" in name or "sweeps" in name)
        + job.flags.get("seed", 0) / 100
    )
    cost = {"step_ms": 10.0, "peak_mb": 300.0}
    if name.startswith("cost"):
        return {"step_ms": 20.0, "peak_mb": 400.0} if name.endswith("full") else cost
    told = {"validation_accuracy": value, "validation_auc": value, "lr": 0.5, "reward": value}
    policy = {"kl": 3.0, "length": 20.0, "frontier": [[0.0, 0.5], [3.0, value]]}
    before = {"reward_before": 0.5, "kl_before": 0.0, "length_before": 30.0}
    before["reward_std_before"] = 0.1
    return cost | told | policy | before


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
    for made in studies.STUDIES.values():
        monkeypatch.setattr(made, "figures", lambda self, job: figure(job))
    names = ("cafe/mini", "cafe/tiny", "cafe/small", "81M")
    parameters = {name: 10**6 * number for number, name in enumerate(names, 1)}

    def make_models(self):
        self.record.update(parameters=parameters)

    for made in studies.STUDIES.values():
        monkeypatch.setattr(made, "make_models", make_models)
    return ran, stop


def test_the_plan_has_every_cell_once_and_sweeps_first(tmp_path, alone):
    plan = RewardStudy(config(tmp_path))
    names = [job.name for job in jobs(plan)]
    assert len(names) == len(set(names))
    cells = (1 + 3 + 1) * 6  # seeds of three sizes; five ranks and full
    assert len([n for n in names if n.startswith("cells")]) == cells - 2  # two are in the sweeps
    assert names.index("sweeps/cafe-pairs/full") < min(
        i for i, name in enumerate(names) if name.startswith("cells")
    )
    assert len(list(plan.costs())) == 6 + 2 * 2 + 6  # a size whole, two by rank 16 and full, 81M
    told = {
        plan.cell_name(CAFE_PAIRS, size, arm, seed)
        for size in study.CAFE.sizes
        for arm in plan.preset.arms
        for seed in range(CAFE_PAIRS.seeds_of(size))
    }
    assert told == {name for name in names if name.startswith(("cells", "sweeps"))}


def test_the_bars_are_held_at_one_size_by_rank_16_and_full(tmp_path, alone):
    names = [job.name for job in jobs(RewardStudy(config(tmp_path, preset="bars")))]
    cells = {name.removeprefix("cells/cafe-pairs/tiny/") for name in names if "cells" in name}
    assert cells == {f"{arm}/seed-{n}" for arm in ("full", "rank-16") for n in (1, 2)}
    with pytest.raises(UsageError, match="perl study policy has no --preset bars; it has cpu"):
        studies.run(config(tmp_path, task="policy", preset="bars"))


def test_a_study_of_cost_alone_takes_no_options_of_quality(tmp_path):
    for option, given in (
        ("--no-cost", {"cost": False}), ("--at-once", {"at_once": 3}),
        ("--data-folder", {"data_folder": str(tmp_path)}),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"{option} is for presets that tell of quality, and"):
            RewardStudy(config(tmp_path, preset="tiny", **given))


def test_cells_differ_in_what_they_compare_and_in_nothing_else(tmp_path, alone):
    plan = RewardStudy(config(tmp_path))
    full, lora = (plan.cell(CAFE_PAIRS, "tiny", arm, 2) for arm in ("full", "rank 4"))
    assert full.flags | {"tuning": "lora", "lora_rank": 4} == lora.flags
    assert (full.lr_of, lora.lr_of) == ("sweeps/cafe-pairs/full", "sweeps/cafe-pairs/lora")


def test_what_is_done_is_kept_and_costs_wait_for_their_time(
    tmp_path, alone, pretended, monkeypatch
):
    monkeypatch.setattr(study, "write_figure", lambda path, drawings: None)  # a second each
    ran, stop = pretended
    stop.add("cells/cafe-pairs/tiny/rank-8/seed-1")
    with pytest.raises(Interrupted, match="go on with: python -m perl study reward"):
        studies.run(config(tmp_path, cost=False))
    first = [name for name, _, _ in ran]
    record = json.loads((tmp_path / "study/study.json").read_text())
    assert list(record["jobs"]) == first and first[0] == "bases/cafe/mini/0"
    with pytest.raises(UsageError, match="or --resume to go on with the study"):
        studies.run(config(tmp_path))
    stop.clear()
    assert "cost = true" in (tmp_path / "study/config.toml").read_text()  # a later --resume's
    studies.run(config(tmp_path, resume=True, cost=False, at_once=3))
    assert {at_once for _, _, at_once in ran[len(first) :]} == {3}
    names = [name for name, _, _ in ran]
    assert len(names) == len(set(names)) and not any(n.startswith("cost") for n in names)
    studies.run(config(tmp_path, resume=True, threads=2))
    costs = [(line, at_once) for name, line, at_once in ran if name.startswith("cost")]
    assert len(costs) == 16 and all(at_once == 1 for _, at_once in costs)
    assert all(line[line.index("--threads") + 1] == "2" for line, _ in costs)
    cell = next(line for name, line, _ in ran if name.startswith("cells"))
    assert cell[cell.index("--lr") + 1] == "0.5"  # the sweep's


def test_tables_bars_and_figure(tmp_path, alone, pretended, capsys):
    studies.run(config(tmp_path))
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


def test_without_matplotlib_the_tables_are_there(tmp_path, alone, pretended, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    studies.run(config(tmp_path))
    assert "pip install matplotlib, then --resume draws it" in capsys.readouterr().err
    assert (tmp_path / "study/table.md").exists() and not (tmp_path / "study/figure.svg").exists()


def test_without_real_rows_it_says_so_and_with_them_every_task_is_there(
    tmp_path, alone, shared_data, monkeypatch, capsys
):
    assert [t.name for t in RewardStudy(config(tmp_path)).preset.tasks] == ["cafe-pairs"]
    assert "the study is of the embedded world alone" in capsys.readouterr().err
    monkeypatch.setenv("PERL_SHARED", str(shared_data.parent))
    plan = RewardStudy(config(tmp_path))
    assert len(plan.preset.tasks) == 3 and not capsys.readouterr().err
    with pytest.raises(UsageError, match="--data-folder .* has no data/ and models/"):
        RewardStudy(config(tmp_path, data_folder=str(tmp_path)))


def test_depths_of_a_real_model(shared_data):
    import torch

    wanted = {"2 layers": [0, 2], "3 layers": [0, 1, 3], "5 layers": [0, 1, 2, 3, 4]}
    whole = study._stories(shared_data.parent, "5 layers")[0].model.layers
    for size, first in wanted.items():
        model, _ = study._stories(shared_data.parent, size)
        assert len(model.model.layers) == model.config.num_hidden_layers == int(size.split()[0])
        for layer, i in zip(model.model.layers, first, strict=False):
            assert torch.equal(layer.mlp.up_proj.weight, whole[i].mlp.up_proj.weight)


@pytest.mark.parametrize("task", studies.STUDIES)
def test_the_tiny_preset_runs_whole(tmp_path, monkeypatch, task):
    def run_all(lines, logs, *, at_once, done):
        for name, line in lines.items():
            assert cli.main(line) == 0, name
            done(name)

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(cli, "_report", lambda config: None)
    studies.run(config(tmp_path, task=task, preset="tiny", threads=1, device="cpu"))
    folder = tmp_path / "study"
    record = json.loads((folder / "study.json").read_text())
    reward_models = {"policy": {"rewards/mini"}}.get(task, set())
    assert set(record["jobs"]) == {"cost/mini/full", "cost/mini/rank-4"} | reward_models
    assert all(cost["step_ms"] > 0 and cost["peak_mb"] > 0 for cost in record["jobs"].values())
    assert not list(folder.rglob("checkpoints")) and "(1.00)" in (folder / "table.md").read_text()
    rows = [json.loads(line) for line in (folder / "cost/mini/full/metrics.jsonl").open()]
    if task == "reward":
        assert rows[0]["tokens"] > 0.9 * 2 * 2 * 64  # sequences as long as the shape says
    else:
        answered = 2 * 64 / rows[0]["tokens_per_s"]
        assert answered == pytest.approx(rows[0]["step_s"], rel=0.1)


# ------------------------------------------------------------------------------------ policies


def policies(tmp_path, **changes):
    return PolicyStudy(config(tmp_path, task="policy", **changes))


def test_the_plan_of_policies(tmp_path, shared_data):
    plan = policies(tmp_path, data_folder=str(shared_data.parent))
    names = [job.name for job in jobs(plan)]
    assert len(names) == len(set(names))
    assert len([n for n in names if n.startswith("cells")]) == 5 * (3 + 1 + 2)
    judged = [name for name in names if name.startswith("judged")]
    assert len(judged) == 1 + 5 * 3 and all("/cafe/" in name for name in judged)
    first = {name.partition("/")[0]: names.index(name) for name in reversed(names)}
    order = ["stories", "bases", "rewards", "sweeps", "judged", "cells"]
    assert sorted(first, key=first.get) == order
    full, lora = (plan.cell(CAFE_ANSWERS, "tiny", arm, 2) for arm in ("full", "rank 4"))
    assert full.flags | {"tuning": "lora", "lora_rank": 4} == lora.flags
    judge = plan.judged(CAFE_ANSWERS, "rank 4", 2)
    assert judge.flags["model"] == str(plan.out / lora.name) and lora.keeps == "policy"
    for task in TASKS:
        reward = plan.flags(task, task.family.chosen, "full")
        assert ("reward_model" in reward) != ("reward_function" in reward)
    for job in [job for job in jobs(plan) if not job.lr_of]:  # what the commands would be given
        cls, _, _ = cli.COMMANDS[job.command]
        flags = {name: value for name, value in job.flags.items() if name != "sweep"}
        make(cls, flags | {"out": "run"})
    plan.jobs.update({job.name: figure(job) for job in jobs(plan)})
    found = {row[""]: row["found"] for row in plan.bars()}
    assert (
        found["Stories of a given animal: success rate, rank 16"] == "0.921"
    )  # 0.916 + seed / 100
    coffee = "reward model's score, rank 16"
    assert found[f"Coffee dialogs: {coffee} less SFT, in its deviations"] == "4.160"
    assert found["Coffee dialogs: KL in nats, rank 16"] == "3.000"
    for told in plan.jobs.values():  # nothing learned, nothing to divide by
        told.update({name: 0.0 for name in told if "reward" in name})
    assert not any("over full" in row[""] or "deviations" in row[""] for row in plan.bars())


def test_tables_bars_and_figure_of_policies(tmp_path, alone, pretended, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(study, "write_figure", lambda path, drawings: drawn.extend(drawings))
    studies.run(config(tmp_path, task="policy"))
    text = (tmp_path / "study/table.md").read_text()
    assert text in capsys.readouterr().out
    reached = "| 0.936 ± 0.000 | 0.946 ± 0.010 | 3.0 ± 0.0 | 20.0 ± 0.0 |"  # oracle, reward
    assert f"| rank 16 {reached}" in text
    assert "| SFT | 0.984 | 0.500 ± 0.000 | 0.0 ± 0.0 | 30.0 ± 0.0 |" in text
    assert "| rank 1 | 10 ms (0.50) | 300 MB (0.75) |" in text
    assert "| Embedded world: oracle, 0 to 1, rank 16 over full | ≥ 0.9 | 0.951 | met |" in text
    by_rank, frontier, *costs = drawn
    assert list(by_rank.values["Embedded world"]) == ["1", "4", "8", "16", "full"]
    assert frontier.lines["rank 16"] == ([0.0, 3.0], [0.5, pytest.approx(0.946)])
    assert [bars.title for bars in costs] == ["Step time", "Peak memory"]


def test_a_study_of_policies_goes_on_where_it_stopped(tmp_path, alone, pretended, monkeypatch):
    monkeypatch.setattr(study, "write_figure", lambda path, drawings: None)
    ran, stop = pretended
    stop.add("judged/cafe/tiny/rank-8/seed-1")
    with pytest.raises(Interrupted, match="go on with: python -m perl study policy"):
        studies.run(config(tmp_path, task="policy"))
    assert ran[-1][0] == "judged/cafe/tiny/rank-16/seed-1"
    stop.clear()
    studies.run(config(tmp_path, task="policy", resume=True))
    names = [name for name, _, _ in ran]
    plan = policies(tmp_path, resume=True)
    assert names == [job.name for job in (*jobs(plan), *plan.costs())]


def test_a_sweep_of_policies_chooses_by_the_objective(tmp_path, alone):
    plan = policies(tmp_path)
    job = plan.sweep(CAFE_ANSWERS, "lora")
    runs = {
        "lr=0.001": {"lr": 0.001, "score": 1.0, "validation_reward": 1.0, "validation_kl": 0.5},
        "lr=0.002": {"lr": 0.002, "score": 1.2, "validation_reward": 1.2, "validation_kl": 5.0},
        "lr=0.004": {"lr": 0.004},  # its loss was not finite
    }
    folder = plan.out / job.name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    assert plan.figures(job) == runs["lr=0.001"] | {"runs": runs}


def test_figures_of_a_policy_and_of_the_judge(tmp_path, alone):
    plan = policies(tmp_path)
    cell = plan.cell(CAFE_ANSWERS, "tiny", "full", 0)
    folder = plan.out / cell.name
    (folder / "policy").mkdir(parents=True)
    held_out = [
        {"validation_reward": reward, "validation_reward_std": 0.3, "validation_kl": kl}
        for reward, kl in ((0.1, 0.0), (0.7, 4.0))
    ]
    rows = [held_out[0]] + [{"length": 40.0 - i, "step_s": 0.01} for i in range(20)]
    rows[-1] |= held_out[1]
    rows = [{"step": step} | row for step, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plan.figures(cell)
    assert found == {
        "reward_before": 0.1, "reward_std_before": 0.3, "reward": 0.7,
        "kl_before": 0.0, "kl": 4.0, "frontier": [[0.0, 0.1], [4.0, 0.7]],
        "length_before": 40.0, "length": pytest.approx(25.5),
        "step_ms": pytest.approx(10.0),
    }  # fmt: skip
    plan.throw_away(cell)
    assert (folder / "policy").is_dir()  # the judge is still to come
    judge = plan.judged(CAFE_ANSWERS, "full", 0)
    figures = plan.out / judge.name / "figures.jsonl"
    figures.parent.mkdir(parents=True)
    figures.write_text('{"policy": "/a/folder", "reward": 0.8}\n')
    assert plan.figures(judge) == {"reward": 0.8}
    plan.throw_away(judge)
    assert not (folder / "policy").exists()
    line = plan.line(judge, 1)  # after a kill before the figures were kept
    assert line[line.index("--out") + 1] == str(figures) and not figures.exists()


def test_stories_are_cut_to_demonstrations(tmp_path, alone):
    plan = policies(tmp_path)
    told = plan.out / "stories/told.jsonl"
    told.parent.mkdir(parents=True)
    rows = [
        {"prompt": "Tim met a cow.", "completion": 'The cow said, "Hi!" He ran. They pl'},
        {"prompt": "Tim met a cow.", "completion": "He was sad and"},
        {"prompt": "Tim met a pig.", "completion": "He ran. He sat! He slept."},
    ]
    told.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plan.figures(plan.tell_stories()) == {"demonstrations": 2, "success": 0.5}
    kept = [json.loads(line) for line in (told.parent / "demonstrations.jsonl").open()]
    assert [row["completion"] for row in kept] == ['The cow said, "Hi!" He ran.', "He ran. He sat!"]


@pytest.mark.parametrize(
    ("story", "good"),
    [
        ("The frog was happy.", 1.0),
        ('Mia said, "Two frogs!"', 1.0),
        ("The frog was happy", 0.0),  # cut off
        ("The dog was happy.", 0.0),
        ("The frogman was happy.", 0.0),
        ("The frog was " + "very " * (stories.WORDS - 4) + "happy.", 1.0),
        ("The frog was " + "very " * (stories.WORDS - 3) + "happy.", 0.0),  # too long
        ("", 0.0),
    ],
)
def test_the_reward_of_a_story(story, good):
    assert stories.reward(["One day, Mia saw a frog by the lake."], [story]) == [good]


def test_held_out_stories_are_of_other_names():
    training, held_out = stories.prompts()
    assert len(set(training)) == len(training) > 1000 and len(set(held_out)) == len(held_out) == 128
    for name in stories.NAMES:
        found = [texts is held_out for texts in (training, held_out) if name in " ".join(texts)]
        assert found == [name in stories.HELD_OUT]
    assert stories.reward(held_out, [""] * len(held_out)) == [0.0] * len(held_out)
    with pytest.raises(ValueError, match="names none of bear"):
        stories.reward(["Mia met a dragon."], ["The dragon."])
