"""Files and folders: whole-file writes, checksums, digests and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
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


def writing_lock(folder: Path) -> FileLock:
    """The lock of a folder that several processes share: whoever writes holds it, others wait, and find it written.

    Unlike a collective it may be waited for as long as the work takes, and machines without a common disk each do theirs.
    """
    return FileLock(folder / "writing.lock", is_singleton=True)  # reentrant


def digest(content: Any) -> str:
    """Digest of plain JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Checksum of a file's content."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            hasher.update(chunk)
    return hasher.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, which is what the Hub keeps of a large file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensor(tensor: torch.Tensor, path: Path) -> None:
    """Write a tensor to a safetensors file that appears whole or not at all, with a checksum of its content and name.

    Call it under the lock of its folder.
    """
    with _whole(path) as unfinished:
        save_file({"states": tensor.contiguous()}, unfinished, metadata={"checksum": digest([path.stem, checksum(tensor)])})


def keep_record(path: Path, record: Any) -> None:
    """Write plain JSON values with a checksum, whole or not at all."""
    write_text(path, json.dumps({"record": record, "checksum": digest(record)}, indent=1))


def recall_record(path: Path) -> Any | None:
    """What :func:`keep_record` wrote; ``None`` when there is no file or it is damaged, which is logged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["checksum"] == digest(content["record"]):
            return content["record"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged, and is made again.", path.name)
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; call it under the lock of its folder."""
    with _whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write in the place of another, which it becomes when it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # on a full disk it would take room


def load_tensor(path: Path) -> torch.Tensor | None:
    """Memory-mapped, what :func:`save_tensor` wrote; ``None`` when there is no file or it is damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        tensor, recorded = open_tensor(path)
        if recorded == digest([path.stem, checksum(tensor)]):
            return tensor
    except SafetensorError:
        pass
    logger.warning("%s is damaged, and is computed again.", Path(*path.parts[-3:]))
    return None


def open_tensor(path: Path) -> tuple[torch.Tensor, str | None]:
    """What :func:`save_tensor` wrote, memory-mapped, and the checksum that was written with it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("states"), (file.metadata() or {}).get("checksum")


def checksum(tensor: torch.Tensor) -> str:
    """Digest of a tensor's shape, dtype and bytes, by xxh3: it guards against damage, not attack, and is as fast as a disk."""
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for chunk in content.split(2**24):  # from a GPU: the system clears larger memory every time
        digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process; inside, it may be claimed again.

    Raises:
        ValueError: another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / LOCK, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"Another run is at work in {folder}: wait for its end, or choose another output_dir. Both would write there."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors_explained(folder: str | Path) -> Iterator[None]:
    """Say what to do where a disk has no room for a file, whichever library was writing it.

    Raises:
        OSError: in the place of that library's error.
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
            f"A file of {folder} could not be written, as on a full disk ({error}). What was finished is whole: make room, or "
            "set signals_dir to another disk, and re-run the command to resume."
        ) from error


def make_folder(name: str, folder: str | Path) -> None:
    """Make a folder that a setting or option names.

    Raises:
        ValueError: nothing can be written to it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{name} {folder} cannot be written to ({error.strerror}): name another folder.") from error


def read_json(path: str | Path, hint: Any = dict[str, Any]) -> dict[str, Any]:
    """Content of a JSON file that this package or one of its companions has written.

    Args:
        path: the file.
        hint: what it has to hold, see :func:`hf_semalign.kinds.check_kinds`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, or holds something else.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"There is no file {path}: correct its name.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        check_kinds(content, hint, str(path))
    except InputError as error:
        raise InputError(f"{error} Copy it again, or make its folder anew.") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): copy it again, or make its folder anew.") from error
    return content


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header cannot be read.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error}): copy or download it again.") from error
