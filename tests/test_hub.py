"""Publishing a run folder: only what is meant for the Hub leaves the machine. (Loading back: tests/test_recipe.py.)"""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from hf_semalign import push_transfer

PUBLIC = {
    "adapter_model.safetensors", "adapter_config.json", "semalign.json", "README.md", "results.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "figures/layers.png", "figures/layers.svg",
}  # fmt: skip
PRIVATE = {
    "_signals/abc/shard-00000.safetensors", "_signals/abc/manifest.json", "checkpoint-5/optimizer.pt", "training_args.bin",
    "checkpoint-5/adapter_model.safetensors", "checkpoint-5/README.md", "checkpoint-5/chat_template.jinja",
    "kd/semantic_map.safetensors", "notes.txt",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in PUBLIC | PRIVATE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def sent(monkeypatch):
    """The calls that would reach the Hub, with the files that the client's own filter lets through."""
    calls = []

    def upload(self, *, repo_id, folder_path, allow_patterns, commit_message):
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        calls.append(("upload", repo_id, self.token, set(filter_repo_objects(files, allow_patterns=allow_patterns))))
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **settings: calls.append(("create", repo_id, settings)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def test_only_the_listed_files_are_sent(folder, sent):
    assert push_transfer(folder, "me/adapter", token="secret", private=True) == "https://hub.example/me/adapter/commit/1"
    (created, repo_id, settings), (_, _, token, files) = sent
    assert (created, repo_id, settings) == ("create", "me/adapter", {"private": True, "exist_ok": True})
    assert token == "secret"
    assert files == PUBLIC


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "semalign.json", "README.md"])
def test_an_unfinished_folder_is_refused_before_anything_is_sent(folder, sent, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks .*{name}"):
        push_transfer(folder, "me/adapter")
    assert not sent
