"""The Hub: publishing a run folder, and loading a transfer back with the record of how it was made.

A folder is published in one commit, after its large files are there: adapter, record and card appear at the same moment, so
that no card ever tells of files that are missing or old, also where an upload breaks off or another one follows it.
"""

from __future__ import annotations

import filecmp
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from yaml import YAMLError

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, MissingFileError, StorageError, brief
from hf_semalign.files import ADAPTER, RECORD_NAME, digest, file_digest, sha256
from hf_semalign.hub.card import TAGS, render_card
from hf_semalign.hub.reading import (
    RESULTS_NAME,
    check_adapter,
    check_recorded,
    read_adapter_config,
    read_record,
    read_results,
)
from hf_semalign.hub.record import CARD
from hf_semalign.models.loading import load_weights
from hf_semalign.models.names import EMBEDDED, is_hub_id, resolve_model

logger = logging.getLogger(__name__)
LOADED = (*ADAPTER, RECORD_NAME)
NEEDED = (*LOADED, CARD)
PUBLISHED = [
    *NEEDED,
    RESULTS_NAME,
    ".eval_results/*.yaml",
    "figures/*.png",
    "figures/*.svg",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
UNCLAIMED = {".gitattributes", ".gitignore", CARD}  # what a repository holds that somebody has only just made
FIGURE = re.compile(r"\]\((figures/[^)]+)\)")
PROBE = 16  # token ids that are compared


def push_transfer(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    target: str | Path | None = None,
    message: str = "SemAlign transfer",
) -> str:
    """Publish a run folder: adapter, record, card, results, figures and tokenizer, and nothing else that lies there.

    What was published is downloaded again and compared: every file byte for byte, and the logits of a probe, where the target
    is on this machine (the log says if not). Then the commit is tagged. A push that broke off is repeated by the same call;
    where all is there already, nothing is written.

    Args:
        folder: a run folder; nothing in it is changed.
        repo_id: ``owner/name``, or ``name`` for a repository of one's own; made if it does not exist.
        token: Hub token; by default ``HF_TOKEN``, or the one that is logged in.
        private: whether a new repository is private; of one that exists, what it has to be.
        revision: branch; made if it does not exist.
        tag: name of the commit; by default ``v``, the version of this package and a digest of the files.
        target: the target, where the record knows only a local folder's name: a Hub id or folder.
        message: of the commit.

    Returns:
        URL of the commit.

    Raises:
        FileNotFoundError: a folder that lacks one of ``NEEDED``, before anything is sent.
        ValueError: files that may not be published as they are, likewise; a name, token or repository that cannot be used.
        OSError: the Hub cannot be reached or fails; what it gives back is not what was sent.
    """
    folder = Path(folder)
    files = published_files(folder)
    facts = {file: file_digest(path) for file, path in files.items()}
    name = tag or f"v{read_record(folder)['versions']['hf_semalign']}-{digest(facts)[:8]}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"The tag {name!r} cannot be used: expected letters, digits, dots, dashes and underscores.")
    probe = _probe(folder, target)
    api, repo_id = open_repo(repo_id, token=token, private=private)
    with hub_errors_explained(repo_id):
        refs = api.list_repo_refs(repo_id)
        branch = revision or "main"
        if branch not in {ref.name for ref in refs.branches}:
            api.create_branch(repo_id, branch=branch)
        head = api.model_info(repo_id, revision=branch, files_metadata=True)
    there = {file.rfilename: file for file in head.siblings or () if _is_published(file.rfilename)}
    known = {name: path for name, path in files.items() if name in there}
    same = _same_files(api, repo_id, str(head.sha), known, there)
    changed = [file for file in files if file not in same]
    stale = sorted(there.keys() - files.keys())  # such as a chat template, which would be read with another tokenizer
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(name)
    if tag is not None and tagged and (changed or stale or tagged != head.sha):
        raise InputError(f"{repo_id} has a tag {tag!r} already, of commit {tagged[:8]}: choose another one.")
    commit = str(head.sha)
    if changed or stale:
        deletions = [CommitOperationDelete(file) for file in stale]
        additions = [CommitOperationAdd(file, path) for file, path in files.items()]
        with hub_errors_explained(repo_id):
            commit = api.create_commit(
                repo_id, [*deletions, *additions], commit_message=message, revision=branch, parent_commit=head.sha
            ).oid
    _compare(api, repo_id, commit, folder, files, probe)
    if not tagged:
        with hub_errors_explained(repo_id):
            api.create_tag(repo_id, tag=name, revision=commit, exist_ok=True)
    state = f"{len(changed)} of {len(files)} files sent" if changed or stale else "it was there already"
    found = "the same bytes" if probe is None else "the same bytes, and the same logits on a probe"
    url = f"{api.endpoint}/{repo_id}/commit/{commit}"
    logger.info("%s: %s; downloaded again, %s; tag %s", url, state, found, name)
    return url


def write_card(folder: Path, record: dict[str, Any], results: dict[str, Any], tags: str | Sequence[str] = ()) -> None:
    """Give a run folder its card, unless a recipe has written one, or the README is somebody's own; add tags to it.

    Args:
        folder: the run folder.
        record: content of ``semalign.json``.
        results: what the card needs beside it, see :func:`hf_semalign.hub.card.render_card`.
        tags: further tags.
    """
    card = folder / CARD
    if not (card.is_file() and ((folder / "results.json").is_file() or card_fault(card))):
        card.write_text(render_card(record, results), encoding="utf-8")
    if tags:
        content: Any = ModelCard(card.read_text(encoding="utf-8"))
        content.data.tags = list(dict.fromkeys([*(content.data.tags or ()), *([tags] if isinstance(tags, str) else tags)]))
        card.write_text(str(content), encoding="utf-8")


def hub_name(args: SemAlignConfig) -> str:
    """The repository of a run: ``hub_model_id``, or the name of its folder in one's own namespace."""
    return args.hub_model_id or Path(str(args.output_dir)).absolute().name


def open_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> tuple[HfApi, str]:
    """Make a repository ready for a push, or say why it cannot be: nothing is uploaded.

    Args:
        repo_id: ``owner/name``, or ``name`` for a repository of one's own; made if it does not exist.
        token: Hub token; by default ``HF_TOKEN``, or the one that is logged in.
        private: whether a new repository is private; of one that exists, what it has to be.

    Returns:
        The client, and the id with its owner.

    Raises:
        ValueError: a name, token or repository that cannot be used.
        OSError: the Hub cannot be reached, or fails.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} cannot be the name of a repository: expected owner/name. ({brief(error)})") from error
    api = HfApi(token=token, library_name="hf_semalign")
    with hub_errors_explained(repo_id):
        user = api.whoami()["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    _create(api, repo_id, private)
    with hub_errors_explained(repo_id):
        try:
            api.auth_check(repo_id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 404 or isinstance(error, RepositoryNotFoundError):
                raise
            logger.info("%s cannot say beforehand whether this token may write: the push is going to see.", api.endpoint)
        info = api.model_info(repo_id)
    if private is not None and info.private is not private:
        kind = "private" if info.private else "public"
        raise InputError(f"{repo_id} exists and is {kind}: name another repository, or leave out the choice of private.")
    files = {file.rfilename for file in info.siblings or ()}
    if RECORD_NAME not in files and (foreign := sorted(files - UNCLAIMED)):
        raise InputError(f"{repo_id} exists and holds no transfer, but {brief(', '.join(foreign))}: name another repository.")
    return api, repo_id


def _create(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Make a repository, if there is none; the client itself would take any conflict for one that exists.

    Raises:
        ValueError: the name cannot be had, by the server's words.
    """
    with hub_errors_explained(repo_id):
        if api.repo_exists(repo_id):
            return
        try:
            api.create_repo(repo_id, private=private)
            return
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            conflict = error
        if api.repo_exists(repo_id):  # made by somebody else meanwhile
            return
    told = brief(conflict.server_message or conflict)
    raise InputError(f"A repository {repo_id} cannot be made: {told}. Choose another name.") from conflict


@contextmanager
def hub_errors_explained(repo_id: str) -> Iterator[None]:
    """Say in one line what went wrong with a request, and what to do; in the block nothing but the client's calls.

    Raises:
        ValueError: the Hub refuses what was asked.
        OSError: it cannot be reached, or fails.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("There is no Hub token: log in with `hf auth login`, set HF_TOKEN, or pass token=.") from error
    except OfflineModeIsEnabled as error:
        raise StorageError("HF_HUB_OFFLINE is set, so that the Hub is not asked: unset it, and try again.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explained(error, repo_id) from error


def _explained(error: Exception, repo_id: str) -> Exception:
    wraps = isinstance(error, (RuntimeError, LocalEntryNotFoundError))  # an upload's thread, a download without a cache
    cause: BaseException = error.__cause__ if wraps and error.__cause__ else error
    if isinstance(cause, RepositoryNotFoundError):
        return InputError(f"There is no repository {repo_id}, or this token may not see it: check both.")
    if isinstance(cause, HfHubHTTPError):
        status, told = cause.response.status_code, brief(cause.server_message or cause)
        place = f"{constants.ENDPOINT}/settings/tokens"
        if status == 401:
            return InputError(f"The Hub does not know this token: log in again with `hf auth login`, or make one at {place}.")
        if status == 403:
            return InputError(
                f"This token may not do that with {repo_id}: make one with write access at {place}, of an account that may "
                f"write to what {repo_id.partition('/')[0]} owns. ({told})"
            )
        if status == 404:
            return InputError(f"{repo_id} does not have what was asked for: check the revision. ({told})")
        if status in (409, 412):
            return InputError(f"{repo_id} was changed by somebody else meanwhile: try again. ({told})")
        if status < 500 and status not in (408, 429):
            return InputError(f"The Hub refused what was asked of {repo_id}: {told or f'status {status}'}")
        return StorageError(f"The Hub failed (status {status}): try again; what it has already is not sent twice.")
    if isinstance(cause, ValueError):
        return InputError(f"The Hub refused what was asked of {repo_id}: {brief(cause)}")
    return StorageError(f"The Hub cannot be reached: try again; what it has already is not sent twice. ({brief(cause)})")


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a run folder that go to the Hub, by name, the card last.

    Raises:
        FileNotFoundError: a folder that lacks one of ``NEEDED``.
        ValueError: links to what lies elsewhere, damaged files, an adapter or a card that are not this run's, or a local path.
    """
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise MissingFileError(f"{folder} lacks {missing}: push the folder of a finished `semalign train`.")
    found = [path for pattern in PUBLISHED for path in sorted(folder.glob(pattern)) if path.is_file()]
    if outside := [path.name for path in found if not path.resolve().is_relative_to(folder.resolve())]:
        raise InputError(f"{outside} are links out of the folder {folder}: put the files themselves there.")
    check_adapter(folder)
    record = read_record(folder)
    check_recorded(folder, record)
    read_results(folder, record)
    base = read_adapter_config(folder)["base_model_name_or_path"]
    if base != record["target"] or not (str(base).startswith(EMBEDDED) or is_hub_id(str(base))):
        raise InputError(
            f"{ADAPTER[1]} of {folder} names the base {base!r}, and {RECORD_NAME} {record['target']!r}: expected the same Hub "
            "id or name, and no path."
        )
    if fault := card_fault(folder / CARD):
        raise InputError(f"{folder / CARD} {fault}")
    shown = FIGURE.findall((folder / CARD).read_text(encoding="utf-8"))
    if missing := [name for name in shown if folder / name not in found]:
        raise InputError(f"{folder / CARD} shows {missing}, which are not there: copy them again, or train again.")
    return {path.relative_to(folder).as_posix(): path for path in sorted(found, key=lambda path: path.name == CARD)}


def card_fault(path: Path) -> str | None:
    """What is wrong with a card that does not come from a run, such as peft's placeholder, or that names a local base."""
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except (ValueError, YAMLError) as error:
        return f"has metadata that cannot be read: put them right, or train again. ({brief(error)})"
    base, tags = data.get("base_model"), data.get("tags") or []
    if not set(TAGS) <= set(tags) or data.get("library_name") != "peft":
        return f"is not the card of a run: expected library_name peft and the tags {list(TAGS)}; move it away, and train again."
    if base is not None and not (isinstance(base, str) and is_hub_id(base)):
        return f"names the base_model {base!r}: expected a Hub id, or none for one that is not there."
    return None


def _is_published(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLISHED)


def _same_files(api: HfApi, repo_id: str, commit: str, files: dict[str, Path], there: dict[str, RepoSibling]) -> set[str]:
    """Names of the files whose content a commit has: by the checksums that the Hub keeps, or else by a download."""
    same, unknown = set(), []
    for name, path in files.items():
        file = there[name]
        if file.lfs is not None:
            same |= {name} if sha256(path) == file.lfs.sha256 else set()
        elif file.blob_id is not None:
            content = path.read_bytes()
            sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git does
            same |= {name} if sha1 == file.blob_id else set()
        else:
            unknown.append(name)
    if unknown:
        with tempfile.TemporaryDirectory() as cache, hub_errors_explained(repo_id):
            kept = Path(api.snapshot_download(repo_id, revision=commit, allow_patterns=unknown, cache_dir=cache))
            same |= {name for name in unknown if filecmp.cmp(files[name], kept / name, shallow=False)}
    return same


def _probe(folder: Path, target: str | Path | None) -> tuple[PeftModel, torch.Tensor] | None:
    """The target with a run's adapter, and its logits; ``None``, which is logged, where the target is not on this machine.

    Raises:
        ValueError: the adapter does not fit the target, or gives logits that are not finite.
    """
    name = str(target or read_record(folder)["target"])
    reason = "the record has no local paths"
    base = None
    if target is not None or not Path(name).exists():  # a folder of that name may be anything
        try:
            base = load_weights(name, dtype="auto", local_files_only=True)
        except (ImportError, ValueError):
            reason = "its weights are not on this machine, and are not downloaded for that"
    if base is None:
        logger.warning("No logits will be compared: the target %s is not at hand, name it by target=. (%s)", name, reason)
        return None
    model = _adapted(base, folder, name)
    logits = _logits(model)
    if not logits.isfinite().all():
        raise InputError(f"The logits of the adapter of {folder} are not finite: it is of no use, train it again.")
    return model, logits


def _adapted(base: Any, folder: Path, name: str) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"The adapter of {folder} does not fit {name}: {brief(error)}. Pass its own target.") from error
    with safe_open(folder / ADAPTER[0], framework="pt") as file:  # of other names peft only warns
        odd = set(file.keys()) ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if odd:
        raise InputError(
            f"The adapter of {folder} does not fit {name}: {len(odd)} weights are in one of them alone, such as {min(odd)}. "
            "Pass its own target."
        )
    return model


@torch.no_grad()
def _logits(model: PeftModel) -> torch.Tensor:
    """Logits ``[1, PROBE, V]`` of the first token ids."""
    rows = cast(Any, model.get_input_embeddings()).num_embeddings
    return model.eval()(input_ids=torch.arange(PROBE).remainder(rows)[None]).logits


def _compare(
    api: HfApi,
    repo_id: str,
    commit: str,
    folder: Path,
    names: Iterable[str],
    probe: tuple[PeftModel, torch.Tensor] | None,
) -> None:
    """Download a commit, and compare its files with a folder's, and the logits of its adapter with known ones.

    Raises:
        OSError: they differ.
    """
    with tempfile.TemporaryDirectory() as cache:
        with hub_errors_explained(repo_id):
            pushed = Path(api.snapshot_download(repo_id, revision=commit, allow_patterns=PUBLISHED, cache_dir=cache))
        wrong = [n for n in names if not (pushed / n).is_file() or not filecmp.cmp(folder / n, pushed / n, shallow=False)]
        if not wrong and probe is not None:
            model, logits = probe
            model.load_adapter(str(pushed), "pushed")
            model.set_adapter("pushed")
            if not torch.equal(_logits(model), logits):
                wrong = ["logits"]
    if wrong:
        raise StorageError(f"Commit {commit[:8]} of {repo_id} is not what was sent, by its {wrong}: push it again.")


def load_transfer(
    repo_id_or_folder: str | Path, *, target: str | Path | None = None, revision: str | None = None
) -> tuple[PeftModel, dict[str, Any]]:
    """Load an adapter and its record.

    Args:
        repo_id_or_folder: a run folder, or a Hub id.
        target: the target, where the record knows only a local folder's name: a Hub id or folder.
        revision: of a Hub id: a tag, branch or commit.

    Returns:
        The target with its adapter in evaluation mode, and the content of ``semalign.json``.

    Raises:
        FileNotFoundError: a folder without ``semalign.json`` or an adapter in safetensors, or an id that cannot be reached.
        ValueError: one of these is damaged, the target is not found, or the record names a path.
    """
    folder = find_folder(repo_id_or_folder, revision)
    record = read_record(folder)
    check_adapter(folder)
    check_recorded(folder, record)
    name = find_target(record, target)
    try:
        base = load_weights(name, dtype="auto")
    except ValueError as error:
        raise InputError(f"{error} The record has no local paths: pass the folder of its target as target.") from error
    return _adapted(base, folder, name), record


def find_folder(repo_id_or_folder: str | Path, revision: str | None = None) -> Path:
    """A folder, or the local copy of what a Hub repository has of a transfer, at a tag, branch or commit.

    Raises:
        FileNotFoundError: it is neither, or cannot be reached.
    """
    given = resolve_model(repo_id_or_folder)
    local = Path(given).is_dir()
    if local and revision is not None:
        raise InputError(f"revision is {revision!r}, and {given} is a folder, which has none: leave it out.")
    try:
        return Path(given if local else snapshot_download(given, revision=revision, allow_patterns=list(LOADED)))
    except (OSError, HFValidationError) as error:
        raise MissingFileError(f"{given!r} is no run folder, and was not found on the Hub. ({brief(error)})") from error


def find_target(record: dict[str, Any], target: str | Path | None = None) -> str:
    """Name of a record's target.

    Args:
        record: see :func:`hf_semalign.hub.reading.read_record`.
        target: the target, where the record knows only a local folder's name.

    Raises:
        ValueError: the record names a path.
    """
    name = str(target or record["target"])
    if target is None and not name.startswith(EMBEDDED) and not is_hub_id(name):
        raise InputError(f"The target {name!r} of the record is no Hub id: name it by target=.")
    return name
