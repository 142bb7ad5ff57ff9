"""A run folder: what a training leaves behind, and what it needs to go on after a kill.

    RUN/config.toml            the resolved configuration
    RUN/metrics.jsonl          one line per logged step
    RUN/samples.jsonl          one line per sampled answer (reinforce)
    RUN/checkpoints/step-N/    state.json, one .safetensors per group of tensors, the roles' folders
    RUN/<role>/                the result: a PEFT adapter or a transformers folder
    RUN/report.html            curves and figures, which the command line adds at the end

A checkpoint is written to a temporary folder and renamed, so it is whole or absent. Resuming takes
the newest one and cuts metrics and samples behind its step: the lines that follow are those of an
uninterrupted run. No pickle anywhere: safetensors and JSON.

Of several processes (perl/distributed.py) the first writes; the others call the same methods and
wait where they will read, so all have to see the folder.

    run = Run.create(config.out, config)             # refuses a folder in use, writes nothing
    ...load model and data, which may refuse too...
    with run:                                        # the folder exists from here on
        for step in run.steps(config.steps, "sft"):
            ...
            run.log(step, loss=loss)
            if run.checkpoint_due(step):
                run.save_checkpoint(step, tensors, state)
"""

from __future__ import annotations

import base64
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from perl import distributed
from perl.config import (
    Stopped,
    TrainConfig,
    Unfinished,
    UsageError,
    write_toml,
)
from perl.disk import disk_trouble, write_whole
from perl.progress import progress


class NonFiniteLoss(Stopped):
    """The loss or the gradient is not finite; the weights were not updated with it."""

    exit_code = 3


class Interrupted(Stopped):
    """Ctrl-C: the step was finished and a checkpoint written."""

    exit_code = 130


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, whole by construction."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step-"))

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The group of tensors saved as `name`. Raises UsageError where there is none."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise UsageError(f"{self.folder} holds no {name}: it belongs to another kind of run")
        return load_file(path)


class Run:
    """The run folder of one training. `step` is the step resumed from, 0 for a new run."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder = folder
        self.config = config
        self.step = 0
        self.interrupted = False
        self._stopping = False  # interrupted here or in another process, and all know
        self._saved_step = -1
        self._bar: tqdm | None = None
        self._files: dict[str, Any] = {}
        self._events: Any = None

    @classmethod
    def create(cls, folder: str | Path, config: TrainConfig) -> Run:
        """Checks the folder; writes nothing. UsageError where it is in use, or no run to resume."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file; give a folder that does not exist")
        used = folder.is_dir() and any(folder.iterdir())
        if used and not config.resume:
            go_on = " or --resume to go on with it" if (folder / "config.toml").is_file() else ""
            raise UsageError(f"--out {folder} exists and is not empty; give another folder{go_on}")
        run = cls(folder, config)
        if config.resume:
            if not (folder / "config.toml").is_file():
                raise UsageError(
                    f"--out {folder} is no run folder (it has no config.toml); leave "
                    "--resume out to start a run"
                )
            newest = run.latest_checkpoint()
            run.step = newest.step if newest else 0
        if config.tensorboard:
            _summary_writer()
        return run

    # -----------------------------------------------------------------------------------------
    # The loop

    def __enter__(self) -> Run:
        if distributed.is_first():
            self._open()
        distributed.wait()
        if not (self.folder / "config.toml").is_file():
            raise UsageError(
                f"process {distributed.rank()} does not see --out {self.folder} of process 0; give "
                "a folder on a disk that all machines share"
            )
        try:
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)
        except ValueError:  # not the main thread: Ctrl-C is somebody else's to handle
            self._handler = None
        return self

    def _open(self) -> None:
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make --out {self.folder}: {error.strerror}") from None
        for stale in (self.folder / "checkpoints").glob(".*"):  # first, as they make room
            shutil.rmtree(stale)
        write_toml(self.config, self.folder / "config.toml")
        for name in ("metrics.jsonl", "samples.jsonl"):  # without a checkpoint, step 0 goes too
            _cut_behind(self.folder / name, self.step or -1)
        if self.config.tensorboard:
            self._events = _summary_writer()(str(self.folder), purge_step=self.step + 1)

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()
        for file in self._files.values():
            with suppress(OSError):  # lines are flushed one by one: one that found no room is left
                file.close()
        self._files.clear()
        if trouble := disk_trouble(error):
            raise Unfinished(
                f"{trouble}; {self.kept}; mend that, then go on with: {self.resume_command}"
            ) from error

    def steps(self, total: int, description: str) -> Iterator[int]:
        """Step numbers after the one resumed from, up to `total`, behind a progress bar.

        After Ctrl-C the step in hand is finished; `checkpoint_due` is then true, and once the
        checkpoint is written Interrupted is raised. A second Ctrl-C stops at once.
        """
        self._bar = progress(total, description, "step", done=self.step)
        for step in range(self.step + 1, total + 1):
            yield step
            self._bar.update()
            if self._stopping and self._saved_step == step:
                raise Interrupted(
                    f"checkpoint of step {step} written; go on with: {self.resume_command}"
                )

    def checkpoint_due(self, step: int) -> bool:
        """True every `checkpoint_every` steps, at the last step, and after Ctrl-C.

        To be asked once a step, by all processes: Ctrl-C may reach only one of them.
        """
        self._stopping = distributed.total(self.interrupted) > 0
        return (
            step % self.config.checkpoint_every == 0 or step == self.config.steps or self._stopping
        )

    def check_finite(self, step: int, **values: float) -> None:
        """Raises NonFiniteLoss, naming the value and the last good checkpoint."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{name} is {value} at step {step}; {self.kept}; start again with "
                    "a lower --lr, or --dtype float32"
                )

    @property
    def kept(self) -> str:
        """What is there from before a divergence, as part of a sentence."""
        good = self.good_checkpoint()
        if good is None:
            return "no checkpoint was written before it"
        return f"the last good checkpoint is {good.folder}"

    @property
    def resume_command(self) -> str:
        command = type(self.config).__name__.removesuffix("Config").lower()
        folder = shlex.quote(str(self.folder))
        return f"{distributed.launcher()} -m perl {command} --out {folder} --resume"

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.say("Ctrl-C: finishing this step, then a checkpoint (again to stop at once)")

    # -----------------------------------------------------------------------------------------
    # What is written

    def log(self, step: int, **metrics: Any) -> None:
        """One line of metrics.jsonl; values that are not finite become null."""
        values = {key: _plain(value) for key, value in metrics.items()}
        self.append("metrics.jsonl", {"step": step} | values)
        numbers = {key: v for key, v in values.items() if isinstance(v, int | float)}
        if self._events is not None:
            for key, value in numbers.items():
                self._events.add_scalar(key, value, step)
        if self._bar is not None:
            shown = {k: numbers[k] for k in ("loss", "accuracy", "reward", "kl") if k in numbers}
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One JSON line, with a "step" key, at the end of a file in the run folder."""
        if not distributed.is_first():
            return
        if name not in self._files:
            self._files[name] = open(self.folder / name, "a", encoding="utf-8")
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self._files[name].flush()

    def say(self, text: str) -> None:
        """A line on stderr that does not break the progress bar."""
        if distributed.is_first():
            tqdm.write(text, file=sys.stderr)

    def save_checkpoint(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        score: float | None = None,
        roles: Callable[[Path], None] | None = None,
    ) -> Checkpoint:
        """Writes checkpoints/step-N, then removes all but the newest, the best and the last good.

        tensors: each group becomes NAME.safetensors. state: JSON values; "good" is False where the
        training may be diverging. score: the higher, the
        better; the best-scored checkpoint is kept. roles: called with the folder to put files
        that others can load (adapters) beside them.
        """
        final = self.folder / "checkpoints" / f"step-{step}"
        temporary = final.with_name(f".step-{step}")
        if distributed.is_first():
            temporary.mkdir()
        if roles is not None:  # all processes, for what is spread over them
            roles(temporary)
        if distributed.is_first():
            self._finish(temporary, final, tensors, state | {"step": step, "score": score})
        distributed.wait()
        self._saved_step = step
        return Checkpoint(final)

    def _finish(
        self,
        temporary: Path,
        final: Path,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> None:
        for name, group in tensors.items():
            save_file(
                {key: tensor.detach().contiguous().cpu() for key, tensor in group.items()},
                temporary / f"{name}.safetensors",
            )
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        for file in self._files.values():
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(final.parent)
        keep = self.checkpoints()[-self.config.keep_checkpoints :]
        keep += [self.best_checkpoint(), self.good_checkpoint()]
        for old in self.checkpoints():
            if old not in keep:
                shutil.rmtree(old.folder)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, oldest first."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return sorted(map(Checkpoint, folders), key=lambda checkpoint: checkpoint.step)

    def latest_checkpoint(self) -> Checkpoint | None:
        return max(self.checkpoints(), key=lambda c: c.step, default=None)

    def best_checkpoint(self) -> Checkpoint | None:
        """The best-scored checkpoint (the first of equals); the newest where none has a score."""
        scored = [(c.state["score"], -c.step, c) for c in self.checkpoints()]
        scored = [entry for entry in scored if entry[0] is not None]
        return max(scored)[2] if scored else self.latest_checkpoint()

    def good_checkpoint(self) -> Checkpoint | None:
        """The newest one that was not written on the way to a divergence."""
        good = [c for c in self.checkpoints() if c.state.get("good", True)]
        return good[-1] if good else None

    def is_best(self, score: float | None) -> bool:
        """Whether a score beats those of all checkpoints so far."""
        best = self.best_checkpoint()
        before = best.state["score"] if best else None
        return score is not None and (before is None or score > before)

    def metrics_at(self, step: int) -> dict[str, Any]:
        """What was logged at a step; empty where nothing was."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return next((row for row in map(json.loads, lines) if row["step"] == step), {})

    def publish(self, role: str, checkpoint: Checkpoint) -> Path:
        """Copies a role's folder of a checkpoint to RUN/<role>, the run's result."""
        result, temporary = self.folder / role, self.folder / f".{role}"
        if distributed.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(checkpoint.folder / role, temporary)
            shutil.rmtree(result, ignore_errors=True)
            os.replace(temporary, result)
        return result


def role_folder(path: str | Path, role: str) -> Path:
    """The folder of a role's files, given that folder itself, a run folder or a checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            f"{path} does not exist or is no folder; give a run folder, or the "
            f"folder of a {role} adapter or model"
        )
    if (path / role).is_dir():
        return path / role
    if (path / "config.toml").is_file():
        raise UsageError(
            f"run folder {path} holds no {role}; give a run that trains one, and "
            "finish it with --resume if it was stopped"
        )
    return path


def role_weights(path: str | Path, role: str) -> list[Path]:
    """The files of a role's weights; `path` is as of `role_folder`."""
    return sorted(role_folder(path, role).glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------
# Random state


def capture_rng() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _encoded(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = [_encoded(s) for s in torch.cuda.get_rng_state_all()]
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `capture_rng` took."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_decoded(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_decoded(s) for s in state["cuda"]])


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*numbers: int) -> int:
    """A seed for what these numbers name, unlike that of any other."""
    return random.Random("/".join(map(str, numbers))).getrandbits(63)


def _encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------
# Files


def _cut_behind(path: Path, step: int) -> None:
    """Keeps the lines of a JSONL file up to `step`; a line torn by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):  # str would split at U+2028 too
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except ValueError:
            break
    write_whole(path, b"".join(kept).decode())


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, Tensor | numpy.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard needs the tensorboard package; `pip install "
            "tensorboard`, or leave the flag out"
        ) from None
    return SummaryWriter
