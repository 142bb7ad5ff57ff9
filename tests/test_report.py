"""Reports: what stands in the page and beside it, for whole, partial and odd run folders."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from perl import cli, drawings, report
from perl.config import ReinforceConfig, RewardConfig, SftConfig, UsageError, write_toml
from perl.drawings import Panel
from perl.report import Answer, Arm, Phase, Sample

NASTY = "<script>alert('$\\x$ & \"y\"')</script>"


def make_run(folder, config_class, rows, samples=(), **changes):
    """A run folder as a training leaves it, without the training."""
    folder.mkdir(parents=True)
    config = config_class(model="base", data="rows.jsonl", out=str(folder), **changes)
    write_toml(config, folder / "config.toml")
    for name, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def reinforce_rows(steps=4, offset=0.0):
    rows = [
        {
            "step": step,
            "reward": offset + step / 10,
            "kl": step * 1e-3,
            "loss": -0.5,
            "entropy": 1.25,
            "policy_grad_norm": 1.0,
            "value_grad_norm": 2.0,
            "tokens_per_s": 1234.5,
            "rollout_s": 0.1,
            "step_s": 0.2 if step < steps else 2.0,
            "peak_memory_bytes": 500_000_000 + step,
        }
        for step in range(1, steps + 1)
    ]
    policy = {"weights": 2_000_000, "gradients": 2_000_000, "optimizer": 4_000_000}
    rows[-1]["role_bytes"] = {"policy": policy, "reference": {"weights": 400_000_000}}
    return rows


def samples(prompt="two scones", before="scone", after="That is 6 euros."):
    return [
        {"step": 0, "prompt": prompt, "completion": before, "reward": 0.25},
        {"step": 2, "prompt": prompt, "completion": "left out", "reward": 0.5},
        {"step": 4, "prompt": prompt, "completion": after, "reward": 0.75},
    ]


def reinforce_run(folder, **changes):
    make = {"rows": reinforce_rows(), "samples": samples(), "reward_function": "f.py:f"} | changes
    return make_run(folder, ReinforceConfig, **make)


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class Page(HTMLParser):
    """Section head -> its text; table rows as lists of cells; tags with their attributes."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.sections, self.rows, self.tags = {}, [], []
        self._section, self._open = "", []
        self.feed(self.source)
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        if self._open and self._open[-1] == "h2":
            self._section = data
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if {"th", "td"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name):
        return next(row[1:] for row in self.rows if row[0] == name)

    @property
    def drawings(self):
        return [a["aria-label"] for tag, a in self.tags if tag == "svg"]


def png_size(path):
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


# ------------------------------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def reinforce_report(tmp_path_factory):
    return report.write_run_report(reinforce_run(tmp_path_factory.mktemp("report") / "rl"))


def test_a_reinforce_run_has_its_curves_figures_and_samples_side_by_side(reinforce_report):
    assert reinforce_report.name == "report.html"
    page = Page(reinforce_report)
    wanted = ["Learning curves", "Figures", "Memory of each role", "Samples", "Configuration"]
    assert list(page.sections)[1:] == wanted
    assert "REINFORCE: rl" in page.sections[""]
    assert "4 of 200 steps · LoRA of rank 16 · model base" in page.sections[""]
    assert page.drawings == [
        "Reward (score)",
        "KL to the anchor (nats per answer)",
        "Policy loss (advantage × nats)",
        "Entropy (nats per token)",
        "Gradient norm before clipping (norm)",
        "Step time (ms)",
        "Throughput (tokens / s)",
        "Peak memory (MB)",
    ]
    assert page.row("Reward") == ["score", "0.1", "0.4", "0.4"]
    assert page.row("Step time, whole step") == ["ms", "200", "2,000", "2,000"]
    assert page.row("Peak memory") == ["MB", "500", "500", "500"]
    assert page.row("policy") == ["2", "2", "4"] and page.row("reference") == ["400", "0", "0"]
    assert page.row("beta") == ["0.05"]
    shown = page.sections["Samples"]
    assert shown == ("Samplestwo sconesstep 0 reward 0.25sconestep 4 reward 0.75That is 6 euros.")
    width, height = png_size(reinforce_report.with_name("curves.png"))
    assert width > 1500 and height > 1000  # three rows of three


def test_the_last_tenth_is_a_mean_over_that_metrics_own_values(tmp_path):
    rows = [{"step": step, "loss": float(step)} for step in range(1, 21)]
    rows[9]["validation_loss"], rows[19]["validation_loss"] = 5.0, 4.0
    page = Page(report.write_run_report(make_run(tmp_path / "r", SftConfig, rows)))
    assert page.row("Loss, training") == ["nats", "1", "20", "19.5"]
    assert page.row("Loss, held out") == ["nats", "5", "4", "4"]


def test_keys_that_are_missing_null_or_unknown(tmp_path):
    rows = [
        {"step": 1, "loss": None, "accuracy": 0.5, "note": "text", "my_metric": 3},
        {"step": 2, "loss": 0.7, "validation_auc": 0.9, "tokens": 12},
    ]
    folder = make_run(tmp_path / "rm", RewardConfig, rows)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write('{"step": 3, "loss": "ü'.encode()[:-1])  # torn by a kill, inside a letter
    page = Page(report.write_run_report(folder))
    assert "Reward model: rm" in page.sections[""] and "2 of 200 steps" in page.sections[""]
    assert page.row("Loss") == ["nats", "0.7", "0.7", "0.7"]
    assert page.row("my_metric") == ["", "3", "3", "3"]
    assert page.drawings == [
        "Loss (nats)",
        "Accuracy (share right)",
        "Good and bad told apart, held out (share)",
        "my_metric",
    ]
    assert "Samples" not in page.sections
    assert not {"note", "tokens"} & {row[0] for row in page.rows}


@pytest.mark.parametrize("metric, step", [("auc", 4), ("loss", 6)])
def test_a_reward_run_shows_the_held_out_answers_of_its_best_validation(tmp_path, metric, step):
    reliability = {"said": [0.25, 0.75], "found": [0.5, 0.7], "count": [1, 9]}
    histogram = {"edges": [-1.0, 0.0, 1.0], "good": [1.0, 4.0], "bad": [3.0, 2.0]}
    rows = [
        {
            "step": 2 * i,
            "validation_auc": auc,
            "validation_loss": 1 / i,
            "validation_reliability": reliability,
            "validation_histogram": histogram,
        }
        for i, auc in enumerate([0.6, 0.8, 0.8], 1)
    ]
    changes = {"best_metric": metric, "validation": "v.jsonl"}
    folder = make_run(tmp_path / "rm", RewardConfig, [{"step": 1, "loss": 1.0}, *rows], **changes)
    page = Page(report.write_run_report(folder))
    assert page.drawings[-2:] == [
        f"Reliability at step {step} (share that came true)",
        f"Scores at step {step} (answers)",
    ]
    assert png_size(folder / "held_out.png")[0] > 1000


def test_histograms_and_reliability_are_drawn_as_they_are():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    counts = {"good": [1.0, 4.0], "bad": [3.0, 2.0]}
    drawings._draw(drawings.Histogram("Scores", "answers", [-1.0, 0.0, 1.0], counts), figure)
    drawn = {patch.get_label(): patch.get_data() for patch in figure.axes[0].patches}
    for label, values in counts.items():
        assert drawn[label].values.tolist() == values
        assert drawn[label].edges.tolist() == [-1.0, 0.0, 1.0]
    figure.clear()
    drawings._draw(drawings.Reliability("R", "share", [0.25, 0.75], [0.5, 0.7], [1, 9]), figure)
    diagonal, line = figure.axes[0].lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert line.get_xydata().tolist() == [[0.25, 0.5], [0.75, 0.7]]
    small, large = figure.axes[0].collections[0].get_sizes()
    assert large == pytest.approx(9 * small)


def test_a_run_without_a_logged_step_or_config_still_has_a_page(tmp_path):
    folder = make_run(tmp_path / "r", SftConfig, [])
    (folder / "config.toml").unlink()
    page = Page(report.write_run_report(folder))
    assert page.sections.keys() == {""} and "no steps" in page.sections[""]
    assert not (folder / "curves.png").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no metrics.jsonl; give the folder of a training"):
        report.write_run_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_text_is_escaped_and_control_characters_are_visible(tmp_path):
    chat = [{"role": "user", "content": NASTY + "\u2028"}]
    folder = reinforce_run(
        tmp_path / "a&b",
        samples=samples(prompt=chat, after="bell\x07 tab\tend"),
        rows=[{"step": 1, "loss": 1.0, NASTY: 2.0}],
        lora_targets=[NASTY],
    )
    page = Page(report.write_run_report(folder))
    assert "<script" not in page.source
    assert f"user: {NASTY}\u2028" in page.sections["Samples"]
    assert "bell␇ tab\tend" in page.sections["Samples"]
    assert page.row(NASTY) == ["", "2", "2", "2"]
    assert page.drawings == ["Policy loss (advantage × nats)", NASTY]
    assert "REINFORCE: a&b" in page.sections[""]


def test_paths_lie_beside_each_other(tmp_path):
    """Small axes of one scale, which is that of all points but the common start."""
    from matplotlib.figure import Figure

    lines = {f"rank {i}": ([-1e-8, 10.0, 11.0 + i], [-4.0, 2.0, 3.0]) for i in range(4)}
    paths, figure = drawings.Paths("World", "reward", lines, over="KL, nats"), Figure()
    drawings._draw(paths, figure)
    *shown, empty, last = figure.axes
    assert [axes.get_title(loc="left") for axes in shown] == [*lines]
    assert figure.get_suptitle() == "World, all from -4 at 0"
    assert all(axes.get_xlim() == pytest.approx((9.52, 14.48)) for axes in shown)
    assert not empty.axison and not last.axison
    xs = [line.get_xdata().tolist() for line in shown[2].lines]
    assert xs == [x for x, _ in lines.values()] + [lines["rank 2"][0], lines["rank 2"][0][-1:]]
    drawings.write_figure(tmp_path / "f.svg", [paths])
    assert drawings.is_drawn(tmp_path / "f.svg", [paths])
    other = drawings.Paths("World", "reward", lines | {"rank 1": ([0], [0])}, over="KL, nats")
    assert not drawings.is_drawn(tmp_path / "f.svg", [other])
    assert not drawings.is_drawn(tmp_path / "g.svg", [paths])


def test_the_page_stands_alone_and_its_drawings_follow_the_scheme(reinforce_report):
    page = Page(reinforce_report)
    assert not re.search(r"https?:|src=|@import|<link|<script", page.source)
    assert "@media (prefers-color-scheme: dark)" in page.source
    drawn = re.findall(r"<svg.*?</svg>", page.source, flags=re.S)
    assert len(drawn) == 8
    for svg in drawn:
        ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))  # well-formed
        assert not re.search("#[0-9a-f]{6}", svg), "a colour of its own would not follow"
    used = set(re.findall(r"var\((--\w+)\)", page.source))
    light, dark = re.findall(r":root \{ (.*) \}", page.source)
    for scheme in (light, dark):
        assert used <= {name for name, _ in re.findall(r"(--\w+): ?(#\w{6});", scheme)}
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    linked = {a["xlink:href"][1:] for _, a in page.tags if "xlink:href" in a}
    clipped = set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert linked and clipped and linked | clipped <= set(ids)


def test_every_colour_reads_on_its_page():
    """WCAG's contrast of text (ink) is at least 4.5, of lines and bars at least 3."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    pages = re.findall(r"--page: (#\w{6})", report._PAGE)
    assert len(pages) == 2
    for light, dark in drawings._DARK.items():
        least = 4.5 if light == drawings._INK else 3.0
        assert contrast(light, pages[0]) >= least and contrast(dark, pages[1]) >= least


def test_a_long_noisy_line_gets_its_moving_mean():
    values = [0.0, 3.0, 0.0, 3.0, 0.0]
    assert drawings._moving_mean(values, 3) == pytest.approx([1.5, 1.0, 2.0, 1.0, 1.5])


def test_long_runs_are_drawn_with_fewer_points(tmp_path):
    rows = [{"step": step, "loss": (step * 7919 % 101) / 100} for step in range(1, 20_001)]
    page = Page(report.write_run_report(make_run(tmp_path / "r", SftConfig, rows)))
    assert "Thin: single steps. Thick: their moving mean." in page.sections["Learning curves"]
    assert len(page.source) < 200_000


# ---------------------------------------------------------------------------------- comparison


def arms(folder):
    rm = [{"step": s, "accuracy": 0.6, "validation_accuracy": 0.8, "step_s": 0.1} for s in (1, 2)]
    sft = [{"step": s, "loss": 1.0, "step_s": 0.3, "peak_memory_bytes": 4e8 + s} for s in (1, 2)]
    made = {}
    for label in ("LoRA", "full"):
        made[label] = Arm({
            "SFT": Phase(make_run(folder / label / "sft", SftConfig, sft)),
            "reward": Phase(make_run(folder / label / "rm", RewardConfig, rm), peak_mb=321.0),
            "REINFORCE": Phase(
                reinforce_run(
                    folder / label / "rl", samples=samples(after=f"{label} says 6"), tuning="lora"
                )
            ),
        })  # fmt: skip
    return made


def test_arms_beside_each_other(tmp_path):
    oracle = Panel("Oracle", "score", {"LoRA": ([0, 4], [0.5, 0.9]), "full": ([], [])})
    path = report.write_comparison(
        tmp_path / "demo",
        f"LoRA & full {NASTY}",
        arms(tmp_path),
        [{"": "parameters", "LoRA": 33_000, "full": None, "ratio": 0.051234}, {"": NASTY}],
        notes=["Seed 0."],
        panels=[oracle],
    )
    page = Page(path)
    assert page.rows[0] == ["", "LoRA", "full", "ratio"]
    assert page.row("parameters") == ["33,000", "–", "0.05123"]
    assert page.row(NASTY) == ["–", "–", "–"]
    assert f"LoRA & full {NASTY}\nSeed 0.\n" in page.sections[""]
    assert page.drawings == [
        "Step time (ms, median)",
        "Peak memory (MB)",
        "Oracle (score)",
        "SFT · Loss, training (nats)",
        "reward · Accuracy, training (share right)",
        "reward · Accuracy, held out (share right)",
        "REINFORCE · Reward, training (score)",
        "REINFORCE · KL to the anchor, training (nats per answer)",
        "REINFORCE · Entropy, training (nats per token)",
    ]
    shown = page.sections["Samples"]
    assert shown.count("two scones") == 1  # one prompt, the answers of both arms under it
    assert "LoRA, step 4 reward 0.75LoRA says 6" in shown
    assert "full, step 4 reward 0.75full says 6" in shown
    assert "left out" not in shown
    png_size(tmp_path / "demo" / "curves.png")
    png_size(tmp_path / "demo" / "costs.png")


def test_costs_come_from_the_metrics_unless_they_are_given(tmp_path):
    made = arms(tmp_path)
    rl = made["full"].phases["REINFORCE"].run
    assert report.phase_cost(rl) == pytest.approx({"step_ms": 200, "peak_mb": 500.000004})
    times, peaks = report._cost_bars(made)
    assert times.values["LoRA"] == pytest.approx({"SFT": 300, "reward": 100, "REINFORCE": 200})
    assert peaks.values["LoRA"]["reward"] == 321.0
    assert peaks.values["LoRA"]["SFT"] == pytest.approx(400.000002)


def test_an_arm_without_a_phase_keeps_its_colour(tmp_path):
    from matplotlib.figure import Figure

    made = arms(tmp_path)
    made["LoRA"] = Arm({"SFT": made["LoRA"].phases["SFT"]})
    panel = next(p for p in report._arm_panels(made) if p.title.startswith("REINFORCE"))
    assert list(panel.lines) == ["LoRA", "full"]
    figure = Figure()
    drawings._draw(panel, figure)
    (line,) = figure.axes[0].get_lines()
    assert (line.get_label(), line.get_color()) == ("full", drawings._COLOURS[1])


def test_samples_that_are_given_take_the_place_of_the_runs(tmp_path, no_matplotlib):
    given = [Sample("a tea?", {"before": Answer("no"), "after": Answer("yes", "oracle 0.93")})]
    path = report.write_comparison(tmp_path / "d", "t", arms(tmp_path), [], samples=given)
    assert Page(path).sections["Samples"] == "Samplesa tea?before noafter oracle 0.93yes"


# ------------------------------------------------------------------------- when something fails


def test_without_matplotlib_the_page_says_how_to_get_the_figures(tmp_path, no_matplotlib):
    page = Page(report.write_run_report(reinforce_run(tmp_path / "rl")))
    assert "pip install matplotlib" in page.sections["Learning curves"]
    assert page.drawings == [] and not (tmp_path / "rl" / "curves.png").exists()
    assert page.row("Reward") == ["score", "0.1", "0.4", "0.4"]
    assert "That is 6 euros." in page.sections["Samples"]


def test_a_report_that_fails_is_a_line_on_stderr(tmp_path, capsys):
    report.try_run_report(tmp_path)
    assert "the run itself is whole: UsageError" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [False, True])
def test_a_training_command_ends_with_its_report(
    tmp_path, monkeypatch, capsys, no_matplotlib, stopped
):
    def train(config):
        make_run(tmp_path / "run", SftConfig, [{"step": 1, "loss": 2.0}])
        if stopped:
            raise cli.cfg.Stopped("loss is nan")
        return {"step": 1}

    monkeypatch.setattr("perl.train_sft.train", train)
    argv = ["sft", "--model", "m", "--data", "d", "--out", str(tmp_path / "run")]
    assert cli.main(argv) == (1 if stopped else 0)
    page = Page(tmp_path / "run" / "report.html")
    assert page.row("Loss") == ["nats", "2", "2", "2"]
    out = capsys.readouterr()
    assert f"report: {tmp_path / 'run' / 'report.html'}" in out.err
    assert out.out == ("" if stopped else json.dumps({"step": 1}) + "\n")


def test_a_refused_command_leaves_no_report_behind(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["sft", "--model", "m", "--data", "d", "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
