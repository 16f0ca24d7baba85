"""Run a Python module as a user without privileges, for tests that root runs.

    python -m tests.support.unprivileged tests.sandbox.attacks --run

Interpreter, packages and this checkout may lie in folders that only root can enter: in a mount
namespace of its own, each of these is covered by an empty one in which nothing but they appears.
"""

import os
import sys
from pathlib import Path

from nanochat.sandbox import confinement
from tests.support.runs import ROOT


def closed_folder(path: Path) -> Path | None:
    """The first folder on the way to a path that others may not enter."""
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


def open_the_way(paths: list[Path]) -> None:
    """Make paths reachable for everyone, in a new mount namespace."""
    confinement.unshare(confinement.CLONE_NEWNS)
    confinement.mount("none", "/", None, confinement.MS_REC | confinement.MS_PRIVATE)
    kept = [(path, closed_folder(path), os.open(path, os.O_PATH)) for path in paths]
    for folder in {folder for _, folder, _ in kept if folder}:
        confinement.mount("tmpfs", str(folder), "tmpfs", 0, "mode=755")
    for path, folder, descriptor in kept:
        if folder:
            path.mkdir(parents=True)
            source = f"/proc/self/fd/{descriptor}"
            flags = confinement.MS_BIND | confinement.MS_REC
            confinement.mount(source, str(path), None, flags)


def main() -> None:
    paths = {Path(p).resolve() for p in (sys.base_prefix, sys.prefix, ROOT)}
    open_the_way([p for p in paths if not any(q in p.parents for q in paths)])
    confinement.become(confinement.NOBODY)
    os.chdir(ROOT)
    interpreter = str(Path(sys.prefix).resolve() / "bin" / "python")
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    environment = kept | {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    os.execve(interpreter, [interpreter, "-m", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
