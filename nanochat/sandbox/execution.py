"""Run untrusted Python programs, such as the answers of a model, where they can do no harm.

A fresh interpreter with an empty environment and a scratch folder, limited in time, memory and
file size, and confined by what the kernel offers:

    landlock  no file but the interpreter's can be read, none but the scratch folder's written
    seccomp   no processes, no sockets, no signals to others, no tracing

Both must be there, or the caller must say `allow_unisolated=True`; what was obtained is in the
result. A program that runs alone cannot outlive its verdict: it cannot fork.
"""

import contextlib
import functools
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanochat.sandbox import confinement

MAX_OUTPUT_BYTES = 1 << 20
READABLE = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom")
SCRATCH_ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": ""}


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program.

    success  it ran to its last line; exiting earlier, with any exit code, is not a success.
    error    last line of its traceback, or what ended it; "" where it succeeded.
    """

    success: bool
    stdout: str
    stderr: str
    error: str
    timed_out: bool
    memory_exceeded: bool
    isolation: tuple[str, ...]


@functools.cache
def isolation_level() -> tuple[str, ...]:
    """The barriers this kernel offers, of "landlock" and "seccomp"."""
    return tuple(name for name in confinement.BARRIERS if _works(name))


def _works(barrier: str) -> bool:
    """Whether an interpreter starts within the barrier, and the barrier holds."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "program.py"
        probe.write_text(confinement.PROBES[barrier])
        done = subprocess.run(
            _command(probe, (barrier,), 1 << 30, 5.0),
            cwd=folder,
            env=SCRATCH_ENVIRONMENT,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0 and done.stdout == b"held"


def _command(
    program: Path, barriers: tuple[str, ...], memory_bytes: int, timeout_s: float
) -> list[str]:
    """An interpreter that confines itself, then becomes the program's own."""
    readable = [sys.base_prefix, sysconfig.get_path("stdlib"), *READABLE]
    limits = {
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": MAX_OUTPUT_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    interpreter = os.path.realpath(sys.executable)
    arguments = [repr(limits), repr(barriers), repr(readable), str(program.parent), interpreter]
    return [interpreter, "-I", "-S", confinement.__file__, *arguments, str(program)]


def execute(
    program: str,
    *,
    timeout_s: float = 5.0,
    memory_bytes: int = 256 << 20,
    allow_unisolated: bool = False,
) -> ExecutionResult:
    """Run `program` to its end or its limits.

    timeout_s     wall time; the CPU gets a second more.
    memory_bytes  address space of the interpreter, which takes about 20 MiB itself.
    Raises        ValueError for a limit that is not positive; RuntimeError where the kernel lacks a
                  barrier and allow_unisolated is not given.
    """
    if timeout_s <= 0 or memory_bytes <= 0:
        raise ValueError(f"timeout_s {timeout_s} and memory_bytes {memory_bytes} must be positive")
    isolation = isolation_level()
    missing = [name for name in confinement.BARRIERS if name not in isolation]
    if missing and not allow_unisolated:
        raise RuntimeError(
            f"this kernel does not offer {' and '.join(missing)}, so a program could reach files "
            "or the network; run on Linux >= 5.13 with both, or accept the danger with "
            "allow_unisolated=True"
        )
    folder = Path(tempfile.mkdtemp(prefix="nanochat-execution-"))
    try:
        return _run(folder, program, timeout_s, memory_bytes, isolation)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    folder: Path, program: str, timeout_s: float, memory_bytes: int, isolation: tuple[str, ...]
) -> ExecutionResult:
    scratch = folder / "scratch"
    scratch.mkdir()
    token = secrets.token_hex(16)
    source = scratch / "program.py"
    # the token says that the last line was reached: exit(0) in the middle does not write it
    ending = f"\n__import__('os').write(2, b'\\n{token}')\n"
    source.write_text(program + ending, encoding="utf-8", errors="surrogatepass")
    stdout_path, stderr_path = folder / "stdout", folder / "stderr"
    with stdout_path.open("wb") as stdout, stderr_path.open("wb") as stderr:
        process = subprocess.Popen(
            _command(source, isolation, memory_bytes, timeout_s),
            cwd=scratch,
            env=SCRATCH_ENVIRONMENT | {"HOME": str(scratch), "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        # Usually wall time ends a program that takes too long; one with several threads can reach
        # its CPU limit first. Output goes to files, so a full pipe can block neither side.
        try:
            process.wait(timeout_s)
            timed_out = process.returncode == -signal.SIGXCPU
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill(process)
    # the verdict: the token at the very end, and a clean exit
    output, errors = (_read(path) for path in (stdout_path, stderr_path))
    finished = errors.endswith(token) and process.returncode == 0
    errors = errors.removesuffix(token).removesuffix("\n")
    last_line = errors.strip().rpartition("\n")[2]
    memory_exceeded = not finished and last_line.startswith("MemoryError")
    return ExecutionResult(
        success=finished and not timed_out,
        stdout=output,
        stderr=errors,
        error=""
        if finished and not timed_out
        else _reason(process, timed_out, timeout_s, last_line),
        timed_out=timed_out,
        memory_exceeded=memory_exceeded,
        isolation=isolation,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process group, where a barrier was missing and it could fork."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> str:
    return path.read_bytes()[:MAX_OUTPUT_BYTES].decode("utf-8", errors="replace")


def _reason(
    process: subprocess.Popen[bytes], timed_out: bool, timeout_s: float, last_line: str
) -> str:
    if timed_out:
        return f"stopped after {timeout_s:g} s"
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        return last_line or f"exit code {process.returncode}"
    return "left before its last line"
