"""Sampling from a role of the backbone: continuous batching over a static KV cache.

    prompts ─► prefill ─► rows of a batch ─► hidden · head / temperature ─► log-softmax
                  ▲             ▲                                              │
            free rows           └─── one token each ◄── draw ◄── top-k, top-p ◄┘
                  └──────────── an answer ended

Only the newest token's row of logits is ever made, (B, V), in float32. A row whose answer ended is
dropped, and once a quarter of the rows is free the next prompts take their places, the longest
first, so that prompts of like length are prefilled together.

What an answer is does not depend on its neighbours (up to rounding) nor on when its turn came:
positions and masks come from its own tokens, and each of its tokens is decided by one number drawn
beforehand, at its place in the order of the prompts.

On a GPU a step of all rows is captured in a CUDA graph and replayed.
Models that remember more than keys and values (states of linear attention) are sampled in groups,
over the cache that transformers makes for them. Left out: speculative drafts, shared prefixes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import perl_kernels as pk
from perl.backbone import Backbone
from perl.data import pad
from perl.kv_cache import GroupCache, SlotCache

REFILL = 0.75  # new prompts come in when no more than this share of the rows is taken
BLOCK = 256  # tokens whose mass is summed in float32
SPARE = 64  # columns of the cache beyond the longest answer: steps between two shifts


class Rollout(NamedTuple):
    """B answers with their prompts; P is the longest prompt and T the longest answer here."""

    sequences: Tensor  # (B, P + T) prompt, left padded, then answer, right padded
    attention_mask: Tensor  # (B, P + T) int64, 1 = real token
    prompt_len: int  # P
    completion_ids: Tensor  # (B, T) = sequences[:, P:]
    completion_mask: Tensor  # (B, T) bool, True up to the end-of-sequence token, itself included
    log_prob: Tensor  # (B, T) float32, 0 past the end; see `generate`
    ended: Tensor  # (B,) bool, False where `max_new_tokens` cut the answer

    def texts(self, tokenizer) -> list[str]:
        """The answers as text, without special tokens."""
        return tokenizer.batch_decode(self.answers(), skip_special_tokens=True)

    def answers(self) -> list[list[int]]:
        """The answers' tokens, the end-of-sequence token included."""
        rows = zip(self.completion_ids.tolist(), self.completion_mask.sum(1).tolist(), strict=True)
        return [ids[:length] for ids, length in rows]


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
    stop: Sequence[str] = (),
    batch_size: int = 0,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,  # (B, max_new_tokens) float64 in [0, 1)
    ended: Callable[[int], object] | None = None,
) -> Rollout:
    """Answers of at most `max_new_tokens` tokens under a role (None: the reference).

    temperature: divides the logits; 0 takes the likeliest token. top_k, top_p: draw among the k
    likeliest tokens, and among the likeliest that together hold the mass p; 0 and 1.0 are off.
    stop: an answer ends, as with an end of sequence, with the token that completes one of these
    strings in its text, special tokens included; the token is kept whole.
    batch_size: rows at once, whatever the number of prompts; 0 = all. Memory goes with it.
    generator: on the backbone's device; its state alone decides the draws. draws: in its place,
    where a process answers some rows of what several together draw with `draw`.
    ended: told of how many more answers have ended, as a progress bar's `update` is.

    `log_prob` is log π(token) of the policy that learns: with temperature applied, before top-k and
    top-p cut its tail, as `pk.policy_loss` computes it again. At temperature 0 it is that of
    temperature 1.

    Raises ValueError for an empty prompt or stop string, a range that is off, or prompts longer
    than the model's context less `max_new_tokens`.
    """
    _check(backbone, prompts, max_new_tokens, temperature, top_k, top_p, stop, batch_size, draws)
    if draws is None:
        draws = draw(len(prompts), max_new_tokens, backbone.device, generator)
    head = backbone.head(role)

    def choose(hidden: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        logits = pk.linear_logits(
            hidden, head.weight, temperature=temperature or 1.0, **head.options
        )
        return _choose(logits, numbers, temperature, top_k, top_p)

    batch = _Batch(backbone, role, prompts, max_new_tokens, stop, batch_size, draws, choose)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    going = len(prompts)
    while backbone.any_process(waiting or batch.taken):
        if waiting and batch.taken <= batch.refill_at:
            free = batch.rows - batch.taken
            batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
        elif batch.taken:
            batch.advance()
        else:
            batch.idle()
        if ended and len(waiting) + batch.taken < going:
            ended(going - len(waiting) - batch.taken)
        going = len(waiting) + batch.taken
    return batch.rollout()


def draw(
    rows: int, tokens: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:  # (rows, tokens) float64 in [0, 1)
    """The numbers that decide so many tokens of so many answers."""
    return torch.rand(rows, tokens, dtype=torch.float64, device=device, generator=generator)


class _Batch:
    """Rows 0 .. taken answer a prompt each, in columns first .. end of the cache; others are free.

    The state of rows lies in tensors that stay where they are, so that a step can be a CUDA graph.
    """

    def __init__(
        self,
        backbone: Backbone,
        role: str | None,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str],
        batch_size: int,
        draws: Tensor,
        choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.backbone, self.role, self.prompts, self.choose = backbone, role, prompts, choose
        self.max_new_tokens, self.device, total = max_new_tokens, backbone.device, len(prompts)
        self.stop = stop
        self.pad_id = backbone.tokenizer.pad_token_id
        self.rows = min(batch_size or total, total)
        self.columns = max(map(len, prompts)) + max_new_tokens
        if self.rows < total:
            self.columns += min(max_new_tokens, SPARE)
        self.taken = self.first = self.end = 0
        self.continuous = SlotCache.holds(backbone.config)
        self.refill_at = int(REFILL * self.rows) if self.continuous else 0
        self.graph = _Graph() if self.continuous and _in_graphs(backbone) else None
        if self.continuous:
            static = self.graph is not None
            self.cache = SlotCache(backbone.config, self.rows, self.columns, static)

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, device=self.device)

        self.prompt = integers(self.rows)  # its number; a free row's is `total`, which is nobody's
        self.start = integers(self.rows)  # the first column of its prompt
        self.count = integers(self.rows)  # tokens of its answer
        self.token = integers(self.rows)  # the last of them
        self.mask = integers(self.rows, self.columns)
        self.column = integers(1)  # `end`, where a graph reads it
        # by prompt, and last what free rows of a graph read and write
        self.draws = F.pad(draws, (0, 0, 0, 1))
        self.tokens = integers(total + 1, max_new_tokens, value=self.pad_id)
        self.log_prob = torch.zeros(total + 1, max_new_tokens, device=self.device)
        self.length = integers(total + 1)
        self.ended = torch.zeros(total + 1, dtype=torch.bool, device=self.device)
        self._free()

    def admit(self, group: list[int]) -> None:
        """Prefills free rows with these prompts, the longest first; each gets a first token."""
        ids, mask = pad([self.prompts[i] for i in group], self.pad_id, left=True)
        ids, mask = ids.to(self.device), mask.to(self.device)
        if self.taken == 0:
            self.first, self.end = 0, ids.shape[1]
            if not self.continuous:
                self.cache = GroupCache(config=self.backbone.config)
        rows = slice(self.taken, self.taken + len(group))
        columns = slice(self.end - ids.shape[1], self.end)
        self.prompt[rows] = torch.tensor(group, device=self.device)
        self.start[rows] = self.end - mask.sum(1)
        self.count[rows] = 0
        self.mask[rows] = 0
        self.mask[rows, columns] = mask
        self.taken, self.first = rows.stop, min(self.first, columns.start)
        self.shortest = len(self.prompts[group[-1]])  # no prompt still to come is longer
        self.cache.see(rows, columns, columns, 0)
        self._predict(rows, ids, mask)
        self._drop()

    def advance(self) -> None:
        """The next token of every row."""
        if self.end == self.columns:
            self._shift()
        if self.graph is not None:
            self.column.fill_(self.end)
            self.graph(self._advance_all)
        else:
            rows, seen = slice(0, self.taken), slice(self.first, self.end + 1)
            self.mask[rows, self.end] = 1
            self.cache.see(rows, seen, slice(self.end, self.end + 1), self.end - self.first)
            self._predict(rows, self.token[rows, None], self.mask[rows, seen])
        self.end += 1
        self._drop()

    def idle(self) -> None:
        """A pass for nothing: blocks that are spread over processes want all of them at it."""
        ids = torch.full((1, 1), self.pad_id, device=self.device)
        self.backbone.hidden(self.role, ids, torch.ones_like(ids))

    def _advance_all(self) -> None:
        """The same with free rows and all columns: what differs from step to step is in tensors."""
        rows, columns = slice(0, self.rows), slice(0, self.columns)
        self.mask.index_copy_(1, self.column, (self.prompt < len(self.prompts)).long()[:, None])
        self.cache.see(rows, columns, self.column, self.column)
        self._predict(rows, self.token[:, None], self.mask)

    def _predict(self, rows: slice, ids: Tensor, mask: Tensor) -> None:
        """One pass, and a token more for each of the rows."""
        hidden = self.backbone.hidden(self.role, ids, mask, cache=self.cache)[:, -1]
        prompt, count = self.prompt[rows], self.count[rows]
        token, log_prob = self.choose(hidden, self.draws[prompt, count])
        self.token[rows] = token
        self.tokens[prompt, count] = token
        self.log_prob[prompt, count] = log_prob.float()
        self.count[rows] += prompt < len(self.prompts)

    def _drop(self) -> None:
        """Frees the rows whose answer ended; the last ones move into their places."""
        taken = slice(0, self.taken)
        prompt, token, count = self.prompt[taken], self.token[taken], self.count[taken]
        by_itself = token == self.backbone.tokenizer.eos_token_id
        if self.stop:
            by_itself |= self._stopped(prompt, count)
        ended = by_itself | (count == self.max_new_tokens)
        if not ended.any():
            return
        self.length[prompt[ended]], self.ended[prompt] = count[ended], by_itself
        kept = self.taken - int(ended.sum())
        order = torch.arange(kept, device=self.device)
        order[ended[:kept]] = kept + (~ended[kept:]).nonzero()[:, 0]
        self.cache.reorder(order, slice(self.first, self.end))
        for state in (self.prompt, self.start, self.count, self.token, self.mask):
            state[:kept] = state[order]
        self.taken = kept
        self._free()
        if kept and self.continuous:
            self.first = int(self.start[:kept].min())

    def _stopped(self, prompt: Tensor, count: Tensor) -> Tensor:  # (taken,) bool
        """Where the newest token completes a stop string, which may have begun tokens before.

        A token holds a byte of text at least, so the string's bytes bound how many to look at; one
        more, since decoding may take a space off the first of them.
        """
        window = 1 + max(len(string.encode()) for string in self.stop)
        rows = zip(self.tokens[prompt].tolist(), count.tolist(), strict=True)
        recent = [ids[max(0, end - window) : end] for ids, end in rows]
        texts = self.backbone.tokenizer.batch_decode(recent)
        found = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(found, device=self.device)

    def _free(self) -> None:
        """Rows without a prompt: they run in a graph, and see column 0, as none may see nothing."""
        self.prompt[self.taken :], self.count[self.taken :] = len(self.prompts), 0
        self.mask[self.taken :] = 0
        self.mask[self.taken :, 0] = 1

    def _shift(self) -> None:
        """Makes free columns on the right, and leaves room for prompts on the left."""
        by = min(self.first, self.end - self.shortest)
        self.cache.shift(self.taken, slice(self.first, self.end), by)
        self.mask.copy_(self.mask.roll(-by, 1))  # what comes round was before every start: zeros
        self._free()
        self.start -= by
        self.first, self.end = self.first - by, self.end - by

    def rollout(self) -> Rollout:
        """The answers, in the order of the prompts."""
        total = len(self.prompts)
        ids, mask = pad(self.prompts, self.pad_id, left=True)
        ids, mask = ids.to(self.device), mask.to(self.device)
        length = self.length[:total]
        longest = int(length.max())
        completion_ids = self.tokens[:total, :longest]
        completion_mask = torch.arange(longest, device=self.device) < length[:, None]
        return Rollout(
            sequences=torch.cat([ids, completion_ids], dim=1),
            attention_mask=torch.cat([mask, completion_mask.long()], dim=1),
            prompt_len=ids.shape[1],
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            log_prob=self.log_prob[:total, :longest],
            ended=self.ended[:total],
        )


class _Graph:
    """A step that is run the first time, captured the second, and replayed from then on.

    A model that cannot be captured (it waits for the device, as experts chosen by number do) is
    run every time.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.runs, self.captures = 0, True

    def __call__(self, step: Callable[[], None]) -> None:
        self.runs += 1
        if self.runs == 1:  # libraries choose kernels and make their workspaces
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            return
        if self.runs == 2:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    step()
                self.graph = graph
            except RuntimeError:
                torch.cuda.synchronize()
        if self.graph is None:
            step()
        else:
            self.graph.replay()


def _in_graphs(backbone: Backbone) -> bool:
    return backbone.device.type == "cuda" and not backbone.sharded


def _choose(
    logits: Tensor,  # (B, V), of the temperature that is asked for, or of 1 where that is 0
    draws: Tensor,  # (B,)
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:  # (B,) tokens and their log π
    peak = logits.amax(-1, keepdim=True)
    mass = (logits - peak).exp_()
    total = mass.sum(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = _draw(truncate(mass, top_k, top_p), draws)
    log_mass = (logits.gather(-1, token[:, None]) - peak).squeeze(-1)
    return token, log_mass - total.log()


def _draw(mass: Tensor, draws: Tensor) -> Tensor:  # (B, V), (B,) -> (B,)
    """The tokens at which the mass passes a share `draws` of the whole.

    First among blocks, then inside the one: sums over all V in float32 would lose the rare tokens,
    and in float64 they take as long as all the rest.
    """
    vocabulary = mass.shape[-1]
    if short := -vocabulary % BLOCK:
        mass = F.pad(mass, (0, short))
    blocks = mass.unflatten(-1, (-1, BLOCK))
    passed = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    wanted = draws[:, None] * passed[:, -1:]
    block = torch.searchsorted(passed, wanted, right=True).clamp_(max=blocks.shape[1] - 1)
    inside = blocks[torch.arange(len(blocks), device=mass.device), block[:, 0]]
    inside = inside.cumsum(-1, dtype=torch.float64)
    # The block's sum is rounded once more than this one: so it is its share that counts.
    start = F.pad(passed, (1, 0)).gather(-1, block)
    share = (wanted - start) / (passed.gather(-1, block) - start)
    found = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    token = (block * BLOCK + found).squeeze(-1)
    return token.clamp_(max=vocabulary - 1)  # NaN, which the trainer will name


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keeps the top_k likeliest tokens and, of those, the fewest that hold the mass top_p.

    probs (..., V), up to a factor; the tokens cut get 0 and the rest keep their value. The
    likeliest token always stays; tokens as likely as the last one kept stay too.
    """
    vocabulary = probs.shape[-1]
    kept = min(top_k or vocabulary, vocabulary)
    if kept == vocabulary and top_p == 1.0:
        return probs
    whole = probs.sum(-1, keepdim=True)
    if kept == vocabulary and not probs.is_cuda:  # a GPU would have to wait for the number
        # Rarer ones hold less than 1 - top_p, all together: they are not worth sorting.
        likely = probs >= (1.0 - top_p) / vocabulary * whole
        kept = max(1, int(likely.sum(-1).max()))
    ranked = probs.topk(kept).values
    if top_k:
        whole = ranked.sum(-1, keepdim=True)
    mass_before = ranked.cumsum(-1) - ranked
    last = (mass_before < top_p * whole).sum(-1, keepdim=True) - 1
    return probs.masked_fill(probs < ranked.gather(-1, last.clamp_(min=0)), 0.0)


def _check(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: Sequence[str],
    batch_size: int,
    draws: Tensor | None,
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts is empty or holds an empty prompt; want token ids in each")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; want at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; want 0 (greedy) or more")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}; want top_k >= 0 and 0 < top_p <= 1")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is {stop!r}; want a list of strings, none of them empty")
    if batch_size < 0:
        raise ValueError(f"batch_size is {batch_size}; want rows at once, or 0 for all prompts")
    if draws is not None and (draws.shape != (len(prompts), max_new_tokens)):
        raise ValueError(
            f"draws is {tuple(draws.shape)}; want a number for each token, "
            f"({len(prompts)}, {max_new_tokens})"
        )
    longest = max(len(prompt) for prompt in prompts)
    context = getattr(backbone.config, "max_position_embeddings", None)
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {context}; shorten one of them"
        )
