"""The benchmark harness: what it times, weighs, checks, keeps and prints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    _bars,
    _figures,
    _limits,
    _measure,
    _page,
    _results,
    _targets,
    _timelines,
    check,
    conftest,
    gpu,
    growth,
    report,
)
from benchmarks._measure import Case, Compared, Contest
from benchmarks._results import Results, Row
from perl import cli, studies, train_policy, train_reward
from perl.backbone import Backbone
from perl.config import StudyConfig
from perl.optimizer import Optimizer
from perl.study_policy import PolicyStudy
from perl.study_reward import RewardStudy

ROOT = Path(__file__).parents[1]
MIB = 2**20
ROOMS = [
    "lora_linear", "lora_linear_parts", "lora_mlp", "multi_lora_linear",
    "rms_norm", "linear_log_prob", "linear_kl", "policy_loss", "log_prob",
    "head_rows", "rollout",
]  # fmt: skip


def make_row(**changes):
    row = Row(
        room="lora_linear", check=_bars.TRAIN, shape={"N": 8, "D": 4, "O": 4, "R": 16},
        dtype="bf16", device="cpu", backend="cpu", median_s=2e-3, spread=0.05, rounds=5,
        contestants={
            "frozen": {"median_s": 2e-3, "ratio": 1.0, "low": 0.9, "high": 1.1},
            "peft": {"median_s": 5e-3, "ratio": 0.4, "low": 0.3, "high": 0.5},
        },
        missing={}, memory={"ours": 3 * MIB, "peft": 9 * MIB}, memory_kind="beyond",
        errors=[{"of": "y", "unit": "relative RMS", "ours": 1e-3, "plain": 2e-3}],
        measures={"flop_per_s": 3e9}, bars=[],
    )  # fmt: skip
    row = replace(row, **changes)
    row.bars = _bars.judge(row)
    return row


def make_results(*rows, name="lora_linear"):
    machine = {
        "cpu": "Some CPU @ 2.00GHz", "instruction_sets": ["avx2"], "torch_uses": "AVX2",
        "kernels_use": "AVX2", "cores": 2, "threads": 2, "memory_bytes": 2**34, "system": "Linux",
    }  # fmt: skip
    versions = dict.fromkeys(_results.PACKAGES, "1.0")
    date = "2026-01-02T03:04:05+00:00"
    return Results(name, "full", "pytest benchmarks", date, machine, versions, list(rows))


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a contestant does its work."""
    now = [0.0]
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: now[0])

    def contestant(*durations):
        calls = [0]

        def run():
            now[0] += durations[calls[0] % len(durations)]
            calls[0] += 1
            return ()

        return run

    return contestant


def test_ratios_are_medians_within_rounds(clock):
    # The machine becomes three times slower for two rounds of five: both are hit alike.
    run = {
        "ours": clock(0.25, 0.25, 0.25, 0.75, 0.75, 0.25, 0.25),
        "other": clock(0.5, 0.5, 0.5, 1.5, 1.5, 0.5, 0.5),
    }
    times = _measure.time_on_cpu(run, seconds=0.0)
    assert times["ours"] == [0.25, 0.75, 0.75, 0.25, 0.25]
    assert times["other"] == [0.5, 1.5, 1.5, 0.5, 0.5]
    median, spread, contestants = _measure.summarise(times)
    assert (median, spread) == (0.25, 2.0)
    assert contestants["other"] == {"median_s": 0.5, "ratio": 0.5, "low": 0.5, "high": 0.5}


def test_rounds_fill_the_time_within_limits():
    assert _measure.rounds_for(one_round=0.1, seconds=1.0) == 10
    assert _measure.rounds_for(one_round=1.0, seconds=1.0) == 5
    assert _measure.rounds_for(one_round=30.0, seconds=1.0) == 3
    assert _measure.rounds_for(one_round=1e-6, seconds=1.0) == 201


# ------------------------------------------------------------------------------------------------
# Peers
# ------------------------------------------------------------------------------------------------


def test_peers_that_cannot_be_imported_are_named(tmp_path, monkeypatch):
    (tmp_path / "peer_without_driver.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    on_gpu, missing = Case("none", "none", {"N": 1}, "bf16", "cuda"), {}
    assert _measure.gpu_peer(on_gpu, "no_such_peer.ops", "run", missing) is None
    assert _measure.gpu_peer(on_gpu, "peer_without_driver", "run", missing) is None
    assert _measure.gpu_peer(on_gpu, "json", "loads", missing) is json.loads
    assert missing == {
        "no_such_peer": "not importable",
        "peer_without_driver": "not importable: OSError: no driver",
    }
    assert _measure.gpu_peer(replace(on_gpu, device="cpu"), "json", "loads", missing) is None
    assert missing["json"] == "runs on a GPU alone"


def test_peers_are_chosen_and_all_else_is_always_there():
    def contest(case):
        exact = torch.ones(4, dtype=torch.float64)
        names = ["ours", "full", "mm", "peft", "peft compiled", "trl", "liger_kernel", "eager"]
        compared = [Compared("y", torch.ones(4), torch.ones(4), exact)]
        missing = {"unsloth": "not importable", "cuda": "no GPU"}
        return Contest(dict.fromkeys(names, tuple), lambda: compared, missing=missing)

    def met(*against):
        case = Case("none", "none", {"N": 4}, "fp32", against=against)
        row = _measure.measure(contest, case, seconds=0.0, weigh=False)
        assert {"full", "mm", "eager"} <= row.contestants.keys() and "cuda" in row.missing
        return {*row.contestants, *row.missing} - {"full", "mm", "eager", "cuda"}

    assert met() == set()
    assert met("peft", "unsloth") == {"peft", "unsloth"}
    assert met("compile", "liger", "trl") == {"peft compiled", "liger_kernel", "trl"}


def test_what_was_asked_for_and_not_measured_is_told():
    rows = [make_row(missing={"unsloth": "runs on a GPU alone"})]
    skipped = [SimpleNamespace(nodeid="bench_x.py::test_x[c]", longrepr=("x.py", 1, "no trl"))]
    assert conftest.not_measured(rows, ("peft", "unsloth", "compile"), skipped) == [
        "bench_x.py::test_x[c]: no trl",
        "compile: nothing here compares with it on this device",
    ]
    assert conftest.not_measured([], ("peft",), []) == []


def test_a_peer_that_fails_does_not_end_the_case():
    def failing(error):
        def run():
            raise error

        return run

    run, missing = {"ours": tuple, "a": failing(RuntimeError("its own\nfault"))}, {}
    run["b"] = failing(torch.OutOfMemoryError("of 99 GiB"))
    assert list(_measure._that_run(run, missing)) == ["ours"]
    assert missing == {"a": "fails: RuntimeError: its own", "b": "out of memory"}
    with pytest.raises(RuntimeError, match="its own"):
        _measure._that_run({"ours": run["a"]}, {})


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def contest_of_known_memory(case):
    n = case.shape["N"] * MIB // 4

    def ours():
        scratch = torch.ones(3 * n)
        return (scratch[:n].clone(),)

    held = torch.ones(n)
    return Contest({"ours": ours, "in place": lambda: (held.add_(1.0),)}, list)


def contest_that_fails(case):
    raise ValueError("this contest has a reason")


def test_extra_memory_is_beyond_inputs_and_outputs():
    case = Case("none", "none", {"N": 32}, "fp32")
    scratch = _measure.extra_bytes(contest_of_known_memory, case, "ours")
    nothing = _measure.extra_bytes(contest_of_known_memory, case, "in place")
    assert abs(scratch - 96 * MIB) < 4 * MIB and nothing < 4 * MIB


def test_a_failure_in_a_fresh_process_is_told_here():
    case = Case("none", "none", {"N": 1}, "fp32")
    with pytest.raises(RuntimeError, match="this contest has a reason"):
        _measure.extra_bytes(contest_that_fails, case, "ours")
    with pytest.raises(RuntimeError, match="exit code 3"):
        _measure.in_fresh_process(os._exit, 3)


# ------------------------------------------------------------------------------------------------
# Correctness comes before speed
# ------------------------------------------------------------------------------------------------


def test_nothing_is_timed_when_a_result_is_wrong():
    called = []

    def wrong(case):
        exact = torch.ones(4, dtype=torch.float64)
        compared = [Compared("y", torch.ones(4) * 1.01, torch.ones(4), exact)]
        return Contest({"ours": lambda: called.append("ours")}, lambda: compared)

    case = Case("lora_linear", _bars.TRAIN, {"N": 4}, "fp32")
    with pytest.raises(AssertionError, match="y: error 0.01 against float64"):
        _measure.measure(wrong, case, seconds=0.0)
    assert not called


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_right_and_complete_at_tiny_shapes(room):
    module = import_module(f"benchmarks.bench_{room}")
    for case in module.cases("tiny"):
        row = _measure.measure(module.contest, case, seconds=0.0, weigh=False)
        assert row.room == room and row.median_s > 0 and row.rounds >= 5
        assert row.errors and all(e["ours"] < 0.01 for e in row.errors)
        known = {"ours"} | row.contestants.keys() | row.missing.keys() | row.measures.keys()
        for bar in row.bars:
            assert bar["what"] in ("memory", "error") or known & set(bar["what"].split("/"))
            assert (bar["met"] == "not measured") == (bar["what"] == "memory")
        json.dumps(row.bars, allow_nan=False)


def test_every_bar_speaks_of_a_case_that_exists():
    """A bar whose check or shape no preset has would never be judged."""
    found = [c for p in ("full", "h200") for c in gpu.cases(p)]
    for bar in _bars.BARS:
        device = "cpu" if bar.on == "cpu" else "cuda"
        assert any(
            (c.device, c.room, c.check) == (device, bar.room, bar.check)
            and bar.where.items() <= c.shape.items()
            for c in found
        ), bar


# ------------------------------------------------------------------------------------------------
# Bars
# ------------------------------------------------------------------------------------------------


def test_verdicts():
    assert _bars.verdict(1.0, "<=", 1.1, 1.0) == "met, stretch"
    assert _bars.verdict(1.05, "<=", 1.1, 1.0) == "met"
    assert _bars.verdict(1.11, "<=", 1.1, None) == "missed"
    assert _bars.verdict(1.9, ">=", 1.8, 2.1) == "met"
    assert _bars.verdict(None, ">=", 1.8, 2.1) == "not measured"


def test_bars_of_a_row():
    found = {(b["what"], b["must"]): (b["value"], b["met"]) for b in make_row().bars}
    assert found == {("ours/frozen", 1.3): (1.0, "met, stretch"), ("peft/ours", 1.0): (2.5, "met")}
    absent = make_row(contestants={}, missing={"peft": "peft is not installed"})
    assert {b["met"] for b in absent.bars} == {"not measured"}
    other_rank = make_row(shape={"N": 8, "D": 4, "O": 4, "R": 64})
    assert [b["what"] for b in other_rank.bars] == ["peft/ours"]


def test_geometric_means_over_the_shapes_of_a_run():
    slow = {"frozen": {"median_s": 1.0, "ratio": 1.21, "low": 1.2, "high": 1.3}}
    found = _bars.geomeans([make_row(), make_row(contestants=slow)])
    means = {b["what"]: (round(b["value"], 4), b["shapes"], b["met"]) for b in found if b["value"]}
    assert means["ours/frozen"] == (1.1, 2, "met")
    assert means["peft/ours"] == (2.5, 1, "met, stretch")
    assert {b["met"] for b in found if b["what"] == "ours/full"} == {"not measured"}


def test_a_bar_is_told_in_words():
    """Every name of a measure that a bar speaks of has words for a reader."""
    names = {bar.what for bar in _bars.BARS if "/" not in bar.what} - {"memory", "error"}
    assert names == _bars.WORDS.keys()
    row = make_row(check=_bars.DROPOUT, measures={"dropout_points": 5.0})
    assert "| points that dropout adds ≤ 6 |" in report.as_markdown(make_results(row))
    told = {line[2] for line in _targets.targets([], "gpu")[1:]}
    assert "share of rows whose log p depends on the batch ≤ 0" in told


def test_memory_ratio_of_a_bar():
    row = make_row(memory={"ours": 3, "full": 4})
    assert _bars.value_of(row, "memory ours/full") == 0.75
    assert _bars.value_of(row, "memory ours/peft") is None
    assert _bars.value_of(row, "memory") == 3
    assert _bars.value_of(row, "error") == 1e-3


# ------------------------------------------------------------------------------------------------
# Files and tables
# ------------------------------------------------------------------------------------------------


def test_results_are_complete_after_every_row(tmp_path):
    results = make_results()
    for count in (1, 2):
        results.add(make_row(), [tmp_path / "a", tmp_path / "b"])
        paths = sorted(tmp_path.rglob("*"))
        assert [p.name for p in paths if p.is_file()] == ["lora_linear-some-avx2-2cores.json"] * 2
        loaded = Results.load(tmp_path / "a" / "lora_linear-some-avx2-2cores.json")
        assert loaded == results and len(loaded.rows) == count


@pytest.mark.parametrize("damage", ["{", "[]", '{"rows": []}', '{"rows": [{"room": "x"}]}'])
def test_a_file_of_another_form_is_named(tmp_path, damage):
    path = tmp_path / "x.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match="x.json is not a file of benchmark results"):
        Results.load(path)


def test_machine_names_no_host_and_versions_are_told():
    machine = _results.machine()
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_bytes"] > 2**28
    assert os.uname().nodename not in json.dumps(machine)
    assert _results.versions()["torch"] == torch.__version__


def test_markdown_has_a_line_per_row_and_per_bar():
    text = report.as_markdown(make_results(make_row(), make_row(dtype="fp32")))
    assert "Some CPU @ 2.00GHz, 2 cores" in text and "`pytest benchmarks`" in text
    assert "| bf16 | N8 D4 O4 R16 | 2 ms | 5% | 3 GFLOP/s | 1.00 | 0.40 | 3.0, 9.0 |" in text
    assert "| lora_linear: forward + backward | bf16 | ours/frozen ≤ 1.3 | worst," in text
    assert "bars: 8 met, 0 missed, 2 not measured" in text


def test_a_step_is_told_by_its_phases():
    times = {"rollout_s": 2.0, "score_s": 0.5, "learn_s": 1.0}
    theirs = {f"{phase}, frozen": 2 * value for phase, value in times.items()}
    row = make_row(measures=times | theirs)
    assert report.phases(row) == "ours 2 s + 500 ms + 1 s; frozen 4 s + 1 s + 2 s"
    assert "| rollout + score + learn |" in report.as_markdown(make_results(row))
    assert "rollout" not in report.as_markdown(make_results(make_row()))


def test_a_run_on_a_gpu_tells_ceilings_clocks_and_versions():
    results = make_results(make_row())
    results.machine["ceilings"] = [["copy", "B/s", 4.3e12]]
    results.machine["gpu"] = {"clocks.sm": "345 MHz", "after": {"clocks.sm": "1980 MHz"}}
    ceilings, before, after, versions = report.setting(results)
    assert ceilings == "Ceilings measured in this run: copy 4.3 TB/s."
    assert before == "The GPU before: clocks.sm 345 MHz."
    assert after == "The GPU after: clocks.sm 1980 MHz."
    assert (
        versions.startswith("Versions: perl-kernels 1.0, torch 1.0") and "unsloth 1.0" in versions
    )


def test_the_worst_shape_is_the_one_reported():
    slow = {"frozen": {"median_s": 1.0, "ratio": 1.4, "low": 1.2, "high": 1.5}}
    rows = [make_row(), make_row(contestants=slow, shape={"N": 9, "D": 4, "O": 4, "R": 16})]
    (line,) = (n for n in report.bars_table(rows) if n[2] == "ours/frozen ≤ 1.3")
    assert line[3:] == ["worst, N9 D4 O4 R16", "1.4", "1.15", "missed"]


def test_blocks_of_a_readme_follow_the_json(tmp_path, capsys):
    results = make_results(make_row())
    results.write([tmp_path])
    readme = tmp_path / "README.md"
    blocks = [f"<!-- results:{results.stem}{bars} -->\n<!-- /results -->" for bars in ("", " bars")]
    readme.write_text("Before\n" + "\nbetween\n".join(blocks) + "\nafter\n")
    arguments = ["--results", str(tmp_path)]
    assert report.main([*arguments, "--check", str(readme)]) == 1
    assert report.main([*arguments, "--readme", str(readme)]) == 0
    assert report.main([*arguments, "--check", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("Before\n<!-- results:") and text.endswith("-->\nafter\n")
    assert text.count("| bf16 | N8 D4 O4 R16 | 2 ms |") == 1
    assert text.count("ours/frozen ≤ 1.3 | worst") == 2
    results.rows[0].median_s = 9e-3
    results.write([tmp_path])
    assert report.main([*arguments, "--check", str(readme)]) == 1
    assert "disagrees" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results:other -->\n<!-- /results -->", "there are no results 'other'"),
        ("<!-- results:other -->\n", "each needs its own"),
    ],
)
def test_bad_blocks_are_errors(tmp_path, capsys, text, message):
    (tmp_path / "README.md").write_text(text)
    code = report.main(["--results", str(tmp_path), "--check", str(tmp_path / "README.md")])
    assert code == 2 and message in capsys.readouterr().err


def test_committed_files_are_named_for_their_machine():
    for path in _results.FOLDER.glob("*.json"):
        assert Results.load(path).stem == path.stem


# ------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------


def command(*arguments):
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = {**alone, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=550,
    )  # fmt: skip


def test_pytest_benchmarks_prints_keeps_and_exports(tmp_path):
    exported = tmp_path / "exported.json"
    done = command(
        "pytest", "benchmarks/bench_linear_kl.py", "--preset", "tiny",
        "--results", tmp_path / "kept", "--benchmark-json", exported, "-p", "no:cacheprovider",
        "--against", "trl",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ceilings measured in this run: copy" in done.stdout and "of limit" in done.stdout
    assert "linear_kl: forward (MiB: beyond inputs and outputs)" in done.stdout
    assert "trl: nothing here compares with it on this device" in done.stdout
    (path,) = (tmp_path / "kept").glob("linear_kl-tiny-*.json")
    rows = Results.load(path).rows
    assert rows and all(row.memory.keys() == {"ours", *row.contestants} for row in rows)
    found = json.loads(exported.read_text())["benchmarks"]
    assert len(found) == len(rows)
    for one, row in zip(found, rows, strict=True):
        assert one["extra_info"]["contestants"] == row.contestants
        assert one["extra_info"]["errors"] == row.errors
        assert one["extra_info"]["memory"] == row.memory
        assert [bar["met"] for bar in one["extra_info"]["bars"]]
        assert one["extra_info"]["flops"] > 0 and one["extra_info"]["bytes"] > 0
        assert one["extra_info"]["share_of_limit"] > 0
        assert one["group"] == f"{row.room}: {row.check}"
        assert one["stats"]["median"] == row.median_s


def test_gpu_campaign_dry_run(tmp_path):
    done = command("benchmarks.gpu", "--dry-run", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== tests: exit code 0" in done.stdout and "FAILED" not in done.stdout
    for task in studies.STUDIES:
        assert f"== study-{task}: exit code 0" in done.stdout
    (path,) = tmp_path.glob("timeline-tiny-*.json")
    assert len(Results.load(path).timelines) == 4
    (path,) = tmp_path.glob("gpu-dry-run-*.json")
    results = Results.load(path)
    assert {row.room for row in results.rows} == {*ROOMS, "reward_step", "policy_step"}
    assert not results.failures and not results.left_out
    assert all(value > 0 for _, _, value in results.machine["ceilings"])


def test_gpu_campaign_keeps_its_order_and_its_time(tmp_path, monkeypatch):
    ordered = gpu.in_order(gpu.cases("h200"))
    assert ordered[0].room == "lora_linear" and ordered[0].shape["R"] == 16
    assert ordered[1].room == "linear_log_prob"
    assert len(ordered) == len(gpu.cases("h200"))
    code = gpu.main(["--dry-run", "--skip-tests", "--minutes", "0.01", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("gpu-dry-run-*.json")
    results = Results.load(path)
    assert code == 0 and not results.rows and len(results.left_out) == len(gpu.cases("tiny"))


def test_gpu_campaign_goes_on_after_a_wrong_result(tmp_path, monkeypatch, capsys):
    wrong, right = gpu.cases("tiny")[:2]
    monkeypatch.setattr(gpu, "cases", lambda *chosen: [wrong, right])
    measure = _measure.measure

    def one_is_wrong(contest_of, case, seconds, **options):
        assert case is not wrong, "an element was not written\nand more"
        return measure(contest_of, case, seconds, weigh=False)

    monkeypatch.setattr(_measure, "measure", one_is_wrong)
    skips = ["--skip-tests", "--skip-study"]
    assert gpu.main(["--dry-run", *skips, "--results", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu-dry-run-*.json")
    results = Results.load(path)
    assert len(results.rows) == 1
    assert "an element was not written" in results.failures[f"{wrong.room} {wrong}"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("task", studies.STUDIES)
def test_gpu_campaign_keeps_the_tables_of_a_study(tmp_path, monkeypatch, task):
    def run(stage, command, folders, seconds):
        flags = cli.build_parser().parse_args(command[3:])  # what python -m perl would be given
        assert (stage, flags.task, flags.preset) == (f"study-{task}", task, "h200")
        Path(flags.out).mkdir()
        (Path(flags.out) / "study.json").write_text("{}")
        (Path(flags.out) / "model.safetensors").write_text("gigabytes")
        return False  # failed, or out of time

    monkeypatch.setattr(gpu, "run", run)
    folders = [tmp_path / "results", tmp_path / "out"]
    assert not gpu.study(task, "h200", folders, seconds=60.0)
    assert gpu.study(task, "h200", folders, seconds=0.0)  # out of time, which is no failure
    for folder in folders:
        assert [path.name for path in (folder / f"study-{task}-h200").iterdir()] == ["study.json"]


# ------------------------------------------------------------------------------------------------
# What is made of all results
# ------------------------------------------------------------------------------------------------


def test_papers_and_figures_agree_with_the_committed_results():
    assert all("<!-- results:" in paper.read_text() for paper in report.PAPERS)
    assert not report.stale(_results.FOLDER, report.PAPERS), "python -m benchmarks.report --write"


def test_every_committed_result_is_shown():
    shown = (_results.FOLDER / "README.md").read_text()
    for path in _results.FOLDER.glob("*.json"):
        assert f"### {path.stem}\n" in shown


def test_every_bar_stands_on_every_kind_of_machine():
    slow = {"frozen": {"median_s": 1.0, "ratio": 1.21, "low": 1.2, "high": 1.3}}
    full = make_results(make_row(dtype="fp32"), make_row(dtype="fp32", contestants=slow))
    quick = make_results(make_row(dtype="fp32", contestants=slow), name="lora_linear-quick")
    quick.preset, quick.machine = "quick", {**quick.machine, "cpu": "AMD"}
    other = make_results(make_row(dtype="bf16"))  # on AVX2 torch has a fallback alone
    table = _targets.targets([full, quick, other], "cpu")
    assert table[0][5:] == ["AMD, avx2, 2 cores", "Some CPU @ 2.00GHz, avx2, 2 cores"]
    bars = [bar for bar in _bars.BARS if bar.on == "cpu"]
    assert len(table) == 1 + sum(1 if bar.dtype else 2 for bar in bars)
    (mean,) = (n for n in table if n[1:3] == ["fp32", "ours/frozen ≤ 1.1"] and "lora_l" in n[0])
    assert mean[3:] == ["1.05", "geometric mean, R16", "1.21 missed (quick)", "1.1 met"]
    (worst,) = (n for n in table if n[1:3] == ["fp32", "ours/frozen ≤ 1.2"])
    assert worst[4:] == ["each shape, R16", "1.21 missed (quick)", "1.21 missed"]
    assert {n[6] for n in table if n[1] == "bf16"} == {"not measured"}
    counted = _targets.counts(table)["AMD, avx2, 2 cores"]
    assert counted["missed"] == 2 and sum(counted.values()) == len(table) - 1
    gpu_table = _targets.targets([full], "gpu")
    assert gpu_table[0][5:] == ["H200"] and {n[5] for n in gpu_table[1:]} == {"not measured"}


def test_the_papers_table_has_ours_beside_it():
    step = make_row(
        room="reward_step", check="step", dtype="fp32", memory={"ours": 30, "full": 60},
        contestants={"full": {"median_s": 1.0, "ratio": 0.625, "low": 0.6, "high": 0.7}},
    )  # fmt: skip
    small = make_results(step)
    small.preset = "quick"
    assert _targets.papers_table([small])[1][-2:] == ["74 %", "not measured"]
    table = _targets.papers_table([make_results(step)])
    assert table[0][-1] == "ours, Some CPU @ 2.00GHz, avx2, 2 cores, fp32"
    assert [line[-1] for line in table[1:]] == ["50 %", "1.60×", "not measured", "not measured"]


def test_the_limit_of_steps_and_rollouts():
    """By hand: 2 x 2 attention weights and a 3 wide MLP are 34 elements of a layer."""
    llama = {"H": 2, "L": 1, "F": 3, "A": 1, "V": 5, "R": 4}
    step = make_row(room="reward_step", check="step", shape={"B": 1, "T": 2} | llama, measures={})
    assert _limits.flops(step) == 2 * 2 * 2 * 34 + 3 * 2 * 2**2 * 2
    assert _limits.least_bytes(step) is None
    both = {"B": 1, "P": 2, "T": 2} | llama
    step = make_row(room="policy_step", check="step", shape=both, measures={})
    assert _limits.flops(step) == 7 * 2 * 4 * 34 + 9 * 2 * 4**2 * 2 + 4 * 2 * 2 * 2 * 5
    drawn = {"measures": {"tokens": 3}, "dtype": "fp32"}
    rollout = make_row(room="rollout", check=_bars.ONE_LENGTH, shape=both, **drawn)
    assert _limits.flops(rollout) == 2 * (2 + 3) * 34 + 2 * 2**2 * 2 + 2 * 3 * 2 * 5
    assert _limits.least_bytes(rollout) == 4 * (34 + 2 * 5) * 3
    ending = make_row(room="rollout", check=_bars.ENDING, shape=both, **drawn)
    assert _limits.flops(ending) == 2 * (8 + 3) * 34 + 2 * 4 * 2**2 * 2 + 2 * 3 * 2 * 5
    product = [["fp32 product of 8²", "FLOP/s", 1e3]]
    assert _limits.share_of_limit(rollout, product) == _limits.flops(rollout) / 1e3 / 2e-3


def test_the_share_of_the_limit():
    row = make_row(dtype="fp32", median_s=2.0, measures={"flop_per_s": 3e9})
    assert _limits.least_bytes(row) == 2 * 4 * (8 * 4 + 4 * 4 + 8 * 4)
    product = ["fp32 product of 8²", "FLOP/s", 4e9]
    assert _limits.share_of_limit(row, [["copy", "B/s", 1e9], product]) == 0.75
    assert _limits.share_of_limit(row, [["copy", "B/s", 320.0], product]) == 1.0
    assert _limits.share_of_limit(row, [["bf16 product of 8²", "FLOP/s", 4e9]]) is None
    results = make_results(row)
    results.machine["ceilings"] = [product]
    assert "| 3 GFLOP/s | 75% |" in report.as_markdown(results)


class Told(dict):
    """Figures of every job of a study, whatever it is called."""

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        told = ("validation_accuracy", "validation_auc", "reward", "kl", "reward_before",
                "reward_std_before", "step_ms", "peak_mb")  # fmt: skip
        return dict.fromkeys(told, 0.5)


def test_learning_bars_are_those_of_the_studies(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("PERL_SHARED", str(tmp_path))
    bars = {}
    for study in (RewardStudy, PolicyStudy):
        task = study.__name__.removesuffix("Study").lower()
        plan = study(StudyConfig(task=task, out=str(tmp_path / task)))
        plan.record["jobs"] = Told()
        bars |= {row[""]: row["wanted"] for row in plan.bars()}
    assert _targets.LEARNING.items() <= bars.items()


@pytest.mark.parametrize(
    "folder", report.studies_of(_results.FOLDER), ids=lambda folder: folder.name
)
def test_tables_of_committed_studies_agree_with_their_json(folder):
    assert studies.told_by(folder).text() == (folder / "table.md").read_text()


def test_bars_of_learning_stand_beside_those_not_measured(tmp_path):
    study = tmp_path / "study-reward-here"
    study.mkdir()
    name = next(iter(_targets.LEARNING))
    (study / "table.md").write_text(
        f"**Bars**\n\n|  | wanted | found | met |\n| --- | ---: | ---: | ---: |\n"
        f"| {name} | ≥ 0.95 | 0.918 | missed |\n| another | ≤ 0.02 | 0.010 | met |\n"
    )
    table = _targets.learning([study])
    assert table[0] == ["study: check", "bar", "study-reward-here"]
    assert table[1] == [name, "≥ 0.95", "0.918 missed"] and table[-1][2] == "0.010 met"
    assert _targets.counts(table) == {
        "study-reward-here": {"met": 1, "missed": 1, "not measured": len(_targets.LEARNING) - 1}
    }
    assert {line[2] for line in _targets.learning([])[1:]} == {"not measured"}


def test_what_compilers_say_is_tested():
    for line in _targets.COMPILED[1:]:
        path, _, test = line[-1].partition("::")
        assert f"def {test}(" in (ROOT / path).read_text()


def test_a_headline_has_every_machine_and_the_command_that_measures_it():
    results = make_results(make_row(dtype="fp32", memory={"ours": 30, "peft": 60}))
    table = _figures.headlines([results])
    assert table[0][1:] == ["Some CPU @ 2.00GHz, avx2, 2 cores, fp32", "command, on a CPU"]
    (line,) = (line for line in table if line[0] == "LoRA layer, against PEFT")
    assert line[1:] == ["0.40, 0.50", "`pytest benchmarks/bench_lora_linear.py --preset full`"]
    assert {n[1] for n in table[1:] if n is not line} == {"not measured"}
    assert {n[1] for n in _figures.headlines([])[1:]} == {"not measured"}


def test_a_verdict_has_its_colour_and_a_word_that_holds_one_has_none():
    assert _page.table([["over", "met"], ["geometric mean", "1.2 missed (quick)"]]).endswith(
        '<td>geometric mean</td><td class="missed">1.2 missed (quick)</td></tr></table></div>'
    )


def test_one_command_writes_all_and_tells_what_is_stale(tmp_path):
    results = make_results(make_row(dtype="fp32", check=_bars.DROPOUT))
    results.machine["ceilings"] = [["copy", "B/s", 1e9], ["fp32 product of 8²", "FLOP/s", 4e9]]
    results.write([tmp_path])
    study = tmp_path / "study-reward-h200"
    study.mkdir()
    record = {"preset": "h200", "parameters": {}, "jobs": {}, "machine": {}}
    (study / "study.json").write_text(json.dumps(record))
    (study / "table.md").write_text("**Pairs**\n\n| rank |\n| --- |\n| <4> |\n")
    paper = tmp_path / "README.md"
    paper.write_text(
        "".join(f"<!-- results:{name} -->\n<!-- /results -->\n" for name in report.MADE)
    )
    figures = ["overview", "peers-some-cpu-2-00ghz-avx2-2-cores-fp32",
               "roofline-some-cpu-2-00ghz-avx2-2-cores"]  # fmt: skip
    missing = report.stale(tmp_path, [paper])
    assert missing == [paper, *(tmp_path / f"{name}.svg" for name in figures)]
    written = report.write(tmp_path, [paper])
    assert written == [*missing[1:], tmp_path / "report.html", paper]
    assert not report.stale(tmp_path, [paper])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml") == len(figures) and 'src="http' not in page
    assert (
        "<h3>Pairs</h3>" in page
        and "&lt;4&gt;" in page
        and '<td class="none">not measured</td>' in page
    )
    absent = page[page.index("<h2>Not measured") :]
    assert "Reward against KL" in absent and "How cost grows" in absent
    assert "Roofline" not in absent and "Accuracy against rank" not in absent
    drawn = (tmp_path / "overview.svg").read_text()
    assert "LoRA layer with dropout, against PEFT" in drawn and "0.40" in drawn
    assert "#1f6feb" not in drawn.split("</style>")[1] and "prefers-color-scheme:dark" in drawn
    results.rows[0].contestants["peft"]["ratio"] = 0.5
    results.write([tmp_path])
    assert report.stale(tmp_path, [paper]) == missing[:3]  # the roofline has not moved
    (shape,) = studies.STUDIES["reward"].presets["h200"].shapes
    costs = {f"cost/{shape.size}/{arm}": {"step_ms": 8.0, "peak_mb": 9.0}
             for arm in ("full", "rank-16")}  # fmt: skip
    (study / "study.json").write_text(json.dumps(record | {"jobs": costs}))
    assert report.stale(tmp_path, [])[2:] == [study / "figure.svg"]
    assert study / "figure.svg" in report.write(tmp_path, [])
    assert not report.stale(tmp_path, [])


# ------------------------------------------------------------------------------------------------
# Whether something is lost
# ------------------------------------------------------------------------------------------------


def faster(low, ratio, high, **memory):
    frozen = {"median_s": 1.0, "ratio": ratio, "low": low, "high": high}
    return make_row(
        contestants={"frozen": frozen, "ours, other": frozen},
        memory={"ours": 30, "full": 60} | memory, memory_kind="peak of the process",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        (faster(0.9, 1.0, 1.1), []),
        (faster(1.19, 1.3, 1.4), []),  # 30 % slower, but the spreads are 8 % apart
        (faster(1.22, 1.3, 1.4), ["time over frozen"]),
        (faster(0.4, 0.5, 0.6, ours=32), []),
        (faster(0.4, 0.5, 0.6, ours=34), ["memory over full"]),
        (make_row(shape={"N": 9, "D": 4, "O": 4, "R": 16}), []),
    ],
)
def test_a_loss_is_beyond_the_spread(now, lost):
    found = list(check.pairs([faster(0.9, 1.0, 1.1)], [now]))
    assert len(found) == (0 if now.shape["N"] == 9 else 2)
    assert [name.rpartition(", ")[2] for name in check.losses(found)] == lost


def test_a_loss_has_to_show_twice_and_is_told(tmp_path, monkeypatch, capsys):
    committed = make_results(faster(0.9, 1.0, 1.1), name="lora_linear-quick")
    committed.preset = "quick"
    arguments = ["--results", str(tmp_path)]
    committed.write([tmp_path])
    assert check.main(arguments) == 0
    assert "nothing is committed for" in capsys.readouterr().out
    monkeypatch.setattr(check, "machine", lambda: committed.machine)
    runs = []
    monkeypatch.setattr(check, "measure", lambda room, preset, threads: [runs.pop(0)])
    slow, same = faster(1.5, 1.6, 1.7), faster(0.9, 1.0, 1.1)
    for given, code, left in (([same, slow], 0, 1), ([slow, same], 0, 0), ([slow, slow], 1, 0)):
        runs[:] = given
        assert check.main(arguments) == code and len(runs) == left
    assert (
        "forward + backward, bf16 N8 D4 O4 R16, time over frozen: 1.60" in capsys.readouterr().out
    )
    for elsewhere in (["--rooms", "lora_mlp"], ["--preset", "full"]):
        assert check.main([*arguments, *elsewhere]) == 0
        assert "there is lora_linear at --preset quick" in capsys.readouterr().out
    runs[:] = [make_row(shape={"N": 9, "D": 4, "O": 4, "R": 16})]
    assert check.main(arguments) == 1
    assert "no committed ratio has come again" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# How cost grows
# ------------------------------------------------------------------------------------------------


def test_an_exponent_and_its_standard_error():
    assert growth.exponent([1, 2, 4, 8], [5, 20, 80, 320]) == pytest.approx((2.0, 0.0), abs=1e-7)
    # by hand: x = -1, 0, 1 in units of log 2, y = 0, 1, 0: slope 0, residuals -1/3, 2/3, -1/3
    slope, error = growth.exponent([1, 2, 4], [1, 2, 1])
    assert slope == pytest.approx(0.0) and error == pytest.approx((1 / 3) ** 0.5)
    with pytest.raises(ValueError, match="wants three points above 0"):
        growth.exponent([1, 2], [1, 2])


def grown(case):
    """A row whose time is linear and whose memory is flat in V."""
    seconds = 1e-6 * case.shape["V"]
    eager = {"median_s": seconds**2, "ratio": 1.0, "low": 1.0, "high": 1.0}
    return make_row(
        room=case.room, check=case.check, shape=case.shape, dtype=case.dtype, median_s=seconds,
        contestants={"eager": eager}, memory={"ours": MIB},
    )  # fmt: skip


def test_sweeps_go_on_where_they_were_and_are_drawn(tmp_path, monkeypatch, capsys):
    (sweep,) = (one for one in growth.SWEEPS if one.title == "vocabulary")
    monkeypatch.setattr(growth, "SWEEPS", (sweep,))
    monkeypatch.setattr(growth, "ceilings", lambda device: [("copy", "B/s", 1e9)])
    measured = []

    def point(case):
        measured.append(case.shape["V"])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return grown(case)

    monkeypatch.setattr(growth, "point", point)
    with pytest.raises(KeyboardInterrupt):
        growth.main(["--results", str(tmp_path)])
    assert growth.main(["--results", str(tmp_path)]) == 0
    assert measured == [4000, 8000, 16000, 16000, 32000, 64000]
    assert "1.00 ± 0.00" in capsys.readouterr().out
    (path,) = tmp_path.glob("growth-*.json")
    results = Results.load(path)
    assert [row.shape["V"] for row in results.rows] == [4000, 8000, 16000, 32000, 64000]
    lines = growth.table(results)[1:]
    assert lines == [
        ["vocabulary", "linear_log_prob", "4,000", "64,000", "ours", "1.00 ± 0.00", "0.00 ± 0.00"],
        [
            "vocabulary",
            "linear_log_prob",
            "4,000",
            "64,000",
            "eager",
            "2.00 ± 0.00",
            "not measured",
        ],
    ]
    (picture,) = _figures.pictures([results])
    drawn = picture.svg()
    assert picture.name.startswith("growth-") and "eager: 2.00 ± 0.00" in drawn
    assert not _targets.kinds([results], "cpu")  # bars are set for other sizes
    results.versions["torch"] = "another"
    results.write([tmp_path])
    assert not growth.begun(tmp_path).rows


def test_every_sweep_is_of_cases_that_its_room_can_measure():
    for sweep in growth.SWEEPS:
        (like, *_) = import_module(f"benchmarks.bench_{sweep.room}").cases("full")
        for case in sweep.cases():
            assert case.shape.keys() == like.shape.keys() and len(sweep.shapes) >= 3


def test_phases_of_a_step_are_drawn():
    times = {"rollout_s": 2.0, "score_s": 0.5, "learn_s": 1.0}
    theirs = {f"{phase}, frozen": 2 * value for phase, value in times.items()}
    row = make_row(dtype="fp32", measures=times | theirs)
    (picture,) = (p for p in _figures.pictures([make_results(row)]) if "phases" in p.name)
    assert picture.data == {
        "fp32: ours": [2.0, 0.5, 1.0],
        "fp32: frozen": [4.0, 1.0, 2.0],
    }
    assert "scoring and anchor" in picture.svg()


# ------------------------------------------------------------------------------------------------
# Memory over a step
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def timeline(monkeypatch):
    """The module; what its `watched` wraps is put back, as there is no process of its own here."""
    for owner, name in (
        (Backbone, "hidden"), (Optimizer, "clip"), (train_policy, "Run"), (train_policy, "Clock"),
        (train_reward, "Run"), (train_reward, "batch_loss"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return import_module("benchmarks.timeline")  # not above: fresh processes would load its peers


@pytest.mark.parametrize("tuning", _timelines.TUNINGS)
def test_a_timeline_tells_phases_roles_and_what_is_held(tmp_path, timeline, tuning):
    found = timeline.cases("tiny")
    case = found[timeline.POLICY]
    timeline.bench_policy_step.write_inputs(tmp_path, case)
    told = timeline.watched(timeline.config_of(timeline.POLICY, tuning, case, tmp_path))
    marks = [(mark["phase"], mark["role"]) for mark in told["marks"]]
    assert marks == [
        ("rollout", "policy"), ("score", "policy"), ("score", "reward"), ("score", "anchor"),
        ("learn", "anchor"), ("learn", "value"), ("learn", "policy"), ("update", "policy"),
    ]  # fmt: skip
    gradients = [mark["gradients"] for mark in told["marks"]]
    held = told["held"]
    trained = {role for role, of in held.items() if "optimizer" in of}
    assert trained == {"policy", "value"} and held.keys() == {*trained, "reward", "anchor"}
    # value's are there when the policy begins, both when they are clipped, none before
    assert gradients[:6] == [0] * 6 and gradients[6] == held["value"]["optimizer"] / 2
    assert gradients[7] == sum(held[role]["optimizer"] for role in trained) / 2
    assert 0 < len(told["bytes"]) <= timeline.POINTS and min(told["bytes"]) > 2**26
    ends = [mark["at"] for mark in told["marks"]]
    assert ends == sorted(ends) and ends[0] == 0 and ends[-1] < told["seconds"]


def make_timeline(step, tuning):
    marks = [
        {"at": 0.0, "phase": "forward", "role": "reward", "gradients": 0},
        {"at": 1.0, "phase": "backward", "role": "reward", "gradients": 0},
        {"at": 3.0, "phase": "update", "role": "reward", "gradients": 4 * MIB},
    ]
    held = {"reward": {"weights": 10 * MIB, "optimizer": 8 * MIB}, "anchor": {"weights": 20 * MIB}}
    return {
        "step": step, "tuning": tuning, "dtype": "fp32", "shape": {"R": 16}, "device": "cpu",
        "seconds": 4.0, "libraries": 100 * MIB, "held": held, "marks": marks,
        "bytes": [n * MIB for n in (150, 190, 170, 145)],
    }  # fmt: skip


def test_the_peak_of_a_step_is_split_and_drawn(tmp_path):
    results = make_results(name="timeline")
    results.preset = _timelines.NAME
    results.timelines = [make_timeline("reward model", how) for how in _timelines.TUNINGS]
    results.write([tmp_path])
    (kept,) = report.every_result(tmp_path)
    assert kept.timelines == results.timelines
    line = ["fp32", "R16", "4", "190", "backward, reward", "100", "30", "8", "0", "52"]
    assert _timelines.table(kept)[1:] == [
        ["reward model", how, *line] for how in _timelines.TUNINGS
    ]
    parts = _timelines.split(results.timelines[0], 3)
    assert [count // MIB for count in parts.values()] == [100, 30, 8, 4, 3]
    (picture,) = _figures.pictures([kept])
    drawn = picture.svg()
    assert "reward model, LoRA, rank 16: 190 MiB at most" in drawn and "MiB in use" in drawn
    assert all(f">{word}<" in drawn for word in ("backward", "gradients", "libraries", "anchor"))
    assert "value" not in drawn  # no step here has one
    assert report.main(["--results", str(tmp_path), "--png", str(tmp_path / "png")]) == 0
    (path,) = (tmp_path / "png").iterdir()
    assert path.name == f"{picture.name}.png" and path.read_bytes().startswith(b"\x89PNG")


def test_readings_become_the_greatest_of_equal_parts(timeline, monkeypatch):
    monkeypatch.setattr(timeline, "POINTS", 4)
    watch = timeline.Watch("cpu")
    watch.backbone = type("Model", (), {"role_bytes": lambda self: {"reference": {"weights": 1}}})()
    watch.readings = [(0.5, 7), (0.9, 3), (1.1, 2), (3.5, 4), (4.0, 5)]
    told = watch.told()
    assert told["bytes"] == [7, 2, 2, 5] and told["seconds"] == 4.0
    assert told["held"] == {"anchor": {"weights": 1}}


def test_timelines_go_on_where_they_were(tmp_path, timeline, monkeypatch, capsys):
    asked = []

    def measure(step, tuning, case):
        asked.append((step, tuning))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return make_timeline(step, tuning)

    monkeypatch.setattr(timeline, "measure", measure)
    arguments = ["--preset", "tiny", "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        timeline.main(arguments)
    assert timeline.main(arguments) == 0
    first, second, third, *rest = asked
    assert rest == [third, (timeline.POLICY, "lora")] and third == (timeline.POLICY, "full")
    assert capsys.readouterr().out.count("backward, reward") == 4
