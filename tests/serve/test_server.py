"""The server around an engine: every way in, limits, a client that leaves; the terminal chat."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from nanochat.gpt import GPT, GPTConfig
from nanochat.infer.engine import Engine
from nanochat.serve.answer import AnswerReader
from nanochat.serve.server import Defaults, create_app
from nanochat.text.tokenizer import RustBPETokenizer
from scripts import chat_cli


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["hello there, what is two and three? " * 9], 285)


@pytest.fixture(scope="module")
def engine(tokenizer: RustBPETokenizer) -> Engine:
    model = GPT(GPTConfig(256, tokenizer.get_vocab_size(), 1, 1, 1, 32))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Engine(model, tokenizer, num_slots=2)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, Defaults(max_tokens=12))) as client:
        yield client


HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "seed": 1}


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
    assert openai["choices"][0]["message"] == {"role": "assistant", "content": want}
    streamed = client.post("/v1/chat/completions", json=HELLO | {"stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    chunks = [event["choices"][0] for event in events_of(streamed.text)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == want
    assert chunks[-1]["finish_reason"] == "stop"
    with client.websocket_connect("/ws") as socket:
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
    ],
)
def test_limits_are_named(client: TestClient, change: dict[str, Any], part: str) -> None:
    for path in ("/chat", "/chat/completions", "/v1/chat/completions"):
        answer = client.post(path, json=HELLO | change)
        assert answer.status_code == 400
        assert part in str(answer.json()["detail"])
    with client.websocket_connect("/ws") as socket:
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
        assert "ended early" in events[-1]["error"]
    assert client.post("/chat", json=HELLO).status_code == 200


def test_answers_are_sorted_into_parts(tokenizer: RustBPETokenizer) -> None:
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


def test_terminal_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = chat_cli.Settings(temperature=0.0, max_tokens=8)
    messages = [{"role": "user", "content": "hello"}]
    content = chat_cli.answer(engine, messages, settings)
    assert isinstance(content, str)
    assert capsys.readouterr().out == content + "\n"
    long = [
        {"role": role, "content": "there " * 60} for _ in range(3) for role in ("user", "assistant")
    ]
    chat_cli.answer(engine, [*long, *messages], settings)
    assert "old messages left out]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="shorten it"):
        chat_cli.answer(engine, [{"role": "user", "content": "x y " * 900}], settings)


def test_tool_calls_are_framed_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = "text"
    for kind, piece in (
        ("text", "is"),
        ("python", "2*3"),
        ("python_output", "6"),
        ("text", " six"),
    ):
        shown = chat_cli.show(kind, piece, shown)
    assert capsys.readouterr().out == "is [2*3 = 6] six"
