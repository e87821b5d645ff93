"""Run a generated program with its tests, as HumanEval and MBPP require, isolated as far as Linux allows.

The program runs in a separate interpreter with only the standard library. It has

- an empty environment, no standard input or output, and a temporary working folder;
- limits that it cannot raise, on wall time, memory, and the size and number of open files. It cannot start processes or
  threads;
- if the system allows namespaces (for root, or if users may create them): no network, no view of other processes, and no files
  except the interpreter's and the system's libraries, read-only. The working folder then holds at most 64 MB.

:attr:`Outcome.unprotected` lists, and a warning logs, what the system does not allow to isolate. The program then sees the
network, the disk and other processes like an ordinary user. If you are root, it runs as nobody. Otherwise it can read your
files and tokens.

A program passes if it reaches its last line. Only then is a secret read and sent back, so leaving early in any way does not
pass. **Remaining risks**: program and tests share an interpreter. A program written against this file can read the secret and
send it, and a program can cheat its tests, for example with objects that equal everything. A bug in the kernel is a way out of
the sandbox, and a bug in CPython helps a cheater. Use a virtual machine against targeted attacks. Memory that belongs to no
process (System V shared memory through ``ctypes``) is not limited, and is freed when the program ends.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

logger = logging.getLogger(__name__)
OPT_IN = "HF_ALLOW_CODE_EVAL"
PATIENCE = 20.0  # seconds allowed for setup on a loaded machine, in addition to the program's time
TIMED_OUT = 9  # exit code of the process that watches the program
TOKEN = 32  # bytes
NOBODY = 65534
FILE_BYTES = 2**24
OPEN_FILES = 32
# From the kernel headers sched.h, mount.h, prctl.h and capability.h.
NAMESPACES = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # mounts, processes, network, IPC, host name
USER_NAMESPACE = 0x10000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 0x20, 0x1000, 0x4000, 0x40000
SET_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
CAPABILITY_VERSION = 0x20080522


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it reached its last line.
        reason: ``passed``, ``timed out``, ``ended early``, or ``failed: `` with the name of an exception.
        unprotected: what could not be isolated: ``network``, ``processes``, ``files``, ``forks``, ``user``.
    """

    passed: bool
    reason: str
    unprotected: tuple[str, ...] = ()


def run_program(program: str, *, timeout: float = 20.0, memory_mb: int = 512) -> Outcome:
    """Run a program that ends with its tests.

    Args:
        program: Python source. It fails if it raises an exception, for example in an assertion.
        timeout: wall time in seconds. The slowest reference solution (MBPP's 123) takes 7.
        memory_mb: address space of the interpreter, which needs about 50 MB itself.

    Raises:
        ValueError: the opt-in is missing, the system is not Linux, or ``timeout`` or ``memory_mb`` is not positive.
        RuntimeError: the sandbox could not be set up, so the program did not run.
    """
    from hf_semalign.errors import InputError  # this file is also run as a script, with only the standard library

    if os.environ.get(OPT_IN) != "1":
        raise InputError(
            "This runs programs written by a model, which may do harm. They are isolated as far as the system allows; "
            f"hf_semalign/experiments/benchmarks/sandbox.py describes the remaining risks. If you accept them, set {OPT_IN}=1."
        )
    if sys.platform != "linux":
        raise InputError(f"Generated programs only run on Linux, not on {sys.platform}: score them on a Linux machine.")
    if not 0 < timeout < math.inf or not isinstance(memory_mb, int) or memory_mb < 1:
        raise InputError(f"timeout is {timeout} and memory_mb {memory_mb}: expected seconds and whole megabytes above 0.")
    token = secrets.token_hex(TOKEN // 2).encode()
    with tempfile.TemporaryDirectory(prefix="semalign-") as folder, tempfile.TemporaryFile() as given:
        given.write(program.encode("utf-8", "surrogatepass") + token)
        given.flush()
        process = subprocess.Popen(
            [sys.executable, "-sSPB", __file__, folder, str(timeout), str(memory_mb)],
            stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            cwd=folder, env={"PYTHONHASHSEED": "0"}, start_new_session=True,
        )  # fmt: skip
        with cast(IO[bytes], process.stdout) as pipe:
            try:
                late = process.wait(timeout + PATIENCE) == TIMED_OUT
            except subprocess.TimeoutExpired:
                late = True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            os.set_blocking(pipe.fileno(), False)
            said = pipe.read(2**16) or b""  # capacity of a pipe, so this is everything that was written
    return _outcome(said, token, late)


def _outcome(said: bytes, token: bytes, late: bool) -> Outcome:
    head, ready, verdict = said.partition(b"\n")
    if not ready or not head.startswith(b"["):
        lines = said.decode(errors="replace").splitlines() or ["it took too long"]
        raise RuntimeError(f"The sandbox could not be set up, so the program did not run: {lines[-1]}.")
    unprotected = tuple(json.loads(head))
    _warn(unprotected)
    if late:
        return Outcome(False, "timed out", unprotected)
    if secrets.compare_digest(verdict, token):
        return Outcome(True, "passed", unprotected)
    name = verdict[:64].decode("ascii", "replace")  # written by the program, so not trusted
    return Outcome(False, f"failed: {name}" if name.isidentifier() else "ended early", unprotected)


@functools.cache
def _warn(unprotected: tuple[str, ...]) -> None:
    if unprotected:
        logger.warning(
            "The system does not allow generated programs to be isolated from: %s. Run them as root, on a system where users "
            "may create namespaces, or in a virtual machine.", ", ".join(unprotected),
        )  # fmt: skip


# The code below runs in the new interpreter, which starts this file as a script.


def _watch(folder: str, timeout: float, memory_mb: int) -> NoReturn:
    """Fork into new namespaces, and stop the program at the timeout. It is the first process there, so none outlives it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    separate = _separate(libc)
    child = os.fork()
    if child == 0:
        _contained(libc, folder, timeout, memory_mb, separate)
    late = []

    def end(*_: Any) -> None:
        late.append(True)
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    os.waitpid(child, 0)
    os._exit(TIMED_OUT if late else 0)


def _separate(libc: ctypes.CDLL) -> bool:
    """Enter new namespaces, as an ordinary user inside a user namespace. Returns whether that is allowed."""
    if libc.unshare(NAMESPACES) == 0:
        return True
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NAMESPACES | USER_NAMESPACE) != 0:
        return False
    with suppress(OSError):  # AppArmor may forbid this; mounting then fails, which is reported
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    return True


def _contained(libc: ctypes.CDLL, folder: str, timeout: float, memory_mb: int, separate: bool) -> NoReturn:
    """Isolate the process, report what could not be isolated, and run the program from stdin, where the secret follows it."""
    size = os.fstat(0).st_size - TOKEN
    program = os.pread(0, size, 0)
    null, secret, verdict = os.open(os.devnull, os.O_RDWR), os.dup(0), os.dup(1)
    unprotected = [] if separate else ["network", "processes"]
    try:
        if not separate:
            raise PermissionError
        _change_root(libc, folder)
    except OSError:
        unprotected.append("files")
    try:
        _drop_privileges(libc)
    except OSError:
        unprotected.append("user")
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError("an unprivileged user cannot read Python's library: install Python where all users can read it")
    _limit(timeout, memory_mb)
    if _can_fork():
        if not separate:
            raise PermissionError("the system allows neither a limit on processes nor a process namespace")
        unprotected.append("forks")
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)  # changing the user cleared it
    os.setpgid(0, 0)  # so that the program cannot kill the watcher; done last, because the caller kills the watcher's group
    os.write(verdict, json.dumps(unprotected).encode() + b"\n")
    for stream in range(3):
        os.dup2(null, stream)
    _execute(program, secret, size, verdict)


def _change_root(libc: ctypes.CDLL, root: str) -> None:
    """Change to a root with only read-only libraries and an empty /tmp. This also rules out new user namespaces."""

    def mount(source: str | None, place: str, kind: str | None, flags: int, options: str | None = None) -> None:
        texts = [None if text is None else os.fsencode(text) for text in (source, place, kind, options)]
        if libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]) != 0:
            raise OSError(ctypes.get_errno(), f"mount {place}")

    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, "size=64m,nr_inodes=2k,mode=755")
    bound: list[Path] = []
    for place in sorted({*sys.path, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"}):
        if Path(place).is_dir() and not any(Path(place).is_relative_to(parent) for parent in bound):
            inside = root + place
            Path(inside).mkdir(parents=True)
            mount(place, inside, None, BIND | RECURSIVE)
            kept = os.statvfs(inside).f_flag & NO_EXEC  # an ordinary user may not remove it
            mount(None, inside, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES | kept)
            bound.append(Path(place))
    Path(root, "tmp").mkdir()
    os.chroot(root)
    os.chdir("/tmp")


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Switch from root to nobody for good, and drop all capabilities, also in a user namespace."""
    try:
        if os.getuid() == 0:
            os.chown(".", NOBODY, NOBODY)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    finally:
        header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        if libc.capset(header, none) != 0 or libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "capset or prctl")


def _limit(timeout: float, memory_mb: int) -> None:
    limits = {
        resource.RLIMIT_CPU: math.ceil(timeout) + 1,
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for what, wanted in limits.items():
        hard = resource.getrlimit(what)[1]
        amount = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (amount, amount))


def _can_fork() -> bool:
    """Whether the process can fork despite the limit, as root can."""
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def _execute(program: bytes, secret: int, place: int, verdict: int) -> NoReturn:
    """Run the program as a module. The secret is read and sent only after its last line."""
    read, write, leave = os.pread, os.write, os._exit  # the program may replace them
    sys.argv = ["program"]
    module = sys.modules["program"] = types.ModuleType("program")  # dataclasses look up their module
    try:
        exec(compile(program, "program", "exec", dont_inherit=True), vars(module))
    except BaseException as error:  # SystemExit and KeyboardInterrupt do not pass either
        write(verdict, type(error).__name__.encode()[:64])
    else:
        write(verdict, read(secret, TOKEN, place))
    leave(0)


if __name__ == "__main__":
    _watch(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
