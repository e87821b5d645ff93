"""Generated programs: right ones pass, wrong ones fail, and hostile ones reach nothing outside and leave nothing behind."""

import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from hf_semalign.experiments.benchmarks import sandbox
from hf_semalign.experiments.benchmarks.sandbox import OPT_IN, Outcome, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated programs run on Linux only")

EARLY_EXITS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os\nfor number in (15, 11, 9): os.kill(os.getpid(), number)\nos._exit(0)",
    "abort": "import os\nos.abort()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "atexit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)",
    "group": "import os\nos.kill(0, 9)\nos._exit(0)",
}
FAKES = {
    "prints": "print('passed')\nimport sys\nsys.stderr.write('passed')",
    "writes to every file": (
        "import os\nfor number in range(64):\n    try: os.write(number, b'[]\\n' + b'0' * 32)\n    except OSError: pass"
    ),
    "no AssertionError": "import builtins\nbuiltins.AssertionError = builtins.BaseException = builtins.Exception = int",
    "excepthook": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)",
    "other os": "import os\nos._exit = os.write = os.pread = print",
    "exec": "import builtins\nbuiltins.exec = builtins.compile = builtins.vars = print",
    "finally": "import atexit\natexit.register(print, 'passed')",
    "no os": "import sys\nsys.modules.clear()",
}


@pytest.fixture(autouse=True)
def opted_in(monkeypatch):
    monkeypatch.setenv(OPT_IN, "1")


@pytest.fixture(scope="module")
def unprotected():
    """What this system does not allow to be closed off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OPT_IN, "1")
        return run_program("").unprotected


@pytest.fixture
def needs(unprotected):
    def check(*names):
        if missing := set(names) & set(unprotected):
            pytest.skip(f"this system leaves {missing} open")

    return check


def run(program, **limits):
    return run_program(textwrap.dedent(program), **limits)


def left_running():
    """Processes of the sandbox, by their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found += [entry.name] if sandbox.__file__.encode() in (entry / "cmdline").read_bytes() else []
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path_factory):
    before = set(Path(tempfile.gettempdir()).glob("semalign-*"))
    yield
    assert not left_running()
    assert set(Path(tempfile.gettempdir()).glob("semalign-*")) <= before


# Programs as they should be


@pytest.mark.parametrize(
    ("solution", "passed"), [("    return a + b\n", True), ("    return a - b\n", False), ("    retur", False)]
)
def test_records_as_in_humaneval(solution, passed):
    record = {
        "prompt": 'from typing import List\n\n\ndef add(a: int, b: int):\n    """Add.\n    >>> add(2, 3)\n    5\n    """\n',
        "entry_point": "add",
        "test": "\n\nMETADATA = {\n    'author': 'a test'\n}\n\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n",
    }
    program = f"{record['prompt']}{solution}\n{record['test']}\ncheck({record['entry_point']})"
    assert run(program).passed is passed


@pytest.mark.parametrize(("sign", "passed"), [("+", True), ("-", False)])
def test_records_as_in_mbpp(sign, passed):
    record = {
        "code": f"import math\r\ndef far(a, b):\r\n    return math.floor(a {sign} b)",
        "test_setup_code": "import heapq",
        "test_list": ["assert far(2, 3) == 5", "assert far(1.5, 1.5) == heapq.nlargest(1, [1, 3])[0]"],
    }
    assert run("\n".join([record["code"], record["test_setup_code"], *record["test_list"]])).passed is passed


def test_outcomes(unprotected):
    assert run("assert sum([1, 2]) == 3") == Outcome(True, "passed", unprotected)
    assert run("assert sum([1, 2]) == 4") == Outcome(False, "failed: AssertionError", unprotected)
    assert run("def f(:").reason == "failed: SyntaxError"
    assert run("\0").reason == "failed: SyntaxError" or run("\0").reason == "failed: ValueError"
    assert run("x = '\ud800'").reason.startswith("failed: ")
    assert run("input()").reason == "failed: EOFError"
    assert run("raise type('no name\\x1b[31m', (Exception,), {})").reason == "ended early"


def test_programs_are_modules_of_their_own():
    assert run("import sys\nassert __name__ != '__main__' and 'hf_semalign' not in sys.modules").passed
    annotated = "def f(a: undefined): pass"
    assert run(annotated).reason == "failed: NameError"  # our own __future__ is not theirs
    assert run(f"from __future__ import annotations\n{annotated}").passed
    assert run(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class A:
            a: int
        assert A(1) == A(1)
        """
    ).passed


def test_sets_have_one_order_in_all_runs():
    command = [sys.executable, "-c", "print(hash('a'))"]
    told = subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True)
    assert run(f"assert hash('a') == {int(told.stdout)}").passed


# Without consent, or without a sandbox


def test_nothing_runs_without_consent(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for value in ("", "0", "true"):
        monkeypatch.setenv(OPT_IN, value)
        with pytest.raises(ValueError, match=r"programs written by a model.*HF_ALLOW_CODE_EVAL=1"):
            run_program("pass")
    monkeypatch.delenv(OPT_IN)
    with pytest.raises(ValueError, match="HF_ALLOW_CODE_EVAL=1"):
        run_program("pass")
    monkeypatch.setenv(OPT_IN, "1")
    with pytest.raises(ValueError, match="timeout is 0 and memory_mb 512: expected seconds and whole"):
        run_program("pass", timeout=0)
    for limits in ({"timeout": float("nan")}, {"timeout": float("inf")}, {"memory_mb": -1}, {"memory_mb": 0.5}):
        with pytest.raises(ValueError, match="expected seconds and whole megabytes above 0"):
            run_program("pass", **limits)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="only run on Linux, not on darwin"):
        run_program("pass")


def test_what_stays_open_is_logged_once(caplog):
    sandbox._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_semalign"):
        for _ in range(2):
            outcome = sandbox._outcome(b'["network", "files"]\nAssertionError', b"0" * 32, False)
    sandbox._warn.cache_clear()
    assert outcome == Outcome(False, "failed: AssertionError", ("network", "files"))
    assert [record.getMessage().split(". ")[0][-16:] for record in caplog.records] == [": network, files"]


def test_a_sandbox_that_cannot_be_set_up_is_an_error():
    for said in (b"", b"Traceback\nPermissionError: no\n", b"[]"):
        with pytest.raises(RuntimeError, match="could not be set up"):
            sandbox._outcome(said, b"0" * 32, True)


@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("setpriv")), reason="needs unshare and setpriv")
def test_a_system_without_namespaces_is_named_or_refused():
    script = "from hf_semalign.experiments.benchmarks.sandbox import run_program\nprint(run_program('import os; os.fork()'))"
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", shell, "sh", sys.executable, "-c", script]
    if subprocess.run([*command[:3], "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = "the system allows neither a limit on processes nor a process namespace" in told.stderr  # root without rights
    named = "unprotected=('network', 'processes', 'files', 'user')" in told.stdout and "BlockingIOError" in told.stdout
    assert refused != named
    assert named == ("isolated from: network, processes, files, user" in told.stderr)


# No pass that was not earned


@pytest.mark.parametrize("name", EARLY_EXITS)
def test_an_early_exit_is_no_pass(name):
    outcome = run(f"{EARLY_EXITS[name]}\nassert False")
    assert not outcome.passed
    assert outcome.reason == "ended early" or outcome.reason in ("failed: SystemExit", "failed: KeyboardInterrupt")


@pytest.mark.parametrize("name", FAKES)
def test_a_pass_cannot_be_pretended(name):
    assert not run(f"{FAKES[name]}\nassert 1 == 2").passed


# Time, memory, files, processes


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "finally": "try:\n    while True: pass\nfinally:\n    while True: pass",
    "output": "import sys\nwhile True: sys.stdout.write('x' * 10**6)",
    "no signals": """
        import signal
        for one in range(1, 65):
            try: signal.signal(one, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "every file": """
        import os
        for number in range(3, 32):
            try:
                while True: os.write(number, bytes(10**6))
            except OSError: pass
        while True: pass
        """,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_programs_are_ended(name):
    start = time.perf_counter()
    assert run(ENDLESS[name], timeout=1).reason == "timed out"
    assert time.perf_counter() - start < 1 + sandbox.PATIENCE / 2


def test_memory_is_limited():
    assert run("x = bytearray(10**9)").reason == "failed: MemoryError"
    assert run("x = bytearray(10**9)\nx[::4096] = b'1' * len(x[::4096])", memory_mb=2000).passed
    grows = "x = []\nwhile True: x.append(bytearray(10**6))"
    assert run(grows).reason == "failed: MemoryError"
    assert run("import mmap\nmmap.mmap(-1, 10**9)").reason == "failed: OSError"


def test_limits_cannot_be_raised():
    names = ["AS", "CPU", "FSIZE", "NOFILE", "NPROC"]
    for name in names:
        raising = f"import resource\nresource.setrlimit(resource.RLIMIT_{name}, (resource.RLIM_INFINITY,) * 2)"
        assert run(raising).reason == "failed: ValueError"


def test_files_are_limited(needs):
    assert run("file = open('big', 'wb')\nfor _ in range(100): file.write(bytes(10**6))").reason == "failed: OSError"
    assert run("files = [open(f'{number}', 'w') for number in range(100)]").reason == "failed: OSError"
    assert run("open('small', 'w').write('a')\nassert open('small').read() == 'a'").passed
    assert run("open('small')").reason == "failed: FileNotFoundError"  # of the program before
    needs("files")
    assert run("for number in range(100): open(f'{number}', 'wb').write(bytes(10**6))").reason == "failed: OSError"


def test_no_process_is_started():
    bounded = """
        import os
        denied = 0
        for _ in range(50):
            try:
                if os.fork() == 0: os._exit(0)
            except OSError: denied += 1
        assert denied == 50
        """
    assert run(bounded).passed  # before the real one is tried
    assert run("import os\nwhile True: os.fork()").reason == "failed: BlockingIOError"
    assert run("import threading\nthreading.Thread(target=print).start()").reason == "failed: RuntimeError"
    assert run("import os\nos.posix_spawn('/bin/true', ['true'], {})").reason.startswith("failed: ")
    daemon = """
        import os, time
        try:
            if os.fork() == 0:
                os.setsid()
                time.sleep(100)
        except OSError: pass
        """
    assert run(daemon).passed  # that nothing stays is looked at after every test


# The world outside


def test_the_environment_is_empty(monkeypatch, needs):
    for name in ("HF_TOKEN", "HOME", "PYTHONPATH"):
        monkeypatch.setenv(name, "hf_secret")
    assert run("import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}").passed
    needs("files")
    elsewhere = """
        import glob
        for path in glob.glob('/proc/*/environ'):
            try: content = open(path, 'rb').read()
            except OSError: continue
            assert b'hf_secret' not in content
        """
    assert run(elsewhere).passed


def test_the_network_is_out_of_reach(needs):
    needs("network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        socket.create_connection(address).close()
        server.accept()[0].close()  # we reach it
        assert run(f"import socket\nsocket.create_connection({address}, 2)").reason == "failed: OSError"
        with pytest.raises(TimeoutError):
            server.accept()
    with socket.socket(socket.AF_UNIX) as server:  # under an abstract name, which is no file
        server.bind("\0semalign-test")
        server.listen()
        reach = "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0semalign-test')"
        assert run(reach).reason == "failed: ConnectionRefusedError"


def test_files_outside_are_out_of_reach(needs, tmp_path):
    needs("files")
    (tmp_path / "token").write_text("hf_secret")
    tmp_path.chmod(0o777)
    assert run(f"open({str(tmp_path / 'token')!r})").reason == "failed: FileNotFoundError"
    run(f"import os\nos.makedirs({str(tmp_path)!r}, exist_ok=True)\nopen({str(tmp_path / 'out')!r}, 'w').write('x')")
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    seen = {"tmp", "lib", "lib64", "usr", Path(sys.base_prefix).parts[1]}
    assert run(f"import os\nassert set(os.listdir('/')) <= {seen} and not os.listdir('/tmp')").passed
    closed = """
        import json, os
        for folder in ('/', '/usr/lib', os.path.dirname(json.__file__)):
            try: open(folder + '/x', 'w')
            except OSError: continue
            raise TypeError(folder)
        """
    assert run(closed).passed


REOPENING = """
    import ctypes, os
    libc = ctypes.CDLL(None)
    assert libc.unshare(0x10000000)  # a user namespace, in which one would be root
    assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)
    assert libc.mount(None, b'/usr/lib', None, 0x1020, None)  # writable again
    assert libc.umount2(b'/usr/lib', 2)
    assert libc.chroot(b'/tmp')
    try: open('/usr/lib/x', 'w')
    except OSError: pass
    else: raise TypeError
    """


def test_the_files_stay_closed(needs):
    needs("files")
    assert run(REOPENING).passed


def test_the_files_stay_closed_for_an_ordinary_user():
    """Also for one who owns them: within a user namespace, even root of the machine is one."""
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    script = f"from {sandbox.__name__} import run_program\nprint(run_program({textwrap.dedent(REOPENING)!r}))"
    told = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    if "'files'" in told:
        pytest.skip("an ordinary user may mount nothing here")
    assert "reason='passed'" in told


def test_other_processes_are_out_of_reach(needs):
    run("import os\nos.kill(os.getppid(), 9)")  # we are still here
    needs("processes")
    alone = """
        import os
        assert os.getpid() == 1
        for number in range(2, 40000):
            try: os.kill(number, 0)
            except ProcessLookupError: continue
            raise TypeError(number)
        """
    assert run(alone).passed


def test_root_is_nobody(needs):
    needs("user")
    assert run("import os\nassert 0 not in (*os.getresuid(), *os.getresgid(), *os.getgroups())").passed
    assert run("import os\nos.setuid(0)").reason == "failed: PermissionError"
