"""Supervised fine-tuning: `python -m perl sft`.

    loss = −Σ_t log π(y_t | y_<t) / number of learned tokens

Learned are the completion of {prompt, completion} rows, every assistant turn of {messages} rows,
and all of {text} rows. Only the hidden states that predict a learned token meet the LM head, and
`pk.linear_log_prob` makes no [tokens × vocabulary] matrix of them.

Left out: packing several short rows into one sequence (rows of like length share a batch instead),
label smoothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from perl import distributed
from perl.backbone import Backbone
from perl.config import SftConfig
from perl.data import Batches, Encoded, encode_examples, load_files, read_rows, want_kind
from perl.memory import PeakMemory
from perl.run import Run
from perl.training import (
    Timer,
    add_role,
    begin,
    language_figures,
    learned_log_prob,
    length_limit,
    lora_config,
    make_optimizer,
    micro_batches,
    open_backbone,
    peak_memory,
    rows_per_pass,
    save,
    say_notes,
    shard,
)


def train(config: SftConfig) -> dict[str, Any]:
    """Trains a policy into `config.out`/policy and returns the figures of the run."""
    # ---- load: everything that can be refused is refused before the run folder exists
    run = Run.create(config.out, config)
    backbone = open_backbone(config, tuning=config.tuning, lora=lora_config(config))
    load = partial(load_examples, config, backbone)
    examples, held_out = load_files(config.data, config.validation, load)
    checkpoint = run.latest_checkpoint() if config.resume else None
    add_role(backbone, "policy", checkpoint)
    shard(config, backbone)
    optimizer = make_optimizer(config, backbone, "policy", config.lr)
    batches = Batches(examples, config.batch_size, config.seed, examples.mixture)
    begin(config, checkpoint, {"policy": optimizer}, batches)

    # ---- loop
    with run, PeakMemory(backbone.device) as peak:
        say_notes(run, examples, held_out)
        for step in run.steps(config.steps, "sft"):
            timer, batch = Timer(backbone.device), next(batches)
            mine = distributed.share(batch)

            learned = sum(sum(example.targets) for example in batch)
            loss = 0.0
            for rows in micro_batches(config.micro_batch_size, len(mine)):
                part = -learned_log_prob(backbone, "policy", mine[rows]).sum() / learned
                part.backward()
                loss += part.item()
            loss = distributed.total(loss)
            grad_norm = optimizer.clip()
            run.check_finite(step, loss=loss, grad_norm=grad_norm)
            optimizer.step(step)

            step_s, tokens = timer.seconds(), sum(map(len, batch))
            metrics = {
                "loss": loss,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "learned_tokens": learned,
                "tokens_per_s": tokens / step_s,
                "step_s": step_s,
                **peak_memory(peak),
            }
            last, score = step == config.steps, None
            if held_out and (step % config.validate_every == 0 or last):
                figures = language_figures(backbone, "policy", held_out, rows_per_pass(config))
                metrics |= {f"validation_{name}": value for name, value in figures.items()}
                score = -metrics["validation_loss"]
            if step % config.log_every == 0 or score is not None or last:
                run.log(step, **metrics)
            if run.checkpoint_due(step) or run.is_best(score):
                save(run, step, backbone, {"policy": optimizer}, batches, score)
        best = run.best_checkpoint()
        result = run.publish("policy", best)
    return {"policy": str(result), "step": best.step} | run.metrics_at(best.step)


def load_examples(config: SftConfig, backbone: Backbone, path: str) -> Encoded:
    rows = read_rows(path, config.format)
    kind = want_kind(rows, ["completion", "messages", "text"], "sft")
    return encode_examples(rows, kind, backbone.tokenizer, length_limit(config, backbone))
