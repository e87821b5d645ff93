"""Two more pairs for the ablation, with fixed seeds, each with a target that lacks the skill and one that half has it.

    OMP_NUM_THREADS=1 python benchmarks/pairs.py stories --source MODEL --tokenizer TOKENIZER --stories TEXT --other JSONL
    OMP_NUM_THREADS=1 python benchmarks/pairs.py styles

``stories``: real text. The source is a Llama that was trained on TinyStories (a folder of safetensors), with its SentencePiece
model; the targets are smaller Llamas trained here. ``styles``: a GPT-NeoX source and Qwen3 targets, over sequences whose next
symbol is uncertain. Each leaves a folder under ``runs/pairs``: the models ``source``, ``absent`` and ``weak``, the splits, what
was measured (``pair.json``), the recipes ``absent.yaml`` and ``weak.yaml``, which ``benchmarks/ablation.py`` runs, and
``compare.yaml``, which ``semalign compare`` does. Forgetting is measured on what the absent target was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transfer import Material, load
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from hf_semalign.splits import valid_positions
from hf_semalign.tokenization import normalise_prompt

ROOT = Path("runs/pairs")
TARGETS = ("absent", "weak")
BATCH = 32  # of training from scratch
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-2,
    "warmup_steps": 0.1,
    "per_device_eval_batch_size": 64,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
METHODS: dict[str, Any] = {  # SemAlign as the ablation has it, and as the paper does
    "SemAlign": {"frontier": "joint", "pairing": "last", "relation_weight": 0.3},
    "SemAlign, the paper's": {"frontier": "single", "pairing": "attribution", "relation_weight": 1.0},
    "Distillation": {"method": "kd"},
    "Fine-tuning": {"method": "sft"},
    "Seeking": {"method": "seeking"},
    "LaTen": {"method": "laten"},
}

# stories
WINDOW, CONTEXT = 48, 12  # words of a record, and of its prompt
BLOCK = 128  # tokens of a training sequence
OTHER_ROWS = 128  # of what the absent target was trained on, to see what is forgotten of it
STORY_SPLITS = {"eval": 60, "extract": 10, "align": 172}  # stories; the rest trains the weak target

# styles
SYMBOLS, STYLES, FACTORS = 96, 8, 8
SHARPNESS = 1.6
PROMPT, ANSWER = 16, 40  # symbols
STYLE_SPLITS = {"extract": 32, "align": 1536, "eval": 256}


def train(model: PreTrainedModel, sequences: torch.Tensor, steps: int, *, seed: int) -> None:
    """Language modelling on rows of token ids ``[N, T]``, in another order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    done = 0
    while done < steps:
        for rows in torch.randperm(len(sequences), generator=generator).split(BATCH)[: steps - done]:
            loss = model(input_ids=sequences[rows], labels=sequences[rows], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % 100 == 0:
                print(f"step {done}: loss {loss.item():.3f}", flush=True)


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Texts as one stream of token ids, in rows of ``BLOCK``."""
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    rows = len(stream) // BLOCK
    return torch.tensor(stream[: rows * BLOCK]).view(rows, BLOCK)


def story_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece model as a fast tokenizer that opens with ``<s>``; stories have no end token, since records are cut."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, pad_token="<unk>", eos_token=None)


def story_records(story: str) -> list[dict[str, str]]:
    """A story in windows of ``WINDOW`` words: the first ``CONTEXT`` are the prompt, the rest is the completion."""
    words = re.findall(r"\s*\S+", story)
    windows = [words[start : start + WINDOW] for start in range(0, len(words), WINDOW)]
    return [
        {"prompt": "".join(window[:CONTEXT]).strip(), "completion": "".join(window[CONTEXT:])}
        for window in windows
        if len(window) > 2 * CONTEXT
    ]


def build_stories(folder: Path, options: argparse.Namespace) -> None:
    """The real source with its tokenizer, two targets, and splits that share no story."""
    tokenizer = story_tokenizer(options.tokenizer)
    stories = [story.strip() for story in options.stories.read_text(encoding="utf-8").split("<|endoftext|>")]
    stories = stories[1:-1]  # the first and the last are fragments
    random.Random(0).shuffle(stories)
    splits, seen = {}, set[str]()
    for name, count in STORY_SPLITS.items():
        taken, stories = stories[:count], stories[count:]
        records = {normalise_prompt(record["prompt"]): record for story in taken for record in story_records(story)}
        splits[name] = [record for prompt, record in records.items() if prompt not in seen]
        seen |= records.keys()
    rows = [json.loads(line) for line in options.other.read_text(encoding="utf-8").splitlines()]
    other = blocks([f"{row['question']}\n{row['answer']}" for row in rows], tokenizer)
    splits["other"] = [{"prompt": row["question"], "completion": f"\n{row['answer']}"} for row in rows[:OTHER_ROWS]]
    source = AutoModelForCausalLM.from_pretrained(options.source)
    torch.manual_seed(1)
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=40,
            intermediate_size=112,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    save(source, tokenizer, folder / "source")
    train(target, other, 1 if options.smoke else 2000, seed=1)
    save(target, tokenizer, folder / "absent")
    train(target, blocks(stories, tokenizer), 1 if options.smoke else 120, seed=2)
    save(target, tokenizer, folder / "weak")
    write(folder, splits, {"per_device_train_batch_size": 8, "max_steps": 8 if options.smoke else 150})


class StyleTask:
    """Sequences in one of several styles, which the first symbols give away and the next symbol stays uncertain under.

    Each symbol has a hidden vector. A style is two matrices, which turn the vectors of the last two symbols into the logits of
    the next. Styles of another seed are other matrices over the same symbols: another skill.
    """

    def __init__(self, seed: int) -> None:
        self.vectors = torch.randn(SYMBOLS, FACTORS, generator=torch.Generator().manual_seed(0))
        self.generator = torch.Generator().manual_seed(seed)
        self.matrices = torch.randn(2, STYLES, FACTORS, FACTORS, generator=self.generator) / FACTORS

    def draw(self, count: int) -> tuple[torch.Tensor, float]:
        """``[count, PROMPT + ANSWER]`` symbols, and the mean entropy of the answers for one who knows the styles (nats)."""
        style = torch.randint(STYLES, (count,), generator=self.generator)
        symbols = torch.randint(SYMBOLS, (count, 2), generator=self.generator)
        entropy = 0.0
        for position in range(2, PROMPT + ANSWER):
            last = self.vectors[symbols[:, -2:]].transpose(0, 1).unsqueeze(-2)  # [2, count, 1, FACTORS]
            wanted = (last @ self.matrices[:, style]).sum(0).squeeze(-2)
            chances = (SHARPNESS * wanted @ self.vectors.T).softmax(-1)
            if position >= PROMPT:
                entropy += torch.special.entr(chances).sum(-1).mean().item() / ANSWER
            symbols = torch.cat([symbols, chances.multinomial(1, generator=self.generator)], dim=1)
        return symbols, entropy

    def sequences(self, count: int) -> torch.Tensor:
        """Token ids of :func:`style_tokenizer`, ``[count, 1 + PROMPT + ANSWER]``."""
        symbols, _ = self.draw(count)
        return torch.cat([torch.ones(count, 1, dtype=torch.long), symbols + 2], dim=1)

    def records(self, count: int) -> list[dict[str, str]]:
        """Prompts and completions."""
        texts = [[f"s{symbol}" for symbol in row] for row in self.draw(count)[0].tolist()]
        return [{"prompt": " ".join(text[:PROMPT]), "completion": " " + " ".join(text[PROMPT:])} for text in texts]


def style_tokenizer() -> PreTrainedTokenizerFast:
    """One word a symbol; the answers have no end token."""
    words = ["<pad>", "<s>", *(f"s{symbol}" for symbol in range(SYMBOLS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")


def build_styles(folder: Path, options: argparse.Namespace) -> None:
    """A GPT-NeoX source, a Qwen3 target that has learnt other styles, the same with a little of the right ones."""
    tokenizer, task = style_tokenizer(), StyleTask(seed=1)
    splits = {name: task.records(8 if options.smoke else count) for name, count in STYLE_SPLITS.items()}
    splits["other"] = StyleTask(seed=2).records(8 if options.smoke else OTHER_ROWS)
    shared = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    source = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, **shared)
    )
    target = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            **shared,
        )
    )
    for role, model, origin, steps in (
        ("source", source, task, 2200),
        ("absent", target, StyleTask(seed=2), 1000),
        ("weak", target, task, 150),
    ):
        steps = 1 if options.smoke else steps
        train(model, origin.sequences(steps * BATCH), steps, seed=1)
        save(model, tokenizer, folder / role)
    write(folder, splits, {"per_device_train_batch_size": 16, "max_steps": 8 if options.smoke else 200})
    print(f"entropy of the answers for one who knows the styles: {task.draw(1000)[1]:.3f} nats")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(folder: Path, splits: dict[str, list[dict[str, str]]], training: dict[str, Any]) -> None:
    """The splits as JSON lines, and a recipe for each target."""
    files = {name: folder / f"{name}.jsonl" for name in splits}
    for name, rows in splits.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = [name for name in splits if name != "other"]
    data = {"task": "records", **{name: len(splits[name]) for name in own}, "files": {name: str(files[name]) for name in own}}
    other = {"task": "records", "eval": len(splits["other"]), "files": {"eval": str(files["other"])}}
    for target in TARGETS:
        recipe = {
            "source": str(folder / "source"),
            "target": str(folder / target),
            "output_dir": f"runs/ablation/{folder.name}-{target}",
            "data": data,
            "training": TRAINING | training,
            "forgetting": {"other": other},
        }
        (folder / f"{target}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    comparison = {
        "output_dir": f"runs/compare/{folder.name}",
        "tasks": {target: f"{target}.yaml" for target in TARGETS},
        "methods": METHODS,
        "seeds": [1, 2, 3],
        "budgets": ["equal data", "equal compute"],
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))


@torch.no_grad()
def describe(folder: Path) -> dict[str, dict[str, float]]:
    """Of each model: parameters, layers, and on the answers of the eval split KL, loss and entropy (nats a token)."""
    found: dict[str, dict[str, float]] = {}
    material = Material.of(folder / f"{TARGETS[0]}.yaml")
    for role in ("source", *TARGETS):
        model = load(str(folder / role))
        entropy = count = 0.0
        for row in material.rows["eval"]:
            batch = material.collator([row])
            valid = valid_positions(batch["labels"])
            logits = model(input_ids=batch["input_ids"]).logits[valid]
            entropy, count = (
                entropy + torch.distributions.Categorical(logits=logits).entropy().sum().item(),
                count + len(logits),
            )
        size = {"parameters": model.num_parameters(), "layers": model.config.num_hidden_layers}
        found[role] = size | material.evaluate(model) | {"entropy": entropy / count}
    return found


def main() -> None:
    """Build one pair."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", choices=("stories", "styles"))
    parser.add_argument("--source", type=Path, help="stories: folder of the source's config.json and model.safetensors")
    parser.add_argument("--tokenizer", type=Path, help="stories: its SentencePiece model (needs sentencepiece and protobuf)")
    parser.add_argument("--stories", type=Path, help="stories: text, <|endoftext|> between stories")
    parser.add_argument("--other", type=Path, help="stories: JSON lines of question and answer, the absent target's text")
    parser.add_argument("--smoke", action="store_true", help="next to no training, into runs/pairs/<pair>-smoke")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = ROOT / (f"{options.pair}-smoke" if options.smoke else options.pair)
    if options.pair == "stories":
        build_stories(folder, options)
    else:
        build_styles(folder, options)
    found = describe(folder)
    (folder / "pair.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
