"""The barriers between a program and everything else, put up from inside, each where the kernel
grants it.

    once for a worker     user and network namespaces; a root of its own with nothing in it but the
                          Python runtime, read-only (bubblewrap makes these where it is installed)
    for each program      pid, IPC and mount namespaces that end with it, with a scratch folder of
                          limited bytes and inodes; limits; no capabilities; Landlock; seccomp

Every function that puts up a barrier raises OSError where the kernel refuses; `attempt` notes which
ones held. Only the standard library is used, by a process with a single thread.
Sources  namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), seccomp(2)
"""

import ctypes
import functools
import os
import resource
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

# in the order in which they are put up
BARRIERS = ("user", "network", "mount", "pid", "ipc", "landlock", "seccomp")
SCRATCH = "/scratch"  # in a program's own root
NOBODY = 65534

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
# calls that the C library has no function for: the same number on x86_64 and aarch64
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

LANDLOCK_VERSION_FLAG = 1
READ_EXECUTE = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
READ_WRITE = 1 << 1 | 1 << 2 | 1 << 14  # write file, read file, truncate
FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
# access rights a ruleset of each ABI version knows
FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _checked(_libc().syscall(number, *arguments), f"system call {number}")


def attempt(held: dict[str, str], barrier: str, put_up: Callable[[], object]) -> bool:
    """Put up a barrier, and note in `held` why the kernel refused, "" where it did not."""
    try:
        put_up()
        held[barrier] = ""
    except OSError as error:
        held[barrier] = str(error)
    return not held[barrier]


def unshare(flags: int) -> None:
    """Leave the namespaces of these CLONE_NEW flags for new ones."""
    _checked(_libc().unshare(flags), f"unshare({flags:#x})")


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends."""
    _checked(_libc().prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def untraceable() -> None:
    """No process of the same user may trace this one or read its memory."""
    _checked(_libc().prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def new_user_namespace() -> bool:
    """Become root of a new user namespace, which has no power outside it.

    Returns whether the namespace has a second user, NOBODY, for programs: only root may map two.
    """
    uid, gid = os.geteuid(), os.getegid()
    # the maps of two users are written from outside, by a child that stays outside
    waiting, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        os.read(waiting, 1)
        folder = Path("/proc") / str(os.getppid())
        status = 1
        try:
            for name in ("uid_map", "gid_map"):
                (folder / name).write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            status = 0
        finally:
            os._exit(status)
    try:
        unshare(CLONE_NEWUSER)
    finally:
        os.close(go)
        os.close(waiting)
        _, status = os.waitpid(helper, 0)
    if status == 0:
        return True
    own = Path("/proc/self")
    (own / "setgroups").write_text("deny")
    (own / "gid_map").write_text(f"0 {gid} 1")
    (own / "uid_map").write_text(f"0 {uid} 1")
    return False


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    encoded = (None if text is None else text.encode() for text in (source, target, kind))
    result = _libc().mount(*encoded, ctypes.c_ulong(flags), options.encode())
    _checked(result, f"mount({target})")


def _restrict_mount(path: str, attributes: int, recursive: bool) -> None:
    """Add mount attributes, keeping those that are there."""
    structure = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    _syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, structure, ctypes.c_size_t(32))


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that exist and are not inside another of them."""
    found = sorted({path for path in paths if os.path.lexists(path)}, key=len)
    return [p for p in found if not any(p.startswith(f"{q}/") for q in found)]


def new_root(readable: Iterable[str], machine: str) -> None:
    """A mount namespace whose root holds `readable`, read-only, SCRATCH, and nothing else."""
    if machine not in PIVOT_ROOT:
        raise OSError(f"the number of pivot_root is not known for {machine}")
    unshare(CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    # any folder would do that no part of the runtime is in
    root = "/proc"
    paths = outermost(readable)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    for path in paths:
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            target.symlink_to(Path(path).readlink())
            continue
        if Path(path).is_dir():
            target.mkdir()
        else:
            target.touch()
        mount(path, str(target), None, MS_BIND | MS_REC)
        device = 0 if path.startswith("/dev/") else ATTR_NODEV
        _restrict_mount(str(target), ATTR_RDONLY | ATTR_NOSUID | device, recursive=True)
    Path(root + SCRATCH).mkdir()
    # the old root is on top of the new one after this, and goes with the second line
    os.chdir(root)
    _syscall(PIVOT_ROOT[machine], b".", b".")
    _checked(_libc().umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")
    _restrict_mount("/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=False)


def scratch_filesystem(size_bytes: int, num_inodes: int, owner: int) -> None:
    """A mount namespace with an empty file system at SCRATCH, which ends with the namespace."""
    unshare(CLONE_NEWNS)
    options = f"size={size_bytes},nr_inodes={num_inodes},mode=700,uid={owner},gid={owner}"
    mount("tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def limit(limits: dict[str, int]) -> None:
    """Resource limits by name, soft and hard; CPU time gets a second between the two."""
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = value + 1 if name == "RLIMIT_CPU" else value
        ceiling = resource.getrlimit(number)[1]
        if ceiling != resource.RLIM_INFINITY:
            value, hard = min(value, ceiling), min(hard, ceiling)
        resource.setrlimit(number, (value, hard))


def become(uid: int) -> None:
    """Be this user and nobody else, in no other group."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def no_new_privileges() -> None:
    """No program gains privileges any more: required by Landlock and seccomp."""
    _checked(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def no_capabilities() -> None:
    """None now, and none to gain."""
    libc = _libc()
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those it does not have
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    _checked(libc.capset(header, bytes(24)), "capset")


def landlock_version() -> int:
    """ABI version of this kernel's Landlock. Raises OSError where there is none."""
    return _syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION_FLAG)


def landlock(readable: Iterable[str], scratch: str) -> None:
    """Only `readable` can be read and run, only `scratch` and /dev/null be written."""
    # 1. A ruleset denies every right that it names unless a rule allows it. Older kernels know
    # fewer rights and refuse unknown ones.
    version = landlock_version()
    rights = FS_RIGHTS[max(known for known in FS_RIGHTS if known <= version)]
    network = 0b11 if version >= 4 else 0  # bind and connect of TCP
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("=QQQ", rights, network, scoped)[:size]
    ruleset = _syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    # 2. Rules.
    rules = [*((path, READ_EXECUTE) for path in readable), (scratch, rights)]
    for path, access in [*rules, ("/dev/null", READ_WRITE)]:
        if not Path(path).exists():
            continue
        if not Path(path).is_dir():
            access &= FILE_RIGHTS
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & rights, parent)
        _syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        os.close(parent)
    # 3. From here on it holds for this process and everything it becomes; it cannot be undone.
    _syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def seccomp(code: bytes) -> None:
    """Install a BPF filter (syscalls.py) for this process and all it becomes."""
    if not code:
        raise OSError("there is no filter for this machine")
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    result = _libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)
    _checked(result, "prctl(PR_SET_SECCOMP)")
