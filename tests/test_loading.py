"""What is known of a model's licence, and what a device is called; loading itself is tested where it is used."""

import pytest
import torch

from hf_semalign.models.loading import device_name, licence_of


@pytest.mark.parametrize("role", ["source", "target"])
def test_licence_of_the_embedded_pair(role):
    assert licence_of(f"embedded:{role}") == {"license": "apache-2.0"}


NAMED = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: llama2", {"license": "llama2"}),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", NAMED),
        ("license: [mit, apache-2.0]", None),
        ("tags: [x]", None),
        ("license: 'a", None),
    ],
)  # fmt: skip
def test_licence_that_a_card_names(tmp_path, head, found):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == found


def test_no_licence_is_no_error(tmp_path, monkeypatch):
    """Of a folder without a card, a model made in memory, also in a folder with a card, and a Hub that is not there."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path / "here")
    assert [licence_of(origin) for origin in (str(tmp_path), "", "owner/nothing-like-it")] == [None] * 3


def test_a_device_has_the_name_of_its_kind():
    assert device_name(torch.device("cpu")) == "cpu"
