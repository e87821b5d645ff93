"""Publish run folders on the Hub.

A folder is published in one commit after its large files are uploaded. Adapter, record and card appear together, so a card
always matches the files next to it, even if an upload is interrupted or another one follows.
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
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from yaml import YAMLError

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, MissingFileError, StorageError, brief
from hf_semalign.files import ADAPTER, RECORD_NAME, digest, file_digest, sha256
from hf_semalign.hub.card import TAGS, render_card
from hf_semalign.hub.loading import LOADED, adapted
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
from hf_semalign.models.names import EMBEDDED, is_hub_id

logger = logging.getLogger(__name__)
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
UNCLAIMED = {".gitattributes", ".gitignore", CARD}  # files of a new, empty repository
FIGURE = re.compile(r"\]\((figures/[^)]+)\)")
PROBE = 16  # number of token ids in the probe


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
    """Publish a run folder: adapter, record, card, results, figures and tokenizer. Other files are not uploaded.

    The published files are downloaded again and compared byte for byte. If the target is on this machine, the logits of a probe
    are compared too; otherwise a warning is logged. Then the commit is tagged. Call it again to resume an interrupted push.
    Nothing is written if everything is already published.

    Args:
        folder: a run folder. It is not modified.
        repo_id: ``owner/name``, or ``name`` for a repository in your namespace. It is created if it does not exist.
        token: Hub token. By default ``HF_TOKEN``, or the token you are logged in with.
        private: whether a new repository is private. An existing repository must match.
        revision: branch, created if it does not exist.
        tag: tag of the commit. By default ``v``, the version of this package and a digest of the files.
        target: Hub id or folder of the target, if the record only has the name of a local folder.
        message: commit message.

    Returns:
        URL of the commit.

    Raises:
        FileNotFoundError: the folder lacks one of ``NEEDED``. Nothing is sent.
        ValueError: the files must not be published as they are (nothing is sent), or a name, token or repository cannot be
            used.
        OSError: the Hub cannot be reached or fails, or the downloaded files differ from the uploaded ones.
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
    changed, stale = _changes(api, repo_id, head, files)
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(name)
    if tag is not None and tagged and (changed or stale or tagged != head.sha):
        raise InputError(f"{repo_id} already has a tag {tag!r}, of commit {tagged[:8]}: choose another tag.")
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
    state = f"sent {len(changed)} of {len(files)} files" if changed or stale else "already published"
    found = "files" if probe is None else "files and logits"
    url = f"{api.endpoint}/{repo_id}/commit/{commit}"
    logger.info("%s: %s; downloaded again, and the %s are the same; tag %s", url, state, found, name)
    return url


def write_card(folder: Path, record: dict[str, Any], results: dict[str, Any], tags: str | Sequence[str] = ()) -> None:
    """Write the card of a run folder, and add tags to it. A card from a recipe and a user's README are kept.

    Args:
        folder: the run folder.
        record: content of ``semalign.json``.
        results: see :func:`hf_semalign.hub.card.render_card`.
        tags: additional tags.
    """
    card = folder / CARD
    if not (card.is_file() and ((folder / "results.json").is_file() or card_fault(card))):
        card.write_text(render_card(record, results), encoding="utf-8")
    if tags:
        content: Any = ModelCard(card.read_text(encoding="utf-8"))
        content.data.tags = list(dict.fromkeys([*(content.data.tags or ()), *([tags] if isinstance(tags, str) else tags)]))
        card.write_text(str(content), encoding="utf-8")


def hub_name(args: SemAlignConfig) -> str:
    """The repository of a run: ``hub_model_id``, or the name of its folder in the user's namespace."""
    return args.hub_model_id or Path(str(args.output_dir)).absolute().name


def open_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> tuple[HfApi, str]:
    """Create a repository if needed, and check that a push can succeed. Nothing is uploaded.

    Args:
        repo_id: ``owner/name``, or ``name`` for a repository in your namespace. It is created if it does not exist.
        token: Hub token. By default ``HF_TOKEN``, or the token you are logged in with.
        private: whether a new repository is private. An existing repository must match.

    Returns:
        The client, and the full repository id with its owner.

    Raises:
        ValueError: a name, token or repository cannot be used.
        OSError: the Hub cannot be reached, or fails.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a valid repository name: expected owner/name. ({brief(error)})") from error
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
            logger.info("%s does not support checking write access in advance: the push will show it.", api.endpoint)
        info = api.model_info(repo_id)
    if private is not None and info.private is not private:
        kind = "private" if info.private else "public"
        raise InputError(f"{repo_id} exists and is {kind}: choose another repository, or do not set private.")
    files = {file.rfilename for file in info.siblings or ()}
    if RECORD_NAME not in files and (foreign := sorted(files - UNCLAIMED)):
        raise InputError(
            f"{repo_id} exists and is not a transfer; it has {brief(', '.join(foreign))}: choose another repository."
        )
    return api, repo_id


def _create(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Create a repository if it does not exist. The client's own ``exist_ok`` would hide other conflicts.

    Raises:
        ValueError: the server refuses the name.
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
        if api.repo_exists(repo_id):  # somebody else created it in the meantime
            return
    told = brief(conflict.server_message or conflict)
    raise InputError(f"The repository {repo_id} cannot be created: {told}. Choose another name.") from conflict


@contextmanager
def hub_errors_explained(repo_id: str) -> Iterator[None]:
    """Explain errors of the Hub client in one line, with what to do. Use it only around calls of the client.

    Raises:
        ValueError: the Hub refuses the request.
        OSError: the Hub cannot be reached, or fails.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("There is no Hub token: log in with `hf auth login`, set HF_TOKEN, or pass token=.") from error
    except OfflineModeIsEnabled as error:
        raise StorageError("HF_HUB_OFFLINE is set, so the Hub cannot be used: unset it, and try again.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explained(error, repo_id) from error


def _explained(error: Exception, repo_id: str) -> Exception:
    wraps = isinstance(error, (RuntimeError, LocalEntryNotFoundError))  # from an upload thread, or a download without a cache
    cause: BaseException = error.__cause__ if wraps and error.__cause__ else error
    if isinstance(cause, RepositoryNotFoundError):
        return InputError(f"The repository {repo_id} does not exist, or this token cannot access it: check both.")
    if isinstance(cause, HfHubHTTPError):
        status, told = cause.response.status_code, brief(cause.server_message or cause)
        place = f"{constants.ENDPOINT}/settings/tokens"
        if status == 401:
            return InputError(f"The Hub rejects this token: log in again with `hf auth login`, or create one at {place}.")
        if status == 403:
            return InputError(
                f"This token lacks permission for {repo_id}: create one with write access at {place}, with an account "
                f"that may write to repositories of {repo_id.partition('/')[0]}. ({told})"
            )
        if status == 404:
            return InputError(f"The Hub did not find this in {repo_id}: check the revision. ({told})")
        if status in (409, 412):
            return InputError(f"Somebody else changed {repo_id} in the meantime: try again. ({told})")
        if status < 500 and status not in (408, 429):
            return InputError(f"The Hub refused the request for {repo_id}: {told or f'status {status}'}")
        return StorageError(f"The Hub failed (status {status}): try again; uploaded files are not sent twice.")
    if isinstance(cause, ValueError):
        return InputError(f"The Hub refused the request for {repo_id}: {brief(cause)}")
    return StorageError(f"The Hub cannot be reached: try again; uploaded files are not sent twice. ({brief(cause)})")


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a run folder to publish, by name. The card comes last.

    Raises:
        FileNotFoundError: the folder lacks one of ``NEEDED``.
        ValueError: a file is a link out of the folder or is damaged, the adapter or the card is from another run, or a file
            contains a local path.
    """
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise MissingFileError(
            f"{folder} lacks {missing}: push the folder of a finished `semalign train`, or call trainer.push_to_hub()."
        )
    found = [path for pattern in PUBLISHED for path in sorted(folder.glob(pattern)) if path.is_file()]
    if outside := [path.name for path in found if not path.resolve().is_relative_to(folder.resolve())]:
        raise InputError(f"{outside} are links out of the folder {folder}: replace them by copies of the files.")
    check_adapter(folder)
    record = read_record(folder)
    check_recorded(folder, record)
    read_results(folder, record)
    base = read_adapter_config(folder)["base_model_name_or_path"]
    if base != record["target"] or not (str(base).startswith(EMBEDDED) or is_hub_id(str(base))):
        raise InputError(
            f"{ADAPTER[1]} of {folder} names the base {base!r}, but {RECORD_NAME} names {record['target']!r}: expected the "
            "same Hub id or name, and no path."
        )
    if fault := card_fault(folder / CARD):
        raise InputError(f"{folder / CARD} {fault}")
    shown = FIGURE.findall((folder / CARD).read_text(encoding="utf-8"))
    if missing := [name for name in shown if folder / name not in found]:
        raise InputError(f"{folder / CARD} shows {missing}, but the folder lacks them: copy them again, or train again.")
    return {path.relative_to(folder).as_posix(): path for path in sorted(found, key=lambda path: path.name == CARD)}


def card_fault(path: Path) -> str | None:
    """Describe the fault of a card that is not from a run (such as PEFT's placeholder) or names a local base model."""
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except (ValueError, YAMLError) as error:
        return f"has invalid metadata: correct it, or train again. ({brief(error)})"
    base, tags = data.get("base_model"), data.get("tags") or []
    if not set(TAGS) <= set(tags) or data.get("library_name") != "peft":
        return f"is not the card of a run: expected library_name peft and the tags {list(TAGS)}. Move it away, and train again."
    if base is not None and not (isinstance(base, str) and is_hub_id(base)):
        return f"names the base_model {base!r}: expected a Hub id, or no base_model if the model is not on the Hub."
    return None


def _is_published(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLISHED)


def _changes(api: HfApi, repo_id: str, head: ModelInfo, files: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Names of the files to send, and of published files to delete, such as the chat template of an earlier tokenizer."""
    there = {file.rfilename: file for file in head.siblings or () if _is_published(file.rfilename)}
    known = {name: path for name, path in files.items() if name in there}
    same = _same_files(api, repo_id, str(head.sha), known, there)
    return [file for file in files if file not in same], sorted(there.keys() - files.keys())


def _same_files(api: HfApi, repo_id: str, commit: str, files: dict[str, Path], there: dict[str, RepoSibling]) -> set[str]:
    """Names of the files that are unchanged in a commit, by the Hub's checksums or, without any, by a download."""
    same, unknown = set(), []
    for name, path in files.items():
        file = there[name]
        if file.lfs is not None:
            same |= {name} if sha256(path) == file.lfs.sha256 else set()
        elif file.blob_id is not None:
            content = path.read_bytes()
            sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's blob id
            same |= {name} if sha1 == file.blob_id else set()
        else:
            unknown.append(name)
    if unknown:
        with tempfile.TemporaryDirectory() as cache, hub_errors_explained(repo_id):
            kept = Path(api.snapshot_download(repo_id, revision=commit, allow_patterns=unknown, cache_dir=cache))
            same |= {name for name in unknown if filecmp.cmp(files[name], kept / name, shallow=False)}
    return same


def _probe(folder: Path, target: str | Path | None) -> tuple[PeftModel, torch.Tensor] | None:
    """The target with a run's adapter, and its logits. Returns ``None``, and logs it, if the target is not on this machine.

    Raises:
        ValueError: the adapter does not fit the target, or its logits are not finite.
    """
    name = str(target or read_record(folder)["target"])
    reason = "the record has no local paths"
    base = None
    if target is not None or not Path(name).exists():  # a local folder of that name may be something else
        try:
            base = load_weights(name, dtype="auto", local_files_only=True)
        except (ImportError, ValueError):
            reason = "its weights are not on this machine, and are not downloaded for this check"
    if base is None:
        logger.warning("Logits will not be compared: the target %s is not available (%s). Pass it as target=.", name, reason)
        return None
    model = adapted(base, folder, name)
    logits = _logits(model)
    if not logits.isfinite().all():
        raise InputError(f"The logits of the adapter in {folder} are not finite, so it cannot be used: train it again.")
    return model, logits


@torch.no_grad()
def _logits(model: PeftModel) -> torch.Tensor:
    """Logits ``[1, PROBE, V]`` for the first token ids."""
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
    """Download a commit, and compare its files and the logits of its adapter with those of the folder.

    Raises:
        OSError: files or logits differ.
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
        raise StorageError(f"Commit {commit[:8]} of {repo_id} differs from what was sent in {wrong}: push it again.")
