"""A Hugging Face Trainer script that takes all TrainingArguments: a tiny GPT-2 from a config."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(args.seed)
config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
tokens = torch.randint(0, 3, (200, 12)).cumsum(1) % 20
rows = [{"input_ids": row, "labels": row} for row in tokens]
trainer = Trainer(
    model=GPT2LMHeadModel(config), args=args, train_dataset=rows[:160], eval_dataset=rows[160:]
)
trainer.train()
trainer.save_state()
