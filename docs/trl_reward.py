"""Train a reward model by TRL's RewardTrainer and PEFT, with one line for our kernels.

    python docs/trl_reward.py                               # a tiny random model, half a minute
    python docs/trl_reward.py --model FOLDER --steps 500    # one of yours

The pairs are those of the embedded cafe; put your own {prompt, chosen, rejected} in their place.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import perl_kernels as pk
from perl.cafe import build_model, build_tokenizer, build_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or folder; none: a random Llama, made here")
    parser.add_argument("--out", default="trl_reward", help="folder of the adapter (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (%(default)s)")
    parser.add_argument("--no-accelerate", action="store_true", help="PEFT's own layers")
    given = parser.parse_args()

    world = build_world(general=100, demonstrations=100, pairs=2000)
    if given.model:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1)
    else:
        tokenizer = build_tokenizer(world.all_text())
        config = build_model(len(tokenizer)).config
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    lora = LoraConfig(r=given.rank, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, lora)
    if not given.no_accelerate:
        pk.accelerate_peft(model)  # the one line
        print(pk.explain(model))
    arguments = RewardConfig(
        given.out, max_steps=given.steps, per_device_train_batch_size=16, learning_rate=1e-3,
        bf16=torch.cuda.is_available(), logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = RewardTrainer(
        model, arguments, train_dataset=Dataset.from_list(world.pairs), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()  # as PEFT does: pk.load_adapter reads it too


if __name__ == "__main__":
    main()
