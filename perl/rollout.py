"""Sampling from a role of the backbone, token by token, over a KV cache.

    prompts, left padded ─► prefill ─► T × [hidden · head / temperature ─► top-k, top-p ─► draw]

Only the newest token's row of logits is ever made, (B, V). Positions and masks come from the real
tokens alone, so a prompt's answer does not depend on its neighbours' lengths (up to rounding).
Left out: dropping finished rows and feeding new prompts (rows that ended ride along as padding
until the longest answer ends), CUDA graphs, speculative drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from perl.backbone import Backbone, Head
from perl.data import pad


class Rollout(NamedTuple):
    """B answers with their prompts; P is the longest prompt and T the longest answer here."""

    sequences: Tensor  # (B, P + T) prompt, left padded, then answer, right padded
    attention_mask: Tensor  # (B, P + T) int64, 1 = real token
    prompt_len: int  # P
    completion_ids: Tensor  # (B, T) = sequences[:, P:]
    completion_mask: Tensor  # (B, T) bool, True up to the end-of-sequence token, itself included
    log_prob: Tensor  # (B, T) float32, 0 past the end; see `generate`

    def texts(self, tokenizer) -> list[str]:
        """The answers as text, without special tokens."""
        rows = zip(self.completion_ids.tolist(), self.completion_mask.tolist(), strict=True)
        ids = [[t for t, real in zip(*row, strict=True) if real] for row in rows]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def generate(
    backbone: Backbone,
    role: str | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,  # (B, max_new_tokens) float64 in [0, 1)
) -> Rollout:
    """Answers of at most `max_new_tokens` tokens under a role (None: the reference).

    temperature: divides the logits; 0 takes the likeliest token. top_k, top_p: draw among the k
    likeliest tokens, and among the likeliest that together hold the mass p; 0 and 1.0 are off.
    generator: on the backbone's device; its state alone decides the draws. draws: in its place,
    where a process answers some rows of what several together draw with `draw`.

    `log_prob` is log π(token) of the policy that learns: with temperature applied, before top-k and
    top-p cut its tail, as `pk.policy_loss` computes it again. At temperature 0 it is that of
    temperature 1.

    Raises ValueError for an empty prompt, a range that is off, or prompts longer than the model's
    context less `max_new_tokens`.
    """
    _check(backbone, prompts, max_new_tokens, temperature, top_k, top_p)
    device, tokenizer = backbone.device, backbone.tokenizer
    if draws is None:
        draws = draw(len(prompts), max_new_tokens, device, generator)
    input_ids, mask = (t.to(device) for t in pad(prompts, tokenizer.pad_token_id, left=True))
    head, cache = backbone.head(role), DynamicCache(config=backbone.config)
    tokens, log_probs, counted = [], [], []
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    new = input_ids
    while True:
        hidden = backbone.hidden(role, new, mask, cache=cache)[:, -1]
        logits = _logits(hidden, head) / (temperature or 1.0)
        token = _draw(logits, temperature == 0, top_k, top_p, draws[:, len(tokens)])
        token = token.masked_fill(~going, tokenizer.pad_token_id)
        log_prob = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
        tokens.append(token)
        log_probs.append(log_prob.masked_fill(~going, 0.0))
        counted.append(going)
        going = going & (token != tokenizer.eos_token_id)
        if len(tokens) == max_new_tokens or not backbone.any_process(going.any()):
            break
        new, mask = token[:, None], torch.cat([mask, counted[-1][:, None].long()], dim=1)
    completion_ids, completion_mask = torch.stack(tokens, 1), torch.stack(counted, 1)
    prompt_len = input_ids.shape[1]
    return Rollout(
        sequences=torch.cat([input_ids, completion_ids], dim=1),
        attention_mask=torch.cat([mask[:, :prompt_len], completion_mask.long()], dim=1),
        prompt_len=prompt_len,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        log_prob=torch.stack(log_probs, 1),
    )


def draw(
    rows: int, tokens: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:  # (rows, tokens) float64 in [0, 1)
    """The numbers that decide so many tokens of so many answers."""
    return torch.rand(rows, tokens, dtype=torch.float64, device=device, generator=generator)


def _logits(hidden: Tensor, head: Head) -> Tensor:  # (B, H) -> (B, V) float32
    logits = F.linear(hidden, head.weight, head.bias).float()
    if head.a is not None:
        logits += head.scale * F.linear(F.linear(hidden.float(), head.a.float()), head.b.float())
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _draw(
    logits: Tensor,  # (B, V)
    greedy: bool,
    top_k: int,
    top_p: float,
    draws: Tensor,  # (B,) float64 in [0, 1)
) -> Tensor:  # (B,)
    """The token at which the probabilities of it and those before it first exceed the draw."""
    if greedy:
        return logits.argmax(-1)
    mass = truncate(logits.softmax(-1), top_k, top_p).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True).squeeze(-1)


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keeps the top_k likeliest tokens and, of those, the fewest that hold the mass top_p.

    probs (..., V); the tokens cut get 0 and the rest keep their value (not renormalised). The
    likeliest token always stays; tokens as likely as the last one kept stay too.
    """
    if not (0 < top_k < probs.shape[-1] or top_p < 1.0):
        return probs
    ranked = probs.sort(dim=-1, descending=True).values
    kept = ranked.shape[-1] if top_k == 0 else min(top_k, ranked.shape[-1])
    ranked = ranked[..., :kept]
    mass_before = ranked.cumsum(-1) - ranked
    last = (mass_before < top_p * ranked.sum(-1, keepdim=True)).sum(-1, keepdim=True) - 1
    return probs.masked_fill(probs < ranked.gather(-1, last.clamp_(min=0)), 0.0)


def _check(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts is empty or holds an empty prompt; want token ids in each")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; want at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; want 0 (greedy) or more")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}; want top_k >= 0 and 0 < top_p <= 1")
    longest = max(len(prompt) for prompt in prompts)
    context = getattr(backbone.config, "max_position_embeddings", None)
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {context}; shorten one of them"
        )
