"""The main job on the embedded world, LoRA beside full tuning: `python -m perl demo`.

    world      dialogs, demonstrations, pairs and prompts of `perl.cafe`, and a random small Llama
    backbone   pretrained once, in full, on generic text: both arms start from it
    each arm   SFT -> reward model on pairs -> REINFORCE with that reward model

Every phase is the command that a user would type, in a process of its own, because peak memory
cannot be compared inside one process. The two arms run a phase at the same time, one
thread each. The oracle of the world judges answers to prompts that no training set holds; no phase
sees it. Each arm has its own learning rates.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from perl import cafe
from perl.commands import run_all, words
from perl.config import DemoConfig, UsageError
from perl.report import Answer, Arm, Phase, Sample, phase_cost, text_table, write_comparison

ARMS = {"LoRA": "lora", "full": "full"}
ROLES = {"SFT": "policy", "reward": "reward", "REINFORCE": "policy"}  # phase -> trained role
NEW_TOKENS = 40


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps and learning rates (LoRA, full) of each phase; found by a coarse search."""

    pretrain_steps: int = 360
    sft_steps: int = 120
    reward_steps: int = 800
    reinforce_steps: int = 250
    rows: int = 128  # held-out prompts that the oracle judges
    pretrain_lr: float = 4e-3
    sft_lr: tuple[float, float] = (5e-3, 1e-3)
    reward_lr: tuple[float, float] = (2e-3, 1e-3)
    reinforce_lr: tuple[float, float] = (1.5e-3, 3e-4)
    beta: float = 0.4  # more than the paper's 0.05: a small reward model is soon outwitted


QUICK = Recipe(pretrain_steps=4, sft_steps=2, reward_steps=2, reinforce_steps=2, rows=4)


def run(config: DemoConfig) -> None:
    """Runs everything, prints the table and writes results.json, figures and report.html."""
    out, recipe = Path(config.out), QUICK if config.quick else Recipe()
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out} exists and is not empty; give another folder, or remove it")
    started = time.perf_counter()
    shared = ["--threads", str(config.threads), "--seed", str(config.seed)]
    shared += ["--device", config.device]
    with tqdm(total=6, desc="demo", file=sys.stderr, dynamic_ncols=True) as bar:

        def phase(name: str, commands: Sequence[list[str]]) -> None:
            bar.set_postfix_str(name)
            lines = {f"{name}-{i}": [*line, *shared] for i, line in enumerate(commands)}
            run_all(lines, out / "logs", at_once=len(lines))
            bar.update()

        world = cafe.build_world(config.seed)
        cafe.write_world(out / "world", world, config.seed)
        phase("backbone", [pretrain(out, recipe)])
        for name, commands in (("SFT", sft), ("reward", reward), ("REINFORCE", reinforce)):
            phase(name, [commands(out, recipe, i) for i in range(len(ARMS))])
        for name, model in (("before", "sft"), ("after", "policy")):
            phase(name, [answer(out, recipe, arm, name, model) for arm in ARMS.values()])
    results = measure(out, world)
    results["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = results_table(results)
    print(text_table(table))
    page = write_comparison(
        out,
        "The cafe: LoRA beside full tuning",
        {
            label: Arm({phase: Phase(_run_folder(out, phase, arm)) for phase in ROLES})
            for label, arm in ARMS.items()
        },
        table,
        notes=[
            "Each phase ran in a process of its own, both arms at the same time, one thread "
            "each. The oracle judges answers to held-out prompts, 0 to 1. At this size "
            "the Python around a layer costs more than its arithmetic: for speed see the "
            "benchmarks."
        ],
        samples=_samples(out, world),
    )
    print(f"\n{results['seconds']:.0f} s in all; report: {page}")


# ---------------------------------------------------------------------- the commands of each phase


def _run_folder(out: Path, phase: str, arm: str) -> Path:
    return out / f"{arm}-{ {'SFT': 'sft', 'reward': 'reward', 'REINFORCE': 'policy'}[phase] }"


def pretrain(out: Path, recipe: Recipe) -> list[str]:
    return words(
        "sft", model=out / "world/init", data=out / "world/general.jsonl", tuning="full",
        steps=recipe.pretrain_steps, batch_size=48, lr=recipe.pretrain_lr, lr_schedule="cosine",
        checkpoint_every=10**6, out=out / "backbone",
    )  # fmt: skip


def sft(out: Path, recipe: Recipe, i: int) -> list[str]:
    arm = list(ARMS.values())[i]
    return words(
        "sft", model=out / "backbone", data=out / "world/sft.jsonl", tuning=arm,
        steps=recipe.sft_steps, batch_size=16, lr=recipe.sft_lr[i], lr_schedule="cosine",
        checkpoint_every=10**6,
        out=_run_folder(out, "SFT", arm),
    )  # fmt: skip


def reward(out: Path, recipe: Recipe, i: int) -> list[str]:
    arm = list(ARMS.values())[i]
    return words(
        "reward", model=_run_folder(out, "SFT", arm), data=out / "world/pairs.jsonl", tuning=arm,
        validation=out / "world/heldout_pairs.jsonl", validate_every=100,
        steps=recipe.reward_steps, batch_size=32, lr=recipe.reward_lr[i], lr_schedule="cosine",
        checkpoint_every=10**6,
        out=_run_folder(out, "reward", arm),
    )  # fmt: skip


def reinforce(out: Path, recipe: Recipe, i: int) -> list[str]:
    arm = list(ARMS.values())[i]
    lr = recipe.reinforce_lr[i]
    return words(
        "reinforce", model=_run_folder(out, "SFT", arm), data=out / "world/prompts.jsonl",
        reward_model=_run_folder(out, "reward", arm), tuning=arm, steps=recipe.reinforce_steps,
        prompts_per_step=32, max_new_tokens=NEW_TOKENS, lr=lr,
        beta=recipe.beta, lr_schedule="linear",
        samples_every=10**6, checkpoint_every=10**6, out=_run_folder(out, "REINFORCE", arm),
    )  # fmt: skip


def answer(out: Path, recipe: Recipe, arm: str, name: str, model: str) -> list[str]:
    return words(
        "generate", model=out / f"{arm}-{model}", data=out / "world/heldout_prompts.jsonl",
        rows=recipe.rows, batch_size=64, max_new_tokens=NEW_TOKENS,
        out=out / f"{arm}-{name}.jsonl",
    )  # fmt: skip


# ----------------------------------------------------------------------------------- the figures


def measure(out: Path, world: cafe.World) -> dict[str, Any]:
    """Per arm: cost of each phase, trained parameters, reward accuracy, oracle before and after."""
    results: dict[str, Any] = {"arms": {}}
    for label, arm in ARMS.items():
        figures: dict[str, Any] = {}
        for phase in ROLES:
            folder = _run_folder(out, phase, arm)
            figures[phase] = phase_cost(folder) | {
                "trainable_parameters": _trained(folder / ROLES[phase])
            }
        metrics = _rows(_run_folder(out, "reward", arm) / "metrics.jsonl")
        figures["reward_accuracy"] = max(r.get("validation_accuracy", 0.0) for r in metrics)
        last = _rows(_run_folder(out, "REINFORCE", arm) / "metrics.jsonl")[-1]
        figures["kl"] = last["kl"]
        for name in ("before", "after"):
            scores = [
                cafe.oracle(row["prompt"], row["completion"])
                for row in _rows(out / f"{arm}-{name}.jsonl")
            ]
            figures[f"oracle_{name}"] = statistics.mean(scores)
        results["arms"][label] = figures
    return results


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _trained(folder: Path) -> int:
    """Parameters in the tensors that a run publishes: the adapter and head, or the whole model."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                size = 1
                for n in tensors.get_slice(key).get_shape():
                    size *= n
                count += size
    return count


def results_table(results: dict[str, Any]) -> list[dict[str, str]]:
    """One row per figure, one column per arm."""
    arms = results["arms"]

    def row(name: str, text: Any) -> dict[str, str]:
        return {"": name} | {label: text(figures) for label, figures in arms.items()}

    rows = []
    for phase in ROLES:
        rows += [
            row(f"{phase}: step, ms", lambda f, p=phase: f"{f[p]['step_ms']:.0f}"),
            row(f"{phase}: peak memory, MB", lambda f, p=phase: f"{f[p]['peak_mb']:.0f}"),
            row(
                f"{phase}: parameters trained",
                lambda f, p=phase: f"{f[p]['trainable_parameters']:,}",
            ),
        ]
    return [
        *rows,
        row("reward accuracy, held-out pairs", lambda f: f"{f['reward_accuracy']:.3f}"),
        row("oracle before REINFORCE, 0 to 1", lambda f: f"{f['oracle_before']:.3f}"),
        row("oracle after REINFORCE, 0 to 1", lambda f: f"{f['oracle_after']:.3f}"),
        row("KL to the anchor, nats per answer", lambda f: f"{f['kl']:.2f}"),
    ]


def _samples(out: Path, world: cafe.World, count: int = 6) -> list[Sample]:
    """Held-out prompts with the answers of both arms before and after, and the oracle's score."""
    answers: dict[str, list[dict[str, Any]]] = {
        f"{label}, {name} REINFORCE": _rows(out / f"{arm}-{name}.jsonl")
        for label, arm in ARMS.items()
        for name in ("before", "after")
    }
    prompts = [row["prompt"] for row in world.heldout_prompts]
    samples = []
    for i in range(min(count, *(len(rows) for rows in answers.values()))):
        said = {
            label: Answer(
                rows[i]["completion"].strip(),
                f"oracle {cafe.oracle(prompts[i], rows[i]['completion']):.2f}",
            )
            for label, rows in answers.items()
        }
        samples.append(Sample(prompts[i], said))
    return samples
