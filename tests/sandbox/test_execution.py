"""What programs and verdicts look like to a caller, what is left afterwards, and what happens where
the kernel grants less. Attacks are in test_attacks.py."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat.sandbox import workers
from nanochat.sandbox.confinement import BARRIERS, NOBODY
from nanochat.sandbox.execution import (
    ExecutionResult,
    Sandbox,
    execute,
    isolation_level,
    judge,
    shared_sandbox,
)
from nanochat.sandbox.workers import Limits, remove_tree
from tests.support.runs import ROOT

pytestmark = pytest.mark.skipif(
    set(isolation_level()) != set(BARRIERS),
    reason=f"this kernel grants only {isolation_level()}",
)


def run(program: str, **options: float) -> ExecutionResult:
    return execute(program, **{"timeout_s": 5.0, **options})


def test_a_good_program_succeeds() -> None:
    result = run("import math\nprint('two', math.sqrt(4))\nassert 1 + 1 == 2")
    assert result.success
    assert result.stdout == "two 2.0\n"
    assert result.stderr == result.error == ""
    assert not result.timed_out
    assert result.isolation == BARRIERS
    assert result.missing == ()


def test_the_standard_library_and_the_scratch_folder_work() -> None:
    result = run(
        "import asyncio, dataclasses, hashlib, inspect, json, re, sqlite3, tempfile, threading\n"
        "import concurrent.futures, ctypes, decimal, unittest, zoneinfo\n"
        "from pathlib import Path\n"
        "Path('a').mkdir()\n"
        "Path('a/b.txt').write_text('kept')\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "with tempfile.TemporaryDirectory() as folder: Path(folder, 'x').write_text('x')\n"
        "thread = threading.Thread(target=print, args=(Path('a/b.txt').read_text(),))\n"
        "thread.start(); thread.join()\n"
        "asyncio.run(asyncio.sleep(0.001))\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool: list(pool.map(abs, range(9)))\n"
        "assert sqlite3.connect(':memory:').execute('select 1').fetchone() == (1,)\n"
        "def f(): pass\n"
        "assert inspect.getsource(f) == 'def f(): pass\\n'\n"
        "open('/dev/null', 'w').write('x')\n"
        "if __name__ == '__main__': print('main')"
    )
    assert result.success, result
    assert result.stdout == "kept\nmain\n"


def test_programs_know_nothing_of_each_other() -> None:
    program = "import os, random\nprint(random.random(), os.listdir('.'))\nopen('x', 'w')"
    first, second = run(program), run(program)
    assert first.stdout.endswith(" []\n")
    assert second.stdout.endswith(" []\n")
    assert first.stdout != second.stdout


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("def f(:\n  pass", "SyntaxError: invalid syntax"),
        ("print('open", "unterminated string literal"),
        ("assert False or \\", "SyntaxError: unexpected EOF"),
        ("x = '\ud800'\nprint(x)", "codec can't decode"),
        ("x\0y", "null bytes"),
        ("exit(0)", "left before its last line"),
        ("import os\nos._exit(0)", "left before its last line"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import sys\nsys.exit('sorry')", "sorry"),
        ("import os\nos.abort()", "ended by SIG"),
        ("input()", "EOFError"),
        ("import sys\nsys.stdout = None", ""),
        ("import atexit\natexit.register(lambda: 1 / 0)", ""),
        ("x = [0] * 10**6\nwhile True: x += x", "MemoryError"),
    ],
)
def test_failures_are_told_apart(program: str, error: str) -> None:
    result = run(program)
    assert result.success == (error == "")
    assert error in result.error
    assert not result.timed_out
    assert result.memory_exceeded == (error == "MemoryError")


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    return 1 / x\n\nf(0)",
        "try:\n    {}['a']\nexcept KeyError:\n    raise ValueError('é') from None",
        "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError from error",
        "def f(:\n    pass",
        "class E(Exception): pass\nraise E('x', 1)",
    ],
)
def test_a_traceback_is_that_of_the_interpreter(tmp_path: Path, program: str) -> None:
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    interpreter = os.path.realpath(sys.executable)
    plain = subprocess.run([interpreter, "-I", path], capture_output=True, encoding="utf-8")
    assert run(program).stderr == plain.stderr.replace(str(path), "/scratch/program.py")


def test_time_and_memory_are_named() -> None:
    slow = run("while True: pass", timeout_s=0.5)
    assert slow.timed_out
    assert slow.error == "stopped after 0.5 s"
    sleepy = run("import time\ntime.sleep(60)", timeout_s=0.5)
    assert sleepy.timed_out
    large = run("x = bytearray(1 << 33)")
    assert large.memory_exceeded
    assert not large.timed_out


def test_output_is_limited() -> None:
    result = run("while True: print('x' * 1000)")
    assert len(result.stdout) == workers.MAX_OUTPUT_BYTES
    assert "File too large" in result.error


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_SECRET", "hunter2")
    result = run("import os\nprint(sorted(os.environ))")
    assert result.stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR']\n"


@pytest.mark.parametrize("option", ["timeout_s", "memory_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_impossible_limits_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} .* must be positive and finite"):
        run("", **{option: value})


# Verdicts

RIGHT = {
    "keyword arguments": ("def f(a, *, b=1): return a - b", "assert f(3, b=2) == 1 == f(2)"),
    "helpers": ("def g(x): return x\ndef f(x): return g(x)", "assert f((1, [2])) == (1, [2])"),
    "an argument that changes": ("def f(x): x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]"),
    "an argument that does not": (
        "def f(x): return sorted(x)",
        "x = [2, 1]\nassert f(x) == [1, 2]\nassert x == [2, 1]",
    ),
    "identity": ("def f(x): return x", "x = [1]\nassert f(x) is x\nassert f([x])[0] is x"),
    "a copy": ("def f(x): return list(x)", "x = [1]\nassert f(x) == x\nassert f(x) is not x"),
    "exceptions": (
        "def f(x): return 1 / x",
        "try: f(0)\nexcept ZeroDivisionError as e: assert 'zero' in str(e)\nelse: assert False",
    ),
    "a generator": ("def f(n): yield from range(n)", "assert tuple(f(3)) == (0, 1, 2)"),
    "floats": ("def f(x): return x / 3", "assert abs(f(1.0) - 0.333) < 1e-3"),
    "state between calls": (
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        "assert [f(), f()] == [1, 2]",
    ),
    "output": ("def f():\n    print('hello')", "assert f() is None"),
    "a name that is passed on": ("def f(x): return x", "def check(g): assert g(1) == 1\ncheck(f)"),
}


@pytest.mark.parametrize(("candidate", "test"), RIGHT.values(), ids=[*RIGHT])
def test_a_right_function_passes(candidate: str, test: str) -> None:
    result = judge(candidate, test, "f")
    assert result.success, result
    assert result.stdout == ("hello\n" if "hello" in candidate else "")
    assert result.isolation == BARRIERS
    # and the same test of nothing does not
    assert not judge("", test, "f").success


@pytest.mark.parametrize(
    ("candidate", "error"),
    [
        ("", "NameError: name 'f' is not defined"),
        ("f = 3", "TypeError: 'int' object is not callable"),
        ("def f(x): return x", "AssertionError: wrong"),
        ("def f(x): return object()", "a value of type object cannot be passed on"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise KeyError('early')", "KeyError: 'early'"),
        ("def f(x): exit(3)", "exit code 3"),
        ("import os\nos._exit(0)", "left before its last line"),
        ("def f(x): return f(x)", "RecursionError"),
        ("def f(x): return 'x' * (1 << 34)", "MemoryError"),
    ],
)
def test_failing_candidates_are_told_apart(candidate: str, error: str) -> None:
    result = judge(candidate, "assert f(1) == 2, 'wrong'", "f")
    assert not result.success
    assert error in result.error, result
    assert not result.timed_out


def test_a_slow_candidate_is_named() -> None:
    result = judge("def f():\n    while True: pass", "f()", "f", timeout_s=0.5)
    assert result.timed_out
    assert result.error == "stopped after 0.5 s"


def test_a_test_that_ignores_everything_does_not_pass_without_answers() -> None:
    test = "try: f()\nexcept: pass"
    assert judge("def f(): raise ValueError", test, "f").success
    assert not judge("import os\ndef f(): os._exit(0)", test, "f").success


def test_a_test_that_does_not_end_does_not_pass() -> None:
    assert not judge("def f(): pass", "f()\nimport os\nos._exit(0)", "f").success
    assert not judge("def f(): pass", "f()\nexit(0)", "f").success


# What is left

LITTER = {
    "deep": "import os\nfor i in range(5000):\n    os.mkdir('d'); os.chdir('d')",
    "closed": "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.mkdir('a/d', 0)",
    "many": "for i in range(2000): open(str(i), 'w').close()",
    "links": "import os\nos.symlink('/', 'root')\nos.symlink('.', 'loop')",
    "slow": "import time\nopen('x', 'w').write('x')\ntime.sleep(60)",
}


def left() -> dict[str, object]:
    """Everything a run could leave behind."""
    me = psutil.Process()
    here = Path(tempfile.gettempdir())
    return {
        "folders": sorted(path.name for path in here.glob("nanochat*")),
        "System V": [
            Path(f"/proc/sysvipc/{kind}").read_text().count("\n") for kind in ("shm", "sem", "msg")
        ],
        "descriptors": me.num_fds(),
        "processes": len(me.children(recursive=True)),
        "threads": me.num_threads(),
    }


def assert_nothing_is_left(before: dict[str, object]) -> None:
    """At once, but for what another test has for a moment, and for a bubblewrap's end."""
    deadline = time.monotonic() + 10
    while left() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left() == before


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    judge("def f(): pass", "f()", "f")  # starts two workers
    before = left()
    for program in LITTER.values():
        run(program, timeout_s=0.6)
        judge(program, "f()", "f", timeout_s=0.6)
    assert_nothing_is_left(before)


@pytest.mark.slow
def test_nothing_is_left_of_a_thousand_programs() -> None:
    judge("def f(): pass", "f()", "f")
    before = left()
    for number in range(1000):
        result = run(f"open('x', 'w').write('x' * 9999)\nprint({number})")
        assert result.stdout == f"{number}\n"
    assert_nothing_is_left(before)


def test_a_sandbox_ends_with_its_workers() -> None:
    before = left()
    with Sandbox() as sandbox:
        assert sandbox.execute("print(1)", Limits()).stdout == "1\n"
        assert left() != before
    assert_nothing_is_left(before)


def test_a_lost_worker_is_a_result_and_is_replaced() -> None:
    assert run("print(1)").success
    tree = psutil.Process(shared_sandbox(False).idle[-1].process.pid)

    def kill() -> None:
        for process in [*tree.children(recursive=True), tree]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    threading.Timer(0.3, kill).start()
    result = run("import time\ntime.sleep(4)")
    assert not result.success
    assert "lost" in result.error
    assert run("print(1)").success


def test_threads_share_a_sandbox() -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run(f"print({i})"), range(12)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(12)]


FORKED = """
import os
from nanochat.sandbox.execution import execute
assert execute("print(1)").success
if (child := os.fork()) == 0:
    os._exit(0 if execute("print(2)").stdout == "2\\n" else 1)
assert os.waitpid(child, 0)[1] == 0
assert execute("print(3)").stdout == "3\\n"
"""


def test_a_forked_process_has_workers_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        yield server


def test_nobody_calls_home(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert not run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)").success
    with pytest.raises(TimeoutError):
        listener.accept()


# Where there is less

WEAKER = """
import json, os
from nanochat.sandbox.confinement import BARRIERS
from nanochat.sandbox.execution import Sandbox, execute, judge
from nanochat.sandbox.workers import Limits
try:
    execute("print(1)")
    refused = ""
except ValueError as error:
    refused = str(error)
with Sandbox() as mistaken:  # believes that everything holds
    mistaken.way, mistaken.isolation = "worker", BARRIERS
    unstarted = mistaken.execute("print(1)", Limits())
deep = execute(
    "import os\\nos.makedirs('a/b')\\nos.mkdir('a/c', 0)\\nos.symlink('/root/x', 'a/d')\\n"
    "for i in range(3000):\\n    os.mkdir('d'); os.chdir('d')\\n",
    allow_weaker_sandbox=True,
)
passing = judge("def f(x): return x", "assert f(1) == 1", "f", allow_weaker_sandbox=True)
fork = execute("import os\\nos.fork()", allow_weaker_sandbox=True)
secret = execute("print(open('/etc/passwd').read())", allow_weaker_sandbox=True)
print(json.dumps({
    "refused": refused, "isolation": deep.isolation, "missing": deep.missing,
    "done": [deep.success, passing.success], "stopped": [fork.error, secret.error],
    "left": os.listdir(os.environ["TMPDIR"]), "unstarted": [unstarted.stdout, unstarted.error],
}))
"""


@pytest.fixture
def folder_in_memory() -> Iterator[Path]:
    """Where removing a folder takes microseconds; a disk may need milliseconds."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def denied(
    calls: str, *words: str, tmp_path: Path, user: str = "this user"
) -> subprocess.CompletedProcess[str]:
    """Python where the kernel refuses system calls, without bubblewrap."""
    become = ["tests.support.unprivileged"] if user == "nobody" else []
    command = [sys.executable, "-m", *become, "tests.support.denied", calls, *words]
    environment = os.environ | {"PATH": "/nowhere", "TMPDIR": str(tmp_path)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("calls", "missing", "user"),
    [
        ("unshare,clone", ["user", "network", "mount", "pid", "ipc"], "this user"),
        ("unshare,clone", ["user", "network", "mount", "pid", "ipc"], "nobody"),
        ("landlock_create_ruleset", ["landlock"], "this user"),
    ],
)
def test_a_weaker_sandbox_is_refused_unless_accepted(
    folder_in_memory: Path, calls: str, missing: list[str], user: str
) -> None:
    if user == "nobody" and os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    folder_in_memory.chmod(0o777)
    done = denied(calls, "-c", WEAKER, tmp_path=folder_in_memory, user=user)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert f"does not grant {' and '.join(missing)}" in said["refused"]
    assert "--allow_weaker_sandbox" in said["refused"]
    assert said["missing"] == missing
    assert said["isolation"] == [name for name in BARRIERS if name not in missing]
    assert said["done"] == [True, True]
    assert said["stopped"][0].startswith("PermissionError")
    assert said["stopped"][1].startswith(("PermissionError", "FileNotFoundError"))
    assert not said["left"]
    assert said["unstarted"] == ["", "exit code 125"]


@pytest.mark.long
def test_a_script_says_so_in_one_line(tmp_path: Path) -> None:
    words = ["-m", "scripts.chat_eval", "--task_name=HumanEval"]
    words += ["--task_data=tests/tasks/fixtures", "--device=cpu"]
    done = denied("unshare,clone", *words, tmp_path=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this kernel does not grant user and network")


def test_check_prints_what_the_kernel_grants(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanochat.sandbox.check"]
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 0
    found = json.loads(full.stdout)
    assert found["full"] is True
    assert found["barriers"] == dict.fromkeys(BARRIERS, True)
    assert found["kernel"]["landlock_abi"] >= 1
    weaker = denied("unshare,clone", "-m", "nanochat.sandbox.check", tmp_path=tmp_path)
    assert weaker.returncode == 1
    found = json.loads(weaker.stdout)
    assert found["full"] is False
    assert [name for name, held in found["barriers"].items() if held] == ["landlock", "seccomp"]
    assert "Operation not permitted" in found["refused"]["worker"]["user"]


@pytest.mark.parametrize("way", workers.ways_outside())
def test_every_way_holds_every_barrier(way: str) -> None:
    program = "import os\nprint(os.getpid(), os.getuid(), os.listdir('.'))\nopen('x', 'w')"
    with Sandbox() as sandbox:
        sandbox.way, sandbox.isolation = way, BARRIERS
        for _ in range(2):
            result = sandbox.execute(program, Limits())
            assert result.isolation == BARRIERS
            pid, uid, files = result.stdout.split()
            assert files == "[]"
            if way != workers.BUBBLEWRAP_ONCE:
                assert pid == "2"  # process 1 is its init
            if way == workers.OWN and os.getuid() == 0:
                assert int(uid) == NOBODY
        assert sandbox.judge("def f(): return 1", "assert f() == 1", "f", Limits()).success
        assert not sandbox.judge("def f(): return 2", "assert f() == 1", "f", Limits()).success


def test_a_tree_that_is_hard_to_remove(folder_in_memory: Path) -> None:
    folder = folder_in_memory / "folder"
    folder.mkdir()
    (folder / "closed").mkdir(mode=0)
    (folder / "out").symlink_to(folder_in_memory)
    subprocess.run(
        [sys.executable, "-c", "import os\nfor _ in range(5000): os.mkdir('d'); os.chdir('d')"],
        cwd=folder,
        check=True,
    )
    (folder_in_memory / "kept").write_text("kept")
    remove_tree(folder)
    assert [path.name for path in folder_in_memory.iterdir()] == ["kept"]


def test_signals_are_those_of_the_caller() -> None:
    """A worker is in a session of its own: Ctrl-C is for the script."""
    run("print(1)")
    worker = shared_sandbox(False).idle[-1]
    assert os.getsid(worker.process.pid) != os.getsid(0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
