"""The sandbox against hostile programs: the host unharmed, a verdict within the limit."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.sandbox import confinement, execution
from nanochat.sandbox.execution import ExecutionResult, execute, isolation_level
from nanochat.sandbox.workers import MAX_OUTPUT_BYTES

isolated = pytest.mark.skipif(
    set(isolation_level()) != set(confinement.BARRIERS),
    reason=f"this kernel offers only {isolation_level()}",
)
pytestmark = isolated


def run(program: str, **options: float) -> ExecutionResult:
    return execute(program, **{"timeout_s": 5.0, **options})


def test_a_good_program_succeeds() -> None:
    result = run("import math\nprint('two', math.sqrt(4))\nassert 1 + 1 == 2")
    assert result.success
    assert result.stdout == "two 2.0\n"
    assert result.stderr == result.error == ""
    assert not result.timed_out
    assert result.isolation == confinement.BARRIERS


def test_the_standard_library_and_the_scratch_folder_work() -> None:
    result = run(
        "import collections, dataclasses, hashlib, heapq, itertools, json, re, tempfile, typing\n"
        "import threading\n"
        "from pathlib import Path\n"
        "Path('a').mkdir()\n"
        "Path('a/b.txt').write_text('kept')\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "thread = threading.Thread(target=print, args=(Path('a/b.txt').read_text(),))\n"
        "thread.start(); thread.join()"
    )
    assert result.success, result
    assert result.stdout == "kept\n"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("def f(:\n  pass", "SyntaxError: invalid syntax"),
        ("print('open", "unterminated string literal"),
        ("exit(0)", "left before its last line"),
        ("import os\nos._exit(0)", "left before its last line"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os\nos.abort()", "ended by SIG"),
        ("input()", "EOFError"),
    ],
)
def test_failures_are_told_apart(program: str, error: str) -> None:
    result = run(program)
    assert not result.success
    assert error in result.error
    assert not result.timed_out
    assert not result.memory_exceeded


HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "vfork through subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])",
    "system": "import os\nassert os.system('true') == 0",
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print)\np.start()",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
    "memory bomb": "x = bytearray(1 << 34)",
    "growing list": "x = []\nwhile True: x.append('y' * 1000000)",
    "recursion": "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
    "endless output": "while True: print('x' * 1000)",
    "huge file": "open('big', 'wb').write(b'0' * (1 << 26))",
    "secret file": "print(open('/etc/passwd').read())",
    "home folder": "import os\nprint(os.listdir(os.path.expanduser('~root')))",
    "proc environ": "print(open(f'/proc/{__import__(\"os\").getppid()}/environ', 'rb').read())",
    "proc mem": "open('/proc/self/mem', 'r+b').seek(4096)",
    "proc fd": "import os\nprint(os.listdir('/proc/self/fd'))",
    "device": "open('/dev/sda', 'rb').read(1)",
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "name lookup": "import socket\nsocket.getaddrinfo('example.com', 80)",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/x')",
    "kill parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kill everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kill group": "import os, signal\nos.killpg(os.getpgid(os.getppid()), signal.SIGKILL)",
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, 0) == 0",
    "raw fork call": "import ctypes\nassert ctypes.CDLL(None).syscall(57) >= 0",
    "raw kill": "import ctypes, os\nassert ctypes.CDLL(None).kill(os.getppid(), 9) == 0",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "hostname": "import socket\nsocket.sethostname('mine')",
    "priority": "import os\nos.nice(-5)",
    "chroot": "import os\nos.chroot('/')",
    "other program": "import os\nos.execv('/bin/ls', ['ls', '/'])",
    "limits": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))",
    "frames": "import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\n"
    "assert 'confinement' in str(f.f_globals)",
}


@pytest.mark.parametrize(
    "program", HOSTILE.values(), ids=[name.replace(" ", "_") for name in HOSTILE]
)
def test_hostile_programs_fail_and_harm_nothing(program: str) -> None:
    result = run(program, timeout_s=8.0)
    assert not result.success, result
    assert "root:" not in result.stdout
    assert len(result.stdout) <= MAX_OUTPUT_BYTES


def test_time_and_memory_are_named() -> None:
    slow = run("while True: pass", timeout_s=0.5)
    assert slow.timed_out
    assert slow.error == "stopped after 0.5 s"
    sleepy = run("import time\ntime.sleep(60)", timeout_s=0.5)
    assert sleepy.timed_out
    large = run("x = bytearray(1 << 33)")
    assert large.memory_exceeded
    assert not large.timed_out


def test_a_dead_program_is_not_a_slow_one() -> None:
    assert not run("import os\nos.abort()").timed_out


def test_files_outside_stay(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("kept")
    for program in (
        f"import os\nos.remove({str(precious)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"open({str(precious)!r}, 'w').write('gone')",
        f"print(open({str(precious)!r}).read())",
        f"import os\nos.rename({str(precious)!r}, 'mine')",
        f"import os\nos.truncate({str(precious)!r}, 0)",
    ):
        result = run(program)
        assert not result.success, program
        assert "kept" not in result.stdout
        assert precious.read_text() == "kept"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_SECRET", "hunter2")
    result = run("import os\nprint(sorted(os.environ))")
    assert result.stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR']\n"


@pytest.fixture
def listener() -> Iterator[tuple[int, list[object]]]:
    """A port on loopback, and who connected to it."""
    met: list[object] = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    stop = threading.Event()

    def accept() -> None:
        while not stop.is_set():
            try:
                met.append(server.accept()[1])
            except TimeoutError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    yield server.getsockname()[1], met
    stop.set()
    thread.join()
    server.close()


def test_nobody_calls_home(listener: tuple[int, list[object]]) -> None:
    port, met = listener
    result = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
    assert not result.success
    assert not met


def test_scratch_folders_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    run("open('left', 'w').write('x')")
    run("while True: pass", timeout_s=0.3)
    assert not list(tmp_path.iterdir())


def test_the_host_keeps_its_processes() -> None:
    before = os.getpid()
    for name in ("fork bomb", "kill everyone", "kill group"):
        run(HOSTILE[name], timeout_s=1.0)
    assert os.getpid() == before


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout_s 0"):
        execute("", timeout_s=0)
