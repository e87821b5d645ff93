"""Publishing against a Hub on the loopback, by the real client: what arrives, what is refused, what survives a bad network."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import hub_client
import pytest
import yaml
from conftest import random_rows, table
from hub_server import CUT, LATE, RIVAL, Fault, running
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_semalign.files import file_digest
from hf_semalign.hub import push as publishing

PUBLIC = {
    "adapter_model.safetensors", "adapter_config.json", "semalign.json", "README.md", "results.json", "tokenizer.json",
    "tokenizer_config.json", "figures/layers.png", "figures/layers.svg", "figures/losses.png", "figures/losses.svg",
    "figures/comparison.png", "figures/comparison.svg",
}  # fmt: skip
PRIVATE = (
    "_signals/abc/00000.safetensors", "training_args.bin", "checkpoint-5/README.md", "kd/adapter_model.safetensors",
    "figures/own/x.png", "adapter_model.bin", "notes.txt",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with hub_client.client(hub.endpoint, tmp_path_factory.mktemp("home")) as call:
        yield call


@pytest.fixture
def run(good, tmp_path):
    """A run folder of one's own."""
    return shutil.copytree(good / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.fixture
def push(hub, client, good, request):
    """``push_transfer`` in the client's process, to a repository of this test; the folder must stay as it is."""
    hub.order()
    name = f"zoe/{hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]}"

    def call(folder, repo_id=name, **options):
        before = content(folder)
        told = client(hub_client.push, folder, repo_id, **{"target": str(good / "target"), **options})
        assert content(folder) == before
        return told

    call.repo = name
    return call


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(folder, name="results.json"):
    (folder / name).write_text((folder / name).read_text() + "\n")


# What arrives


def test_the_listed_files_arrive_in_one_commit_and_are_compared(hub, run, push):
    for name in PRIVATE:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    told = push(run, private=True)
    assert told["error"] is None
    repo = hub.repos[push.repo]
    assert repo.private
    assert [commit.title for commit in repo.commits.values()] == ["initial commit", "SemAlign transfer"]
    assert hub.files(push.repo) == PUBLIC
    assert all(hub.read(push.repo, name) == (run / name).read_bytes() for name in PUBLIC)
    assert told["url"] == f"{hub.endpoint}/{push.repo}/commit/{repo.branches['main']}"
    ((tag, tagged),) = repo.tags.items()
    assert tag.startswith("v0.1.0-")
    assert tagged == repo.branches["main"]
    assert f"sent 13 of 13 files; downloaded again, and the files and logits are the same; tag {tag}" in told["log"]


def test_results_of_a_registered_benchmark_arrive_where_the_hub_looks(hub, run, push):
    (run / ".eval_results").mkdir()
    (run / ".eval_results" / "gsm8k.yaml").write_text("- dataset: {id: openai/gsm8k, task_id: gsm8k}\n  value: 12.35\n")
    (run / ".eval_results" / "notes.txt").write_text("private")
    assert push(run)["error"] is None
    assert hub.files(push.repo) == PUBLIC | {".eval_results/gsm8k.yaml"}


def test_what_is_there_is_not_sent_again(hub, run, push):
    first = push(run)
    hub.order()
    again = push(run)
    assert (again["error"], again["url"]) == (None, first["url"])
    assert "already published; downloaded again" in again["log"]
    assert hub.count("commit/|PUT|/tag/") == 0
    assert len(hub.repos[push.repo].commits) == 2


def test_a_compatible_server_that_knows_less_gets_no_more(hub, run, push):
    hub.plain = True
    first = push(run)
    assert first["error"] is None and "does not support checking write access in advance" in first["log"]
    hub.order()
    hub.plain = True
    again = push(run)
    assert (again["error"], again["url"]) == (None, first["url"]) and "already published" in again["log"]
    assert hub.count("preupload|commit/|PUT|batch") == 0
    change(run)
    hub.order()
    hub.plain = True
    told = push(run)
    assert told["error"] is None and "sent 1 of 13 files" in told["log"]


def test_a_second_push_leaves_nothing_of_the_first_but_its_tag(hub, run, push, client, good):
    (run / "chat_template.jinja").write_text("{{ messages }}")
    assert push(run)["error"] is None
    old = json.loads((run / "semalign.json").read_text())
    (first,) = hub.repos[push.repo].tags
    hub.write(push.repo, {"figures/own/x.png": b"by hand", "notes.txt": b"by hand"})
    (run / "chat_template.jinja").unlink()
    (run / "semalign.json").write_text(json.dumps(old | {"stages": [0, 3]}))
    told = push(run)
    assert "sent 1 of 13 files" in told["log"]
    assert hub.files(push.repo) == PUBLIC | {"figures/own/x.png", "notes.txt"}
    assert len(hub.repos[push.repo].tags) == 2
    assert "chat_template.jinja" in hub.files(push.repo, first)
    target = {"target": str(good / "target")}
    assert client(hub_client.load, push.repo, revision=first, **target)["record"] == old
    assert client(hub_client.load, push.repo, **target)["record"] == old | {"stages": [0, 3]}


def test_a_branch_is_made_and_main_is_left_alone(hub, run, push):
    assert push(run, revision="trial")["error"] is None
    assert push(run, revision="trial")["error"] is None
    assert hub.files(push.repo, "trial") == PUBLIC
    assert hub.files(push.repo) == set()


def test_a_tag_of_ones_own_never_moves(hub, run, push):
    assert push(run, tag="v1")["error"] is None
    assert push(run, tag="v1")["error"] is None
    tagged = hub.repos[push.repo].tags["v1"]
    change(run)
    hub.order()
    assert f"already has a tag 'v1', of commit {tagged[:8]}: choose another tag" in push(run, tag="v1")["error"]
    assert hub.count("commit/|PUT") == 0
    assert push(run, tag="v2")["error"] is None
    assert hub.repos[push.repo].tags["v1"] == tagged
    assert hub.repos[push.repo].tags["v2"] == hub.repos[push.repo].branches["main"]
    assert "The tag 'v 3' cannot be used" in push(run, tag="v 3")["error"]


def test_a_bare_name_is_in_ones_own_namespace(hub, run, push):
    assert push(run, "bare")["error"] is None
    assert hub.files("zoe/bare") == PUBLIC


def test_logits_that_cannot_be_compared_are_told_of(run, push):
    told = push(run, target=None)
    assert told["error"] is None
    assert "Logits will not be compared: the target target is not available" in told["log"]
    assert "connect" not in told["log"]
    assert "downloaded again, and the files are the same; tag" in told["log"]


# What is refused, with nothing sent


@table("options, message", [
    ("no token", {"token": None}, "InputError: There is no Hub token: log in with `hf auth login`, set HF_TOKEN"),
    ("a wrong token", {"token": "hf_wrong"}, "InputError: The Hub rejects this token: log in again"),
    ("a token to read", {"token": "hf_read"}, "InputError: This token lacks permission for zoe/new: create one"),
    ("another's namespace", {"repo_id": "max/new"}, "InputError: This token lacks permission for max/new: .*namespace \"max\""),
    ("another's repository", {"repo_id": "max/model"}, "InputError: This token lacks permission for max/model"),
    ("no name", {"repo_id": "a/b/c"}, "InputError: 'a/b/c' is not a valid repository name: expected owner/name"),
    ("a name that is not allowed", {"repo_id": "zoe/models"}, "InputError: The Hub refused .*: This name is reserved"),
    (
        "a name that conflicts",
        {"repo_id": "zoe/taken"},
        "InputError: The repository zoe/taken cannot be created: .*conflicts with existing repository Taken.* "
        "Choose another name",
    ),
    ("a repository of something else", {"repo_id": "zoe/model"}, "InputError: zoe/model exists and is not a transfer; it has"),
    ("a public repository", {"repo_id": "zoe/model", "private": True}, "InputError: zoe/model exists and is public: "),
    ("no network", {"constant": ("ENDPOINT", "http://127.0.0.1:9")}, "StorageError: The Hub cannot be reached: .*refused"),
    ("offline", {"constant": ("HF_HUB_OFFLINE", True)}, "StorageError: HF_HUB_OFFLINE is set"),
])  # fmt: skip
def test_who_may_not_push_is_told_why(hub, run, push, options, message):
    for owner in ("zoe", "max"):
        hub.repos.pop(f"{owner}/model", None)
        hub.write(f"{owner}/model", {"config.json": b"{}", "README.md": b"mine"})
    error = push(run, **{"repo_id": "zoe/new", **options})["error"]
    assert re.match(message, error), error
    assert "hf_w" not in error
    assert "\n" not in error
    assert "zoe/new" not in hub.repos
    assert hub.read("zoe/model", "README.md") == b"mine"
    assert hub.count("preupload|commit/|PUT|batch") == 0


def without(name):
    return lambda run: (run / name).unlink()


def other_adapter(run):
    tensors = load_file(run / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, run / "adapter_model.safetensors")


def recorded(run, change):
    """Change the weights, and with them the checksum in record and results."""
    path = run / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    for name in ("semalign.json", "results.json"):
        known = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(known | {"adapter_checksum": file_digest(path)}))


def edit_card(**changes):
    def edit(run):
        _, head, text = (run / "README.md").read_text().split("---\n", 2)
        data = yaml.safe_load(head) | changes
        (run / "README.md").write_text(f"---\n{yaml.safe_dump(data)}---\n{text}")

    return edit


def write_card(text):
    return lambda run: (run / "README.md").write_text(text)


def local_base(run):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/home/zoe/target"}))


@table("damage, message", [
    *((f"no {name}", without(name), f"MissingFileError: .*lacks .*{name}") for name in ("semalign.json", "README.md")),
    ("no weights", without("adapter_model.safetensors"), "MissingFileError: .*lacks .*adapter_model.safetensors"),
    ("another's weights", other_adapter, "InputError: .*does not match semalign.json"),
    ("weights cut short", lambda run: (run / "adapter_model.safetensors").write_bytes(b"cut"), ".*is damaged or trunc"),
    ("no finite weights", lambda run: recorded(run, lambda old: {k: v * float("nan") for k, v in old.items()}), ".*not finite"),
    ("weights of another shape", lambda run: recorded(run, lambda old: {k: v[:-1] for k, v in old.items()}), ".*does not fit"),
    ("a path as base", local_base, "InputError: .*names the base '/home/zoe/target'.* and no path"),
    ("a path in the card", edit_card(base_model="/home/zoe/target"), "InputError: .*names the base_model '/home/zoe/target'"),
    ("a card of something else", edit_card(tags=["lora"]), "InputError: .*is not the card of a run"),
    ("a card that is no YAML", write_card("---\na: [\n---\n"), "InputError: .*README.md has invalid metadata"),
])  # fmt: skip
def test_a_folder_that_may_not_be_published_as_it_is(hub, run, push, damage, message):
    damage(run)
    error = push(run)["error"]
    assert re.match(message, error), error
    assert hub.requests == []


def test_metadata_that_the_hub_refuses(hub, run, push):
    """Which this package does not know of; the Hub's own words are told, and nothing is there."""
    edit_card(metrics="exact_match")(run)
    assert '"metrics" must be an array' in push(run)["error"]
    assert hub.files(push.repo) == set()


def test_the_server_takes_no_object_but_the_announced_one(hub):
    oid = hashlib.sha256(b"content").hexdigest()
    for body in (b"content and more", b"CONTENT"):
        request = urllib.request.Request(f"{hub.endpoint}/storage/{oid}?size=7", data=body, method="PUT")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request, timeout=5)
    assert oid not in hub.objects


# Bad networks


@table("fault", [
    ("a storage that fails twice", Fault("PUT", 503, times=2)),
    ("an upload that is cut", Fault("PUT", CUT)),
    ("too many requests", Fault("preupload", 429, headers={"Retry-After": "0"})),
    ("objects that cannot be listed", Fault("batch", 502)),
    ("no verification", Fault("verify", 500)),
    ("a download that is cut", Fault("GET .*/resolve/", CUT)),
])  # fmt: skip
def test_the_client_tries_again(hub, run, push, fault):
    hub.objects.pop(hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest(), None)
    hub.order(fault)
    told = push(run)
    assert told["error"] is None
    assert fault.times == 0
    assert hub.files(push.repo) == PUBLIC


@table("fault, message, landed", [
    ("a storage that fails", Fault("PUT", 503, times=99), "StorageError: The Hub failed .status 503.: try again", False),
    ("uploads that are cut", Fault("PUT", CUT, times=99), "StorageError: The Hub cannot be reached: try again", False),
    ("no commit", Fault("commit/", 500), "StorageError: The Hub failed .status 500.", False),
    ("a commit without an answer", Fault("commit/", LATE), "StorageError: The Hub cannot be reached", True),
    ("a commit of another", Fault("commit/", RIVAL), "InputError: Somebody else changed .* in the meantime: try again", False),
    ("no download", Fault("GET .*/tree/", 500, times=99), "StorageError: The Hub failed .status 500.", True),
    ("no tag", Fault("/tag/", 504), "StorageError: The Hub failed .status 504.", True),
])  # fmt: skip
def test_a_push_that_broke_off_is_repeated(hub, run, push, fault, message, landed):
    hub.objects.pop(hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest(), None)
    hub.order(fault)
    error = push(run)["error"]
    assert re.match(message, error), error
    assert hub.files(push.repo) - {".gitignore"} == (PUBLIC if landed else set())
    assert not hub.repos[push.repo].tags
    sent = hub.count("PUT")
    hub.order()
    again = push(run)
    assert again["error"] is None
    assert ("already published" in again["log"]) is landed
    assert hub.files(push.repo) - {".gitignore"} == PUBLIC
    assert len(hub.repos[push.repo].commits) == 2 + (fault.status == RIVAL)
    assert len(hub.repos[push.repo].tags) == 1
    if "PUT" not in fault.request:
        assert sent
        assert hub.count("PUT") == 0


def test_what_comes_back_changed_is_no_success(hub, run, push):
    hub.damaged = {"semalign.json"}
    told = push(run)
    assert "differs from what was sent in ['semalign.json']: push it again" in told["error"]
    assert not hub.repos[push.repo].tags
    hub.order()
    assert push(run)["error"] is None


def test_other_logits_are_no_success(run, good):
    model, logits = publishing._probe(run, str(good / "target"))
    api = SimpleNamespace(snapshot_download=lambda *_, **__: str(run))
    publishing._compare(api, "zoe/a", "0" * 40, run, [], (model, logits))
    with pytest.raises(OSError, match=r"differs from what was sent in \['logits'\]"):
        publishing._compare(api, "zoe/a", "0" * 40, run, [], (model, logits + 1e-6))


# The traps of a card


def test_peft_s_placeholder_never_becomes_the_card(hub, run, push, good, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(good / "target"), LoraConfig(target_modules=["up_proj"]))
    model.save_pretrained(tmp_path / "peft")
    placeholder = (tmp_path / "peft" / "README.md").read_text()
    assert str(good) in placeholder
    (run / "README.md").write_text(placeholder)
    assert "is not the card of a run" in push(run)["error"]
    assert hub.requests == []


def settings(folder, **changes):
    return {
        "output_dir": str(folder), "max_steps": 3, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "pairing": "last", "hub_model_id": f"zoe/{folder.name}", "hub_token": "hf_write", **changes,
    }  # fmt: skip


def test_a_trainer_publishes_what_push_transfer_does(hub, client, good, tmp_path):
    hub.order()
    models = str(good / "target"), str(good / "source")
    steps = [("train", {}), ("evaluate", {}), ("push_to_hub", {"tags": ["mine", "lora"], "private": True})]
    told = client(hub_client.train, settings(tmp_path / "trainer"), random_rows([(4, 3)] * 16), models, steps)
    assert told["error"] is None
    repo = hub.repos["zoe/trainer"]
    assert repo.private
    assert list(repo.tags.values()) == [repo.branches["main"]]
    files = hub.files("zoe/trainer")
    assert files == {name for name in PUBLIC if not name.startswith(("figures", "results"))}
    head = yaml.safe_load(hub.read("zoe/trainer", "README.md").decode().split("---\n")[1])
    assert head["tags"] == ["lora", "transformers", "hf-semalign", "knowledge-transfer", "mine"]
    assert head["library_name"] == "peft"
    assert "base_model" not in head
    (entry,) = head["model-index"]
    assert {metric["type"] for metric in entry["results"][0]["metrics"]} == {"kl_divergence", "cross_entropy"}
    for name in files:
        assert str(good).encode() not in hub.read("zoe/trainer", name)
    assert "the files and logits are the same" in told["log"]


def test_what_is_published_is_the_adapter_and_not_a_checkpoint_s(hub, client, good, tmp_path):
    """Of Seeking a checkpoint holds matrices for another base."""
    models = str(good / "target"), str(good / "source")
    steps = [("train", {}), ("push_to_hub", {})]
    told = client(hub_client.train, settings(tmp_path / "seeking"), random_rows([(4, 3)] * 24), models, steps, method="seeking")
    assert told["error"] is None
    config = json.loads(hub.read("zoe/seeking", "adapter_config.json"))
    kept = json.loads((tmp_path / "seeking" / "checkpoint-3" / "adapter_config.json").read_text())
    assert config["r"] == 2 * kept["r"] == json.loads((tmp_path / "seeking" / "adapter_config.json").read_text())["r"]


def test_a_card_without_results_has_no_empty_index(hub, client, good, tmp_path):
    models = str(good / "target"), str(good / "source")
    steps = [("train", {}), ("save_model", {})]
    told = client(hub_client.train, settings(tmp_path / "saved", push_to_hub=True), random_rows([(4, 3)] * 16), models, steps)
    assert told["error"] is None
    assert "model-index" not in hub.read("zoe/saved", "README.md").decode()
    assert len(hub.repos["zoe/saved"].commits) == 2  # no checkpoint


@table("changes, steps, message", [
    ("no rights", {"push_to_hub": True, "hub_token": "hf_other"}, [], "This token lacks permission for zoe/refused"),
    ("a future", {}, [("push_to_hub", {"blocking": False})], "push_to_hub does not take .'blocking=False'."),
    ("of another card", {}, [("push_to_hub", {"language": "en"})], "push_to_hub does not take .'language'."),
])  # fmt: skip
def test_a_trainer_that_may_not_publish_says_so(hub, client, good, tmp_path, changes, steps, message):
    models = str(good / "target"), str(good / "source")
    rows = random_rows([(4, 3)] * 16)
    told = client(hub_client.train, settings(tmp_path / "refused", **changes), rows, models, steps)
    assert re.match(f"InputError: {message}", told["error"])
    assert not (tmp_path / "refused" / "_signals").exists() or steps
    assert "zoe/refused" not in hub.repos


# Recipes, and the whole tour


def test_a_recipe_publishes_at_its_end(hub, client, good, tmp_path):
    hub.order()
    train = ["train", "--config", good / "recipe.yaml", "--push-to-hub", f"output_dir={tmp_path / 'run'}"]
    train += ["training.hub_model_id=zoe/recipe", "training.hub_private_repo=true"]
    told = client(hub_client.command, *train, token="hf_other")
    assert told["code"] == 2
    assert "This token lacks permission for zoe/recipe" in told["log"]
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))

    hub.order(Fault("commit/", 500))
    told = client(hub_client.command, *train, token="hf_write")
    assert told["code"] == 2
    run = tmp_path / "run"
    assert f"error: {run} is finished, but not published: The Hub failed (status 500)" in told["log"]
    assert f"Then: semalign push {run} zoe/recipe" in told["log"]
    assert content(run).keys() >= PUBLIC

    push = client(hub_client.command, "push", run, "zoe/recipe", "--private", "--tag", "v1", token="hf_write")
    assert push["code"] == 0
    assert push["out"].strip() == f"{hub.endpoint}/zoe/recipe/commit/{hub.repos['zoe/recipe'].branches['main']}"
    assert hub.files("zoe/recipe") == PUBLIC
    assert hub.repos["zoe/recipe"].private

    told = client(hub_client.command, *train, token="hf_write")  # goes on at its end, with other seconds in its results
    assert told["code"] == 0
    assert "Target before" in told["out"]
    assert len(hub.repos["zoe/recipe"].tags) == 2


def test_the_whole_tour(hub, client, good, run, push, tmp_path):
    """Published, loaded by plain peft in a fresh process, evaluated, published again."""
    assert push(run)["error"] is None
    rows = str(good / "eval.jsonl")
    code = f"import hub_client; print(hub_client.plain_peft({str(good / 'target')!r}, {push.repo!r}, {rows!r}))"
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "PATH": ""}
    environment |= {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    fresh = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    logits, loss = json.loads(fresh.stdout)
    results = json.loads((run / "results.json").read_text())
    assert [logits, loss] == hub_client.plain_peft(good / "target", run, rows)
    assert loss == pytest.approx(results["metrics"]["semalign"]["loss"], rel=1e-6)
    (run / "results.json").write_text(json.dumps(results | {"evaluated": "again"}))
    assert push(run)["error"] is None
    assert json.loads(hub.read(push.repo, "results.json"))["evaluated"] == "again"
    assert len(hub.repos[push.repo].tags) == 2


# Looking at an adapter


@pytest.fixture
def inspect(client):
    return lambda *arguments: client(hub_client.command, "inspect", *arguments)


def test_a_repository_is_inspected_by_metadata_alone(hub, run, push, inspect, good):
    assert push(run, tag="v1")["error"] is None
    hub.order()
    told = inspect(push.repo, "--revision", "v1")
    assert told["code"] == 0
    read = [request for request in hub.requests if "resolve" in request or "storage" in request]
    assert [request for request in read if request.endswith(("safetensors", ".json"))]
    assert not [request for request in read if "storage" in request and "in part" not in request]
    assert not [request for request in read if "README" in request or "tokenizer" in request]
    record = json.loads((run / "semalign.json").read_text())
    layers = record["pairing"]["source_layers"]
    shown = " ".join(told["out"].split())
    for text in (
        "LORA adapter", "source → target", f"{layers[0]} → 0, {layers[1]} → 1, {layers[2]} → 2", "3: 0, 1, 2", "16, 16",
        "down_proj, o_proj, up_proj, v_proj", "align 24 rows", "hf_semalign 0.1.0", hub.repos[push.repo].tags["v1"],
        "adapter_sha256 │ the recorded one",
    ):  # fmt: skip
        assert text in shown, shown
    folder = inspect(run)
    assert folder["code"] == 0
    assert "adapter_checksum │ the recorded one" in " ".join(folder["out"].split())


def test_weights_that_are_not_the_recorded_ones_end_with_2(hub, run, push, inspect):
    assert push(run)["error"] is None
    other_adapter(run)
    hub.write(push.repo, {"adapter_model.safetensors": (run / "adapter_model.safetensors").read_bytes()})
    for origin in (push.repo, run):
        told = inspect(origin)
        assert told["code"] == 2
        assert "NOT the recorded one" in told["out"]
        assert "error: adapter_model.safetensors does not match semalign.json (adapter_" in told["log"]


def test_a_record_of_strangers_is_shown_to_the_letter(run, inspect):
    record = json.loads((run / "semalign.json").read_text())
    (run / "semalign.json").write_text(json.dumps(record | {"source": "[red]a[/]\x1b[31m"}))
    told = inspect(run)
    assert told["code"] == 0
    assert r"[red]a[/]\x1b[31m → target" in told["out"]
    assert "\x1b[31m" not in told["out"]


@table("name, content, message", [
    ("a list", "semalign.json", [1], r"semalign.json is \[1\]: expected names and values"),
    ("a number", "adapter_config.json", 3, "adapter_config.json is 3: expected names and values"),
    ("pairs", "semalign.json", {"pairing": {"source_layers": "none", "num_source_layers": 5, "strategy": ""}},
     "source_layers of the pairing of .* is 'none': expected a list"),
    ("versions", "semalign.json", {"versions": []}, r"versions of .*semalign.json is \[\]: expected names"),
    ("a rank", "adapter_config.json", {"r": {}}, "r of .*adapter_config.json is {}: expected a whole number"),
])  # fmt: skip
def test_a_record_of_another_form_is_damaged(run, inspect, name, content, message):
    changed = json.loads((run / name).read_text()) | content if isinstance(content, dict) else content
    (run / name).write_text(json.dumps(changed))
    told = inspect(run)
    assert told["code"] == 2
    assert re.search(message, told["log"])


def test_what_holds_no_transfer_is_not_inspected(hub, run, inspect, tmp_path):
    hub.write("zoe/base", {"config.json": b"{}", "adapter_model.safetensors": b"x"})
    large = dict.fromkeys(("semalign.json", "adapter_config.json"), b" " * (2**24 + 1))
    hub.write("zoe/large", {"adapter_model.safetensors": b"", **large})
    for arguments, message in (
        (["zoe/base"], r"zoe/base lacks \['semalign.json', 'adapter_config.json'\]"),
        (["zoe/large"], "are larger than 16 MB"),
        (["zoe/none"], "The repository zoe/none does not exist, or this token cannot access it"),
        (["zoe/base", "--revision", "v9"], "The Hub did not find this in zoe/base: check the revision"),
        ([tmp_path / "none"], "is neither a folder nor a Hub id"),
        ([run, "--revision", "v1"], "revision is 'v1', but"),
    ):
        told = inspect(*arguments)
        assert told["code"] == 2
        assert re.search(message, told["log"]), told
