"""Train a policy by TRL's GRPOTrainer and PEFT, with one line for our kernels.

    python docs/trl_grpo.py                               # a tiny random model, a minute
    python docs/trl_grpo.py --model FOLDER --steps 500    # one of yours

Prompts and reward are those of the embedded cafe; put your own in their place.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import perl_kernels as pk
from perl.cafe import build_model, build_tokenizer, build_world, reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or folder; none: a random Llama, made here")
    parser.add_argument("--out", default="trl_grpo", help="folder of the adapter (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (%(default)s)")
    parser.add_argument("--no-accelerate", action="store_true", help="PEFT's own layers")
    given = parser.parse_args()

    world = build_world(general=100, demonstrations=100, pairs=100, prompts=500)
    if given.model:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model = AutoModelForCausalLM.from_pretrained(given.model)
    else:
        tokenizer = build_tokenizer(world.all_text())
        model = build_model(len(tokenizer))
    lora = LoraConfig(r=given.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    if not given.no_accelerate:
        pk.accelerate_peft(model)  # the one line
        print(pk.explain(model))
    arguments = GRPOConfig(
        given.out, max_steps=given.steps, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=16, learning_rate=1e-3, beta=0.05, bf16=torch.cuda.is_available(),
        logging_steps=5, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, lambda prompts, completions, **_: reward(prompts, completions), arguments,
        train_dataset=Dataset.from_list(world.prompts), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()  # as PEFT does: pk.load_adapter reads it too


if __name__ == "__main__":
    main()
