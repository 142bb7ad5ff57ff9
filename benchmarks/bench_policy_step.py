"""One step of REINFORCE: sampling, scoring, anchor and learning, with LoRA and with full tuning.

    ours    perl.train_policy, unchanged: policy, value and reward are adapters of one
            backbone, and the anchor is that backbone without any
    full    the same with `--tuning full`: four models, two of them trained
    eager   four models of transformers, in plain torch: generate over a static cache, logits
    trl     TRL's RLOOTrainer with PEFT: one backbone for policy and anchor, a reward model of
            its own, no value model; two answers to each prompt, so half as many prompts

A step is B answers of T tokens to prompts of P tokens, the reward model's scores, the anchor's
log-probabilities, and one update of AdamW of the policy and, but for trl, of the value model. No
answer ends early, and all pass their rows at once: with --micro-batch-size ours takes less memory
and more time. Each contestant lives in a process of its own, whose peak memory is told, and they
take turns step by step; a trainer's loop waits for its turn. All start from the same weights.

"rollout_s", "score_s" and "learn_s" are a step's phases, medians; trl's are not told.
Letters beside the library's: P tokens of a prompt, T of an answer, L layers, F features inside the
MLP, A attention heads.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import string
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from _compare import FLOOR, errors
from torch import Tensor

import perl_kernels as pk
from benchmarks._measure import DTYPES, OURS, Case, Stopwatch, give_back_freed, shapes_for
from benchmarks._results import PHASES, Row
from benchmarks._steps import Turns, measure_turns
from benchmarks.bench_rollout import SHAPES, build, fill
from perl import train_policy
from perl.backbone import Backbone
from perl.cafe import build_tokenizer
from perl.config import ReinforceConfig
from perl.memory import PeakMemory
from perl.policy_step import ask_anchor, learn
from perl.rollout import Rollout
from perl.run import Run
from perl.train_policy import Clock
from perl.training import lora_config

ROOM, STEP = "policy_step", "step"
PEERS = ("peft", "trl.trainer.rloo_trainer")
FULL, EAGER, TRL = "full", "eager", "trl"
NEVER = 10**6  # steps until the end, a checkpoint or samples
TEMPERATURE, BETA, LR = 0.9, 0.05, {"lora": 1e-4, "full": 1e-5}


def cases(preset: str) -> list[Case]:
    device = "cuda" if preset == "h200" else "cpu"
    dtypes = {"h200": ("bf16",), "tiny": ("fp32",)}.get(preset, ("bf16", "fp32"))
    return [
        Case(ROOM, STEP, shapes_for(preset, dtype, SHAPES), dtype, device, weighed=preset != "tiny")
        for dtype in dtypes
    ]


@pytest.mark.timeout(3600)
def test_policy_step(case, record):
    record(measure_step, case)


def measure_step(case: Case, seconds: float, stopwatch: Stopwatch | None = None) -> Row:
    """As benchmarks._measure.measure, with a process per contestant.

    Raises:
        AssertionError: gradients of ours are further from float64 than plain torch's by more than
            half.
    """
    names, missing = [OURS, FULL, EAGER], {}
    absent = [package for package in ("trl", "peft") if find_spec(package) is None]
    if absent and case.meets(TRL):
        missing[TRL] = f"{absent[0]} is not installed"
    elif case.meets(TRL):
        names.append(TRL)

    def errors_of(told: dict[str, Any]) -> dict[str, Any]:
        ours, plain = told[OURS]
        # every layer's rounding is in both, so this is no test of one kernel: a wide margin
        assert ours <= 1.5 * plain + FLOOR[case.torch_dtype], (
            f"{case}: gradients are off by {ours:.3g} of their size, plain torch's by {plain:.3g}"
        )
        return {"of": "gradients", "unit": "relative RMS", "ours": ours, "plain": plain}

    tokens = case.shape["B"] * (case.shape["P"] + case.shape["T"])
    with TemporaryDirectory() as folder:
        write_inputs(Path(folder), case)
        contestant = functools.partial(serve, Path(folder))
        return measure_turns(
            contestant, case, names, missing, tokens, seconds, stopwatch, errors_of
        )


def write_inputs(folder: Path, case: Case) -> None:
    """The base, a reward model as an adapter and one with weights of its own, and the prompts."""
    tokenizer = build_tokenizer(["x"], vocab_size=260)  # a token is a byte
    build(case, ends=False).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    letters = random.Random(0)
    rows = [
        {"prompt": "".join(letters.choices(string.ascii_lowercase, k=case.shape["P"] - 1))}
        for _ in range(case.shape["B"])
    ]  # and <bos>
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for tuning in ("lora", "full"):
        config = config_of(folder, tuning, case)
        backbone = Backbone.load(config.model, tuning=tuning, lora=lora_config(config))
        backbone.add_role("reward", scalar=True)
        if tuning == "lora":
            fill(parameter for _, parameter in backbone.trainable("reward"))
        backbone.save_role("reward", folder / f"reward-{tuning}")


def config_of(folder: Path, tuning: str, case: Case) -> ReinforceConfig:
    s = case.shape
    return ReinforceConfig(
        model=str(folder / "model"), data=[str(folder / "prompts.jsonl")],
        reward_model=[str(folder / f"reward-{tuning}")], out=str(folder / f"run-{tuning}"),
        tuning=tuning, lora_rank=s["R"], lora_alpha=2.0 * s["R"], lr=LR[tuning],
        dtype=str(case.torch_dtype).removeprefix("torch."), device=case.device,
        prompts_per_step=s["B"], max_new_tokens=s["T"], temperature=TEMPERATURE, beta=BETA,
        steps=NEVER, checkpoint_every=NEVER, samples_every=NEVER, reward_drop=0.0,
    )  # fmt: skip


def serve(folder: Path, turns: Turns, name: str, case: Case) -> None:
    if name == OURS:
        found = gradient_errors(folder, case)
        give_back_freed()  # the float64 copy, which no other has made
        pk.empty_cpu_pool()
        train_by_perl(config_of(folder, "lora", case), turns, found)
    elif name == FULL:
        train_by_perl(config_of(folder, "full", case), turns)
    else:
        train = train_by_trl if name == TRL else train_eagerly
        train(folder, case, turns)


# ------------------------------------------------------------------------------------------------
# The steps
# ------------------------------------------------------------------------------------------------


def train_by_perl(config: ReinforceConfig, turns: Turns, told: Any = None) -> None:
    logged: list[dict[str, Any]] = []

    class InTurns(Run):
        """A turn is from one step to the next, with what is logged between."""

        def steps(self, total: int, description: str) -> Iterator[int]:
            turns.ready(told)
            logged.clear()  # what stands before the first step
            step = 0
            while turns.wait(lambda: phases(logged) | {"peak": logged[-1]["peak_memory_bytes"]}):
                step += 1
                yield step
                turns.done()
            raise SystemExit

        def log(self, step: int, **metrics: Any) -> None:
            super().log(step, **metrics)
            logged.append(metrics)

    train_policy.Run = InTurns
    train_policy.train(config)


def phases(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(step[name] for step in steps) for name in PHASES}


def train_eagerly(folder: Path, case: Case, turns: Turns) -> None:
    import transformers
    from transformers import (
        AutoTokenizer,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
    )

    transformers.utils.logging.set_verbosity_error()  # the value model's head is new

    def load(kind: Any, name: str, **options: Any) -> Any:
        return kind.from_pretrained(folder / name, dtype=case.torch_dtype, **options).to(
            case.device
        )

    policy, anchor = (load(LlamaForCausalLM, "model") for _ in range(2))
    value = load(LlamaForTokenClassification, "model", num_labels=1)
    reward = load(LlamaForSequenceClassification, "reward-full")
    trained = [list(model.parameters()) for model in (policy, value)]
    optimizers = [torch.optim.AdamW(p, lr=LR["full"], weight_decay=0, fused=True) for p in trained]
    texts = [row["prompt"] for row in read_prompts(folder)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = tokenizer(texts, return_tensors="pt")["input_ids"].to(case.device)
    count = prompts.shape[1]

    def log_prob(model: Any, sequences: Tensor) -> Tensor:  # (B, T)
        logits = model(sequences[:, :-1], use_cache=False, logits_to_keep=case.shape["T"]).logits
        found = (logits.float() / TEMPERATURE).log_softmax(-1)
        return found.gather(-1, sequences[:, count:, None]).squeeze(-1)

    def step() -> dict[str, float]:
        clock = Clock(torch.device(case.device))
        with clock.phase("rollout"), torch.no_grad():
            sequences = policy.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                max_new_tokens=case.shape["T"], temperature=TEMPERATURE, top_k=0, top_p=1.0,
                cache_implementation="static",
            )  # fmt: skip
        with clock.phase("score"), torch.no_grad():
            scores = reward(sequences, use_cache=False).logits[:, 0].float()
            ref_log_prob = log_prob(anchor, sequences)
        with clock.phase("learn"):
            found = log_prob(policy, sequences)
            rewards = -BETA * (found.detach() - ref_log_prob)
            rewards[:, -1] += (1 - BETA) * scores
            returns = rewards.flip(1).cumsum(1).flip(1)
            values = value(sequences[:, :-1], use_cache=False).logits[:, count - 1 :, 0].float()
            (returns - values).square().mean().backward()
            (-(returns - values.detach()) * found).mean().backward()
            for parameters, optimizer in zip(trained, optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return clock.seconds()

    logged: list[dict[str, float]] = []
    give_back_freed()
    turns.ready()
    with PeakMemory(case.device) as peak:
        while turns.wait(lambda: phases(logged) | {"peak": peak.read()}):
            logged.append(step())
            turns.done()


def train_by_trl(folder: Path, case: Case, turns: Turns) -> None:
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoTokenizer,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        TrainerCallback,
    )

    s, on_cpu = case.shape, case.device == "cpu"
    policy, reward = (
        kind.from_pretrained(folder / name, dtype=case.torch_dtype).to(case.device)
        for kind, name in (
            (LlamaForCausalLM, "model"),
            (LlamaForSequenceClassification, "reward-full"),
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    class InTurns(TrainerCallback):
        """A turn is from the end of one step to that of the next, with all that lies between."""

        def on_train_begin(self, args, state, control, **kwargs):
            turns.ready()
            control.should_training_stop = not turns.wait(figures)

        def on_step_end(self, args, state, control, **kwargs):
            if not on_cpu:
                torch.cuda.synchronize()
            turns.done()
            control.should_training_stop = not turns.wait(figures)

    def figures() -> dict[str, float]:
        return {"peak": peak.read()}

    @torch.no_grad()
    def scores(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Of the tokens; TRL would decode them and encode the text, which they may not survive."""
        before = tokenizer(prompts)["input_ids"]
        ids = [prompt + answer for prompt, answer in zip(before, completion_ids, strict=True)]
        ids = torch.tensor(ids, device=case.device)
        return reward(ids, use_cache=False).logits[:, 0].tolist()

    lora = LoraConfig(
        r=s["R"], lora_alpha=2 * s["R"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = trl.RLOOConfig(
        str(folder / "run-trl"), per_device_train_batch_size=s["B"], num_generations=2,
        max_completion_length=s["T"], temperature=TEMPERATURE, top_k=0, beta=BETA,
        learning_rate=LR["lora"], max_steps=NEVER, gradient_checkpointing=False,
        cache_implementation="static", bf16=case.dtype == "bf16", use_cpu=on_cpu,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.RLOOTrainer(
        policy,
        scores,
        arguments,
        train_dataset=Dataset.from_list(read_prompts(folder)),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[InTurns()],
    )
    give_back_freed()
    with PeakMemory(case.device) as peak:
        trainer.train()


def read_prompts(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# What the trainer's gradients are held to
# ------------------------------------------------------------------------------------------------


def gradient_errors(folder: Path, case: Case) -> tuple[float, float]:
    """Of both roles' gradients together, on a short batch, against float64: ours, plain torch's."""
    config, s = config_of(folder, "lora", case), case.shape
    rows, before, after = min(s["B"], 2), min(s["P"], 16), min(s["T"], 16)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(3, s["V"], (rows, before + after), generator=generator)
    returns = torch.randn(rows, after, generator=generator).to(case.device)
    sequences = sequences.to(case.device)
    rollout = Rollout(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        prompt_len=before,
        completion_ids=sequences[:, before:],
        completion_mask=torch.ones_like(sequences[:, before:], dtype=torch.bool),
        log_prob=torch.zeros(rows, after, device=case.device),
        ended=torch.zeros(rows, dtype=torch.bool, device=case.device),
    )

    def gradients(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(2)
        backbone = Backbone.load(
            config.model, lora=lora_config(config), dtype=DTYPES[case.dtype], device=case.device
        )
        for role in ("policy", "value"):
            backbone.add_role(role, scalar=role == "value")
            fill(parameter for _, parameter in backbone.trainable(role))
        backbone.model.to(dtype)
        anchor = ask_anchor(config, backbone, rollout)
        for _ in learn(config, backbone, rollout, returns.to(dtype), anchor, config.beta):
            pass
        trained = [*backbone.trainable("policy"), *backbone.trainable("value")]
        return torch.cat([parameter.grad.flatten().double() for _, parameter in trained])

    ours = gradients(case.torch_dtype)
    with pk.use_backend("reference"):
        plain, exact = gradients(case.torch_dtype), gradients(torch.float64)
    return errors(ours, exact)[0], errors(plain, exact)[0]
