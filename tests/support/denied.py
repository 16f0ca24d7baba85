"""Run Python where the kernel refuses system calls, as a container's own filter makes it.

    python -m tests.support.denied unshare,landlock_create_ruleset -m tests.sandbox.attacks

`clone` stands for clone with a flag of a new namespace, `prctl` for a seccomp filter of one's own.
"""

import os
import platform
import struct
import sys

from nanochat.sandbox import confinement
from nanochat.sandbox.syscalls import ALLOW, ARCHITECTURES, EPERM

NUMBERS = {
    "unshare": (272, 97),
    "clone": (56, 220),
    "landlock_create_ruleset": (444, 444),
    "prctl": (157, 167),
}
LOAD, JUMP_EQUAL, JUMP_IF_ANY, RETURN = 0x20, 0x15, 0x45, 0x06
# calls that are refused for one argument only: how the first one is compared
FIRST = {
    "clone": (JUMP_IF_ANY, 1, 0, 0x7E020000),  # CLONE_NEW flags
    "prctl": (JUMP_EQUAL, 1, 0, confinement.PR_SET_SECCOMP),
}


def deny(names: list[str]) -> None:
    """EPERM for these calls, from here on."""
    which = list(ARCHITECTURES).index(platform.machine())
    refuse = (RETURN, 0, 0, EPERM)
    program = [(LOAD, 0, 0, 0)]
    for name in names:
        block = [refuse]
        if name in FIRST:
            block = [(LOAD, 0, 0, 16), FIRST[name], (RETURN, 0, 0, ALLOW), refuse]
        program += [(JUMP_EQUAL, 0, len(block), NUMBERS[name][which]), *block]
    program.append((RETURN, 0, 0, ALLOW))
    confinement.no_new_privileges()
    confinement.seccomp(b"".join(struct.pack("=HBBI", *step) for step in program))


def main() -> None:
    deny(sys.argv[1].split(","))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])


if __name__ == "__main__":
    main()
