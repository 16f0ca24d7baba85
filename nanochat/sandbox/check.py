"""What the sandbox gets on this machine, as one JSON object.

    python -m nanochat.sandbox.check

    barriers  each of confinement.BARRIERS: true where programs get it, found by running one in it
    full      whether all of them are; programs are refused where they are not, unless
              --allow_weaker_sandbox is given
    way       who makes the namespaces: bubblewrap, or the worker itself
    seccomp   who wrote the filter: a binding of libseccomp, or our own table
    refused   for each way, what the kernel said of each barrier that it did not grant
    kernel    facts of the kernel that explain the rest

Exit code 0 where `full` is true, 1 where it is not.
"""

import json
import os
import platform
import sys
from pathlib import Path

from nanochat import command
from nanochat.sandbox import confinement
from nanochat.sandbox.execution import strongest_way, ways
from nanochat.sandbox.workers import Job, seccomp_filter

# settings that turn namespaces or Landlock off, on the systems that have them
SETTINGS = (
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/sys/kernel/security/lsm",
)


def report() -> dict[str, object]:
    """The object that is printed."""
    tried = ways()
    try:
        way, held = strongest_way(tried)
    except ValueError:
        way, held = "none", ()
    try:
        abi = confinement.landlock_version()
    except (OSError, AttributeError):  # AttributeError: a C library that is not Linux's
        abi = 0
    settings = {path: Path(path).read_text().strip() for path in SETTINGS if Path(path).exists()}
    return {
        "full": set(held) == set(confinement.BARRIERS),
        "barriers": {name: name in held for name in confinement.BARRIERS},
        "way": way,
        "seccomp": seccomp_filter()[1],
        "refused": {way: refusals(job) for way, job in tried.items()},
        "kernel": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "uid": os.getuid(),
            "landlock_abi": abi,
            "settings": settings,
        },
    }


def refusals(job: Job) -> dict[str, str]:
    """What the kernel said, by barrier; under "start" why nothing ran."""
    if "lost" in job.outcome:
        return {"start": job.outcome["lost"]}
    return {name: said for name, said in job.outcome["held"].items() if said}


def main() -> None:
    found = report()
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["full"] else 1)


if __name__ == "__main__":
    command.run(main)
