"""Confine this process and become another program: the first half of every sandboxed run.

python -I -S confinement.py LIMITS BARRIERS READABLE SCRATCH INTERPRETER PROGRAM

Limits, landlock rules and seccomp filter outlast exec, and the program starts in an interpreter
that holds nothing of this one. Only the standard library is used: it must work without site.
Sources  landlock(7), seccomp(2), include/uapi/linux/{landlock,seccomp,filter,audit}.h
"""

import ast
import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

BARRIERS = ("landlock", "seccomp")
PROBES = {
    "landlock": "try: open('/etc/passwd')\nexcept PermissionError: print('held', end='')\n",
    "seccomp": "import os\ntry: os.fork()\nexcept PermissionError: print('held', end='')\n",
}

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 38, 22, 24
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION_FLAG = 1
READ_EXECUTE = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
READ_FILE = 1 << 2
FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
# access rights a ruleset of each ABI version knows
FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
KILL = 0x80000000
CLONE_THREAD = 0x00010000
# AUDIT_ARCH, then numbers of the calls: clone and clone3 apart
ARCHITECTURES = {
    "x86_64": (0xC000003E, 56, 435),
    "aarch64": (0xC00000B7, 220, 435),
}
# call: its number on x86_64, on aarch64 (None: it has none there)
DENIED = {
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
}


def _syscall(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    result = libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def no_new_privileges(libc: ctypes.CDLL) -> None:
    """Required by both barriers; drops the capabilities that root would keep across exec."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those it does not have
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def landlock(libc: ctypes.CDLL, readable: list[str], writable: str) -> None:
    """Only `readable` can be read and run, only `writable` changed."""
    # 1. A ruleset denies every right that it names unless a rule allows it. Older kernels know
    # fewer rights and refuse unknown ones.
    version = _syscall(libc, LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION_FLAG)
    rights = FS_RIGHTS[max(known for known in FS_RIGHTS if known <= version)]
    network = 0b11 if version >= 4 else 0  # bind and connect of TCP
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("=QQQ", rights, network, scoped)[:size]
    ruleset = _syscall(libc, LANDLOCK_CREATE_RULESET, attributes, size, 0)
    # 2. Rules: read and execute what the interpreter needs, do anything in the scratch folder.
    for path, access in [*((p, READ_EXECUTE) for p in readable), (writable, rights)]:
        if not Path(path).exists():
            continue
        if not Path(path).is_dir():
            access &= FILE_RIGHTS
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & rights, parent)
        _syscall(libc, LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        os.close(parent)
    # 3. From here on it holds for this process and everything it becomes; it cannot be undone.
    _syscall(libc, LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def seccomp_filter(machine: str) -> bytes:
    """The BPF program: calls of DENIED give EPERM, clone only makes threads."""
    audit, clone, clone3 = ARCHITECTURES[machine]
    load_arch, load_number, load_flags = ((0x20, 0, 0, offset) for offset in (4, 0, 16))

    def jump_equal(value: int, then: int, otherwise: int) -> tuple[int, int, int, int]:
        return (0x15, then, otherwise, value)

    def give(value: int) -> tuple[int, int, int, int]:
        return (0x06, 0, 0, value)

    # Jumps are relative: jump_equal(v, 1, 0) skips the next instruction where the value is v. The
    # calls of another architecture have other numbers, so one of them ends the process.
    program = [load_arch, jump_equal(audit, 1, 0), give(KILL), load_number]
    if machine == "x86_64":  # the x32 calls have numbers of their own
        program += [(0x35, 0, 1, 0x40000000), give(KILL)]
    # glibc falls back from clone3, whose flags a filter cannot read, to clone
    program += [jump_equal(clone3, 0, 1), give(ENOSYS)]
    which = list(ARCHITECTURES).index(machine)
    for numbers in DENIED.values():
        if numbers[which] is not None:
            program += [jump_equal(numbers[which], 0, 1), give(EPERM)]
    # clone with CLONE_THREAD makes a thread, without it a process; all other calls are allowed
    program += [
        jump_equal(clone, 0, 3),
        load_flags,
        (0x45, 1, 0, CLONE_THREAD),
        give(EPERM),
        give(ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def seccomp(libc: ctypes.CDLL) -> None:
    """Install the filter for this process and all it becomes."""
    code = seccomp_filter(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def main(arguments: list[str]) -> None:
    limits, barriers, readable = (ast.literal_eval(text) for text in arguments[:3])
    scratch, interpreter, program = arguments[3:]
    # the program inherits all of this: limits, landlock rules and seccomp filter survive exec
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if barriers:
        libc = ctypes.CDLL(None, use_errno=True)
        no_new_privileges(libc)
        if "landlock" in barriers:
            landlock(libc, readable, scratch)
        if "seccomp" in barriers:
            seccomp(libc)
    os.execv(interpreter, [interpreter, "-I", program])


if __name__ == "__main__":
    main(sys.argv[1:])
