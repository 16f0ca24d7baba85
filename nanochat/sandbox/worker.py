"""A worker: starts once, then forks a confined Python process for each program it is asked for.

    worker    reads requests; its root and its user and network namespaces are its programs' too
      keeper    new pid, IPC and mount namespaces, which end with it, and everything inside
        init      process 1 of the pid namespace: starts the program, stops it at its time limit
          program   no capabilities, limits, Landlock, seccomp; then program.py runs the text

Text never passes through the worker: a program reads its own from a descriptor, after the fork, so
no program can find the text of another one in the memory it was forked with.

A request is one packet, JSON with the descriptors [stdout, stderr, text, channel]; its answer is
one too, JSON alone.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import platform
import resource
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from nanochat.sandbox import confinement
from nanochat.sandbox.program import FINISHED, REPORT, run_text

MAX_PACKET = 1 << 16
MAX_DESCRIPTORS = 256
REFUSED = 125  # exit code of a program that was not started
# what most programs import; they find it there
WARM = ("bisect collections copy dataclasses datetime decimal enum fractions functools hashlib "
        "heapq itertools math operator random re statistics string typing")  # fmt: skip
STANDARD_INPUT = 0


def main() -> None:
    """Serve requests from the socket that is this process's standard input."""
    config = json.loads(sys.argv[1])
    sys.path.remove(config["source"])
    # so that all descriptors can be closed one by one
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_DESCRIPTORS, MAX_DESCRIPTORS))
    requests = socket.socket(fileno=os.dup(STANDARD_INPUT))
    os.dup2(os.open(os.devnull, os.O_RDONLY), STANDARD_INPUT)
    for name in WARM.split():
        importlib.import_module(name)
    config["held"] = dict.fromkeys(config["outside"], "")
    config["owner"] = 0  # of a program, within the user namespace
    if not config["outside"]:
        enter(config)
    config["filter"] = bytes.fromhex(config["filter"])
    gc.collect()
    gc.freeze()  # a collection in a program would copy the pages of everything here
    requests.send(json.dumps({"held": config["held"]}).encode())
    while True:
        packet, descriptors, _, _ = socket.recv_fds(requests, MAX_PACKET, 4)
        if not packet:
            return
        reader, writer = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            requests.close()
            os.close(reader)
            _leave(keep, config | json.loads(packet), writer, descriptors)
        for descriptor in (writer, *descriptors):
            os.close(descriptor)
        os.waitpid(keeper, 0)
        # everything that ran is gone, and what init wrote is in the pipe
        answer = os.read(reader, MAX_PACKET)
        os.close(reader)
        requests.send(answer or b'{"lost": true}')
        if config["once"]:
            return


def enter(config: dict[str, Any]) -> None:
    """The namespaces of all programs, as far as the kernel grants them."""
    held: dict[str, str] = config["held"]
    second_user: list[bool] = []
    confinement.attempt(held, "user", lambda: second_user.append(confinement.new_user_namespace()))
    network = confinement.CLONE_NEWNET | confinement.CLONE_NEWUTS
    confinement.attempt(held, "network", lambda: confinement.unshare(network))
    readable, machine = config["readable"], platform.machine()
    rooted = confinement.attempt(held, "mount", lambda: confinement.new_root(readable, machine))
    # another user can read a runtime only where the folders that lead to it are our own root's
    if rooted and (second_user[0] if second_user else os.geteuid() == 0):
        config["owner"] = confinement.NOBODY


def _leave(work: Any, *arguments: Any) -> NoReturn:
    """The life of a forked process: it must not come back into the caller's frames."""
    status = REFUSED
    try:
        status = work(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def keep(config: dict[str, Any], answer: int, descriptors: list[int]) -> int:
    """New namespaces for one program, init in them, and the end of all of it."""
    confinement.die_with_parent()
    held: dict[str, str] = config["held"]
    if config["once"]:
        return _wait_for(config, answer, descriptors)
    if not held["mount"]:
        size, inodes, owner = config["scratch_bytes"], config["scratch_inodes"], config["owner"]
        confinement.attempt(
            held, "mount", lambda: confinement.scratch_filesystem(size, inodes, owner)
        )
    confinement.attempt(held, "pid", lambda: confinement.unshare(confinement.CLONE_NEWPID))
    confinement.attempt(held, "ipc", lambda: confinement.unshare(confinement.CLONE_NEWIPC))
    return _wait_for(config, answer, descriptors)


def _wait_for(config: dict[str, Any], answer: int, descriptors: list[int]) -> int:
    init = os.fork()
    if init == 0:
        _leave(watch, config, answer, descriptors)
    os.waitpid(init, 0)
    return 0


def watch(config: dict[str, Any], answer: int, descriptors: list[int]) -> int:
    """Run the program, stop it at its time limit, and say how it ended."""
    confinement.die_with_parent()
    confinement.untraceable()
    reader, report = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(reader)
        _leave(run, config, [os.dup(STANDARD_INPUT), *descriptors[:2], report, *descriptors[2:]])
    os.close(report)
    for descriptor in descriptors:
        os.close(descriptor)
    # a descriptor of the process becomes readable when it ends
    handle = os.pidfd_open(program)
    timed_out = not select.select([handle], [], [], config["timeout_s"])[0]
    # a group of its own; what left it, where seccomp is missing, ends with the pid namespace
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            end(program, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    os.set_blocking(reader, False)
    try:
        said, _, end = os.read(reader, MAX_PACKET).partition(b"\n")
    except BlockingIOError:  # it left a process that has the other end
        said, end = b"", b""
    outcome = {
        # written before the first line of the program ran
        "held": json.loads(said or b"{}"),
        "status": status,
        "timed_out": timed_out or status == -signal.SIGXCPU,
        "finished": end == FINISHED and status == 0,
    }
    os.write(answer, json.dumps(outcome).encode())
    return 0


def run(config: dict[str, Any], descriptors: list[int]) -> int:
    """Become the program: every barrier, then its text."""
    # 1. Descriptors 0 to 5 are its own, in this order; nothing else stays open.
    stdin, stdout, stderr, report, text, *channel = descriptors
    spare = [
        fcntl.fcntl(fd, fcntl.F_DUPFD, 100)
        for fd in (stdin, stdout, stderr, report, text, *channel)
    ]
    for number, descriptor in enumerate(spare):
        os.dup2(descriptor, number)
    os.closerange(len(spare), MAX_DESCRIPTORS)
    os.setsid()
    # 2. Barriers, the ones that the others need first.
    held: dict[str, str] = config["held"]
    scratch = config["scratch"]
    os.chdir(scratch)
    os.environ.clear()
    os.environ.update({"LANG": "C.UTF-8", "PATH": "", "HOME": scratch, "TMPDIR": scratch})
    limits = config["limits"]
    if held["user"]:
        # it would count the processes of this user everywhere
        del limits["RLIMIT_NPROC"]
    confinement.limit(limits)
    if config["owner"]:
        confinement.become(config["owner"])
    confinement.no_capabilities()
    confinement.no_new_privileges()
    confinement.attempt(held, "landlock", lambda: confinement.landlock(config["readable"], scratch))
    confinement.attempt(held, "seccomp", lambda: confinement.seccomp(config["filter"]))
    os.write(REPORT, json.dumps(held).encode() + b"\n")
    if any(held[name] for name in config["required"]):
        return REFUSED
    # 3. Its text.
    return run_text(config["role"], f"{scratch}/program.py", config["function"])
