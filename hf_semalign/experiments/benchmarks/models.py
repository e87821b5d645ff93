"""Models for the lm-evaluation-harness, opened from memory, a run folder, an adapter on the Hub or a model's name.

They differ from the harness's own models in two things:

- :mod:`hf_semalign.experiments.generation` generates the answers. It drops ended sequences from the batch and ignores the
  model's ``generation_config``. Some of these, such as Qwen2.5's, penalise repetition, which is not greedy.
- Every prompt starts with the tokenizer's BOS exactly once, with or without a chat template, even if the tokenizer does not add
  it by default. The same holds for vLLM. A tokenizer without BOS adds none. The record states the BOS.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.experiments.answers import read_entries
from hf_semalign.experiments.benchmarks.problems import quiet
from hf_semalign.experiments.generation import (
    computing_in,
    continue_prompts,
    end_tokens,
    fastest_dtype,
    generating,
    rows_that_fit,
)
from hf_semalign.files import RECORD_NAME, digest, write_text
from hf_semalign.hub.loading import find_folder, find_target, load_transfer
from hf_semalign.hub.reading import check_adapter, read_adapter_config, read_record
from hf_semalign.models.anatomy import CausalLM
from hf_semalign.models.loading import find_tokenizer, load_weights, unknown_words_explained
from hf_semalign.models.names import resolve_model

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CHOICE_ROWS = 16  # batch size for multiple choice, which needs the logits of all tokens


@dataclass(frozen=True)
class Opened:
    """A model for the harness. ``own`` marks a user's LM, which builds its prompts."""

    lm: Any
    backend: str
    own: bool = False


class Kept(TypedDict):
    """A line of the file with saved answers."""

    asked: str
    answer: str


class _Keeper:
    """Cache hook of the harness that saves each answer to a JSON-lines file, by a digest of the request.

    The harness's own cache is not used, because it reads pickles. A folder from somebody else could run code that way.
    """

    def __init__(self, path: Path | None, known: dict[str, str]) -> None:
        self.path = path
        if path is not None:  # drops an incomplete last line, left by a killed process
            write_text(path, "".join(self._line(*one) for one in known.items()))

    def __enter__(self) -> _Keeper:
        self.file = None if self.path is None else self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None  # do not save the choices of a later task

    def add_partial(self, kind: str, asked: Any, answer: str) -> None:
        """Save an answer."""
        if self.file is not None:
            self.file.write(self._line(digest(asked), answer))
            self.file.flush()

    @staticmethod
    def _line(asked: str, answer: str) -> str:
        return json.dumps({"asked": asked, "answer": answer}) + "\n"


def _harness_model(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> Any:
    """Wrap a model for the harness. :func:`hf_semalign.experiments.generation.continue_prompts` generates the answers."""
    from lm_eval.models.huggingface import HFLM

    class GreedyLM(HFLM):
        answers: Path | None = None

        def tok_encode(self, *args: Any, **settings: Any) -> Any:
            with unknown_words_explained():
                return super().tok_encode(*args, **settings)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [digest(request.args) for request in requests]
            known = {} if self.answers is None else {one["asked"]: one["answer"] for one in read_entries(self.answers, Kept)}
            missing = [request for request, key in zip(requests, asked, strict=True) if key not in known]
            room = requests[0].args[1].get("max_gen_toks", self.max_gen_toks)
            self.batch_size_per_gpu = batch_size or rows_that_fit(model, room)
            total, off = len(requests), disable_tqdm or self.rank != 0
            self.bar = tqdm(total=total, initial=total - len(missing), desc="answers", disable=off)
            try:
                with self.bar, _Keeper(self.answers, known) as self.cache_hook:
                    made = iter(super().generate_until(missing, disable_tqdm=True) if missing else ())
                return [known[key] if key in known else next(made) for key in asked]
            finally:
                self.batch_size_per_gpu = batch_size or CHOICE_ROWS  # the next task may be multiple choice

        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **settings: Any
        ) -> torch.Tensor:
            if settings.get("do_sample") or settings.get("temperature"):
                raise InputError(f"The task asks for sampling ({settings}), but only greedy decoding is supported.")
            new = continue_prompts(
                model,
                context,
                attention_mask,
                max_new_tokens=max_length - context.shape[1],
                eos_token_ids=self.ends,
                pad_token_id=tokenizer.pad_token_id,
                has_ended=lambda tokens: any(one in self.tok_decode(tokens) for one in stop),
                on_end=self.bar.update,
            )
            return torch.cat((context, new), dim=1)

    with quiet():
        lm = GreedyLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or CHOICE_ROWS, add_bos_token=True)
    lm.ends = end_tokens(model, tokenizer)
    return lm


@contextmanager
def open_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, batch_size: int | None, backend: str, target: str | Path | None
) -> Iterator[Opened]:
    """Open a model for the harness. The arguments are those of ``run_benchmark``.

    Raises:
        ValueError: the model or its tokenizer cannot be used with this backend.
    """
    from lm_eval.api.model import LM

    named = isinstance(model, (str, Path))
    if isinstance(model, LM):
        yield Opened(model, type(model).__name__, own=True)
        return
    if backend == "vllm":
        if not named or tokenizer is not None:
            raise InputError("vLLM loads model and tokenizer itself: pass the name of a run folder or model, and no tokenizer.")
        yield Opened(_open_vllm(str(model), target), backend)
        return
    if named:
        model, own = _load_named(str(model), target)
        tokenizer = tokenizer or own
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"The model is a {type(model).__name__}: expected a causal LM, a name, or an lm_eval LM.")
    if tokenizer is None:
        raise InputError("No tokenizer was given, and the model comes without one: pass its tokenizer.")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tokenizer = copy.deepcopy(tokenizer)  # the harness modifies it
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token to end answers with: set its eos_token.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= base.get_input_embeddings().weight.shape[0]:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    with unknown_words_explained():
        begins = tokenizer("a")["input_ids"][:1]
    if tokenizer.bos_token is not None and begins != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True
    causal = cast(CausalLM, model)
    with generating(causal), computing_in(causal, fastest_dtype(causal)):
        yield Opened(_harness_model(model, tokenizer, batch_size), backend)


def find_adapter(name: str) -> Path | None:
    """The folder of a transfer, or ``None`` if ``name`` is a model."""
    folder = find_folder(name)
    return folder if (folder / RECORD_NAME).is_file() else None


def _load_named(name: str, target: str | Path | None) -> tuple[Any, PreTrainedTokenizerBase | None]:
    adapter = find_adapter(name)
    if adapter is None:
        model: Any = load_weights(name, dtype="auto")
    else:
        model, _ = load_transfer(adapter, target=target)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), find_tokenizer(_tokenizer_place(name, adapter, target))


def _tokenizer_place(name: str, adapter: Path | None, target: str | Path | None) -> str:
    """Where to load the tokenizer from: the adapter if it has one, or else its target."""
    if adapter is None:
        return name
    return str(adapter) if (adapter / "tokenizer_config.json").is_file() else find_target(read_record(adapter), target)


def _open_vllm(name: str, target: str | Path | None) -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    adapter = find_adapter(name)
    place = resolve_model(_tokenizer_place(name, adapter, target))  # vLLM does not know embedded models
    given = {"tokenizer": place, "add_bos_token": True, "batch_size": "auto"}
    if adapter is None:
        return VLLM(pretrained=resolve_model(name), **given)
    check_adapter(adapter)
    config = read_adapter_config(adapter)
    rank = max(config["r"], *config.get("rank_pattern", {}).values(), 0)
    largest = next((known for known in VLLM_RANKS if known >= rank), None)
    if largest is None:
        raise InputError(f"vLLM supports LoRA ranks up to {VLLM_RANKS[-1]}, not the adapter's rank {rank}: use the backend hf.")
    base = resolve_model(find_target(read_record(adapter), target))
    return VLLM(pretrained=base, lora_local_path=str(adapter), max_lora_rank=largest, **given)
