"""Several processes behind one port: they share the work, and one that dies is started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from nanochat.serve.workers import bind
from tests.support.runs import ROOT

# Two processes with a tiny model each, as scripts/chat_web.py starts them.
PROGRAM = """
import sys
from nanochat.serve import workers
from nanochat.serve.config import ServerConfig

def build(index):
    from tests.support.servers import tiny_app  # with torch: seconds that only the workers need
    return tiny_app(index)

if __name__ == "__main__":
    listening = workers.bind("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    sys.exit(workers.serve(build, listening, ServerConfig(), 2))
"""
SLOW = 120  # seconds for processes to start on a machine that does much else


@pytest.fixture
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, str]]:
    path = tmp_path_factory.mktemp("program") / "two_workers.py"
    path.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process, f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()
        assert process.wait(SLOW) == 0


def until(true: Callable[[], object]) -> None:
    for _ in range(SLOW * 10):
        with contextlib.suppress(httpx.HTTPError):
            if true():
                return
        time.sleep(0.1)
    raise AssertionError("it did not come true")


def worker(client: httpx.Client) -> tuple[int, int]:
    """Number and id of the process that answers."""
    model = client.get("/v1/models").json()["data"][0]
    return model["worker"], model["pid"]


def workers(url: str) -> dict[int, int]:
    """Those that answer 20 connections: id by number."""
    found = []
    for _ in range(20):
        with httpx.Client(base_url=url, timeout=SLOW) as client:
            found.append(worker(client))
    return dict(found)


def processes(url: str) -> int:
    """How many are healthy, by the sums that any of them shows."""
    for line in httpx.get(f"{url}/metrics", timeout=SLOW).text.splitlines():
        if line.startswith("nanochat_healthy "):
            return int(float(line.split()[1]))
    return 0


@pytest.mark.long
def test_one_that_dies_in_mid_stream_is_replaced(
    running: tuple[subprocess.Popen, str],
) -> None:
    _, url = running
    body = {"prompt": "hello", "max_tokens": 200, "stream": True}
    until(lambda: len(workers(url)) == 2)
    until(lambda: processes(url) == 2)
    with httpx.Client(base_url=url, timeout=SLOW) as client:
        number, victim = worker(client)
        # the same connection, and so the same process
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):  # its client is told; nobody else notices
                list(lines)
    for _ in range(10):
        assert httpx.get(f"{url}/health", timeout=SLOW).status_code == 200
    until(lambda: len(workers(url)) == 2)
    assert workers(url)[number] != victim
    until(lambda: processes(url) == 2)
    whole = httpx.post(f"{url}/v1/completions", json=body | {"stream": False}, timeout=SLOW)
    assert whole.json()["usage"]["completion_tokens"] == 200


def test_an_address_that_is_taken_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*choose another"),
    ):
        bind("127.0.0.1", taken.getsockname()[1])
