"""Where rewards come from: what scores the answers of a policy.

    --reward-model FOLDER ...        roles of the backbone, one or an ensemble (perl/ensemble.py); a
                                     whole model with another tokenizer reads the text through that
    --reward-function FILE.py:NAME   NAME(prompts, completions) -> one number for each
    --reward-url URL                 POST {"prompts": [...], "completions": [...]}
                                     200  {"rewards": [...]}

The last two are sources of text: prompts are text or lists of messages as in the data, completions
are text. TRL's reward functions call the columns so, and OpenRLHF's reward servers the answer.

A source of text may raise, hang, or say what is no reward: SourceFailed names it. A failed
connection, a time-out, 429 and 5xx are asked again after 1, 2, 4, ... seconds; whatever else an
endpoint says it would say again. Where a source fails in the middle of a run, a checkpoint of the
last finished step is written first, so nothing is lost and resuming is exact. Of several processes
all fail together.

Left out: requests in parallel (a server batches what it is sent, and a step is one request of each
process), API keys (a function of ten lines adds any header).
"""

from __future__ import annotations

import http.client
import json
import math
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from perl import distributed
from perl.backbone import Backbone
from perl.config import CompareConfig, EvaluateConfig, ReinforceConfig, Unfinished, UsageError
from perl.data import Limit, answer_ids, pad, plain_text, prompt_ids
from perl.ensemble import Rewards, combine, load_reward_models
from perl.functions import SourceFailed, about, load_function, short
from perl.rollout import Rollout
from perl.run import Run
from perl.training import micro_batches

FIRST_WAIT = 1.0  # seconds before the second request; twice as long before each one more
LONGEST_WAIT = 60.0

# (prompts, completions) -> a finite number for each
TextSource = Callable[[Sequence[Any], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Prompt:
    """A prompt as text (or messages), for sources of text, and as tokens."""

    text: Any
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


# (answers, their prompts) -> (B,) float32 on the backbone's device
Scorer = Callable[[Rollout, Sequence[Prompt]], Rewards]


# ---------------------------------------------------------------------------------------------
# One face


def open_text_source(
    config: ReinforceConfig | EvaluateConfig | CompareConfig, first_prompt: Callable[[], Any]
) -> TextSource | None:
    """The source of text that the config names; None where reward models score.

    Needs no model, so it comes before one is loaded. An endpoint is asked about one prompt, with
    its own text as the answer. Raises UsageError for a target that is no function, SourceFailed
    for an endpoint that does not reward.
    """
    if config.reward_function is not None:
        return load_reward_function(config.reward_function, config.reward_timeout)
    if config.reward_url is None:
        return None
    distributed.start(config.device)
    prompt = first_prompt()
    once = endpoint(config.reward_url, config.reward_timeout, retries=0)
    agreed(lambda: once([prompt], [plain_text(prompt)]))
    return endpoint(config.reward_url, config.reward_timeout, config.reward_retries)


def make_scorer(config: ReinforceConfig, backbone: Backbone, source: TextSource | None) -> Scorer:
    """Rewards of a rollout's answers: what `source` says, or the reward models' scores."""
    if source is not None:

        def of_text(rollout: Rollout, prompts: Sequence[Prompt]) -> Rewards:
            texts = rollout.texts(backbone.tokenizer)
            rewards = agreed(lambda: source([prompt.text for prompt in prompts], texts))
            return Rewards(torch.tensor(rewards, device=backbone.device))

        return of_text
    roles = load_reward_models(backbone, config.reward_model, own_tokenizer=True)
    strangers = [r for r in roles if backbone.tokenizer_of(r) is not backbone.tokenizer]

    def reread(role: str, rollout: Rollout, prompts: Sequence[Prompt]) -> list[Tensor]:
        asked, texts = [p.text for p in prompts], rollout.texts(backbone.tokenizer)
        sequences = reencode(backbone, role, asked, texts, config.truncate_prompts)
        padded = pad(sequences, backbone.tokenizer_of(role).pad_token_id)
        return [tensor.to(backbone.device) for tensor in padded]

    @torch.no_grad()
    def of_models(rollout: Rollout, prompts: Sequence[Prompt]) -> Rewards:
        inputs = dict.fromkeys(roles, (rollout.sequences, rollout.attention_mask))
        inputs |= {role: agreed(partial(reread, role, rollout, prompts)) for role in strangers}
        scores = [
            backbone.score(role, ids[rows], mask[rows])
            for role, (ids, mask) in inputs.items()
            for rows in micro_batches(config.micro_batch_size, len(prompts))
        ]
        return combine(torch.cat(scores).view(len(roles), -1), config.ensemble)

    return of_models


def reencode(
    backbone: Backbone,
    role: str,
    prompts: Sequence[Any],
    completions: Sequence[str],
    truncate_prompts: bool,
) -> list[list[int]]:
    """Prompts with answers in the tokens of a role that has a tokenizer of its own.

    Through that tokenizer's chat template where a prompt is messages, the end-of-sequence token
    behind. SourceFailed for one that does not fit the role's context, unless prompts may be cut.
    """
    tokenizer, sequences = backbone.tokenizer_of(role), []
    limit = Limit(backbone.context(role), truncate_prompts)
    for prompt, text in zip(prompts, completions, strict=True):
        answer = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        place = f"prompt {short(prompt)} with its answer, in the tokens of the {role} model"
        start = prompt_ids(prompt, tokenizer)
        try:
            end = answer_ids(prompt, answer, tokenizer, place)
        except UsageError as error:  # a chat template that rewrites what came before
            raise SourceFailed(str(error)) from error
        try:
            sequences.append(limit.fit(start, len(end), place, tokenizer.bos_token_id) + end)
        except UsageError:
            raise SourceFailed(
                f"{place}, is {len(start) + len(end)} long, and its context holds "
                f"{limit.max_tokens}; give --truncate-prompts, or fewer --max-new-tokens"
            ) from None
    return sequences


T = TypeVar("T")


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns; SourceFailed on all processes where it raises that on one."""
    result, failure = None, None
    try:
        result = work()
    except SourceFailed as error:
        failure = error
    failures = [text for text in distributed.each(failure and str(failure)) if text]
    if failures:
        raise failure or SourceFailed(failures[0])
    return result


# ---------------------------------------------------------------------------------------------
# What a run keeps


@contextmanager
def keeping(
    run: Run, finished: int, go_back: Callable[[], None], save: Callable[[], None]
) -> Iterator[None]:
    """Where rewards fail, a checkpoint of the last finished step is written.

    go_back: puts data and random numbers back to where they were behind that step; the weights are
    still there. save: writes the checkpoint.
    """
    try:
        yield
    except SourceFailed:
        newest = run.latest_checkpoint()
        if finished > (newest.step if newest else 0):
            go_back()
            save()
        raise


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Turns a source's failure into Unfinished where there is a checkpoint to go on from."""
    try:
        yield
    except SourceFailed as failure:
        newest = run.latest_checkpoint()
        if newest is None:
            raise
        raise Unfinished(
            f"{failure}; {newest.folder} is kept; go on with: {run.resume_command}"
        ) from failure


# ---------------------------------------------------------------------------------------------
# A Python function


def load_reward_function(target: str, timeout: float) -> TextSource:
    """The function NAME of FILE.py, given "FILE.py:NAME"; called NAME(prompts, completions).

    timeout: seconds for one call; see `load_function`, which says what else is refused. A call
    raises SourceFailed too for all but one finite number for each completion.
    """
    function = load_function("--reward-function", target, "prompts, completions", timeout)

    def call(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        returned = function(prompts, completions)
        return checked(f"reward function {target}", returned, prompts, completions)

    return call


# ---------------------------------------------------------------------------------------------
# An HTTP endpoint


def endpoint(url: str, timeout: float, retries: int) -> TextSource:
    """POSTs {"prompts", "completions"} and returns the "rewards" of the JSON that comes back.

    timeout: seconds that the server may be silent. retries: further requests after a failed
    connection, a time-out, 429 or 5xx, with waits that double from a second to a minute.
    A call raises SourceFailed for what is left then, for any other status, and for all but one
    finite number for each completion.
    """

    def call(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        body = json.dumps({"prompts": list(prompts), "completions": list(completions)}).encode()
        for left in range(retries, -1, -1):
            try:
                answer = post(url, body, timeout)
                break
            except Passing as error:
                if not left:
                    raise SourceFailed(
                        f"{url} {error} when asked for {about(prompts, completions)}, "
                        f"{retries + 1} times; start the server, or correct --reward-url"
                    ) from error
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (retries - left))
                tqdm.write(f"{url} {error}; asked again in {wait:g} s", file=sys.stderr)
                time.sleep(wait)
        try:
            returned = json.loads(answer)["rewards"]
        except (ValueError, TypeError, KeyError):
            raise SourceFailed(
                f'{url} answered {short(answer.decode(errors="replace"))}; want {{"rewards": '
                "[one number for each completion]}"
            ) from None
        return checked(url, returned, prompts, completions)

    return call


class Passing(Exception):
    """A failure of an endpoint that may be gone the next time."""


def post(url: str, body: bytes, timeout: float) -> bytes:
    """The body of a 200; Passing for what may pass, SourceFailed for other statuses."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        said = f"answered {error.code} {error.reason}"
        if error.code == 429 or error.code >= 500:
            raise Passing(said) from error
        raise SourceFailed(f"{url} {said}; correct --reward-url, or the server") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib's own error wraps the connection's
        if isinstance(reason, TimeoutError):
            raise Passing(f"was silent for {timeout:g} s") from error
        raise Passing(f"could not be asked ({reason or type(reason).__name__})") from error


# ---------------------------------------------------------------------------------------------
# What both return


def checked(
    who: str, returned: Any, prompts: Sequence[Any], completions: Sequence[str]
) -> list[float]:
    """One finite number for each completion, or SourceFailed that says what `returned` is."""
    try:
        if isinstance(returned, str | dict):
            raise TypeError(f"it is {short(returned)}")
        rewards = [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise SourceFailed(
            f"{who} returned no list of numbers: {error}; return one float for each completion"
        ) from error
    if len(rewards) != len(completions):
        raise SourceFailed(
            f"{who} returned {len(rewards)} rewards for {len(completions)} completions; return one "
            "for each"
        )
    for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
        if not math.isfinite(reward):
            raise SourceFailed(
                f"{who} returned {reward} for completion {short(completion)} of prompt "
                f"{short(prompt)}; return finite numbers"
            )
    return rewards
