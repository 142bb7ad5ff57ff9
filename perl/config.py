"""One dataclass per command: every field is a flag (`--lora-rank`) and a TOML key (`lora_rank`).

Values come from the defaults, then `--config FILE.toml`, then the flags; a resumed run reads the
`config.toml` of its folder in place of the file. A config checks itself when it is made, so a
trainer called from Python refuses the same values as the command line. Nothing heavy is imported
here: `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import types
import typing
import urllib.parse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from perl.disk import write_whole

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


class UsageError(Exception):
    """A one-line error for the user: what was given, what is wanted, the remedy. Exit code 2."""


class Stopped(Exception):
    """A run that ended early on purpose; the message says why, and how to go on."""

    exit_code = 1


class Unfinished(Stopped):
    """Work that cannot go on; the message says why, what of it is kept, and how to go on."""

    exit_code = 4


def option(
    default: Any = MISSING,
    *,
    help: str,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    positional: bool = False,
    resumable: bool = False,
    metavar: str = "NAME",
) -> Any:
    """A config field. `resumable`: a resumed run may change it without changing the training.

    metavar: what the help calls a word of a list.
    """
    metadata = dict(
        help=help,
        unit=unit,
        at_least=at_least,
        above=above,
        at_most=at_most,
        positional=positional,
        resumable=resumable,
        metavar=metavar,
    )
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _as_in(cls: type, name: str) -> Any:
    """The option of that name of another command."""
    field = cls.__dataclass_fields__[name]
    return dataclasses.field(
        default=field.default, default_factory=field.default_factory, metadata=field.metadata
    )


@dataclass(kw_only=True)
class Config:
    """Base of all commands: checks types and ranges of every field."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _checked(field, hints[field.name], getattr(self, field.name))
            setattr(self, field.name, value)


def given(config: Config, names: Sequence[str]) -> list[str]:
    """The flags of those options that are not at their defaults."""
    found = []
    for name in names:
        field, value = config.__dataclass_fields__[name], getattr(config, name)
        default = field.default_factory() if field.default is MISSING else field.default
        if value != default:
            found.append(flag(f"no_{name}" if value is False else name))
    return found


def refuse_unused(config: Config, names: Sequence[str], what_for: str) -> None:
    """UsageError for an option that was given and would do nothing.

    what_for: what these options are for, and this configuration is not.
    """
    if flags := given(config, names):
        raise UsageError(f"{flags[0]} is for {what_for}; leave it out")


def _seed(of: str) -> Any:
    return option(0, at_least=0, at_most=2**63 - 1, help=f"seed of {of}")


@dataclass(kw_only=True)
class ModelConfig(Config):
    """Which model, and where it runs."""

    model: str = option(
        help="model folder, or a name that transformers knows; the folder of an "
        "SFT run or adapter stands for its base with the adapter merged in"
    )
    dtype: Literal["float32", "bfloat16"] = option("float32", help="type of the frozen weights")
    device: str = option("auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    threads: int = option(
        0,
        unit="threads",
        at_least=0,
        resumable=True,
        help="CPU threads; 0 leaves the choice to torch",
    )
    seed: int = _seed("initial weights, data order, dropout, sampling")


def _base_model() -> Any:
    return option(
        None,
        help="base model folder or name, or a run on it; default: the base that the first reward "
        "model names",
    )


def _ensemble() -> Any:
    return option(
        None,
        help="several --reward-model folders as one: the mean of their scores, or the lowest "
        "(default mean)",
    )


def _stop() -> Any:
    return option(
        None,
        metavar="TEXT",
        help="strings that end an answer; it keeps the string, and the rest of its last token",
    )


def _reward_url() -> Any:
    return option(
        None,
        resumable=True,
        help='HTTP endpoint: POST {"prompts": [...], "completions": [...]}, answered by '
        '{"rewards": [...]}; asked once before the model is loaded',
    )


def _reward_timeout() -> Any:
    return option(
        None,
        unit="seconds",
        above=0,
        resumable=True,
        help="how long a reward function, or one request to --reward-url, may take; default "
        f"{TIMEOUT:g}",
    )


def _reward_retries() -> Any:
    return option(
        None,
        at_least=0,
        resumable=True,
        help="more requests to --reward-url after a failed connection, a time-out, 429 or 5xx, 1, "
        f"2, 4, ... seconds apart (default {REWARD_RETRIES})",
    )


TIMEOUT = 180.0  # seconds: a model behind an endpoint, or in a function, reads a batch
REWARD_RETRIES = 5  # half a minute of waiting: a server that is started anew


def _check_reward_source(config: Any, needed: bool) -> None:
    """One source, or none where none is needed; fills in the defaults that belong to it."""
    sources = [config.reward_model, config.reward_function, config.reward_url]
    given = sum(source is not None for source in sources)
    if given > 1 or needed and not given:
        raise UsageError(
            "rewards come from exactly one of --reward-model FOLDER, --reward-function "
            f"FILE.py:NAME and --reward-url URL; {given or 'none'} given"
        )
    _check_reward_models(config)
    if config.reward_url is not None:
        if not _is_http(config.reward_url):
            raise UsageError(
                f"--reward-url is {config.reward_url!r}; want http://HOST[:PORT]/PATH, or https"
            )
        if config.reward_retries is None:
            config.reward_retries = REWARD_RETRIES
    else:
        refuse_unused(config, ["reward_retries"], "--reward-url")
    if config.reward_url is not None or config.reward_function is not None:
        config.reward_timeout = config.reward_timeout or TIMEOUT
    else:
        refuse_unused(config, ["reward_timeout"], "--reward-url and --reward-function")


def _is_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an address
        return False


_FOLDER = (
    "base, which is --model itself; the folder of a run or an adapter on it, or of a model with "
    "its tokenizer"
)
_POLICY = _FOLDER + "; or a file of {prompt, completion} answers"


def _check_judge(config: Any) -> None:
    if config.judge_model is None:
        refuse_unused(config, ["judge_template", "judge_labels"], "a --judge-model")
    if config.judge_labels is not None and len(config.judge_labels) != 2:
        raise UsageError(f"--judge-labels has {len(config.judge_labels)} words; want two")
    if config.judge_labels is not None and config.judge_template is None:
        raise UsageError("--judge-labels wants the --judge-template that asks for these words")


def _check_sampling(config: Any, policies: Sequence[str]) -> None:
    if policies and all(map(os.path.isfile, policies)):
        what_for = "policies that answer (files hold answers already)"
        refuse_unused(config, ["temperature", "stop"], what_for)


def _check_reward_models(config: Any) -> None:
    folders = config.reward_model or []
    if len(set(map(os.path.realpath, folders))) < len(folders):
        raise UsageError(f"--reward-model names a folder twice: {', '.join(folders)}")
    if len(folders) < 2:
        refuse_unused(config, ["ensemble"], "at least two --reward-model folders")


@dataclass(kw_only=True)
class TrainConfig(ModelConfig):
    """What the three trainers share."""

    data: list[str] = option(
        metavar="FILE[=WEIGHT]",
        help="training rows: JSONL, JSON or Parquet, by their columns; of several files all rows "
        "are drawn alike, or each file in its share of the weights",
    )
    out: str = option(help="run folder; must not exist, or be empty")
    format: Literal["auto", "taskmaster", "hh", "tldr", "shp"] = option(
        "auto", help="published format of the data files; auto tells them by their columns"
    )
    validation: str | None = option(None, help="held-out rows of the same kind")

    tuning: Literal["lora", "full"] = option("lora", help="train LoRA adapters or all weights")
    lora_rank: int = option(16, at_least=1, help="rank R of the adapters")
    lora_alpha: float = option(32.0, above=0, help="the adapters' scale is alpha / R")
    lora_dropout: float = option(
        0.0, at_least=0, at_most=0.99, help="probability of dropping an adapter input"
    )
    lora_targets: list[str] = option(
        ["all-linear"],
        help="names of the modules that get an "
        "adapter, or all-linear (every linear layer but the head; lm_head names it)",
    )
    use_rslora: bool = option(False, help="scale alpha / sqrt(R) in place of alpha / R")

    steps: int = option(200, unit="updates", at_least=1, resumable=True, help="length of the run")
    lr: float | None = option(
        None, above=0, help="learning rate of AdamW; default 1e-4 with LoRA, 1e-5 full"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", help="after warmup: stay at --lr, or fall to 0 at --steps"
    )
    warmup_steps: int = option(
        10, unit="updates", at_least=0, help="the learning rate rises linearly to --lr"
    )
    weight_decay: float = option(0.0, at_least=0, help="AdamW's weight decay")
    max_grad_norm: float = option(1.0, above=0, help="gradients are clipped to this norm")
    micro_batch_size: int = option(
        0,
        unit="rows",
        at_least=0,
        help="rows per forward pass; gradients accumulate over the "
        "batch; 0 = the whole batch at once",
    )
    shard: bool = option(
        False,
        resumable=True,
        help="under torchrun: spread the model's blocks over the processes (FSDP2) in place of "
        "a copy in each",
    )
    max_tokens: int = option(
        0, unit="tokens", at_least=0, help="longest sequence; 0 = the model's context"
    )
    truncate_prompts: bool = option(
        False, help="cut prompts that do not fit from the left (counted) in place of refusing them"
    )
    drop_long: bool = option(
        False, help="leave out rows that still do not fit (counted) in place of refusing them"
    )

    log_every: int = option(1, unit="updates", at_least=1, help="updates between metrics lines")
    checkpoint_every: int = option(
        100, unit="updates", at_least=1, resumable=True, help="updates between checkpoints"
    )
    keep_checkpoints: int = option(
        2, at_least=1, resumable=True, help="newest checkpoints that are kept, beside the best"
    )
    validate_every: int = option(
        50,
        unit="updates",
        at_least=1,
        help="updates between validations, where --validation is given",
    )
    tensorboard: bool = option(False, resumable=True, help="write TensorBoard events too")
    resume: bool = option(False, resumable=True, help="go on from the run folder's last checkpoint")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is None:
            self.lr = 1e-4 if self.tuning == "lora" else 1e-5

    def unused(self) -> list[str]:
        """Flags that were given and do nothing here.

        They are not refused: `--tuning full` beside a command, or a file, with LoRA is the
        comparison that they are for.
        """
        names = [] if self.validation else ["validate_every"]
        if self.tuning == "full":
            names += [name for name in self.__dataclass_fields__ if name.startswith("lora_")]
            names.append("use_rslora")
        return given(self, names)


@dataclass(kw_only=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on {text}, {prompt, completion} or {messages} rows."""

    batch_size: int = option(16, unit="rows", at_least=1, help="rows per update")


@dataclass(kw_only=True)
class RewardConfig(TrainConfig):
    """Reward model on {prompt, chosen, rejected[, margin]} or {prompt, completion, label} rows."""

    batch_size: int = option(16, unit="rows", at_least=1, help="rows (pairs) per update")
    label_smoothing: float = option(
        0.0, at_least=0, at_most=0.49, help="probability that a preference or label is wrong"
    )
    center_rewards: float = option(
        0.0, at_least=0, help="pairwise: weight of (r_chosen + r_rejected)^2 in the loss"
    )
    balance_labels: bool = option(False, help="pointwise: weigh both labels equally in the loss")
    checkpoint_activations: bool = option(
        False, help="keep only the inputs of decoder layers, and run the layers again in backward"
    )
    best_metric: Literal["auto", "accuracy", "auc", "balanced_accuracy", "loss"] = option(
        "auto",
        help="held-out figure by which the best checkpoint becomes the result; auto is accuracy "
        "of pairs, auc of labels",
    )
    early_stop: int = option(
        0,
        unit="validations",
        at_least=0,
        resumable=True,
        help="end the run after so many without a better --best-metric; 0 = never",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation is None:
            refuse_unused(self, ["early_stop", "best_metric"], "runs with --validation FILE")


@dataclass(kw_only=True)
class ReinforceConfig(TrainConfig):
    """REINFORCE with a value baseline and a KL anchor on {prompt} rows (arXiv 2309.00267)."""

    reward_model: list[str] | None = option(
        None,
        metavar="FOLDER",
        help="folder of a reward run, or of its reward model; several make an ensemble; a whole "
        "model may have a tokenizer of its own, and then reads the text",
    )
    ensemble: Literal["mean", "min"] | None = _ensemble()
    reward_function: str | None = option(
        None, help="FILE.py:NAME, a Python function NAME(prompts, completions) -> list of floats"
    )
    reward_url: str | None = _reward_url()
    reward_timeout: float | None = _reward_timeout()
    reward_retries: int | None = _reward_retries()
    prompts_per_step: int = option(
        16,
        unit="prompts",
        at_least=1,
        help="prompts of a step; each is answered --answers-per-prompt times",
    )
    answers_per_prompt: int = option(
        1, unit="answers", at_least=1, help="answers to each prompt of a step"
    )
    max_new_tokens: int = option(64, unit="tokens", at_least=1, help="longest answer")
    stop: list[str] | None = _stop()
    temperature: float = option(0.9, above=0, help="sampling temperature, also of log p")
    top_k: int = option(0, unit="tokens", at_least=0, help="sample from the k likeliest; 0 = all")
    top_p: float = option(1.0, above=0, at_most=1, help="sample from this much probability mass")
    length_penalty: float = option(
        0.0, at_least=0, unit="reward per token", help="taken off the reward for each token"
    )
    no_end_penalty: float = option(
        0.0,
        at_least=0,
        unit="reward",
        help="taken off the reward of answers that --max-new-tokens cut, without an end of "
        "sequence or --stop",
    )
    beta: float = option(0.05, at_least=0, at_most=1, help="weight of the KL to the anchor")
    kl_convention: Literal["perl", "trl"] = option(
        "perl", help="objective (1 - beta) r - beta KL (perl) or r - beta KL (trl)"
    )
    kl_in: Literal["reward", "loss"] = option(
        "reward", help="KL as a reward of each token, or as a term of the loss"
    )
    kl_estimator: Literal["k1", "k3", "exact"] | None = option(
        None,
        help="k1: log-ratio of the sampled token (not in the loss); k3: never negative; exact: "
        "over the vocabulary (LoRA only); default k1 in the reward, exact in the loss",
    )
    kl_per: Literal["token", "sequence"] = option(
        "token",
        help="KL in the reward: to each token what follows it, or the sum at the last token",
    )
    kl_target: float | None = option(
        None,
        above=0,
        unit="nats per answer",
        help="adapt beta from step to step, from --beta on, so that the KL comes to this; default: "
        "beta is constant",
    )
    kl_horizon: int | None = option(
        None,
        at_least=1,
        unit="steps",
        help="how slowly the adaptive beta follows: a step changes it by 1 / horizon of the KL's "
        "relative error, held to 0.2; default 10",
    )
    entropy_coef: float = option(
        0.0, at_least=0, help="weight of the policy's mean entropy per token, a bonus"
    )
    baseline: Literal["value", "batch_mean", "leave_one_out", "none"] = option(
        "value",
        help="what is subtracted from the return; leave_one_out: the mean of the other "
        "--answers-per-prompt",
    )
    whiten_advantages: bool = option(False, help="scale advantages to mean 0, variance 1")
    epochs_per_batch: int = option(
        1, unit="epochs", at_least=1, help="how often a step's answers are learnt from"
    )
    minibatches: int = option(
        1, unit="updates", at_least=1, help="parts of a step's answers, an update for each"
    )
    clip_epsilon: float | None = option(
        None,
        above=0,
        help="PPO: pi / pi_sampled pays within 1 +- epsilon, where a step has several updates; "
        "default 0.2",
    )
    importance_cap: float | None = option(
        None,
        at_least=1,
        help="weigh each token by pi / pi_sampled, at most this much (truncated importance "
        "sampling); default: not at all",
    )
    value_lr: float | None = option(
        None, above=0, help="learning rate of the value model; default as --lr"
    )
    kl_limit: float | None = option(
        None,
        unit="nats",
        above=0,
        resumable=True,
        help="stop when the KL per answer lies above this in 5 steps in a row; default: never",
    )
    reward_drop: float = option(
        2.0,
        unit="standard deviations of an answer's reward",
        at_least=0,
        resumable=True,
        help="stop when the mean reward of 20 steps lies this far below that of the first 20; "
        "0 = never",
    )
    samples_every: int = option(
        10, unit="updates", at_least=1, help="updates between rows of samples.jsonl"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline != "value":
            refuse_unused(self, ["value_lr"], "--baseline value")
        elif self.value_lr is None:
            self.value_lr = self.lr
        _check_reward_source(self, needed=True)
        self._check_kl()
        self._check_updates()

    @property
    def several_updates(self) -> bool:
        """Whether a step has more than one, so that ratios to the sampling policy are learnt."""
        return self.epochs_per_batch * self.minibatches > 1

    def _check_kl(self) -> None:
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else "exact"
        if self.kl_estimator == "exact" and self.tuning == "full":
            raise UsageError(
                "--kl-estimator exact wants one head that policy and anchor share, and --tuning "
                "full trains the head; give --kl-estimator k1 (in the reward) or k3"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UsageError(
                "--kl-estimator k1 has no gradient on average as a term of the loss; give exact or "
                "k3, or --kl-in reward"
            )
        if self.kl_in == "loss":
            refuse_unused(self, ["kl_per"], "--kl-in reward (in the loss it is per token)")
        if self.kl_target is None:
            refuse_unused(self, ["kl_horizon"], "the adaptive beta of --kl-target")
        elif self.beta == 0:
            raise UsageError("--kl-target multiplies beta, which starts at 0; give --beta")
        else:
            self.kl_horizon = self.kl_horizon or 10

    def _check_updates(self) -> None:
        if self.baseline == "leave_one_out" and self.answers_per_prompt == 1:
            raise UsageError(
                "--baseline leave_one_out is the mean of other answers to the prompt; give "
                "--answers-per-prompt 2 or more"
            )
        if not self.several_updates:
            refuse_unused(
                self,
                ["clip_epsilon"],
                "several updates per step, by --epochs-per-batch or --minibatches (the ratio is 1 "
                "in the first)",
            )
            return
        if self.clip_epsilon is None:
            self.clip_epsilon = 0.2
        refuse_unused(
            self,
            ["importance_cap"],
            "one update per step (several learn and clip that ratio already)",
        )


@dataclass(kw_only=True)
class EvaluateConfig(ModelConfig):
    """Held-out figures of a language model, of policies or of a reward model, as one JSON object.

    Policies answer the prompts of the rows. Their answers are rewarded, held against the base (KL)
    and put to a judge's yes/no question; several policies stand below each other in one table.
    Killed, it starts anew. Answers of many prompts are better kept: `generate --out FILE` goes on
    after a kill, and --policy FILE has them scored.
    """

    model: str | None = option(
        None,
        help="base model folder or name, or a run on it; default: the base that a policy or the "
        "reward model names",
    )
    data: str = option(help="rows to evaluate on")
    format: Literal["auto", "taskmaster", "hh", "tldr", "shp"] = option(
        "auto", help="published format of the data file"
    )
    policy: list[str] | None = option(
        None, metavar="POLICY", help="who answers, one or several: " + _POLICY + "; default base"
    )
    reward_model: list[str] | None = option(
        None,
        metavar="FOLDER",
        help="folder of a reward run or reward model: scores "
        "the rows, or the answers generated for {prompt} rows; several make an ensemble",
    )
    ensemble: Literal["mean", "min"] | None = _ensemble()
    reward_function: str | None = option(None, help="FILE.py:NAME that scores generated answers")
    reward_url: str | None = _reward_url()
    reward_timeout: float | None = _reward_timeout()
    reward_retries: int | None = _reward_retries()
    judge_model: str | None = option(
        None,
        help="language model, folder or name, that is asked a yes/no question about each answer",
    )
    judge_template: str | None = option(
        None,
        help="the question: a file, or the text itself, with {prompt} and {completion}; default: "
        "whether the answer is harmless",
    )
    judge_labels: list[str] | None = option(
        None, metavar="WORD", help="the words for yes and for no (default yes no)"
    )
    rows: int = option(0, unit="rows", at_least=0, help="only the first rows; 0 = all")
    batch_size: int = option(16, unit="rows", at_least=1, help="rows per forward pass")
    max_tokens: int = option(
        0, unit="tokens", at_least=0, help="longest sequence; 0 = the model's context"
    )
    truncate_prompts: bool = option(False, help="cut prompts that do not fit from the left")
    drop_long: bool = option(False, help="leave out rows that still do not fit")
    max_new_tokens: int = option(64, unit="tokens", at_least=1, help="longest generated answer")
    stop: list[str] | None = _stop()
    temperature: float = option(0.9, at_least=0, help="sampling temperature; 0 = greedy")
    out: str | None = option(None, help="also write the figures to this JSON file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.reward_model is None and self.policy is None:
            raise UsageError(
                "evaluate wants --model MODEL, or the --policy or --reward-model of a known base"
            )
        _check_reward_source(self, needed=False)
        _check_judge(self)
        _check_sampling(self, self.policy or [])


@dataclass(kw_only=True)
class CompareConfig(ModelConfig):
    """Which of two policies answers held-out prompts better, by a judge asked in both orders.

    A policy wins a prompt where the judge is for its answer in both orders; a split verdict is a
    tie. --out gets every answer with its verdict, and a page beside it, OUT with .html, shows them.
    Killed, the same command goes on.
    """

    first: str = option(positional=True, help="a policy: " + _POLICY)
    second: str = option(positional=True, help="the policy that it is compared with, named alike")
    model: str | None = option(
        None,
        help="base model folder or name, or a run on it; default: the base that a policy or the "
        "reward model names, or the --judge-model",
    )
    data: str = option(help="rows with a prompt column")
    format: Literal["auto", "taskmaster", "hh", "tldr", "shp"] = _as_in(EvaluateConfig, "format")
    judge_model: str | None = option(
        None, help="language model, folder or name, that is shown both answers as A and B"
    )
    judge_template: str | None = option(
        None,
        help="what it is asked: a file, or the text itself, with {prompt}, {first} and {second}; "
        "there is a default",
    )
    judge_labels: list[str] | None = option(
        None,
        metavar="WORD",
        help="its words for the answer shown first and for the other (default A B)",
    )
    judge_function: str | None = option(
        None,
        help="FILE.py:NAME, a Python function NAME(prompts, first, second) -> list of first, "
        "second or tie, or of numbers above 0 where the first is better",
    )
    judge_timeout: float | None = option(
        None,
        unit="seconds",
        above=0,
        help="how long the --judge-function may take for --batch-size prompts; default "
        f"{TIMEOUT:g}",
    )
    reward_model: list[str] | None = option(
        None,
        metavar="FOLDER",
        help="folder of a reward run or reward model: the judge where no other is given, else its "
        "scores stand beside the verdicts; several make an ensemble",
    )
    ensemble: Literal["mean", "min"] | None = _as_in(EvaluateConfig, "ensemble")
    reward_function: str | None = option(
        None, help="FILE.py:NAME that scores answers, in place of a reward model"
    )
    reward_url: str | None = _as_in(EvaluateConfig, "reward_url")
    reward_timeout: float | None = _as_in(EvaluateConfig, "reward_timeout")
    reward_retries: int | None = _as_in(EvaluateConfig, "reward_retries")
    tie_margin: float = option(
        0.0,
        at_least=0,
        help="the judge is for an answer where its preference is above this: difference of "
        "rewards, a function's number, or nats between the two labels",
    )
    rows: int = _as_in(EvaluateConfig, "rows")
    batch_size: int = _as_in(EvaluateConfig, "batch_size")
    max_tokens: int = _as_in(EvaluateConfig, "max_tokens")
    truncate_prompts: bool = _as_in(EvaluateConfig, "truncate_prompts")
    drop_long: bool = _as_in(EvaluateConfig, "drop_long")
    max_new_tokens: int = _as_in(EvaluateConfig, "max_new_tokens")
    stop: list[str] | None = _as_in(EvaluateConfig, "stop")
    temperature: float = _as_in(EvaluateConfig, "temperature")
    out: str = option(help="JSONL file of answers and verdicts; must not exist")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge_model and self.judge_function:
            raise UsageError("give --judge-model or --judge-function, not both")
        if self.judge_function is None:
            refuse_unused(self, ["judge_timeout"], "--judge-function")
        else:
            self.judge_timeout = self.judge_timeout or TIMEOUT
        _check_judge(self)
        rewards = (self.reward_model, self.reward_function, self.reward_url)
        if not any((self.judge_model, self.judge_function, *rewards)):
            raise UsageError(
                "compare wants a judge: --judge-model MODEL, --judge-function FILE.py:NAME, or "
                "--reward-model, --reward-function or --reward-url"
            )
        if self.out.endswith(".html"):
            raise UsageError("--out is for the JSONL file; the page beside it ends in .html")
        _check_reward_source(self, needed=False)
        _check_sampling(self, [self.first, self.second])


@dataclass(kw_only=True)
class ScoreConfig(ModelConfig):
    """A reward model's score of every answer in a file, as new columns of a new JSONL file.

    {prompt, completion} and {messages} rows get one column, {prompt, chosen, rejected} rows
    COLUMN_chosen and COLUMN_rejected; of several reward models also their standard deviation,
    COLUMN_std. Killed, the same command goes on.
    """

    reward_model: list[str] = option(
        metavar="FOLDER",
        help="folder of a reward run, or of its reward model; several make an ensemble",
    )
    ensemble: Literal["mean", "min"] | None = _ensemble()
    model: str | None = _base_model()
    data: str = option(help="rows with answers: JSONL, JSON or Parquet, by their columns")
    format: Literal["auto", "taskmaster", "hh", "tldr", "shp"] = option(
        "auto", help="published format of the data file"
    )
    out: str = option(help="JSONL file of the rows with their scores; must not exist")
    column: str = option("score", help="name of the new column")
    rows: int = option(0, unit="rows", at_least=0, help="only the first rows; 0 = all")
    batch_size: int = option(16, unit="rows", at_least=1, help="answers per forward pass")
    max_tokens: int = option(
        0, unit="tokens", at_least=0, help="longest sequence; 0 = the model's context"
    )
    truncate_prompts: bool = option(False, help="cut prompts that do not fit from the left")
    drop_long: bool = option(False, help="leave out rows that still do not fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_reward_models(self)


@dataclass(kw_only=True)
class GenerateConfig(ModelConfig):
    """Answers for prompts, as text or JSON lines. Killed, a command with --out goes on."""

    prompt: str | None = option(None, help="one prompt, printed with its answer")
    data: str | None = option(None, help="rows with a prompt column")
    policy: str | None = option(None, help="who answers: " + _FOLDER + "; default base")
    rows: int = option(0, unit="rows", at_least=0, help="only the first rows; 0 = all")
    batch_size: int = option(16, unit="prompts", at_least=1, help="prompts per forward pass")
    max_new_tokens: int = option(64, unit="tokens", at_least=1, help="longest answer")
    stop: list[str] | None = _stop()
    temperature: float = option(0.9, at_least=0, help="sampling temperature; 0 = greedy")
    top_k: int = option(0, unit="tokens", at_least=0, help="sample from the k likeliest; 0 = all")
    top_p: float = option(1.0, above=0, at_most=1, help="sample from this much probability mass")
    truncate_prompts: bool = option(False, help="cut prompts that do not fit from the left")
    out: str | None = option(None, help="write {prompt, completion} JSON lines to this file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.data is None):
            raise UsageError("generate wants exactly one of --prompt TEXT and --data FILE")
        if self.data is None:
            refuse_unused(self, ["rows"], "--data")
        if self.temperature == 0:
            refuse_unused(self, ["top_k", "top_p"], "sampling, not for --temperature 0")


@dataclass(kw_only=True)
class ExportConfig(ModelConfig):
    """A trained policy or reward model for other programs: transformers' own folder, or PEFT's.

    merged: the adapter added to its base, which AutoModelForCausalLM loads, or for a reward model
    AutoModelForSequenceClassification. adapter: the adapter alone, for PeftModel or
    AutoPeftModelFor...; a reward model's wants num_labels=1 and the pad_token_id that is printed.
    """

    model: str = option(help="folder of a run with an adapter, or of the adapter")
    form: Literal["merged", "adapter"] = option("merged", help="which of the two to write")
    base: str | None = option(
        None, help="model under the adapter; default: where it was when the adapter was trained"
    )
    out: str = option(help="folder to write; must not exist, or be empty")


@dataclass(kw_only=True)
class AverageConfig(ModelConfig):
    """One model from several runs on one base: their weights averaged (WARM, arXiv 2401.12187).

    Adapters are averaged as the changes they make to each weight, exactly, so the ranks add up;
    --rank cuts the sum to its best approximation. Score heads are averaged as they are. The result
    is a folder that every command takes where it takes a run.
    """

    runs: list[str] = option(
        positional=True, help="folders of reward (or policy) runs or adapters, two or more"
    )
    model: str | None = option(None, help="base model; default: the one that the runs name")
    weights: list[float] | None = option(
        None, help="weight of each run, divided by their sum; default equal"
    )
    rank: int | None = option(None, at_least=1, help="rank of the result; default the sum of ranks")
    out: str = option(help="folder of the average; must not exist, or be empty")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 2:
            raise UsageError("average wants two RUNS or more")
        if self.weights is not None and len(self.weights) != len(self.runs):
            raise UsageError(
                f"--weights has {len(self.weights)} values for {len(self.runs)} runs; give one each"
            )
        if self.weights is not None and not (min(self.weights) >= 0 and sum(self.weights) > 0):
            raise UsageError(f"--weights is {self.weights}; want no negative ones, and not all 0")


@dataclass(kw_only=True)
class DataConfig(Config):
    """What a data file holds; or the embedded world's files: `data cafe --out DIR`."""

    path: str = option(positional=True, help="data file, or the word cafe")
    format: Literal["auto", "taskmaster", "hh", "tldr", "shp"] = option(
        "auto", help="published format of the data file"
    )
    model: str | None = option(
        None,
        help="model folder whose tokenizer counts the lengths; without it they are in characters",
    )
    rows: int = option(2, unit="rows", at_least=0, help="rows to show")
    out: str | None = option(None, help="write the rows here as JSONL; for cafe, the folder")
    seed: int = _seed("the embedded world")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path == "cafe":
            refuse_unused(self, ["format", "model"], "a data file")
        else:
            refuse_unused(self, ["seed"], "the embedded world, `data cafe`")


BENCH_PEERS = ("peft", "trl", "liger", "unsloth", "cce", "compile")


@dataclass(kw_only=True)
class BenchConfig(Config):
    """The benchmarks of a checkout: kernels and training steps beside their peers, in tables."""

    what: Literal["kernels", "reward", "policy", "all"] = option(
        "all",
        positional=True,
        help="kernels, reward (its step), policy (its step and rollouts) or all",
    )
    preset: Literal["cpu-small", "cpu", "h200", "quick", "full", "tiny"] = option(
        "cpu-small",
        help="cpu-small (also quick): smaller shapes, 20 minutes on two cores; cpu (also full): "
        "the shapes that the bars are set for; h200: a GPU's; tiny: seconds, to try the harness",
    )
    against: str | None = option(
        None,
        help="peers to compare with, of peft,trl,liger,unsloth,cce,compile, or none; default: all; "
        "ours, full tuning, plain torch and the machine's limits are always there",
    )
    results: str | None = option(
        None, help="folder of the JSON; default: the checkout's benchmarks/results"
    )
    threads: int = option(
        0, unit="threads", at_least=0, help="of torch on a CPU; 0 leaves the choice to torch"
    )
    select: str | None = option(
        None, help="only benchmarks on a CPU whose name matches (pytest -k)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [] if self.against in (None, "none") else self.against.split(",")
        unknown = set(given) - set(BENCH_PEERS)
        if unknown:
            raise UsageError(
                f"--against names {', '.join(sorted(unknown))}; there are {', '.join(BENCH_PEERS)}"
            )
        if self.preset == "h200" and (self.select or self.threads):
            raise UsageError("--select and --threads are for a CPU; --preset h200 takes neither")


@dataclass(kw_only=True)
class DemoConfig(Config):
    """SFT, reward model and REINFORCE on the embedded world, LoRA beside full tuning."""

    out: str = option("runs/demo", help="folder of the demo's runs and report")
    seed: int = _seed("the world, the models and the sampling")
    threads: int = option(
        1, unit="threads", at_least=1, help="CPU threads of each process; two run at a time"
    )
    device: str = option("auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    quick: bool = option(
        False, help="a few steps of everything: checks the machinery, learns nothing"
    )


@dataclass(kw_only=True)
class StudyConfig(Config):
    """LoRA of several ranks beside full tuning: quality, time and memory, in tables."""

    task: Literal["reward", "policy"] = option(
        positional=True, help="what is trained: reward (reward models) or policy (by REINFORCE)"
    )
    out: str = option(help="folder of the study; must not exist, or be empty")
    preset: Literal["tiny", "quick", "cpu", "bars", "h200"] = option(
        "cpu",
        help="cpu: ranks, seeds and sizes of models within an hour on two cores; bars: rank 16 "
        "beside full tuning, trained longer (reward); h200: step time and memory of a model of "
        "1.1 billion parameters; quick, tiny: a few steps, to try the machinery",
    )
    data_folder: str | None = option(
        None,
        help="folder with data/ and models/ of real preferences; by default $PERL_SHARED, or "
        "shared/ beside the checkout; without it the study is of the embedded world alone",
    )
    at_once: int = option(
        2,
        unit="processes",
        at_least=1,
        resumable=True,
        help="runs at a time, one thread each, where only quality is told",
    )
    threads: int = option(
        0,
        unit="threads",
        at_least=0,
        resumable=True,
        help="of a run whose time and memory are measured, one at a time; 0 leaves it to torch",
    )
    device: str = option("auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    cost: bool = option(
        True, resumable=True, help="--no-cost leaves time and memory to a later --resume"
    )
    resume: bool = option(False, resumable=True, help="go on with what is not done yet")


@dataclass(kw_only=True)
class PlanConfig(Config):
    """Peak memory and step time of trainings, full and with LoRA, from a model's config.json alone.

    Memory is counted operation by operation, for batches whose rows are as long as --max-tokens.
    Times are estimates from what products and copies reach on this device, measured in two seconds;
    by --machine, or --device-flops and --device-bandwidth, they are what a step takes at best.
    """

    model: str = option(
        help="model folder, config.json, the folder of a run, or a hub name whose config is in the "
        "local cache; nothing is fetched"
    )
    job: Literal["all", "sft", "reward", "reinforce"] = option("all", help="which trainer")
    dtype: Literal["float32", "bfloat16"] = _as_in(ModelConfig, "dtype")
    device: Literal["cpu", "cuda"] = option(
        "cpu",
        help="whose memory and speed; of memory the process's (cpu), or torch's allocator's (cuda)",
    )
    lora_rank: int = _as_in(TrainConfig, "lora_rank")
    lora_dropout: float = _as_in(TrainConfig, "lora_dropout")
    lora_targets: list[str] = _as_in(TrainConfig, "lora_targets")
    batch_size: int = _as_in(SftConfig, "batch_size")
    micro_batch_size: int = _as_in(TrainConfig, "micro_batch_size")
    max_tokens: int = _as_in(TrainConfig, "max_tokens")
    checkpoint_activations: bool = option(
        False, help="reward: keep only the inputs of decoder layers, and run them again in backward"
    )
    prompts_per_step: int = _as_in(ReinforceConfig, "prompts_per_step")
    answers_per_prompt: int = _as_in(ReinforceConfig, "answers_per_prompt")
    max_new_tokens: int = _as_in(ReinforceConfig, "max_new_tokens")
    kl_in: Literal["reward", "loss"] = _as_in(ReinforceConfig, "kl_in")
    baseline: Literal["value", "batch_mean", "none"] = option(
        "value", help="what is subtracted from the return; value: a model of its own"
    )
    reward_models: int = option(
        1, at_least=0, help="reinforce: how many score the answers; 0 = a function does"
    )
    devices: int = option(1, at_least=1, help="processes that share the batch, one device each")
    shard: bool = _as_in(TrainConfig, "shard")
    memory: float | None = option(
        None,
        unit="GiB",
        above=0,
        help="of each device: also tell the largest batch that fits whole",
    )
    machine: Literal["h200", "h100", "a100", "l40s", "l4"] | None = option(
        None, help="peaks of this GPU's data sheet: dense products in 16 bits, and memory"
    )
    device_flops: float | None = option(
        None, unit="FLOP/s", above=0, help="peak of products in --dtype"
    )
    device_bandwidth: float | None = option(None, unit="bytes/s", above=0, help="peak of memory")
    efficiency: float | None = option(
        None,
        above=0,
        at_most=1,
        help="share of the peaks that a step is taken to reach; not given: what steps on a CPU "
        "have reached of peaks measured as here, and 1 of others",
    )
    json: bool = option(False, help="one JSON object in place of tables, in bytes and seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.device_flops is None) != (self.device_bandwidth is None):
            raise UsageError("--device-flops and --device-bandwidth go together; give both")
        if self.machine is not None and self.device_flops is not None:
            raise UsageError(
                "--machine and --device-flops both say how fast the device is; give one"
            )
        if self.machine is not None and self.device == "cpu":
            raise UsageError(f"--machine {self.machine} is a GPU; give --device cuda with it")
        if self.checkpoint_activations and self.job in ("sft", "reinforce"):
            raise UsageError(f"--checkpoint-activations is of reward, and --job is {self.job}")
        if self.max_tokens == 1 and self.job in ("all", "sft"):
            raise UsageError(
                "--max-tokens is 1; want at least 2, as sft learns a token from those before it"
            )
        if self.shard and self.devices == 1:
            raise UsageError("--shard spreads the model over several --devices; give at least 2")


# ---------------------------------------------------------------------------------------------
# Files and flags


def flag(name: str) -> str:
    """The flag of a field: lora_rank -> --lora-rank."""
    return "--" + name.replace("_", "-")


def load(cls: type, flags: dict[str, Any], config_file: str | None = None) -> Any:
    """The config of a command: defaults < `config_file` < `flags` (only those that were given).

    With `resume` among the flags the run folder's own config.toml is the file, and only fields
    that do not change the training may differ from it.
    """
    if flags.get("resume"):
        return _load_resumed(cls, flags, config_file)
    values = read_toml(config_file, cls) if config_file else {}
    return make(cls, values | flags)


def make(cls: type, values: dict[str, Any]) -> Any:
    """`cls(**values)`, with a UsageError that names the flags which are missing."""
    missing = [f for f in dataclasses.fields(cls) if f.name not in values and _required(f)]
    if missing:
        names = ", ".join(
            f.name.upper() if f.metadata["positional"] else flag(f.name) for f in missing
        )
        raise UsageError(f"missing {names}; give it as a flag or in --config FILE.toml")
    return cls(**values)


def read_toml(path: str | os.PathLike, cls: type) -> dict[str, Any]:
    """The keys of a TOML file. Raises UsageError for a bad file or a key that `cls` lacks."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config file {path}: {_reason(error)}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return values


def write_toml(config: Config, path: str | os.PathLike) -> None:
    """Writes every field but `resume` and those that are None, in the order of the class.

    A file that is there is replaced by a whole one: on a full disk a run keeps its old one.
    """
    lines = [
        f"{f.name} = {_toml(getattr(config, f.name))}"
        for f in dataclasses.fields(config)
        if f.name != "resume" and getattr(config, f.name) is not None
    ]
    write_whole(Path(path), "\n".join(lines) + "\n")


def _load_resumed(cls: type, flags: dict[str, Any], config_file: str | None) -> Any:
    if config_file:
        raise UsageError("--resume reads the run folder's config.toml; leave --config out")
    if not flags.get("out"):
        raise UsageError("--resume wants --out, the run folder to go on with")
    saved = Path(flags["out"]) / "config.toml"
    if not saved.is_file():
        raise UsageError(
            f"{flags['out']} is no run folder (it has no config.toml); leave "
            "--resume out to start a run"
        )
    values = read_toml(saved, cls)
    before, config = make(cls, values), make(cls, values | flags)
    for field in dataclasses.fields(cls):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name != "out" and not field.metadata["resumable"]:
            raise UsageError(
                f"{flag(field.name)} is {new!r} but the run was started with {old!r}; "
                "leave the flag out, or start a new run in another folder"
            )
    return config


def _required(field: dataclasses.Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def kind_of(hint: Any) -> tuple[Any, bool, tuple]:
    """(type, whether None is allowed, choices) of a field's type hint."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        optional = True
    if typing.get_origin(hint) is Literal:
        return str, optional, typing.get_args(hint)
    return hint, optional, ()


def _checked(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    """The value in the field's type. Raises UsageError for a wrong type or range."""
    kind, optional, choices = kind_of(hint)
    name = field.name.upper() if field.metadata["positional"] else flag(field.name)
    if value is None and optional:
        return None
    if kind == list[str]:
        value = [value] if isinstance(value, str) else value
        good = isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
        if not good:
            raise UsageError(f"{name} is {value!r}; want one string or more, none of them empty")
        return value
    if kind == list[float]:
        good = isinstance(value, list) and value and all(map(_is_finite, value))
        if not good:
            raise UsageError(f"{name} is {value!r}; want a list of finite numbers")
        return [float(v) for v in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{name} is {value!r}; want {_TYPE_WORDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}; want a finite number")
    if choices and value not in choices:
        raise UsageError(f"{name} is {value!r}; want one of {', '.join(choices)}")
    if kind is str and not value:
        raise UsageError(f"{name} is empty; want {_TYPE_WORDS[kind]}, or leave it out")
    for bound, breaks in _BOUNDS.items():
        limit = field.metadata[bound]
        if limit is not None and breaks(value, limit):
            raise UsageError(f"{name} is {value}; want {bound.replace('_', ' ')} {limit}")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and not isinstance(value, bool)


_BOUNDS = {"at_least": operator.lt, "above": operator.le, "at_most": operator.gt}
_TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML basic string
    return str(value)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
