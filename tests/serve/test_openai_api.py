"""OpenAI's API, by OpenAI's own client, against what the engine says itself."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingSettings
from nanochat.serve.answer import AnswerReader, StopStrings
from nanochat.serve.config import ServerConfig
from nanochat.serve.openai_shapes import TokenNames
from nanochat.serve.prompt import fit_prompt
from tests.support.servers import CONTEXT, idle, serving, tiny_engine

HELLO: Any = [{"role": "user", "content": "hello"}]
BE = {"type": "text", "text": "be "}
GREEDY: Any = {"model": "nanochat", "messages": HELLO, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(num_slots=4)


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    config = ServerConfig(max_tokens=12, about={"checkpoint": "sft/d4/000010"})
    with serving(engine, config) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    for _ in range(200):
        if idle(engine):
            return
        time.sleep(0.01)
    raise AssertionError("a request continues after its answer")


def answer(engine: Engine, max_tokens: int = 12, **options: Any) -> tuple[str, Any]:
    """What the engine answers to HELLO: its text, and the events."""
    tokens = fit_prompt(engine.tokenizer, HELLO, CONTEXT).tokens
    sampling = SamplingSettings(**{"temperature": 0, **options})
    (handle,) = engine.complete([Request(tokens, max_tokens, sampling, top_logprobs=2)])
    reader = AnswerReader(engine.tokenizer)
    pieces = [reader.add(token) for token in handle.tokens] + [reader.finish()]
    return "".join(text for kind, text in pieces if kind == "text"), handle


def refused(body: dict[str, Any], url: str, path: str = "chat/completions") -> dict[str, Any]:
    """The error of a request that must be refused."""
    response = httpx.post(f"{url}/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


class TestChats:
    def test_an_answer_is_the_engines(self, client: openai.OpenAI, engine: Engine) -> None:
        text, handle = answer(engine)
        got = client.chat.completions.create(**GREEDY)
        assert got.choices[0].message.content == text
        assert got.choices[0].finish_reason == handle.finish_reason == "length"
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(handle.request.tokens)
        assert (got.usage.completion_tokens, got.usage.total_tokens) == (
            12,
            12 + got.usage.prompt_tokens,
        )
        assert (got.model, got.object) == ("nanochat", "chat.completion")

    def test_an_answer_that_stops_says_so(
        self, client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, whole = answer(engine)
        monkeypatch.setattr(engine, "stop_tokens", (whole.tokens[5],))
        text, handle = answer(engine)
        assert handle.finish_reason == "stop"
        got = client.chat.completions.create(**GREEDY)
        assert (got.choices[0].message.content, got.choices[0].finish_reason) == (text, "stop")
        assert got.usage is not None
        assert got.usage.completion_tokens == len(handle.events)

    def test_streams_are_the_answer_in_parts(self, client: openai.OpenAI, engine: Engine) -> None:
        text, handle = answer(engine)
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(**GREEDY, **options))
        *parts, last = chunks
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == len(handle.events)
        assert all(chunk.usage is None for chunk in parts)
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == text
        assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["length"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert len(parts) > 6

    def test_choices_and_seeds(self, client: openai.OpenAI, engine: Engine) -> None:
        asked = GREEDY | {"n": 6, "seed": 5, "temperature": 1.0, "top_p": 0.9}
        got = client.chat.completions.create(**asked)
        options = {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 50}
        want = [answer(engine, **options, sample=i)[0] for i in range(6)]
        assert [choice.index for choice in got.choices] == list(range(6))
        assert [choice.message.content for choice in got.choices] == want
        assert len({*want}) > 3
        assert client.chat.completions.create(**asked).choices == got.choices
        streamed = [""] * 6
        for chunk in client.chat.completions.create(**asked, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert streamed == want

    def test_log_probabilities(self, client: openai.OpenAI, engine: Engine) -> None:
        text, handle = answer(engine)
        asked = GREEDY | {"logprobs": True, "top_logprobs": 2}
        (choice,) = client.chat.completions.create(**asked).choices
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert [token.logprob for token in content] == pytest.approx(handle.logprobs, abs=1e-4)
        said = b"".join(bytes(token.bytes or []) for token in content)
        assert said.decode(errors="replace") == text
        for token, event in zip(content, handle.events, strict=True):
            got = [other.logprob for other in token.top_logprobs]
            assert got == pytest.approx([p for _, p in event.top], abs=1e-4)
        streamed: list[Any] = []
        for chunk in client.chat.completions.create(**asked, stream=True):
            if chunk.choices[0].logprobs:
                streamed += chunk.choices[0].logprobs.content or []
        assert [token.token for token in streamed] == [token.token for token in content]
        plain = client.chat.completions.create(**GREEDY)
        assert plain.choices[0].logprobs is None

    @pytest.mark.parametrize("cut", [(2, 5), (0, 1), (3, 9)])
    @pytest.mark.parametrize("stream", [False, True])
    def test_stop_strings(
        self, client: openai.OpenAI, engine: Engine, cut: tuple[int, int], stream: bool
    ) -> None:
        text, handle = answer(engine)
        stop = text[slice(*cut)]
        options: Any = {"stop": ["never said", stop], "logprobs": True}
        asked = GREEDY | options
        if stream:
            chunks = [
                chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)
            ]
            got = "".join(chunk.delta.content or "" for chunk in chunks)
            reason = chunks[-1].finish_reason
            named = [t.token for c in chunks if c.logprobs for t in c.logprobs.content or []]
        else:
            (choice,) = client.chat.completions.create(**asked).choices
            got, reason = choice.message.content or "", choice.finish_reason
            assert choice.logprobs is not None
            named = [token.token for token in choice.logprobs.content or []]
        assert (got, reason) == (text[: text.index(stop)], "stop")
        names = TokenNames(engine.tokenizer, engine.tokenizer.token_bytes())
        assert named == [names.name(token) for token in handle.tokens[: len(named)]]
        shown = [names.text(handle.tokens[: max(0, n)])[0] for n in (len(named) - 1, len(named))]
        assert not cut[0] or len(shown[0]) <= len(got) <= len(shown[1])
        alone = client.chat.completions.create(**(GREEDY | {"stop": stop}))
        assert alone.choices[0].message.content == got

    def test_what_cannot_stop_is_not_held_back(self, client: openai.OpenAI, engine: Engine) -> None:
        text, _ = answer(engine)
        got = client.chat.completions.create(**GREEDY, stop=text[-2:] + "more")
        assert got.choices[0].message.content == text
        assert got.choices[0].finish_reason == "length"

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "system", "content": "be brief"}, *HELLO],
            [{"role": "developer", "content": "be brief"}, *HELLO],
            [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *HELLO],
            [
                {
                    "role": "system",
                    "content": [{"type": "text", "text": t} for t in ("be ", "brief")],
                },
                {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            ],
        ],
    )
    def test_a_system_message_reaches_the_model_as_text(
        self, url: str, engine: Engine, messages: Any
    ) -> None:
        plain = [{"role": "system", "content": "be brief"}, *HELLO]
        want = fit_prompt(engine.tokenizer, plain, CONTEXT).tokens
        got = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["tokens"]
        assert got == want
        assert "be brief\n\nhello" in engine.tokenizer.decode(got)

    def test_several_system_messages_become_one(self, url: str, engine: Engine) -> None:
        messages = [{"role": r, "content": r} for r in ("system", "developer", "user")]
        got = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["tokens"]
        assert "system\n\ndeveloper\n\nuser<|user_end|>" in engine.tokenizer.decode(got)

    def test_an_answer_goes_back_into_the_history(self, client: openai.OpenAI) -> None:
        message = client.chat.completions.create(**GREEDY).choices[0].message
        if not message.content:
            message.content = "x"
        history = [*HELLO, message.model_dump(), *HELLO]
        assert client.chat.completions.create(**GREEDY | {"messages": history}).choices

    def test_lengths(self, client: openai.OpenAI, engine: Engine, url: str) -> None:
        prompt = len(fit_prompt(engine.tokenizer, HELLO, CONTEXT).tokens)
        room = CONTEXT + 1 - prompt
        body = {key: GREEDY[key] for key in ("messages", "temperature")}
        got = client.chat.completions.create(**GREEDY | {"max_tokens": room})
        assert got.usage is not None
        assert got.usage.completion_tokens <= room
        del got
        for name in ("max_tokens", "max_completion_tokens"):
            short = httpx.post(f"{url}/v1/chat/completions", json=body | {name: 3}).json()
            assert short["usage"]["completion_tokens"] == 3
            assert refused(body | {name: room + 1}, url)["code"] == "context_length_exceeded"
        assert (
            httpx.post(f"{url}/v1/chat/completions", json=body).json()["usage"]["completion_tokens"]
            == 12
        )
        long = [{"role": "user", "content": "x y " * 300}]
        error = refused(body | {"messages": long}, url)
        assert error["code"] == "context_length_exceeded"
        assert f"context is {CONTEXT} tokens" in error["message"]

    @pytest.mark.parametrize(
        ("change", "param", "code"),
        [
            ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
            (
                {"response_format": {"type": "json_object"}},
                "response_format",
                "unsupported_parameter",
            ),
            ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
            ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
            ({"presence_penalty": False}, "presence_penalty", "unsupported_parameter"),
            ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
            ({"nonsense": 1}, "nonsense", "unknown_parameter"),
            ({"temperature": 2.5}, "temperature", "invalid_value"),
            ({"temperature": "1"}, "temperature", "invalid_value"),
            ({"top_p": -0.1}, "top_p", "invalid_value"),
            ({"top_k": -1}, "top_k", "invalid_value"),
            ({"seed": 2**70}, "seed", "invalid_value"),
            ({"seed": 1.5}, "seed", "invalid_value"),
            ({"n": 0}, "n", "invalid_value"),
            ({"n": 129}, "n", "invalid_value"),
            ({"n": 100}, "n", "invalid_value"),  # more than slots and queue together
            ({"max_tokens": 0}, "max_tokens", "invalid_value"),
            ({"max_tokens": -5}, "max_tokens", "invalid_value"),
            ({"max_tokens": True}, "max_tokens", "invalid_value"),
            ({"max_completion_tokens": 4}, None, "invalid_value"),
            ({"top_logprobs": 2}, None, "invalid_value"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
            ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
            ({"stop": ""}, "stop", "invalid_value"),
            ({"stop": ["a"] * 17}, "stop", "invalid_value"),
            ({"stop": ["a", 5]}, "stop[1]", "invalid_value"),
            ({"messages": []}, "messages", "invalid_value"),
            ({"messages": "hello"}, "messages", "invalid_value"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
            (
                {"messages": [{"role": "user", "content": "x", "name": "bob"}]},
                "messages[0].name",
                "unsupported_parameter",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
                "messages[0].content[0].type",
                "invalid_value",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]},
                "messages[0]",
                "invalid_value",
            ),
        ],
    )
    def test_what_is_not_supported_is_refused(
        self, url: str, change: dict[str, Any], param: str | None, code: str
    ) -> None:
        error = refused(GREEDY | change, url)
        assert (error["param"], error["code"]) == (param, code)

    def test_what_asks_for_nothing_special_is_accepted(self, client: openai.OpenAI) -> None:
        plain = client.chat.completions.create(**GREEDY)
        same = client.chat.completions.create(
            **GREEDY,
            frequency_penalty=0,
            presence_penalty=0.0,
            logit_bias={},
            tools=[],
            response_format={"type": "text"},
            user="someone",
            n=1,
            store=False,
            stop=None,
            seed=None,
        )
        assert same.choices == plain.choices

    def test_other_models_do_not_exist(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(**GREEDY | {"model": "gpt-4"})
        assert caught.value.code == "model_not_found"

    def test_a_failure_in_mid_stream_is_its_last_event(
        self, client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = client.chat.completions.create(**GREEDY | {"max_tokens": 200}, stream=True)
        next(stream)

        def broken(*_: Any) -> None:
            raise IndexError("planted")

        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "head", broken)
            with pytest.raises(openai.APIError, match="IndexError: planted"):
                list(stream)
        assert client.chat.completions.create(**GREEDY).choices


class TestCompletions:
    def test_a_text_is_continued_as_a_document(self, client: openai.OpenAI, engine: Engine) -> None:
        tokens = engine.tokenizer.encode("hello", prepend="<|bos|>")
        request = Request(tokens, 9, SamplingSettings(temperature=0), calculator=False)
        (handle,) = engine.complete([request])
        want = engine.tokenizer.decode(handle.tokens)
        asked: Any = {"model": "nanochat", "temperature": 0, "max_tokens": 9}
        got = client.completions.create(prompt="hello", **asked)
        assert got.choices[0].text == want
        assert got.usage is not None
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(tokens), 9)
        echoed = client.completions.create(prompt="hello", echo=True, **asked)
        assert echoed.choices[0].text == "hello" + want
        streamed = client.completions.create(prompt=tokens, echo=True, stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in streamed) == "hello" + want
        assert client.completions.create(prompt="hello", model="nanochat").usage is not None

    def test_batches_keep_their_order(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "nanochat", "max_tokens": 7, "temperature": 1, "seed": 3}
        texts = ["hello", "what is", "two and three", "hello", "there"]
        together = client.completions.create(prompt=texts, n=2, **asked)
        assert [choice.index for choice in together.choices] == list(range(10))
        alone = [client.completions.create(prompt=text, n=2, **asked) for text in texts]
        assert [c.text for c in together.choices] == [c.text for a in alone for c in a.choices]
        assert len({choice.text for choice in together.choices}) == 8
        assert together.usage is not None
        assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone if a.usage)

    @pytest.mark.parametrize("max_tokens", [0, 1, 3])
    def test_prompts_are_scored(
        self, client: openai.OpenAI, engine: Engine, max_tokens: int
    ) -> None:
        tokens = engine.tokenizer.encode("hello there \u4f60")  # one character of three tokens
        asked: Any = {"model": "nanochat", "temperature": 0, "max_tokens": max_tokens}
        (choice,) = client.completions.create(prompt=tokens, echo=True, logprobs=2, **asked).choices
        logprobs: Any = choice.logprobs
        (handle,) = engine.complete([Request(tokens, 0, prompt_logprobs=2)])
        count = len(tokens)
        lengths = {len(column) for column in logprobs.model_dump().values()}
        assert lengths == {count + max_tokens}, choice
        assert logprobs.token_logprobs[0] is None
        assert logprobs.top_logprobs[0] is None
        want = [scored.logprob for scored in handle.prompt]
        assert logprobs.token_logprobs[1:count] == pytest.approx(want, abs=1e-4)
        for position, scored in enumerate(handle.prompt, 1):
            top = logprobs.top_logprobs[position]
            assert max(top.values()) == pytest.approx(scored.top[0][1], abs=1e-4)
            assert top[logprobs.tokens[position]] == logprobs.token_logprobs[position]
            assert len(top) == 2 + (scored.token not in [t for t, _ in scored.top])
        for name, offset in zip(logprobs.tokens[:count], logprobs.text_offset, strict=False):
            assert name.startswith("bytes:") or choice.text[offset:].startswith(name)
        assert "bytes:" in " ".join(logprobs.tokens)
        assert (choice.finish_reason, choice.text[:6]) == ("length", "hello ")

    def test_an_ending_is_scored_too(
        self, client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: Any = {"model": "nanochat", "temperature": 0, "logprobs": 0, "prompt": [1, 2, 3]}
        plain = client.completions.create(max_tokens=4, **asked).choices[0]
        assert plain.logprobs is not None
        request = Request([1, 2, 3], 1, SamplingSettings(temperature=0), calculator=False)
        first = engine.complete([request])[0].tokens[0]
        monkeypatch.setattr(engine, "stop_tokens", (first,))
        # a client that drops one token after its prompt must find one
        ended = client.completions.create(max_tokens=1, echo=True, **asked).choices[0]
        assert ended.finish_reason == "stop"
        assert ended.logprobs is not None
        assert len(ended.logprobs.token_logprobs or []) == 4

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"suffix": "x"}, "suffix"),
            ({"best_of": 2}, "best_of"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [[]]}, "prompt[0]"),
            ({"prompt": [1, "x"]}, "prompt[1]"),
            ({"prompt": [1.5]}, "prompt[0]"),
            ({"prompt": None}, "prompt"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": [285]}, None),
            ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
            ({"prompt": ["x"] * 65, "n": 2}, "n"),
            ({"prompt": [3] * 257}, "prompt"),
            ({"logprobs": 21}, "logprobs"),
            ({"logprobs": True}, "logprobs"),
        ],
    )
    def test_what_is_not_supported_is_refused(
        self, url: str, change: dict[str, Any], param: str | None
    ) -> None:
        error = refused({"prompt": "hello", "max_tokens": 2} | change, url, "completions")
        assert error["param"] == param


class TestEvaluationHarness:
    """The requests of lm_eval's `local-completions`, word for word, and how it reads the answers.

    The package itself needs a dozen others; docs/serve.md says how to run it against a server.
    """

    SEED = 1234

    def post(self, url: str, body: dict[str, Any], path: str = "v1/completions") -> Any:
        response = httpx.post(f"{url}/{path}", json=body, headers={"Authorization": "Bearer none"})
        assert response.status_code == 200, response.text
        return response.json()

    def encode(self, url: str, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return self.post(url, body, "tokenize")["tokens"]

    def test_it_finds_the_tokenizer(self, url: str, engine: Engine) -> None:
        info = httpx.get(f"{url}/tokenizer_info").json()
        for name, special in (("eos_token", "<|assistant_end|>"), ("bos_token", "<|bos|>")):
            assert info[name] == special
            assert self.encode(url, info[name])[0] == engine.tokenizer.encode_special(special)
        text = "hello \u4f60"
        assert self.encode(url, text) == engine.tokenizer.encode(text)
        tokens = {"tokens": self.encode(url, text)}
        assert self.post(url, tokens, "detokenize")["prompt"] == text

    def test_likelihoods(self, url: str, engine: Engine) -> None:
        pairs = [("hello", " there"), ("what is two and three? ", "5"), ("<|bos|>", "what is")]
        with torch.no_grad():
            best = engine.model(torch.tensor([self.encode(url, "hello there")]))[0, -1].argmax()
        pairs.append(("hello there", engine.tokenizer.decode([int(best)])))
        contexts = [self.encode(url, context) for context, _ in pairs]
        prompts = [
            c + engine.tokenizer.encode(x) for c, (_, x) in zip(contexts, pairs, strict=True)
        ]
        prompts[-1] = [*contexts[-1], int(best)]
        payload = {
            "model": "nanochat",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": self.SEED,
            "echo": True,
        }
        choices = sorted(self.post(url, payload)["choices"], key=lambda choice: choice["index"])
        greedy = []
        for choice, context, prompt in zip(choices, contexts, prompts, strict=True):
            logprobs = choice["logprobs"]
            ours = logprobs["token_logprobs"][len(context) : -1]
            tops = logprobs["top_logprobs"][len(context) : -1]
            with torch.no_grad():
                logits = engine.model(torch.tensor([prompt]))[0].log_softmax(-1)
            rows = range(len(context) - 1, len(prompt) - 1)
            want = [float(logits[i, prompt[i + 1]]) for i in rows]
            assert ours == pytest.approx(want, abs=1e-4)
            greedy.append(all(x == max(top.values()) for x, top in zip(ours, tops, strict=True)))
            assert greedy[-1] == all(int(logits[i].argmax()) == prompt[i + 1] for i in rows)
        assert greedy[-1]
        assert not all(greedy)

    def test_generations(self, url: str, engine: Engine) -> None:
        prompts = [self.encode(url, text) for text in ("hello", "what is", "two and")]
        payload = {
            "prompt": prompts,
            "model": "nanochat",
            "max_tokens": 12,
            "temperature": 0,
            "stop": ["e", "\n\n", "<|assistant_end|>"],
            "seed": self.SEED,
        }
        greedy = SamplingSettings(temperature=0)
        handles = engine.complete([Request(p, 12, greedy, calculator=False) for p in prompts])
        texts = [engine.tokenizer.decode(handle.tokens) for handle in handles]
        got = self.post(url, payload)["choices"]
        assert [choice["text"] for choice in got] == [text.split("e")[0] for text in texts]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("nanochat", "model")
    about: Any = model
    assert (about.max_model_len, about.checkpoint) == (CONTEXT, "sft/d4/000010")
    assert client.models.retrieve("nanochat") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_tokens_there_and_back(url: str, engine: Engine) -> None:
    text = "hello <|bos|> \u4f60\u597d"
    bos = engine.tokenizer.get_bos_token_id()

    def ask(**body: Any) -> list[int]:
        answer = httpx.post(f"{url}/tokenize", json={"prompt": text} | body).json()
        assert answer["count"] == len(answer["tokens"])
        return answer["tokens"]

    assert ask(parse_special=False, add_special_tokens=False) == engine.tokenizer.encode(text)
    assert ask(parse_special=False)[0] == bos
    parsed = ask(add_special_tokens=False)
    assert parsed.count(bos) == 1
    back = httpx.post(f"{url}/detokenize", json={"tokens": parsed}).json()
    assert back == {"prompt": text}
    assert ask(prompt="", add_special_tokens=False) == []
    for path, body in (
        ("tokenize", {}),
        ("tokenize", {"prompt": "x", "messages": HELLO}),
        ("detokenize", {"tokens": [285]}),
        ("detokenize", {"tokens": [-1]}),
        ("detokenize", {}),
    ):
        assert httpx.post(f"{url}/{path}", json=body).status_code == 400


def test_nobody_is_served_in_another_shape(url: str) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        response = httpx.request(method, url + path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


class TestStopStrings:
    @pytest.mark.parametrize(
        ("text", "stops", "shown"),
        [
            ("some text END more", ["END"], "some text "),
            ("some text EN", ["END"], "some text EN"),
            ("aab", ["ab"], "a"),
            ("aaaab", ["aab"], "aa"),
            ("abcd", ["abcd", "bc"], "a"),  # "bc" is complete first
            ("abcd", ["bcd", "abcd"], ""),  # both at once: before the longer one
            ("xyz", [], "xyz"),
            ("ab", ["ab"], ""),
        ],
    )
    def test_wherever_the_text_is_cut(self, text: str, stops: list[str], shown: str) -> None:
        for cuts in range(2 ** (len(text) - 1) if len(text) < 9 else 40):
            pieces, current = [], ""
            for i, character in enumerate(text):
                current += character
                if cuts >> i & 1:
                    pieces.append(current)
                    current = ""
            reader, got = StopStrings(stops), ""
            for piece in [*pieces, current]:
                more, stopped = reader.add(piece)
                got += more
                if stopped:
                    break
            else:
                got += reader.finish()
            assert got == shown

    def test_nothing_is_held_back_longer_than_needed(self) -> None:
        reader = StopStrings(["END"])
        assert [reader.add(c)[0] for c in "xENxE"] == ["x", "", "", "ENx", ""]
        assert reader.finish() == "E"


def test_chunks_are_json_that_every_parser_takes(url: str) -> None:
    """No NaN, no Infinity, one event per line group, as the standard has it."""
    asked = GREEDY | {"stream": True, "logprobs": True, "top_logprobs": 20, "temperature": 2}
    with contextlib.closing(httpx.Client()) as client:
        text = client.post(f"{url}/v1/chat/completions", json=asked).text
    *events, done = [line for line in text.split("\n\n") if line]
    assert done == "data: [DONE]"

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    for event in events:
        chunk = json.loads(event.removeprefix("data: "), parse_constant=no_constant)
        for token in (chunk["choices"][0]["logprobs"] or {}).get("content", []):
            assert math.isfinite(token["logprob"])
