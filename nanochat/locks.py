"""One writer at a time: locks that say who holds them.

    with OwnedLock(folder / ".run", "use another --model_tag"):
        ...                     .run.lock is locked, .run.owner.json says by whom

The lock is the operating system's and ends with its process, however that ends; the file beside it
only tells. A lock that can be taken although an owner is written there was left by a process that
died on this machine, or the file system does not lock between machines: then only a person knows.
"""

import json
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nanochat.common import Runtime, replace_file

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of Linux: one for each start of a machine
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock."""

    pid: int
    host: str
    boot: str  # tells two machines of one name apart, as containers may be
    since: str
    command: str

    @classmethod
    def of_this_process(cls) -> "Owner":
        """This process, from now on."""
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), boot, now, shlex.join(sys.argv))

    def is_elsewhere(self) -> bool:
        """Whether it runs, or ran, on a machine whose processes cannot be seen from here."""
        here = Owner.of_this_process()
        return self.host != here.host and (not self.boot or self.boot != here.boot)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


class LockedError(ValueError):
    """Another process holds the lock."""


class OwnedLock:
    """Held from the moment it is made until close(), or until the process ends.

    base    the files are <base>.lock and <base>.owner.json.
    remedy  what to do where another process holds it, for the message.
    wait    wait for the other process, saying so, instead of raising.
    Raises  LockedError (a ValueError) naming the owner, OSError where the files cannot be written.
    """

    def __init__(self, base: Path, remedy: str, wait: bool = False) -> None:
        self.owner_file = base.with_name(f"{base.name}.owner.json")
        self._lock = FileLock(base.with_name(f"{base.name}.lock"))
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            said = ""
            while problem := self._take(remedy):
                if not wait:
                    raise LockedError(problem)
                if problem != said:
                    print(f"waiting: {problem}", flush=True)
                said = problem
                time.sleep(POLL_SECONDS)
            replace_file(self.owner_file, json.dumps(asdict(Owner.of_this_process()), indent=1))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot lock the folder ({error.strerror}); check the permission to write there, "
                "or set NANOCHAT_BASE_DIR to a folder you may write",
                str(base.parent),
            ) from error

    def close(self) -> None:
        """Let others have it."""
        if self._lock.is_locked:
            self.owner_file.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "OwnedLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self, remedy: str) -> str:
        """Why the lock cannot be had; "" once it is."""
        folder = self.owner_file.parent
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return f"{folder} is in use by {self._owner() or 'another process'}; {remedy}"
        owner = self._owner()
        if owner is not None and owner.is_elsewhere():
            self._lock.release()
            return (
                f"{folder} is in use by {owner}, which cannot be asked from here; {remedy}, or if "
                f"it has ended, delete {self.owner_file}"
            )
        if owner is not None:
            print(f"{folder} was left by {owner}, which has ended; taken over", flush=True)
        return ""

    def _owner(self) -> Owner | None:
        """Who wrote the file; None where there is none, or it was cut short."""
        try:
            return Owner(**json.loads(self.owner_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def lock_for_all_ranks(base: Path, remedy: str, runtime: Runtime) -> OwnedLock | None:
    """The lock of a run, held by rank 0; None elsewhere.

    Raises  LockedError on every rank if rank 0 cannot have it.
    """
    lock, problem = None, ""
    if runtime.is_main:
        try:
            lock = OwnedLock(base, f"wait for it, stop it, or {remedy}")
        except LockedError as error:
            problem = str(error)
    if runtime.all_reduce(torch.tensor(float(bool(problem)), device=runtime.device)):
        raise LockedError(problem or f"rank 0 cannot have {base.parent}")
    return lock
