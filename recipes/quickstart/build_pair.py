"""Train the embedded pair: a source that masters four skills over sequences of symbols, and a smaller target that does not.

    OMP_NUM_THREADS=1 python recipes/quickstart/build_pair.py [--output hf_semalign/data/pair]

Run once; the result ships with the package. Both are Llama models of another depth and width over one tokenizer, trained
from scratch on records that share no prompt with the quickstart's splits. The target sees 1/15 of the source's data, with
the same annealed schedule: it is finished, but weaker. One thread and fixed seeds make the result repeatable on a machine.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.recipe import load_recipe
from hf_semalign.experiments.symbols import build_tokenizer, make_records
from hf_semalign.models.names import PAIR_FOLDER
from hf_semalign.splits import Collator, encode

BATCH = 64
MODELS = {
    "source": {"num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 144, "steps": 6000, "seed": 1},
    "target": {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 96, "steps": 390, "seed": 2},
}


def build(role: str, output: Path) -> dict[str, float]:
    """Train one model and save it with its tokenizer; returns its exact match by skill on the quickstart's eval split."""
    settings = dict(MODELS[role])
    steps, seed = settings.pop("steps"), settings.pop("seed")
    tokenizer = build_tokenizer()
    splits = load_recipe(Path(__file__).parent / "semalign.yaml").data.load()
    reserved = {record["prompt"] for split in (splits.extract, splits.align, splits.eval) for record in split}
    records = make_records(BATCH * steps, seed=1_000_000 + seed, exclude=reserved)
    collator = Collator(tokenizer.pad_token_id)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in collator(rows).items() if key != "example_id"}

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )
    args = TrainingArguments(
        output_dir="runs/build_pair",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_steps=250,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=encode(records, tokenizer, split=role), data_collator=collate).train()
    model.save_pretrained(output / role)
    tokenizer.save_pretrained(output / role)
    return exact_match(model, tokenizer, splits.eval)


def main() -> None:
    """Build both models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=PAIR_FOLDER)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    for role in MODELS:
        print(role, build(role, output))


if __name__ == "__main__":
    main()
