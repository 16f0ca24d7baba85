"""Processes that serve one port.

One process serves from where it is started. Several share one listening socket, each with a model
and an engine of its own on a GPU of its own; whichever is free accepts a connection. The process
that started them only watches: one that dies is started again, and the others continue.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import multiprocess
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from nanochat import command
from nanochat.serve.config import ServerConfig
from nanochat.serve.metrics import FOLDER_VARIABLE

SHUTDOWN_SECONDS = 10  # for answers that are being written when the server is asked to end
PING_SECONDS = 20.0  # between two pings of a WebSocket, and for its answer
UNREAD_FRAMES = 8  # of a WebSocket
# A peer that is gone without a word is noticed after about a minute: probes after IDLE seconds,
# every INTERVAL seconds, COUNT of them; what was sent is unacknowledged for USER_TIMEOUT ms.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0  # seconds before a process that died is started again
LASTED = 60.0  # seconds; one that ran so long is started again at once

Build = Callable[[int], FastAPI]


def bind(host: str, port: int) -> socket.socket:
    """A socket that drops peers which are gone. It listens once a model is there to answer.

    Raises  ValueError if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as undo:
            undo.callback(listening.close)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if hasattr(socket, name):  # not on every system
                    listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            listening.bind(address)
            undo.pop_all()
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from error
    return listening


class HttpProtocol(AutoHTTPProtocol):
    """uvicorn's, but a client that does not send its headers in time is left.

    read_timeout  seconds, from a class made for it
    """

    read_timeout: float
    transport: Any  # these three are the base's
    cycle: Any
    loop: Any

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen: Any = None
        self._look_later()

    def _look_later(self) -> None:
        self.loop.call_later(self.read_timeout, self._look)

    def _look(self) -> None:
        # a WebSocket has taken the connection over: it has its pings
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._seen is self.cycle:  # between two requests since the last look
            self.transport.close()
            return
        self._seen = self.cycle if idle else self
        self._look_later()


def server_for(app: FastAPI, config: ServerConfig) -> uvicorn.Server:
    """A server of one process, with all limits."""
    protocol = type("HttpProtocol", (HttpProtocol,), {"read_timeout": config.read_timeout})
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws_max_size=config.max_body_bytes,
            ws_max_queue=UNREAD_FRAMES,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=PING_SECONDS,
            limit_concurrency=config.max_connections,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
    )


def serve(build: Build, listening: socket.socket, config: ServerConfig, num_workers: int) -> int:
    """Serve until a signal comes; returns the exit code.

    build  makes the application of process number 0, 1, ...; for several processes it is pickled.
    """
    if num_workers == 1:
        _run(server_for(build(0), config), listening)
        return 0
    return Supervisor(build, listening, config, num_workers).run()


class Supervisor:
    """Keeps several processes running."""

    def __init__(
        self, build: Build, listening: socket.socket, config: ServerConfig, num_workers: int
    ) -> None:
        self._context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._run = partial(_run_worker, build, listening, config)
        self._workers: dict[int, BaseProcess] = {}
        self._started: dict[int, float] = {}
        self._pauses = dict.fromkeys(range(num_workers), FIRST_PAUSE)
        self._folder = tempfile.mkdtemp(prefix="nanochat-metrics-")
        self._ending = threading.Event()

    def run(self) -> int:
        """Until SIGINT or SIGTERM, or until a process finds that it was called wrongly."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._ending.set())
        os.environ[FOLDER_VARIABLE] = self._folder  # for the processes alone
        try:
            for index in self._pauses:
                self._start(index)
            while not self._ending.is_set():
                ended = connection.wait([w.sentinel for w in self._workers.values()], timeout=0.2)
                for index, worker in list(self._workers.items()):
                    if worker.sentinel in ended and not self._ending.is_set():
                        if worker.exitcode == command.USAGE:
                            return command.USAGE
                        self._replace(index, worker)
            return 0
        finally:
            self._stop()
            shutil.rmtree(self._folder, ignore_errors=True)
            del os.environ[FOLDER_VARIABLE]

    def _start(self, index: int) -> None:
        worker = self._context.Process(target=self._run, args=(index,), daemon=True)
        worker.start()
        self._workers[index], self._started[index] = worker, time.monotonic()

    def _replace(self, index: int, worker: BaseProcess) -> None:
        lasted = time.monotonic() - self._started[index]
        pause = 0.0 if lasted > LASTED else self._pauses[index]
        self._pauses[index] = FIRST_PAUSE if lasted > LASTED else min(2 * pause, LAST_PAUSE)
        message = f"process {index} ended with {worker.exitcode}; starting it again in {pause:g} s"
        print(message, file=sys.stderr, flush=True)
        assert worker.pid is not None
        multiprocess.mark_process_dead(worker.pid, self._folder)
        if not self._ending.wait(pause):
            self._start(index)

    def _stop(self) -> None:
        for worker in self._workers.values():
            worker.terminate()
        ends = time.monotonic() + SHUTDOWN_SECONDS + 5
        for worker in self._workers.values():
            worker.join(max(0.0, ends - time.monotonic()))
            worker.kill()
            worker.join()


def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended, and raises it once more
        server.run(sockets=[listening])


def _run_worker(build: Build, listening: socket.socket, config: ServerConfig, index: int) -> None:
    def run() -> None:
        server = server_for(build(index), config)
        threading.Thread(target=end_with_parent, args=(server,), daemon=True).start()
        _run(server, listening)

    def end_with_parent(server: uvicorn.Server) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        connection.wait([parent.sentinel])
        server.should_exit = True

    command.run(run)
