"""The system calls that a Python program needs, as a seccomp filter: everything else is EPERM.

The filter is a BPF program over (call number, architecture, six arguments). It comes from
libseccomp through its Python binding where that is installed (`seccomp`, which libseccomp itself
ships, or `pyseccomp`), otherwise it is generated here; both from the one table below. A call that
is harmless or harmful depending on an argument has conditions:

    prctl(PR_SET_NAME)      allowed        prlimit64(0, ...)       allowed: the caller's own limits
    prctl(anything else)    EPERM          prlimit64(pid, ...)     EPERM

Not in the table, so refused: making processes, running programs, signals of any kind, sockets that
reach anyone, System V and POSIX IPC, modes and times of files, priorities, namespaces, mounts,
keys, tracing, bpf, io_uring.

Sources  seccomp(2), include/uapi/linux/{seccomp,filter,audit}.h; numbers: syscalls(2) tables of
         both architectures.
"""

import importlib
import struct
import tempfile
from dataclasses import dataclass
from types import ModuleType

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000
# name as platform.machine() has it: AUDIT_ARCH of the kernel
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # numbers from here on are the x32 calls of an x86_64 kernel
BINDINGS = ("seccomp", "pyseccomp")

LOW = 0xFFFFFFFF  # the kernel reads only this half of an int argument
WHOLE = 0xFFFFFFFF_FFFFFFFF

# name: its number on x86_64 and on aarch64; None where an architecture has no such call
CALLS: dict[str, tuple[int | None, int | None]] = {
    # memory
    "brk": (12, 214),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "msync": (26, 227),
    # open files
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fstat": (5, 80),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fallocate": (285, 47),
    "getdents64": (217, 61),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "fadvise64": (221, 223),
    "fstatfs": (138, 44),
    # files by name: Landlock and the mount namespace decide which
    "open": (2, None),
    "openat": (257, 56),
    "creat": (85, None),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "truncate": (76, 45),
    "umask": (95, 166),
    "statfs": (137, 43),
    # waiting
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "restart_syscall": (219, 128),
    "pause": (34, None),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    # handlers of its own signals
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    # questions about itself and the clock
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "times": (100, 153),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    # threads, and the end
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # allowed under CONDITIONS
    "clone": (56, 220),
    "prlimit64": (302, 261),
    "sched_getaffinity": (204, 123),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prctl": (157, 167),
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
}
# a caller is to take it for missing: glibc then uses clone, whose flags a filter can read
MISSING = {"clone3": (435, 435)}


@dataclass(frozen=True)
class Condition:
    """An argument that allows a call: `argument & mask == value`."""

    argument: int
    value: int
    mask: int = LOW


# CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM | SETTLS | PARENT_SETTID | CHILD_CLEARTID:
# what a C library's new thread is, with or without CLONE_DETACHED, and no process can be
NEW_THREAD = Condition(0, 0x003D0F00, LOW & ~0x00400000)
AF_UNIX = 1
# one of the conditions must hold
CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "clone": (NEW_THREAD,),
    "prlimit64": (Condition(0, 0),),
    "sched_getaffinity": (Condition(0, 0),),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: is it a terminal, what waits in it,
    # may it block, is it inherited
    "ioctl": tuple(Condition(1, x) for x in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no owner, no
    # signal, no lease, no lock on a file that others use too
    "fcntl": tuple(Condition(1, x) for x in (0, 1, 2, 3, 4, 1030, 1032)),
    "prctl": (Condition(0, 15), Condition(0, 16)),  # PR_SET_NAME, PR_GET_NAME of a thread
    # asyncio wakes its loop through a pair; without an address, bytes go to the other end only
    "socketpair": (Condition(0, AF_UNIX),),
    "sendto": (Condition(4, 0, WHOLE),),
}


def bpf_filter(machine: str) -> tuple[bytes, str]:
    """The filter for a machine, and where it came from: a binding's name, or "table".

    machine  as platform.machine() has it; one of ARCHITECTURES.
    Raises   ValueError for another machine.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(
            f"no seccomp filter for machine {machine!r}; known are {', '.join(ARCHITECTURES)}"
        )
    for name in BINDINGS:
        try:
            binding = importlib.import_module(name)
        except (ImportError, RuntimeError):  # RuntimeError: the binding without its library
            continue
        return from_libseccomp(binding, machine), name
    return from_table(machine), "table"


def from_libseccomp(binding: ModuleType, machine: str) -> bytes:
    """The filter as libseccomp writes it."""
    rules = binding.SyscallFilter(binding.ERRNO(1))
    rules.set_attr(binding.Attr.ACT_BADARCH, KILL)
    architecture = getattr(binding.Arch, machine.upper())
    if not rules.exist_arch(architecture):
        rules.add_arch(architecture)
        rules.remove_arch(binding.Arch.NATIVE)
    for name, numbers in {**CALLS, **MISSING}.items():
        number = numbers[list(ARCHITECTURES).index(machine)]
        if number is None:
            continue
        # by name: libseccomp has its own table of numbers
        if name in MISSING:
            rules.add_rule_exactly(binding.ERRNO(38), name)
        elif name not in CONDITIONS:
            rules.add_rule_exactly(binding.ALLOW, name)
        for condition in CONDITIONS.get(name, ()):
            compare = binding.Arg(
                condition.argument, binding.MASKED_EQ, condition.mask, condition.value
            )
            rules.add_rule_exactly(binding.ALLOW, name, compare)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


Instruction = tuple[int, int, int, int]
# opcodes of classic BPF, and where struct seccomp_data has its fields
LOAD, AND, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16


def from_table(machine: str) -> bytes:
    """The filter as a list of comparisons, one call after the other.

    Jumps are relative: (JUMP_EQUAL, 0, 1, v) skips one instruction unless the loaded word is v.
    The calls of another architecture have other numbers, so one of them ends the process.

        load architecture;  equal? else kill           load number;  an x32 call? kill
        equal to read?  allow                          ... every call without conditions
        equal to prctl?  load argument 0;  15? allow;  16? allow;  EPERM
        EPERM
    """
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        program += [(JUMP_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for name, numbers in {**CALLS, **MISSING}.items():
        number = numbers[list(ARCHITECTURES).index(machine)]
        if number is None:
            continue
        if name in CONDITIONS:
            block = [step for condition in CONDITIONS[name] for step in _comparison(condition)]
            block.append((RETURN, 0, 0, EPERM))
        else:
            block = [(RETURN, 0, 0, ENOSYS if name in MISSING else ALLOW)]
        program += [(JUMP_EQUAL, 0, len(block), number), *block]
    program.append((RETURN, 0, 0, EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _comparison(condition: Condition) -> list[Instruction]:
    """Allow if the condition holds, otherwise continue after it; a word is half an argument."""
    steps: list[Instruction] = [(RETURN, 0, 0, ALLOW)]
    for half in (1, 0):  # little-endian: the upper half comes second
        mask = condition.mask >> 32 * half & LOW
        value = condition.value >> 32 * half & LOW
        if mask:
            offset = ARGUMENTS + 8 * condition.argument + 4 * half
            test: list[Instruction] = [
                (LOAD, 0, 0, offset),
                (AND, 0, 0, mask),
                (JUMP_EQUAL, 0, len(steps), value),
            ]
            steps = test + steps
    return steps
