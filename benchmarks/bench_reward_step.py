"""One training step of a reward model: LoRA by this library, LoRA by PEFT, and full tuning.

    ours        transformers' Llama with a scalar head, pk.apply_lora on all linear layers; on a CPU
                with pk.use_cpu_pool()
    peft        the same by PEFT, adapters in the type of the base (its fastest form)
    full        the same model with every weight trained, as transformers runs it eagerly
    full, pool  that with pk.use_cpu_pool()

A step is forward, Bradley-Terry loss over pairs of rows, backward, AdamW. Each contestant lives in
a process of its own, whose peak memory is told, and they take turns step by step.

The same step inside TRL's RewardTrainer, whose train() runs unchanged and waits in a callback for
its turn:

    ours        PEFT's model after pk.accelerate_peft(model), the one line that differs
    ours, pool  that with pk.use_cpu_pool()
    trl         PEFT's model

on the same tokens, the same rows without padding. What a RewardTrainer does otherwise than the
loop above is in both: its data loader and metrics, clipped gradients, the fused AdamW with a
schedule, adapters in float32 and, in bf16, autocast; its libraries are in the memory. Checkpointing
of activations is TRL's default; without it the trainer does the work of the loop above.

Letters beside the library's: L layers, F features inside the MLP, A attention heads.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _compare import FLOOR, errors
from torch import Tensor, nn

import perl_kernels as pk
from benchmarks._measure import DTYPES, OURS, Case, Stopwatch, give_back_freed, shapes_for
from benchmarks._results import Row
from benchmarks._steps import Turns, measure_turns
from perl.cafe import build_tokenizer
from perl.memory import PeakMemory

ROOM = "reward_step"
PEERS = ("peft", "trl.trainer.reward_trainer")
STEP, TRL = "step", "step in TRL's RewardTrainer"
CHECKPOINTED = f"{TRL}, checkpointing"
CHECKS = {"h200": [STEP], "tiny": [STEP, CHECKPOINTED]}  # by preset; the others have all
POOL = ", pool"
CONTESTANTS = {
    STEP: (OURS, "full", f"full{POOL}", "peft"),
    TRL: (OURS, f"{OURS}{POOL}", "trl"),
    CHECKPOINTED: (OURS, f"{OURS}{POOL}", "trl"),
}
SHAPES = {
    # 81 million parameters; at the smaller ones overheads weigh more
    "full": {"B": 16, "T": 256, "H": 768, "L": 8, "F": 2048, "A": 12, "V": 32000, "R": 16},
    "quick": {"B": 8, "T": 128, "H": 384, "L": 4, "F": 1024, "A": 6, "V": 8000, "R": 16},
    "small": {"B": 4, "T": 32, "H": 64, "L": 2, "F": 192, "A": 4, "V": 500, "R": 16},
    "tiny": {"B": 2, "T": 8, "H": 32, "L": 1, "F": 48, "A": 2, "V": 101, "R": 4},
    # 1.1 billion parameters
    "h200": {"B": 16, "T": 512, "H": 2048, "L": 22, "F": 5632, "A": 32, "V": 32000, "R": 16},
}


def cases(preset: str) -> list[Case]:
    device = "cuda" if preset == "h200" else "cpu"
    dtypes = {"h200": ("bf16",), "tiny": ("fp32",)}.get(preset, ("bf16", "fp32"))
    return [
        Case(
            ROOM, check, shapes_for(preset, dtype, SHAPES), dtype, device, weighed=preset != "tiny"
        )
        for check in CHECKS.get(preset, [STEP, TRL, CHECKPOINTED])
        for dtype in dtypes
    ]


@pytest.mark.timeout(3600)
def test_reward_step(case, record):
    if case.check != STEP:
        pytest.importorskip("trl")
        if not case.meets("trl"):
            pytest.skip("trl is not in --against")
    record(measure_step, case)


def measure_step(
    case: Case,
    seconds: float,
    stopwatch: Stopwatch | None = None,
) -> Row:
    """As benchmarks._measure.measure, with a process per contestant.

    Raises:
        AssertionError: gradients of ours are further from float64 than PEFT's by more than half.
    """
    names, missing = [name for name in CONTESTANTS[case.check] if case.meets(name)], {}
    if case.device != "cpu":
        names = [name for name in names if not name.endswith(POOL)]
    if "peft" in names and find_spec("peft") is None:
        names.remove("peft")
        missing["peft"] = "peft is not installed"

    def errors_of(found: dict[str, float]) -> dict[str, Any]:
        ours, plain = found[OURS], found[names[-1]]
        # every layer's rounding is in both, so this is no test of one kernel: a wide margin
        assert ours <= 1.5 * plain + FLOOR[case.torch_dtype], (
            f"{case}: gradients are off by {ours:.3g} of their size, plain torch's by {plain:.3g}"
        )
        return {"of": "gradients", "unit": "relative RMS", "ours": ours, "plain": plain}

    tokens = case.shape["B"] * case.shape["T"]
    return measure_turns(serve, case, names, missing, tokens, seconds, stopwatch, errors_of)


def serve(turns: Turns, name: str, case: Case) -> None:
    if name.endswith(POOL) or (name, case.check, case.device) == (OURS, STEP, "cpu"):
        pk.use_cpu_pool()
    model = build(name.removesuffix(POOL), case)
    compared = name in (OURS, "peft", "trl") or not (find_spec("peft") and case.meets("peft"))
    turns.ready(gradient_error(model, case) if compared else 0)
    counts = {
        "parameters": sum(p.numel() for n, p in model.named_parameters() if not _is_new(n)),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    give_back_freed()  # the float64 copy, which not all have made
    pk.empty_cpu_pool()
    train = train_by_hand if case.check == STEP else train_by_trl
    with PeakMemory(case.device) as peak:
        train(model, case, turns, lambda: {"peak": peak.read(), **counts})


# ------------------------------------------------------------------------------------------------
# The steps
# ------------------------------------------------------------------------------------------------


def train_by_hand(model: nn.Module, case: Case, turns: Turns, figures: Callable) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = random_tokens(case, case.shape["B"], case.shape["T"])
    while turns.wait(figures):
        loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if case.device != "cpu":
            torch.cuda.synchronize()
        turns.done()


def train_by_trl(model: nn.Module, case: Case, turns: Turns, figures: Callable) -> None:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class InTurns(TrainerCallback):
        """A turn is from the end of one step to that of the next, with all that lies between."""

        def on_train_begin(self, args, state, control, **kwargs):
            control.should_training_stop = not turns.wait(figures)

        def on_step_end(self, args, state, control, **kwargs):
            turns.done()
            control.should_training_stop = not turns.wait(figures)

    chosen, rejected = random_tokens(case, case.shape["B"], case.shape["T"]).chunk(2)
    pairs = {"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()}
    with TemporaryDirectory() as folder:
        arguments = trl.RewardConfig(
            folder, per_device_train_batch_size=len(chosen), learning_rate=1e-4, max_steps=10**6,
            train_sampling_strategy="sequential", gradient_checkpointing=case.check == CHECKPOINTED,
            bf16=case.dtype == "bf16", use_cpu=True, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trl.RewardTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({key: rows * 100 for key, rows in pairs.items()}),
            processing_class=build_tokenizer(["pad"], vocab_size=260),
            callbacks=[InTurns()],
        ).train()


# ------------------------------------------------------------------------------------------------
# The model and its loss
# ------------------------------------------------------------------------------------------------


def build(name: str, case: Case) -> nn.Module:
    """The contestant's model. All have the same base weights, both kinds of LoRA the same A, B."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    s = case.shape
    config = LlamaConfig(
        hidden_size=s["H"], num_hidden_layers=s["L"], intermediate_size=s["F"],
        num_attention_heads=s["A"], num_key_value_heads=s["A"], vocab_size=s["V"],
        max_position_embeddings=max(s["T"], 64), num_labels=1, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(case.device):
        model = LlamaForSequenceClassification(config).to(DTYPES[case.dtype])
    if case.check == STEP and name == OURS:
        pk.apply_lora(model, pk.LoRAConfig(r=s["R"], alpha=2 * s["R"]))
        model.score.requires_grad_(True)
    elif name != "full":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=s["R"], lora_alpha=2 * s["R"], target_modules="all-linear", task_type="SEQ_CLS"
        )
        model = get_peft_model(model, adapter, autocast_adapter_dtype=case.check != STEP)
        if name == OURS:
            pk.accelerate_peft(model)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            _fill(parameter_name, parameter)
    return model.train()


def _is_new(parameter_name: str) -> bool:
    """Whether PEFT or this library put the parameter there: an adapter's, or a copy of the head."""
    return "lora_" in parameter_name or ".modules_to_save." in parameter_name


@torch.no_grad()
def _fill(name: str, parameter: Tensor) -> None:
    """Values that depend on the name alone, and are zero nowhere."""
    plain_name = name.removeprefix("base_model.model.").removesuffix(".weight")
    generator = torch.Generator().manual_seed(zlib.crc32(plain_name.encode()))
    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def random_tokens(case: Case, rows: int, tokens: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, case.shape["V"], (rows, tokens), device=case.device)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """-log sigmoid(score of chosen - score of rejected); the first half of the rows is chosen."""
    scores = model(input_ids=tokens).logits[:, 0]
    chosen, rejected = scores.to(torch.promote_types(scores.dtype, torch.float32)).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def gradient_error(model: nn.Module, case: Case) -> float:
    """Of all trained parameters together, against a float64 copy of the model, on a short batch."""
    tokens = random_tokens(case, 2, min(case.shape["T"], 32))

    def gradient(model: nn.Module) -> Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss(model, tokens), trained)
        return torch.cat([g.flatten().double() for g in found])

    return errors(gradient(model), gradient(copy.deepcopy(model).double()))[0]
