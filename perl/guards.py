"""What stops a run whose policy has come apart, while a checkpoint from before is still there.

    KL       the KL per answer lies above --kl-limit in 5 steps in a row
    reward   the mean reward of the last 20 steps lies --reward-drop standard deviations of an
             answer's reward below that of the first 20
    NaN      a loss or gradient that is not finite: Run.check_finite, in every run

Each default with its reason:
- `--reward-drop 2`: a policy that is better than its anchor by the objective, (1 − β) r − β KL, has
  more reward than the anchor, since the KL is not negative. So a reward far below the start is
  never a trade-off. The mean of 20 steps of 16 answers is known to 0.06 standard deviations: 2 are
  no accident, and a reward that merely fluctuates never gets there.
- `--kl-limit` is off: how far is too far depends on the length of the answers and on β. Beyond the
  KL that a reward model was trained near, its scores mean less and less (arXiv 2210.10760).
- 5 steps in a row, and means of 20: single batches are noise.

Left out: a floor for the entropy, which falls in every run that learns to answer well.

A checkpoint is good where no guard is on its way to stop the run: the KL below its limit, the
reward not half as far down as it may be. The newest good one is never removed (perl/run.py).
"""

from __future__ import annotations

import statistics
from typing import Any

from perl.config import ReinforceConfig, Stopped
from perl.run import Run

IN_A_ROW = 5  # steps
WINDOW = 20  # steps


class Diverged(Stopped):
    """A guard stopped the run; the message says what it saw and which checkpoint is good."""

    exit_code = 3


class Guards:
    """Watches the figures of each step, which are those of the whole batch on every process.

    state: what `state` of an earlier one returned, to go on from.
    """

    def __init__(self, config: ReinforceConfig, state: dict[str, Any] | None) -> None:
        self.kl_limit, self.reward_drop = config.kl_limit, config.reward_drop
        state = state or {"above": 0, "first": [], "last": []}
        self._good = True  # the last step was well inside the limits
        self._above: int = state["above"]  # steps in a row
        self._first: list[list[float]] = state["first"]  # mean and standard deviation of steps
        self._last: list[list[float]] = state["last"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON values."""
        guards = {"above": self._above, "first": self._first, "last": self._last}
        return {"good": self._good, "guards": guards}

    def watch(self, run: Run, step: int, *, kl: float, reward: float, reward_std: float) -> None:
        """Takes in a step's figures. Raises Diverged where a limit is passed."""
        above = self.kl_limit is not None and kl > self.kl_limit
        self._above = self._above + 1 if above else 0
        if self._above == IN_A_ROW:
            raise Diverged(
                f"the KL per answer is {kl:.4g} nats at step {step}, and above --kl-limit "
                f"{self.kl_limit:g} for {IN_A_ROW} steps; {run.kept}; start again with a higher "
                "--beta or a lower --lr"
            )
        if len(self._first) < WINDOW:
            self._first.append([reward, reward_std])
        else:
            self._last = [*self._last, [reward, reward_std]][-WINDOW:]
        fall, spread = self._fall() if self.reward_drop and len(self._last) == WINDOW else (0, 1)
        if fall > self.reward_drop * spread:
            raise Diverged(
                f"the mean reward of the last {WINDOW} steps lies {fall:.4g} below that of the "
                f"first {WINDOW} at step {step}, over {self.reward_drop:g} standard deviations of "
                f"an answer's reward ({spread:.4g}, --reward-drop); {run.kept}; start again with a "
                "lower --lr"
            )
        self._good = not above and fall <= self.reward_drop * spread / 2

    def _fall(self) -> tuple[float, float]:
        """By how much the mean reward fell, and the larger standard deviation of the two times."""
        first, last = (statistics.fmean(mean for mean, _ in w) for w in (self._first, self._last))
        spread = max(
            statistics.fmean(std**2 + (mean - center) ** 2 for mean, std in window)
            for window, center in ((self._first, first), (self._last, last))
        )
        return first - last, spread**0.5
