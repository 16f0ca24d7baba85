"""The server around an engine: every way in, limits, a client that leaves; the terminal chat."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.serve.answer import AnswerReader
from nanochat.serve.config import ServerConfig
from nanochat.serve.engine_thread import EngineThread
from nanochat.serve.server import create_app
from nanochat.text.tokenizer_base import Tokenizer
from tests.support.servers import tiny_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> Tokenizer:
    return engine.tokenizer


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    app = create_app(engine, ServerConfig(max_tokens=12, stall_timeout=0.5))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


SOCKET = "ws://127.0.0.1:8000/ws"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "seed": 1}


STREAMED = {"prompt": "hello", "stream": True}


def until(true: Callable[[], bool]) -> None:
    """Wait for something to come true: seconds at most, or the test fails."""
    for _ in range(500):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come true")


def events_of(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def test_page_health_and_stats(client: TestClient) -> None:
    for path in ("/", "/ui.html"):
        page = client.get(path)
        assert page.status_code == 200
        assert "<title>nanochat</title>" in page.text
        assert "src=" not in page.text  # nothing is loaded from elsewhere
    assert client.get("/health").json() == {"status": "ok", "error": ""}
    before = client.get("/stats").json()
    client.post("/chat", json=HELLO)
    after = client.get("/stats").json()
    assert after["requests"] == before["requests"] + 1
    assert before["tokens"] < after["tokens"] <= before["tokens"] + 12
    assert (after["slots"], after["context"]) == (2, 256)


def test_all_ways_give_one_answer(client: TestClient) -> None:
    want = client.post("/chat", json=HELLO).json()["response"]
    assert want
    short = {"message": "hello", "temperature": 0}
    assert client.post("/chat", json=short).json()["response"] == want
    events = events_of(client.post("/chat/completions", json=HELLO).text)
    assert events[-1] == {"done": True}
    assert "".join(e["token"] for e in events[:-1] if e["type"] == "text") == want
    openai = client.post("/v1/chat/completions", json=HELLO).json()
    assert openai["object"] == "chat.completion"
    assert openai["choices"][0]["message"] == {
        "role": "assistant",
        "content": want,
        "refusal": None,
    }
    streamed = client.post("/v1/chat/completions", json=HELLO | {"stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    chunks = [event["choices"][0] for event in events_of(streamed.text)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == want
    assert chunks[-1]["finish_reason"] == openai["choices"][0]["finish_reason"] == "length"
    with client.websocket_connect(SOCKET) as socket:
        for _ in range(2):
            socket.send_text(json.dumps(HELLO))
            got = ""
            while not (message := socket.receive_json()).get("done"):
                got += message["token"] if message["type"] == "text" else ""
            assert got == want


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"messages": []}, "needs messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "none of them empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must be from the user"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "8,001 characters in a message"),
        ({"messages": [{"role": "user", "content": "x y" * 2000}]}, "the context leaves"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_limits_are_named(client: TestClient, change: dict[str, Any], part: str) -> None:
    for path in ("/chat", "/chat/completions"):
        answer = client.post(
            path, content=json.dumps(HELLO | change), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert part in str(answer.json()["detail"])
    with client.websocket_connect(SOCKET) as socket:
        socket.send_text(json.dumps(HELLO | change))
        assert part in socket.receive_json()["error"]


def test_old_turns_are_dropped_not_refused(client: TestClient) -> None:
    turns = [
        {"role": role, "content": "hello there " * 10}
        for _ in range(6)
        for role in ("user", "assistant")
    ]
    body = HELLO | {"messages": [*turns, {"role": "user", "content": "hello"}]}
    assert client.post("/chat", json=body).status_code == 200


def test_tool_calls_in_the_history_are_tokens_again(client: TestClient) -> None:
    content = [
        {"type": "text", "text": "it is "},
        {"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"},
    ]
    messages = [*HELLO["messages"], {"role": "assistant", "content": content}, *HELLO["messages"]]
    assert client.post("/chat", json=HELLO | {"messages": messages}).status_code == 200


def test_health_answers_while_the_engine_is_busy(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.step

    def slow() -> bool:
        time.sleep(0.1)
        return real()

    monkeypatch.setattr(engine, "step", slow)
    thread = threading.Thread(target=client.post, args=("/chat",), kwargs={"json": HELLO})
    thread.start()
    time.sleep(0.2)
    assert client.get("/stats").json()["active"] == 1
    assert client.get("/health").json()["status"] == "ok"
    thread.join()


def test_an_engine_that_fails_ends_its_requests_and_goes_on(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def broken(*args: Any) -> Any:
            raise RuntimeError("out of memory")

        patch.setattr(engine.model, "head", broken)
        events = events_of(client.post("/chat/completions", json=HELLO).text)
        assert events[-1] == {"error": "the generation failed: RuntimeError: out of memory"}
        failed = client.post("/chat", json=HELLO)
        assert (failed.status_code, failed.json()["detail"]) == (503, events[-1]["error"])
        openai = client.post("/v1/chat/completions", json=HELLO)
        assert (openai.status_code, openai.json()["error"]["type"]) == (503, "server_error")
        *_, last = events_of(client.post("/v1/completions", json=STREAMED).text)
        assert last["error"]["code"] == "generation_failed"
        sick = client.get("/health")
        assert (sick.status_code, sick.json()["status"]) == (503, "failing")
        assert "out of memory" in sick.json()["error"]
    until(lambda: client.get("/health").status_code == 200)  # with nobody asking for anything
    assert client.post("/chat", json=HELLO).status_code == 200


def test_a_step_that_never_ends_is_noticed(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, real = threading.Event(), engine.step

    def stuck() -> bool:
        going.wait(20)
        return real()

    monkeypatch.setattr(engine, "step", stuck)
    until(lambda: client.get("/health").status_code == 503)
    assert "more than 0.5 seconds" in client.get("/health").json()["error"]
    going.set()
    until(lambda: client.get("/health").status_code == 200)


def test_a_process_that_only_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, killed = tiny_engine(), []
    thread = EngineThread(engine, stall_timeout=60, give_up_after=0.2)

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.model, "head", broken)
    monkeypatch.setattr(os, "kill", lambda *how: killed.append(how))
    engine.submit(Request([1], 1))
    thread.start()
    until(lambda: bool(killed))
    thread.stop()
    assert killed[0] == (os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("top_p", [1e-46, 5e-324])
def test_no_setting_harms_the_others(client: TestClient, top_p: float) -> None:
    together = [
        HELLO | {"top_p": top_p, "temperature": 1.0},
        HELLO | {"top_k": 200, "seed": -(2**63)},
        HELLO,
    ]
    alone = client.post("/chat", json=HELLO).json()
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda body: client.post("/chat", json=body), together))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[2].json() == alone
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "parsing the body"),
        (b'{"message": "\xff"}', "parsing the body"),
        (b"7", "valid dict"),
        (b"", "required"),
        (b'{"messages": [], "\\ud800": 1, "temperature": 9}', "temperature"),
        (b'{"temperature": NaN, "message": "x"}', "temperature"),
    ],
)
def test_bodies_that_are_no_requests(client: TestClient, body: bytes, part: str) -> None:
    for path in ("/chat", "/v1/chat/completions", "/tokenize"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        if path == "/chat":
            assert part.lower() in answer.json()["detail"].lower()
        else:
            assert answer.json()["error"]["type"] == "invalid_request_error"


def test_numbers_for_prometheus(client: TestClient) -> None:
    def numbers() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}

    before = numbers()
    client.post("/v1/chat/completions", json=HELLO)
    client.get("/nobody/serves/this")
    client.post("/tokenize", json={})
    after = numbers()
    grown = {name for name in after if after[name] > before.get(name, 0)}
    assert {
        'nanochat_requests_total{route="/v1/chat/completions",status="200"}',
        'nanochat_requests_total{route="other",status="404"}',
        'nanochat_requests_total{route="/tokenize",status="400"}',
        'nanochat_tokens_total{kind="prompt"}',
        'nanochat_tokens_total{kind="generated"}',
        'nanochat_answers_total{finish_reason="length"}',
        "nanochat_first_token_seconds_count",
        "nanochat_answer_seconds_sum",
    } <= grown
    assert after["nanochat_slots"] == 2
    assert (after["nanochat_active"], after["nanochat_healthy"]) == (0, 1)


def test_answers_are_sorted_into_parts(tokenizer: Tokenizer) -> None:
    reader = AnswerReader(tokenizer)
    special = tokenizer.encode_special
    ids = [
        *tokenizer.encode("is "),
        special("<|python_start|>"),
        *tokenizer.encode("2*3"),
        special("<|python_end|>"),
        special("<|output_start|>"),
        *tokenizer.encode("6"),
        special("<|output_end|>"),
        *tokenizer.encode(" é"),
    ]
    pieces = [reader.add(token) for token in ids]
    assert reader.content == [
        {"type": "text", "text": "is "},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": " é"},
    ]
    assert "\ufffd" not in "".join(text for _, text in pieces)
    plain = AnswerReader(tokenizer)
    for token in tokenizer.encode("two"):
        plain.add(token)
    assert plain.content == "two"
