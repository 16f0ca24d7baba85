"""What a program's process does once it is confined: its text, run in one of three roles.

    program    a text, run to its end
    candidate  a text that defines a function; answers calls of it until the caller leaves
    tester     a text that calls this function in a candidate, through a channel (values.py)

Descriptors: 0 to 2 as everywhere; REPORT, where the worker reads FINISHED after the last line;
TEXT; and CHANNEL to the other role. A candidate has a REPORT too, and nobody asks it.
"""

import atexit
import contextlib
import json
import linecache
import os
import struct
import sys
import threading
import traceback
import types
from typing import Any

from nanochat.sandbox.values import Table, exception_named

REPORT, TEXT, CHANNEL = 3, 4, 5
FINISHED = b"finished"
MAX_MESSAGE = 16 << 20  # bytes of the arguments or the result of one call


class CandidateGoneError(BaseException):
    """The candidate does not answer; no `except Exception` of a test takes it for an answer."""


def run_text(role: str, path: str, function: str) -> int:
    """Run the text that TEXT holds; returns the exit code.

    path      what the program takes for its file
    function  that a candidate defines and a tester calls
    """
    source = b""
    while part := os.read(TEXT, 1 << 20):
        source += part
    os.close(TEXT)
    status = 1
    try:
        status = ROLES[role](source, path, function)
    except SystemExit as leaving:
        status = _exit_code(leaving)
    except BaseException as error:
        _explain(error)
    return max(status, _finalize())


def _finalize() -> int:
    """What an interpreter does at its end; 1 if something of it fails."""
    try:
        while waiting := [t for t in threading.enumerate() if _is_joined(t)]:
            waiting[0].join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException as error:
        _explain(error)
        return 1
    return 0


def _is_joined(thread: threading.Thread) -> bool:
    return thread is not threading.current_thread() and not thread.daemon


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return (leaving.code or 0) & 0xFF
    print(leaving.code, file=sys.stderr)
    return 1


def _explain(error: BaseException) -> None:
    """The traceback, from the program's own first frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        traceback.print_exception(type(error), error, trace)
        sys.stderr.flush()
    except BaseException:  # of a program that left no memory, or broke the stream
        del trace
        sys.modules["__main__"].__dict__.clear()
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}\n".encode())


def _execute(source: bytes, path: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a text as the main module; returns its globals."""
    module = types.ModuleType("__main__")
    module.__dict__.update(names, __file__=path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]
    sys.modules["__main__"] = module
    sys.argv = [path]
    lines = source.decode("utf-8", errors="replace").splitlines(keepends=True)
    linecache.cache[path] = (len(source), None, lines, path)
    exec(compile(source, path, "exec", dont_inherit=True, optimize=0), module.__dict__)
    return module.__dict__


def _program(source: bytes, path: str, function: str) -> int:
    _execute(source, path, {})
    if not _finalize():
        os.write(REPORT, FINISHED)
    return 0


def _candidate(source: bytes, path: str, function: str) -> int:
    """Answer calls of the function until the tester closes its end."""
    names = _execute(source, path, {})
    while request := _receive():
        table = Table()
        table.decode(request["nodes"])
        known = len(table.objects)
        answer: dict[str, Any] = {}
        try:
            args = [table.objects[i] for i in request["args"]]
            kwargs = {name: table.objects[i] for name, i in request["kwargs"].items()}
            if function not in names:
                raise NameError(f"name {function!r} is not defined")
            answer["result"] = table.add(names[function](*args, **kwargs))
            answer["nodes"] = table.encode(known)
        except Exception as error:
            answer = {"error": [type(error).__name__, str(error)]}
        _send(answer)
    return 0


def _tester(source: bytes, path: str, function: str) -> int:
    """Run the text with a function that the candidate computes."""
    gone: list[CandidateGoneError] = []

    def candidate(*args: Any, **kwargs: Any) -> Any:
        table = Table()
        indices = [table.add(value) for value in args]
        names = {name: table.add(value) for name, value in kwargs.items()}
        nodes = table.encode()
        try:
            _send({"nodes": nodes, "args": indices, "kwargs": names})
            answer = _receive()
            if "error" in answer:
                name, message = answer["error"]
                failure = exception_named(str(name), str(message))
            else:
                table.decode(answer["nodes"])
                return table.objects[answer["result"]]
        # whatever the other side wrote that is not an answer
        except (OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
            gone.append(CandidateGoneError(f"no answer from {function}"))
            raise gone[-1] from error
        raise failure

    candidate.__name__ = candidate.__qualname__ = function
    _execute(source, path, {function: candidate})
    if gone:  # a bare `except:` continued without an answer
        raise gone[0]
    if not _finalize():
        os.write(REPORT, FINISHED)
    return 0


ROLES = {"program": _program, "candidate": _candidate, "tester": _tester}


def _send(message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"{len(body)} bytes are more than {MAX_MESSAGE}")
    data = struct.pack("=I", len(body)) + body
    while data:
        data = data[os.write(CHANNEL, data) :]


def _receive() -> dict[str, Any]:
    """The next message; {} at the end."""
    head = _read_exactly(4)
    if not head:
        return {}
    (length,) = struct.unpack("=I", head)
    if length > MAX_MESSAGE:
        raise ValueError(f"{length} bytes are more than {MAX_MESSAGE}")
    message = json.loads(_read_exactly(length))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def _read_exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(CHANNEL, count - len(data))
        if not part:
            return b""
        data += part
    return data
