"""What we rely on of transformers' ``Trainer`` that it does not promise: a release that changes it fails here, by name."""

import ast
import inspect
from pathlib import Path

from transformers import Trainer

import hf_semalign
from hf_semalign.trainer import SemAlignTrainer

ONE_FILE = "training/layerwise.py"
# Methods that are overridden, with the parameters that they have there.
PRIVATE = {
    "_clip_grad_norm": ["model"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_set_signature_columns_if_needed": [],
}
PUBLIC = {
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
    "floating_point_ops": ["inputs"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "get_eval_dataloader": ["eval_dataset"],
    "get_test_dataloader": ["test_dataset"],
    "init_hf_repo": ["token", "private"],
    "log": ["logs", "start_time"],
    "predict": ["test_dataset", "ignore_keys", "metric_key_prefix"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "save_model": ["output_dir", "_internal_call"],
    "set_initial_training_values": ["args", "dataloader"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
}
ATTRIBUTES = {"_created_lr_scheduler", "_loss_shifts_labels", "_signature_columns"}


def test_what_we_override_is_as_we_know_it():
    known = PRIVATE | PUBLIC
    found = {name: list(inspect.signature(getattr(Trainer, name)).parameters)[1:] for name in known if hasattr(Trainer, name)}
    assert found == known


def test_what_we_set_is_still_read():
    source = inspect.getsource(Trainer)
    assert {name for name in ATTRIBUTES if f"self.{name}" not in source} == set()


def test_the_list_is_whole():
    ours = SemAlignTrainer.__mro__[: SemAlignTrainer.__mro__.index(Trainer)]
    overridden = {name for one in ours for name in vars(one) if callable(getattr(Trainer, name, None))}
    assert {name for name in overridden if not name.startswith("__")} == PRIVATE.keys() | PUBLIC.keys()


def test_one_file_knows_the_private_members():
    package = Path(hf_semalign.__file__).parent
    members = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")} | ATTRIBUTES
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        trainers = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer")]
        own = {item.name for one in trainers for item in one.body if isinstance(item, ast.FunctionDef)}
        used = {node.attr for one in trainers for node in ast.walk(one) if isinstance(node, ast.Attribute)} | own
        told = used & members
        if path == package / ONE_FILE:
            assert told == PRIVATE.keys() | ATTRIBUTES
        else:
            assert told == set(), path
