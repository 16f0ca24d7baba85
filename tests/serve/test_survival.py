"""What clients do to a server, a real one on loopback: leave, flood, dawdle, lie who they are."""

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus

from nanochat.infer.engine import Engine
from nanochat.serve import streams
from nanochat.serve.config import ServerConfig
from tests.support.servers import idle, serving, slowed, tiny_engine

STEP = 0.01  # seconds of the engine for a token
CONFIG = ServerConfig(
    max_tokens=200,
    max_queue=3,
    max_body_bytes=20_000,
    read_timeout=0.5,
    request_timeout=30,
    max_connections=40,
)
LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200}
ROUTES = [
    ("/chat", LONG),
    ("/chat/completions", LONG),
    ("/v1/chat/completions", LONG),
    ("/v1/chat/completions", LONG | {"stream": True}),
    ("/v1/completions", {"prompt": ["hello", "there"], "max_tokens": 200}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 200, "stream": True, "n": 2}),
]
Address = tuple[str, int]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return slowed(tiny_engine(), STEP)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[Address]:
    with serving(engine, CONFIG) as address:
        yield address


@pytest.fixture
def url(address: Address) -> str:
    return f"http://{address[0]}:{address[1]}"


@pytest.fixture
def ws(address: Address) -> str:
    return f"ws://{address[0]}:{address[1]}/ws"


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    until(lambda: idle(engine))


def until(true: Callable[[], bool]) -> None:
    """Wait for something to come true: ten seconds at most, or the test fails."""
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come true")


def request_bytes(path: str, body: Any, **headers: str) -> bytes:
    """An HTTP request, by hand."""
    content = json.dumps(body).encode()
    lines = {"Host": "127.0.0.1", "Content-Type": "application/json"}
    lines |= {"Content-Length": str(len(content))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def dial(address: Address, *parts: bytes) -> socket.socket:
    connected = socket.create_connection(address, timeout=10)
    for part in parts:
        connected.sendall(part)
    return connected


def answer_to(address: Address, *parts: bytes) -> str:
    """All that comes back until the server closes."""
    received = b""
    with dial(address, *parts) as connected:
        while more := connected.recv(65536):
            received += more
    return received.decode()


class TestLeaving:
    @pytest.mark.parametrize(("path", "body"), ROUTES)
    def test_a_client_that_leaves_is_not_answered(
        self,
        monkeypatch: pytest.MonkeyPatch,
        engine: Engine,
        address: Address,
        path: str,
        body: dict[str, Any],
    ) -> None:
        # slower still, so that a busy machine notices who has left long before the answers end
        slow, step = 5 * STEP, engine.step
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(slow - STEP), step())[1])
        clients = [dial(address, request_bytes(path, body)) for _ in range(2)]
        until(lambda: engine.num_active == 2)
        began = time.monotonic()
        for client in clients:
            client.close()
        until(lambda: idle(engine))
        # far sooner than the answers would have ended, which is not a matter of speed
        assert time.monotonic() - began < 200 * slow

    @pytest.mark.parametrize(("path", "body"), ROUTES[:4])
    def test_nor_one_that_leaves_while_it_waits(
        self, engine: Engine, address: Address, path: str, body: dict[str, Any]
    ) -> None:
        answered = [dial(address, request_bytes("/chat", LONG)) for _ in range(2)]
        until(lambda: engine.num_active == 2)
        waiting = [dial(address, request_bytes(path, body)) for _ in range(2)]
        until(lambda: engine.num_waiting == 2)
        for client in waiting:
            client.close()
        until(lambda: engine.num_waiting == 0)
        assert engine.num_active == 2
        for client in answered:
            client.close()

    def test_nor_a_websocket_that_leaves_while_it_waits(
        self, engine: Engine, address: Address, ws: str
    ) -> None:
        answered = [dial(address, request_bytes("/chat", LONG)) for _ in range(2)]
        until(lambda: engine.num_active == 2)
        with websockets.sync.client.connect(ws) as client:
            client.send(json.dumps(LONG))
            until(lambda: engine.num_waiting == 1)
        until(lambda: engine.num_waiting == 0)
        assert engine.num_active == 2
        for client in answered:
            client.close()

    def test_nor_a_websocket_that_closes_or_breaks(self, engine: Engine, ws: str) -> None:
        for graceful in (True, False):
            clients = [websockets.sync.client.connect(ws) for _ in range(2)]
            for client in clients:
                client.send(json.dumps(LONG))
                assert json.loads(client.recv())
            assert engine.num_active == 2
            for client in clients:
                if graceful:
                    client.close()
                else:
                    client.socket.close()
            until(lambda: idle(engine))

    def test_a_stop_string_frees_the_slot(self, engine: Engine, url: str) -> None:
        asked = LONG | {"temperature": 0}
        whole = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        text = whole["choices"][0]["message"]["content"]
        short = httpx.post(f"{url}/v1/chat/completions", json=asked | {"stop": text[2:6]}).json()
        assert short["choices"][0]["finish_reason"] == "stop"
        assert short["usage"]["completion_tokens"] < 50
        until(lambda: idle(engine))


class TestLimits:
    def test_a_full_queue_says_when_to_come_again(
        self, engine: Engine, address: Address, url: str, ws: str
    ) -> None:
        clients = [dial(address, request_bytes("/chat", LONG)) for _ in range(5)]
        until(lambda: (engine.num_active, engine.num_waiting) == (2, 3))
        for path, body in ROUTES:
            refused = httpx.post(url + path, json=body)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
        with websockets.sync.client.connect(ws) as client:
            client.send(json.dumps(LONG))
            said = json.loads(client.recv())
            assert "wait already" in said["error"]
            assert said["retry_after"] >= 1
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        for client in clients:
            client.close()
        until(lambda: idle(engine))
        assert httpx.post(f"{url}/chat", json=LONG | {"max_tokens": 1}).status_code == 200

    def test_bodies(self, address: Address, url: str) -> None:
        large = LONG | {"messages": [{"role": "user", "content": "x" * 30_000}]}
        for path in ("/chat", "/v1/chat/completions", "/tokenize"):
            assert httpx.post(url + path, json=large).status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(5):
                yield b"x" * 10_000

        streamed = httpx.post(f"{url}/v1/completions", content=chunks())
        assert streamed.status_code == 413
        assert streamed.json()["error"]["code"] == "body_too_large"
        lying = answer_to(address, request_bytes("/chat", LONG, **{"Content-Length": "9" * 30}))
        assert " 4" in lying.partition("\r\n")[0]

    def test_clients_that_dawdle_are_left(self, address: Address) -> None:
        whole = request_bytes("/chat", LONG)
        assert answer_to(address) == ""  # says nothing
        assert answer_to(address, whole[:30]) == ""  # half a header
        late = answer_to(address, whole[:-5], b" ")  # a body that does not end
        assert late.startswith("HTTP/1.1 408")
        # a second request on the same connection that does not end either
        with dial(address, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as client:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.sendall(whole[:30])
            assert client.recv(65536) == b""

    def test_an_answer_that_takes_too_long(self, engine: Engine) -> None:
        with serving(engine, replace(CONFIG, request_timeout=0.2)) as (host, port):
            url = f"http://{host}:{port}"
            late = httpx.post(f"{url}/v1/chat/completions", json=LONG)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            events = httpx.post(f"{url}/chat/completions", json=LONG).text.split("\n\n")
            assert "took more than 0.2 seconds" in json.loads(events[-2][6:])["error"]
            until(lambda: idle(engine))

    def test_connections(self, address: Address, url: str) -> None:
        open_ = [dial(address) for _ in range(CONFIG.max_connections)]
        time.sleep(0.1)
        assert httpx.get(f"{url}/health").status_code == 503
        for connected in open_:
            connected.close()
        until(lambda: httpx.get(f"{url}/health").status_code == 200)

    def test_a_reader_that_has_stopped_reading_is_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed, sent = [], []

        async def events() -> Any:
            for i in range(10):
                yield f"data: {i}\n\n"

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 3:
                await asyncio.sleep(60)

        stream = streams.EventStream(events(), lambda: closed.append(True), send_timeout=0.05)
        asyncio.run(stream({"type": "http"}, receive, send))
        assert (len(sent), closed) == (3, [True])

    def test_a_silent_stream_shows_that_it_lives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "KEEP_ALIVE", 0.01)

        async def slow() -> Any:
            await asyncio.sleep(0.05)
            yield "data: 1\n\n"

        async def collect() -> list[str]:
            return [text async for text in streams.with_keep_alive(slow())]

        *comments, last = asyncio.run(collect())
        assert last == "data: 1\n\n"
        assert set(comments) == {": waiting\n\n"}


class TestWebSocket:
    def test_messages_are_answered_in_order(self, ws: str) -> None:
        with websockets.sync.client.connect(ws) as client:
            for count in (3, 5):
                client.send(json.dumps(LONG | {"max_tokens": count, "temperature": 0}))
            for _ in (3, 5):
                while not (said := json.loads(client.recv())).get("done"):
                    assert said["token"]

    @pytest.mark.parametrize("text", ["", "{", "7", '{"message": 5}', '{"messages": []}'])
    def test_a_wrong_message_is_an_error_and_no_end(self, ws: str, text: str) -> None:
        with websockets.sync.client.connect(ws) as client:
            client.send(text)
            assert json.loads(client.recv())["error"]
            client.send(json.dumps({"message": "hello", "max_tokens": 1}))
            assert "error" not in json.loads(client.recv())

    @pytest.mark.parametrize(
        ("sent", "code"),
        [([b"\x00\xff"], 1003), (["x" * 30_000], 1009), ([json.dumps(LONG)] * 12, 1013)],
    )
    def test_what_ends_it(self, ws: str, sent: list[Any], code: int) -> None:
        with websockets.sync.client.connect(ws) as client, contextlib.suppress(ConnectionClosed):
            for message in sent:
                client.send(message)
            while True:
                client.recv()
        assert client.close_code == code


class TestDoor:
    def test_hosts(self, url: str) -> None:
        def status(host: str) -> int:
            return httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code

        for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "10.1.2.3", socket.gethostname()):
            assert status(host) == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.example", "", "[::"):
            assert status(host) in (400, 403)

    def test_origins(self, url: str, ws: str) -> None:
        def status(origin: str) -> int:
            body = {"prompt": "x"}
            return httpx.post(f"{url}/tokenize", json=body, headers={"Origin": origin}).status_code

        assert status(url) == 200
        for origin in ("https://evil.example", "null", "", "http://127.0.0.1:1", url + ".example"):
            assert status(origin) == 403
            with pytest.raises(InvalidStatus) as refused:
                websockets.sync.client.connect(ws, additional_headers={"Origin": origin})
            assert refused.value.response.status_code == 403
        with websockets.sync.client.connect(ws, additional_headers={"Origin": url}):
            pass

    def test_allowed_names_and_pages(self, engine: Engine) -> None:
        config = replace(
            CONFIG, allowed_hosts=("Chat.example",), allowed_origins=("https://a.org",)
        )
        with serving(engine, config) as (host, port):
            url = f"http://{host}:{port}"
            headers = {"Host": "chat.example", "Origin": "https://a.org"}
            answer = httpx.post(f"{url}/tokenize", json={"prompt": "x"}, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["Access-Control-Allow-Origin"] == "https://a.org"
            preflight = headers | {"Access-Control-Request-Method": "POST"}
            assert httpx.options(f"{url}/tokenize", headers=preflight).status_code == 200
            headers["Origin"] = "https://b.org"
            assert httpx.post(f"{url}/tokenize", json={}, headers=headers).status_code == 403

    def test_a_key(self, engine: Engine) -> None:
        with serving(engine, replace(CONFIG, api_key="s\u00e9cret")) as (host, port):
            url = f"http://{host}:{port}"

            def status(path: str, given: str | None) -> int:
                headers = {} if given is None else {"Authorization": given.encode()}
                return httpx.get(url + path, headers=headers).status_code

            for path in ("/", "/ui.html", "/health"):
                assert status(path, None) == 200
            for path in ("/v1/models", "/stats", "/metrics", "/openapi.json", "/nothing"):
                assert status(path, None) == 401
            for given in (
                "",
                "Bearer",
                "Bearer wrong",
                "s\u00e9cret",
                "Basic s\u00e9cret",
                "Bearer \xff",
            ):
                assert status("/v1/models", given) == 401
            assert status("/v1/models", "Bearer s\u00e9cret") == 200
            assert status("/v1/models", "bearer  s\u00e9cret") == 200
            for query, right in (
                ("", False),
                ("?api_key=wrong", False),
                ("?api_key=s%C3%A9cret", True),
            ):
                with contextlib.ExitStack() as stack:
                    if not right:
                        stack.enter_context(pytest.raises(InvalidStatus))
                    stack.enter_context(
                        websockets.sync.client.connect(f"ws://{host}:{port}/ws{query}")
                    )


def hammer(address: Address, seed: int, ends: float, seen: list[int]) -> None:
    """One client: asks again and again, and leaves whenever it likes."""
    rng = random.Random(seed)
    while time.monotonic() < ends:
        path, body = rng.choice(ROUTES)
        sent = request_bytes(path, body | {"max_tokens": rng.randint(1, 60)})
        if rng.random() < 0.1:
            sent = sent[: rng.randrange(len(sent))]
        with contextlib.suppress(OSError), dial(address, sent) as client:
            client.settimeout(rng.choice((0.01, 0.1, 0.5)))
            received = client.recv(64)
            if received.startswith(b"HTTP/1.1 "):
                seen.append(int(received[9:12]))
            if rng.random() < 0.5:
                client.recv(10**6)


@pytest.mark.parametrize(
    ("clients", "seconds"), [(10, 3), pytest.param(100, 60, marks=pytest.mark.slow)]
)
def test_clients_come_and_go(
    engine: Engine, address: Address, url: str, clients: int, seconds: float
) -> None:
    ends = time.monotonic() + seconds
    seen: list[list[int]] = [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=hammer, args=(address, i, ends, seen[i])) for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: idle(engine))
    statuses = {status for each in seen for status in each}
    assert 200 in statuses
    assert statuses <= {200, 400, 408, 429, 503}  # 503: more connections than are allowed
    until(lambda: httpx.get(f"{url}/health").status_code == 200)
    assert httpx.post(f"{url}/chat", json=LONG | {"max_tokens": 2}).status_code == 200
