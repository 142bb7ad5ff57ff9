"""Answers drawn from a policy with an adapter: this library's decode loop and transformers'.

    ours           perl.rollout.generate: static cache, rows that ended dropped and refilled, log p
    transformers   model.generate of the same model, static cache, in batches of as many rows
    peft           the same by PEFT's layers
    merged         the same without an adapter, as if it were merged into the weights

"answers of one length": as many prompts as rows, and no answer ends early. "answers that end": four
times as many, whose answers end by chance after half of the longest on average; a batch of
transformers then runs until its longest answer ends. Only ours gives log p of what was drawn.

A Llama of random weights; B rows, P tokens of prompt, T of the longest answer; L layers, F features
inside the MLP, A attention heads. "tokens" and "tokens of transformers" are what the answers of the
two add up to.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from _tiny import tiny_tokenizer
from torch import Tensor, nn

import perl_kernels as pk
from benchmarks._bars import ENDING, ONE_LENGTH
from benchmarks._measure import Case, Compared, Contest, measure, shapes_for, without_gradients
from perl.backbone import Backbone
from perl.rollout import Rollout, generate

ROOM = "rollout"
PEERS = ("peft",)
EOS = 2
SHAPES = {
    # 106 million parameters, 81 without the head; at the smaller ones the host's share is larger
    "full": {"B": 16, "P": 64, "T": 64, "H": 768, "L": 8, "F": 2048, "A": 12, "V": 32000, "R": 16},
    "quick": {"B": 16, "P": 32, "T": 32, "H": 384, "L": 4, "F": 1024, "A": 6, "V": 8000, "R": 16},
    "small": {"B": 8, "P": 16, "T": 16, "H": 64, "L": 2, "F": 192, "A": 4, "V": 500, "R": 16},
    "tiny": {"B": 2, "P": 4, "T": 6, "H": 32, "L": 1, "F": 48, "A": 2, "V": 320, "R": 4},
    # 1.1 billion parameters
    "h200": {
        "B": 64, "P": 128, "T": 128, "H": 2048, "L": 22, "F": 5632, "A": 32, "V": 32000, "R": 16,
    },
}  # fmt: skip


def cases(preset: str) -> list[Case]:
    device = "cuda" if preset == "h200" else "cpu"
    dtypes = {"h200": ("bf16",), "tiny": ("fp32",)}.get(preset, ("bf16", "fp32"))
    return [
        Case(ROOM, check, shapes_for(preset, dtype, SHAPES), dtype, device, weighed=False)
        for dtype in dtypes
        for check in (ONE_LENGTH, ENDING)
    ]


@pytest.mark.timeout(3600)
def test_rollout(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    s, ends = case.shape, case.check == ENDING
    model = build(case, ends)
    missing, peft = {}, None
    if find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    else:
        peft = with_peft(copy.deepcopy(model), s["R"])
    lora = pk.LoRAConfig(r=s["R"], alpha=2 * s["R"])
    tokenizer = tiny_tokenizer()
    backbone = Backbone.load(model=model, tokenizer=tokenizer, device=case.device, lora=lora)
    backbone.add_role("policy")
    fill(parameter for _, parameter in backbone.trainable("policy"))
    count = s["B"] * (4 if ends else 1)
    prompts = torch.randint(3, s["V"], (count, s["P"]), device=case.device)

    def ours() -> Rollout:
        torch.manual_seed(0)
        return generate(
            backbone, "policy", prompts.tolist(), max_new_tokens=s["T"], batch_size=s["B"]
        )

    def theirs(model: nn.Module, around: Callable = contextlib.nullcontext) -> Tensor:
        torch.manual_seed(0)
        with around(model):
            return torch.cat([answers_of(model, part, case) for part in prompts.split(s["B"])])

    run = {
        "ours": without_gradients(lambda: ours().completion_ids),
        "transformers": without_gradients(lambda: theirs(model)),
        "merged": without_gradients(lambda: theirs(model, pk.disable_adapters)),
    }
    if peft is not None:
        run["peft"] = without_gradients(lambda: theirs(peft))

    def compare() -> list[Compared]:
        """log p of tokens that were drawn one by one, and of the same by one pass over all."""
        drawn = ours()
        kept = drawn.completion_mask

        @torch.no_grad()
        def whole(dtype: torch.dtype) -> Tensor:
            same = copy.deepcopy(model).to(dtype)
            pk.set_adapter(same, "policy")
            logits = same(drawn.sequences[:, :-1]).logits[:, s["P"] - 1 :]
            wide = torch.promote_types(dtype, torch.float32)
            log_prob = logits.to(wide).log_softmax(-1)
            return log_prob.gather(-1, drawn.completion_ids[..., None])[..., 0][kept]

        return [
            Compared(
                "log_prob", drawn.log_prob[kept], whole(case.torch_dtype), whole(torch.float64),
                nats=True,
            )
        ]  # fmt: skip

    def measures() -> dict[str, float]:
        """How many tokens the two have drawn: their numbers are equal but for chance."""
        before = (theirs(model) == EOS).cumsum(1).cumsum(1) <= 1  # the first EOS, and what is left
        return {
            "tokens": ours().completion_mask.sum().item(),
            "tokens of transformers": before.sum().item(),
        }

    return Contest(run, compare, missing=missing, measures=measures)


def build(case: Case, ends: bool) -> nn.Module:
    """The end of an answer is as likely as makes half of the longest the mean; or out of reach."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = case.shape
    config = LlamaConfig(
        hidden_size=s["H"], num_hidden_layers=s["L"], intermediate_size=s["F"],
        num_attention_heads=s["A"], num_key_value_heads=s["A"], vocab_size=s["V"],
        max_position_embeddings=s["P"] + s["T"], pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(case.device):
        model = LlamaForCausalLM(config).to(case.torch_dtype).eval()
        ids = torch.randint(3, s["V"], (4, s["P"]))
    with torch.no_grad():  # feature 0 of the hidden states nearly a constant, for the head to read
        model.get_input_embeddings().weight[:, 0] = 0.02 * math.sqrt(s["H"])
        constant = model.base_model(ids).last_hidden_state[..., 0].mean().item()
        head = model.lm_head.weight
        head[:, 0], head[EOS] = 0.0, 0.0
        head[EOS, 0] = (math.log(2 * s["V"] / s["T"]) if ends else -20.0) / constant
    return model


def fill(parameters: Iterable[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.02 * torch.randn(parameter.shape))


def with_peft(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    fill(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model.eval()


def answers_of(model: nn.Module, ids: Tensor, case: Case) -> Tensor:  # (rows, P) -> (rows, T)
    drawn = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.shape["T"],
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, cache_implementation="static",
    )  # fmt: skip
    answers = drawn[:, ids.shape[1] :]
    return F.pad(answers, (0, case.shape["T"] - answers.shape[1]))
