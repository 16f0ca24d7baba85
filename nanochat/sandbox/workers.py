"""Workers as their owner sees them: started in the strongest way this machine grants, asked to run
one text at a time, replaced when one is lost.

Texts and outputs are files in memory that the owner makes; a worker is handed their descriptors and
never reads them.
"""

import functools
import json
import math
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.sandbox import confinement, syscalls

SOURCES = Path(__file__).resolve().parents[2]
LIBRARIES = ("/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom", "/dev/zero")
MAX_OUTPUT_BYTES = 1 << 20
MAX_PACKET = 1 << 16
START_S = 60.0  # until a new worker must have said what it holds
GRACE_S = 10.0  # after its time limit, until a program that did not end costs its worker
# Who makes the namespaces, and which of them hold for every program of a worker. Where bubblewrap
# may make some and a worker inside it none, each program gets a worker of its own.
BUBBLEWRAP, OWN, BUBBLEWRAP_ONCE = "bubblewrap", "worker", "bubblewrap for each program"
OUTSIDE = {
    BUBBLEWRAP: ("user", "network", "mount"),
    OWN: (),
    BUBBLEWRAP_ONCE: ("user", "network", "mount", "pid", "ipc"),
}
# worker.py, where bubblewrap shows it
INSIDE = "/worker"


class LostWorkerError(Exception):
    """A worker that ended, or does not answer."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    timeout_s        wall time; the CPU gets a second more
    memory_bytes     address space, of which the interpreter takes about 25 MiB
    scratch_bytes    of all its files together, where there is a mount namespace
    scratch_inodes   files and folders, likewise
    """

    timeout_s: float = 5.0
    memory_bytes: int = 256 << 20
    scratch_bytes: int = 16 << 20
    scratch_inodes: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be positive and finite")

    def resources(self) -> dict[str, int]:
        """Limits of the process, by their names in setrlimit(2)."""
        return {
            "RLIMIT_CPU": math.ceil(self.timeout_s) + 1,
            "RLIMIT_AS": int(self.memory_bytes),
            "RLIMIT_FSIZE": MAX_OUTPUT_BYTES,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_NPROC": 64,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_CORE": 0,
        }


@dataclass
class Job:
    """One text to run, and what became of it.

    role      program, candidate or tester (worker.py)
    channel   descriptor of the other end's calls; -1 for none
    outcome   what the worker answered: held, status, timed_out, finished; or {"lost": why}
    """

    role: str
    text: str
    limits: Limits
    required: Sequence[str]
    function: str = ""
    channel: int = -1
    outcome: dict[str, Any] = field(default_factory=dict)
    stdout: str = ""
    stderr: str = ""

    @property
    def held(self) -> tuple[str, ...]:
        """The barriers that held, in the order of BARRIERS."""
        held = self.outcome.get("held", {})
        return tuple(name for name in confinement.BARRIERS if held.get(name) == "")

    @property
    def last_line(self) -> str:
        """Of what it wrote to standard error."""
        return self.stderr.strip().rpartition("\n")[2]


class Worker:
    """A worker process.

    has_root  whether its programs have a root of their own
    once      whether it is for one program only

    Raises  LostWorkerError where it does not start.
    """

    def __init__(self, outside: str) -> None:
        self.owner = os.getpid()
        self.once = outside == BUBBLEWRAP_ONCE
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as complaint:
            try:
                self.process = subprocess.Popen(
                    _command(outside),
                    stdin=theirs.fileno(),
                    stdout=complaint,
                    stderr=complaint,
                    cwd="/",
                    env={"LANG": "C.UTF-8"},
                    start_new_session=True,
                )
            except OSError as error:
                self.socket.close()
                raise LostWorkerError(f"{outside}: {error}") from error
            theirs.close()
            try:
                self.has_root = not self._receive(START_S)["held"]["mount"]
            except LostWorkerError:
                self.close()
                complaint.seek(0)
                lines = complaint.read().decode(errors="replace").strip().splitlines()
                raise LostWorkerError(f"{outside}: {lines[-1] if lines else 'no answer'}") from None

    def start(self, job: Job, scratch: str) -> list[int]:
        """Send a job; returns the descriptors of its outputs."""
        request = {
            "role": job.role,
            "function": job.function,
            "timeout_s": job.limits.timeout_s,
            "scratch": scratch,
            "scratch_bytes": int(job.limits.scratch_bytes),
            "scratch_inodes": int(job.limits.scratch_inodes),
            "limits": job.limits.resources(),
            "required": list(job.required),
        }
        text = job.text.encode("utf-8", errors="surrogatepass")
        files: list[int] = []
        try:
            for name in ("text", "stdout", "stderr"):
                files.append(os.memfd_create(name, os.MFD_CLOEXEC))
            with os.fdopen(os.dup(files[0]), "wb") as file:
                file.write(text)
            os.lseek(files[0], 0, os.SEEK_SET)
            # standard output and error first: descriptors 1 and 2 of the program
            passed = [files[1], files[2], files[0], *([job.channel] if job.channel >= 0 else [])]
            socket.send_fds(self.socket, [json.dumps(request).encode()], passed)
        except OSError as error:
            for descriptor in files[1:]:
                os.close(descriptor)
            raise LostWorkerError(str(error)) from error
        finally:
            for descriptor in files[:1]:
                os.close(descriptor)
        return files[1:]

    def finish(self, job: Job, outputs: list[int]) -> None:
        """Wait for the end of a job that was started."""
        try:
            job.outcome = self._receive(job.limits.timeout_s + GRACE_S)
            job.stdout, job.stderr = map(_text_of, outputs)
        finally:
            for descriptor in outputs:
                os.close(descriptor)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self.socket.settimeout(timeout_s)
        try:
            packet = self.socket.recv(MAX_PACKET)
        except OSError as error:  # TimeoutError is one
            raise LostWorkerError(str(error)) from error
        answer = json.loads(packet) if packet else {"lost": True}
        if "lost" in answer:
            raise LostWorkerError("it ended")
        return answer

    def close(self) -> None:
        """End it, and with it all that it started."""
        self.socket.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


def _text_of(descriptor: int) -> str:
    data = os.pread(descriptor, MAX_OUTPUT_BYTES, 0)
    return data.decode("utf-8", errors="replace")


def _command(outside: str) -> list[str]:
    """An interpreter that becomes a worker, in bubblewrap's namespaces or making its own."""
    interpreter = os.path.realpath(sys.executable)
    readable = confinement.outermost([*_runtime(), *LIBRARIES, *DEVICES])
    wrapped = outside != OWN
    source = INSIDE if wrapped else str(SOURCES)
    config = {
        "source": source,
        "readable": readable,
        "outside": OUTSIDE[outside],
        "once": outside == BUBBLEWRAP_ONCE,
        "filter": seccomp_filter()[0].hex(),
    }
    begin = "import sys; sys.path.insert(0, sys.argv[2]); "
    begin += "from nanochat.sandbox.worker import main; main()"
    worker = [interpreter, "-I", "-c", begin, json.dumps(config), source]
    if not wrapped:
        return worker
    return [*_bubblewrap(readable, interpreter, outside == BUBBLEWRAP_ONCE), *worker]


def _runtime() -> Iterator[str]:
    """Folders of the standard library, and of the shared libraries that it loads."""
    yield sysconfig.get_path("stdlib")
    yield sysconfig.get_path("platstdlib")
    # a Python of the system has its libraries among all others, which have a folder for a machine
    prefix = Path(sys.base_prefix)
    system = Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "")
    yield str(system if system.is_dir() else Path("/usr/lib"))
    if prefix != Path("/usr"):
        yield str(prefix / "lib")


@functools.cache
def seccomp_filter() -> tuple[bytes, str]:
    """The filter and its origin; no bytes for a machine that has none."""
    try:
        return syscalls.bpf_filter(platform.machine())
    except ValueError:
        return b"", "none"


def _bubblewrap(readable: list[str], interpreter: str, once: bool) -> list[str]:
    """bwrap(1) with a root that holds the runtime and the worker, all namespaces new."""
    words = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user"]
    words += ["--uid", "0", "--gid", "0"]
    scratch = ["--dir", confinement.SCRATCH]
    if once:
        scratch = ["--size", str(Limits.scratch_bytes), "--tmpfs", confinement.SCRATCH]
    else:
        # for the namespaces of each program, within the new user namespace
        words += ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]
    for path in readable:
        if Path(path).is_symlink():
            words += ["--symlink", str(Path(path).readlink()), path]
        else:
            words += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    if not any(interpreter.startswith(f"{path}/") for path in readable):
        words += ["--ro-bind", interpreter, interpreter]
    package = SOURCES / "nanochat"
    for path in (package / "__init__.py", package / "sandbox"):
        words += ["--ro-bind", str(path), f"{INSIDE}/{path.relative_to(SOURCES)}"]
    return [*words, *scratch, "--remount-ro", "/", "--chdir", "/", "--"]


def ways_outside() -> list[str]:
    """How a worker can get its namespaces here, the preferred way first."""
    if sys.platform != "linux":
        return []
    return [BUBBLEWRAP, OWN, BUBBLEWRAP_ONCE] if shutil.which("bwrap") else [OWN]


def remove_tree(folder: Path) -> None:
    """Remove a folder that a hostile program filled, where scratch is no file system of its own.

    However deep: a folder's folders move up beside it, so no path becomes long, nothing recurses.
    Whatever their modes: they belong to this user, or this is root.
    """
    waiting = [folder]
    count = 0
    while waiting:
        current = waiting.pop()
        for entry in list(current.iterdir()):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
                continue
            entry.chmod(stat.S_IRWXU)
            count += 1
            waiting.append(entry.rename(folder.parent / f"{folder.name}.{count}"))
        current.rmdir()
