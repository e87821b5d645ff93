"""Files and folders: atomic writes, checksums, digests and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_semalign.errors import InputError, MissingFileError, StorageError
from hf_semalign.kinds import check_kinds

logger = logging.getLogger(__name__)
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
LOCK = "_lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RECORD_NAME = "semalign.json"


Part = tuple[int, int]  # which part of a pass, and of how many
WHOLE: Part = (0, 1)


def writing_lock(folder: Path, part: Part = WHOLE) -> FileLock:
    """Lock for a folder that several processes share, or for one part of its files.

    One process writes while the others wait, then read what it wrote. Unlike a collective operation, waiting has no time
    limit. Machines that share no disk each do the work themselves.
    """
    name = "writing" if part == WHOLE else f"writing-{part[0]}-of-{part[1]}"
    return FileLock(folder / f"{name}.lock", is_singleton=True)  # reentrant


def in_parts(work: Callable[..., bool], part: Part) -> None:
    """Share work among processes that share a folder.

    Each process does its own part first, and then what it finds undone of the others': the process that should do it has
    died, or works on another machine without this folder. A part that is in progress elsewhere is waited for last. When this
    returns, all parts are done.

    Args:
        work: called with a part, and ``wait=False`` or ``True``. It does nothing if the part is done, and returns False if
            another process holds the part's lock and ``wait`` is False.
        part: of this process, and the number of processes.
    """
    own, count = part
    parts = [((own + k) % count, count) for k in range(count)]
    for one in [one for one in parts if not work(one, wait=False)]:
        work(one, wait=True)


def digest(content: Any) -> str:
    """Digest of plain JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """xxh3 checksum of a file's content."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            hasher.update(chunk)
    return hasher.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, which the Hub stores for each large file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensor(tensor: torch.Tensor, path: Path, **others: torch.Tensor) -> None:
    """Write a tensor to a safetensors file atomically, with a checksum of its content and name.

    Hold the folder's lock while calling it.

    Args:
        tensor: what :func:`load_tensor` reads.
        path: the file.
        others: small tensors that are stored with it, by name.
    """
    tensors = {"states": tensor.contiguous(), **others}
    with _whole(path) as unfinished:
        save_file(tensors, unfinished, metadata={"checksum": _checksum(tensors, path)})


def _checksum(tensors: dict[str, torch.Tensor], path: Path) -> str:
    return digest([path.stem, *(checksum(tensor) for _, tensor in sorted(tensors.items()))])


def keep_record(path: Path, record: Any) -> None:
    """Write plain JSON values with a checksum, atomically."""
    write_text(path, json.dumps({"record": record, "checksum": digest(record)}, indent=1))


def recall_record(path: Path) -> Any | None:
    """Read what :func:`keep_record` wrote; ``None`` if the file is missing or damaged. Damage is logged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["checksum"] == digest(content["record"]):
            return content["record"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged and will be recreated.", path.name)
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; hold the folder's lock while calling it."""
    with _whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces ``path`` once the block succeeds."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # a leftover would take up space on a full disk


def load_tensor(path: Path) -> torch.Tensor | None:
    """Memory-map what :func:`save_tensor` wrote; ``None`` if the file is missing or damaged. Damage is logged."""
    tensors = load_tensors(path)
    return None if tensors is None else tensors["states"]


def load_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """Like :func:`load_tensor`, with the tensors that are stored beside it; the tensor itself is ``"states"``."""
    if not path.is_file():
        return None
    try:
        tensors, recorded = open_tensors(path)
        if recorded == _checksum(tensors, path) and "states" in tensors:
            return tensors
    except SafetensorError:
        pass
    logger.warning("%s is damaged and will be recomputed.", Path(*path.parts[-3:]))
    return None


def open_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Memory-map what :func:`save_tensor` wrote; also returns the checksum stored with it."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("checksum")  # noqa: SIM118


def checksum(tensor: torch.Tensor) -> str:
    """xxh3 digest of a tensor's shape, dtype and bytes. It detects damage, not tampering, and is as fast as a disk."""
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for chunk in content.split(2**24):  # copies from a GPU: the system zeroes larger allocations every time
        digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Lock a run folder for this process. The lock is reentrant.

    Raises:
        ValueError: another process holds the lock.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / LOCK, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"Another run is using {folder}, and both would write there: wait until it ends, or choose another output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors_explained(folder: str | Path) -> Iterator[None]:
    """Replace a library's error about a full disk with one that says what to do.

    Raises:
        OSError: a file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        written = isinstance(error, RuntimeError) and "inline_container" in str(error)  # torch.save gives no reason
        full = getattr(error, "errno", None) in FULL or (
            isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in FULL)
        )
        if not (written or full):
            raise
        raise StorageError(
            f"A file in {folder} could not be written; the disk may be full ({error}). Finished files are intact. Free some "
            "space, or set signals_dir to another disk, and re-run the command to resume."
        ) from error


def make_folder(name: str, folder: str | Path) -> None:
    """Create the folder that a setting or option names, and check that it is writable.

    Raises:
        ValueError: it cannot be created or is not writable.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{name} {folder} is not writable ({error.strerror}): choose another folder.") from error


def read_json(path: str | Path, hint: Any = dict[str, Any]) -> dict[str, Any]:
    """Read a JSON file written by this package or by a library it uses.

    Args:
        path: the file.
        hint: expected type of the content, see :func:`hf_semalign.kinds.check_kinds`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, or its content does not match ``hint``.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"There is no file {path}: check the name.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        check_kinds(content, hint, str(path))
    except InputError as error:
        raise InputError(f"{error} Copy the file again, or recreate its folder.") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): copy it again, or recreate its folder.") from error
    return content


def check_header(path: Path) -> None:
    """Check that a safetensors file has a readable header.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or truncated ({error}): copy or download it again.") from error
