"""Memory over one training step, by phase and role: LoRA beside full tuning.

    python -m benchmarks.timeline                    a few minutes on two cores
    python -m benchmarks.timeline --preset h200      on a GPU

The trainers of `perl` run unchanged, each in a process of its own, at the shapes of
bench_reward_step and bench_policy_step; the third step is told of. What is in use is read every few
milliseconds: of a GPU what torch's allocator has given out, of a CPU the resident set less what the
pool keeps for later. benchmarks/_timelines.py says what it is made of.

Under LoRA all roles share the frozen base, which is the anchor. A run that was stopped goes on with
what it has not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import string
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import PRESETS, bench_policy_step, bench_reward_step
from benchmarks._measure import Case, give_back_freed
from benchmarks._results import FOLDER, Results
from benchmarks._timelines import ANCHOR, NAME, TUNINGS, table
from benchmarks.bench_policy_step import LR, NEVER
from perl import train_policy, train_reward
from perl.backbone import Backbone
from perl.config import ReinforceConfig, RewardConfig
from perl.memory import in_use
from perl.optimizer import Optimizer
from perl.progress import progress
from perl.run import Run
from perl_kernels import _library

REWARD, POLICY = "reward model", "REINFORCE"
STEPS = 3  # the first one makes the optimizer's state, the last one is told of
EVERY_S, POINTS = 0.002, 240  # between two readings; of a step's that are kept


# ------------------------------------------------------------------------------------------------
# What is in use while a trainer runs
# ------------------------------------------------------------------------------------------------


def used(device: str) -> int:
    """Bytes in use now."""
    if device != "cpu" or _library.missing["cpu"]:
        return in_use(device)
    return in_use(device) - torch.ops.perl_kernels.cpu_pool_bytes()[1]


class Watch:
    """Readings of the memory in use, and marks of what the trainer is about."""

    def __init__(self, device: str):
        give_back_freed()
        self.device, self.libraries = device, used(device)
        self.backbone: Backbone | None = None
        self.over = threading.Event()
        self.begin_step()

    def begin_step(self) -> None:
        self.start, self.readings, self.marks = time.perf_counter(), [], []

    def read(self) -> None:
        """In a thread of its own."""
        while not self.over.wait(EVERY_S):
            self.readings.append((time.perf_counter() - self.start, used(self.device)))

    def mark(self, phase: str = "", role: str = "") -> None:
        """What begins now; "" is as before."""
        last = self.marks[-1] if self.marks else {"phase": "", "role": ""}
        told = {"phase": phase or last["phase"], "role": role or last["role"]}
        if self.marks and not last["role"]:  # who runs in the first phase
            last.update(told)
        elif not told.items() <= last.items():
            at = time.perf_counter() - self.start if self.marks else 0.0
            self.marks.append({"at": at, **told, "gradients": self.gradients()})

    def gradients(self) -> int:
        """Bytes that lie in `.grad`."""
        if self.backbone is None:
            return 0
        roles = self.backbone.role_bytes().keys() - {"reference"}
        trained = (p for role in roles for _, p in self.backbone.trainable(role))
        return sum(p.grad.nbytes for p in trained if p.grad is not None)

    def told(self) -> dict[str, Any]:
        """The last step: its greatest readings in POINTS equal parts, its marks, what is held."""
        seconds = self.readings[-1][0]
        most = [0] * min(POINTS, len(self.readings))
        for at, count in self.readings:
            part = min(int(at / seconds * len(most)), len(most) - 1)
            most[part] = max(most[part], count)
        for part, count in enumerate(most):  # none was read; a step begins as the last one ended
            most[part] = count or most[part - 1]
        held = self.backbone.role_bytes()
        for bytes_of in held.values():
            bytes_of.pop("gradients", None)
        held = {ANCHOR if role == "reference" else role: found for role, found in held.items()}
        return {
            "seconds": seconds, "libraries": self.libraries, "held": held, "marks": self.marks,
            "bytes": most,
        }  # fmt: skip


def watched(config: RewardConfig | ReinforceConfig) -> dict[str, Any]:
    """`Watch.told` of a training; for a fresh process, whose trainers it wraps."""
    watch = Watch(config.device)

    class FewSteps(Run):
        def steps(self, total: int, description: str) -> Iterator[int]:
            for step in range(1, STEPS + 1):
                watch.begin_step()
                yield step
            raise SystemExit  # before the checkpoint that ends a run

    class MarkedClock(train_policy.Clock):
        def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
            watch.mark(name)
            return super().phase(name)

    hidden, clip, batch_loss = Backbone.hidden, Optimizer.clip, train_reward.batch_loss

    def marked_hidden(backbone: Backbone, role: str | None, *given: Any, **options: Any) -> Any:
        watch.backbone = backbone
        watch.mark(role=role or ANCHOR)
        return hidden(backbone, role, *given, **options)

    def marked_loss(*given: Any) -> Any:
        watch.mark("forward")
        found = batch_loss(*given)
        watch.mark("backward")
        return found

    def marked_clip(optimizer: Optimizer) -> float:
        watch.mark("update")
        return clip(optimizer)

    Backbone.hidden, Optimizer.clip = marked_hidden, marked_clip
    train_policy.Run = train_reward.Run = FewSteps
    train_policy.Clock, train_reward.batch_loss = MarkedClock, marked_loss
    trainer = train_reward if isinstance(config, RewardConfig) else train_policy
    reader = threading.Thread(target=watch.read)
    reader.start()
    try:
        with contextlib.suppress(SystemExit):
            trainer.train(config)
    finally:
        watch.over.set()
        reader.join()
    return watch.told()


# ------------------------------------------------------------------------------------------------
# The trainings
# ------------------------------------------------------------------------------------------------


def cases(preset: str) -> dict[str, Case]:
    """The steps at the shapes of their benchmarks, in the type that the machine is best at."""
    policy = bench_policy_step.cases(preset)[-1]
    tokens = bench_reward_step.SHAPES[preset]["T"]
    rows = bench_reward_step.SHAPES[preset]["B"]
    shape = policy.shape | {"B": rows, "P": tokens // 2, "T": tokens - tokens // 2}
    return {REWARD: replace(policy, shape=shape), POLICY: policy}


def config_of(step: str, tuning: str, case: Case, folder: Path) -> RewardConfig | ReinforceConfig:
    config = bench_policy_step.config_of(folder, tuning, case)
    if step == POLICY:
        return config
    s, letters = case.shape, random.Random(0)

    def text(tokens: int) -> str:
        return "".join(letters.choices(string.ascii_lowercase, k=tokens - 1))

    pairs = [
        {"prompt": text(s["P"]), "chosen": text(s["T"]), "rejected": text(s["T"])}
        for _ in range(s["B"] // 2)
    ]  # a token is a letter, <bos> or <eos>
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return RewardConfig(
        model=config.model, data=[str(folder / "pairs.jsonl")], out=config.out, tuning=tuning,
        lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, lr=LR[tuning],
        dtype=config.dtype, device=config.device, batch_size=len(pairs), steps=NEVER,
        checkpoint_every=NEVER,
    )  # fmt: skip


def measure(step: str, tuning: str, case: Case) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        bench_policy_step.write_inputs(Path(folder), case)
        config = config_of(step, tuning, case, Path(folder))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            1, spawn, torch.set_num_threads, (torch.get_num_threads(),)
        ) as fresh:
            found = fresh.submit(watched, config).result()
    what = {"step": step, "tuning": tuning, "dtype": case.dtype, "shape": case.shape}
    return what | {"device": case.device} | found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timeline", description="Memory over a training step."
    )
    parser.add_argument(
        "--preset", choices=[*PRESETS, "h200"], default="full",
        help="shapes, as of the other benchmarks; h200: on a GPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.preset == "h200" and not torch.cuda.is_available():
        parser.error("--preset h200 is for a GPU, and torch sees none here; choose another")
    name = NAME if options.preset in ("full", "h200") else f"{NAME}-{options.preset}"
    found = cases(options.preset)
    results = Results.resume(name, NAME, options.results, found[POLICY].device)
    done = {(one["step"], one["tuning"]) for one in results.timelines}
    wanted = [(step, tuning) for step in found for tuning in TUNINGS]
    with progress(len(wanted), NAME, "training", len(done)) as bar:
        for step, tuning in wanted:
            if (step, tuning) not in done:
                results.timelines.append(measure(step, tuning, found[step]))
                results.write([options.results])
                bar.update()
    for line in table(results):
        print("  ".join(cell.ljust(14) for cell in line).rstrip())
    print(f"kept in {options.results / results.stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
