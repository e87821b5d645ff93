"""What runs in the process of a Hub's client: ``HF_ENDPOINT`` is read when huggingface_hub is imported.

Each function gives back plain values: what came out, the error if there was one, and what was logged.
"""

import contextlib
import io
import json
import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_semalign import SemAlignConfig, load_transfer, push_transfer
from hf_semalign.cli import main
from hf_semalign.experiments.evaluation import answer_loss
from hf_semalign.experiments.methods import METHODS
from hf_semalign.splits import Collator, encode


@contextlib.contextmanager
def client(endpoint: str, home: Path):
    """Call functions of this file in a process of its own, which is a client of ``endpoint`` and knows no token."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with mock.patch.dict(os.environ, settings), ProcessPoolExecutor(1, get_context("spawn"), _hurry) as pool:
        os.environ.pop("HF_TOKEN", None)
        pool.submit(os.getpid).result(timeout=60)
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(timeout=120)


def _hurry() -> None:
    """The client's waits between its tries, shortened."""
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.05))


@contextlib.contextmanager
def _told():
    """Collect what hf_semalign logs, and the error that ends the block."""
    told, handler = {"error": None, "log": ""}, logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("hf_semalign")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield told
    except (OSError, ValueError) as error:
        told["error"] = f"{type(error).__name__}: {error}"
    finally:
        logger.removeHandler(handler)
        told["log"] = handler.stream.getvalue()


def push(folder, repo_id, token="hf_write", constant=None, **options):
    """``push_transfer``; ``constant``: of huggingface_hub, with its value."""
    changed = mock.patch.object(constants, *constant) if constant else contextlib.nullcontext()
    with changed, _told() as told:
        told["url"] = push_transfer(folder, repo_id, token=token, **options)
    return told


def command(*arguments, token=None):
    """The command line; its exit code and what it prints."""
    shown, environment = io.StringIO(), {"HF_TOKEN": token} if token else {}
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(shown), _told() as told:
        told["code"] = main([str(argument) for argument in arguments])
    return told | {"out": shown.getvalue()}


def train(settings, rows, models, steps, method="semalign"):
    """A trainer, and its methods that ``steps`` names, called on it."""
    with _told() as told:
        trainer_class = METHODS[method].trainer
        trainer = trainer_class(*models, SemAlignConfig(**{**trainer_class.settings, **settings}), rows[8:], rows[:8])
        told["results"] = [str(getattr(trainer, name)(**options)) for name, options in steps]
    return told


def load(repo_id, **options):
    """``load_transfer``: the record."""
    with _told() as told:
        told["record"] = load_transfer(repo_id, **options)[1]
    return told


def plain_peft(base, adapter, rows):
    """An adapter as peft loads it, with the tokenizer beside it: its logits of a probe, and its loss on the rows of a file."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    encoded = encode(list(map(json.loads, Path(rows).read_text().splitlines())), tokenizer, split="eval")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(16)[None]).logits
    return [logits.tolist(), answer_loss(model, [Collator(tokenizer.pad_token_id)([dict(row) for row in encoded])])]
