"""The chat's page in a browser: typing, streaming, tools, stop, regenerate, parameters, errors.

Needs `uv sync --extra page` and a Chromium: `playwright install chromium`, or one that is running,
by its debugging address: --chromium=http://127.0.0.1:9222.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.gpt import GPT, GPTConfig, KVCache
from nanochat.infer.engine import Engine
from nanochat.serve.config import ServerConfig
from nanochat.text.tokenizer import RustBPETokenizer
from tests.support.servers import serving

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright: uv sync --extra page"
)

CONTEXT = 256
STEP_SECONDS = 0.02  # of the model: an answer can be watched, and stopped


class Scripted(GPT):
    """Answers every prompt with the same tokens."""

    script: list[int]
    assistant_start: int
    first = 0  # position of the answer

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        assert cache is not None
        time.sleep(STEP_SECONDS)
        positions = cache.lengths[:, None] + torch.arange(idx_BT.shape[1])
        starts = positions[idx_BT == self.assistant_start]
        if len(starts):
            self.first = int(starts.max())
        cache.lengths += idx_BT.shape[1]
        return (positions - self.first).clamp(0, len(self.script) - 1)[..., None].float()

    def head(self, y: Tensor) -> Tensor:
        says = torch.tensor(self.script)[y[..., 0].long()]
        logits = torch.full((*says.shape, self.config.vocab_size), -20.0)
        return logits.scatter(-1, says[..., None], 20.0)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["what is six times seven? it is " * 9], 284)


@pytest.fixture(scope="module")
def model(tokenizer: RustBPETokenizer) -> Scripted:
    model = Scripted(GPTConfig(CONTEXT, tokenizer.get_vocab_size(), 1, 1, 1, 32))
    model.assistant_start = tokenizer.encode_special("<|assistant_start|>")
    return model


@pytest.fixture(scope="module")
def address(tokenizer: RustBPETokenizer, model: Scripted) -> Iterator[str]:
    config = ServerConfig(max_tokens=100)
    with serving(Engine(model, tokenizer, num_slots=1), config) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    running = request.config.getoption("--chromium")
    with playwright.sync_playwright() as started:
        try:
            chromium = started.chromium
            browser = chromium.connect_over_cdp(running) if running else chromium.launch()
        except playwright.Error as error:
            if running:  # asked for: it must be there
                raise
            pytest.skip(f"needs `playwright install chromium`: {str(error).splitlines()[0]}")
        yield browser
        if not running:
            browser.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; at the end nothing has failed in it and nothing came from elsewhere."""
    failures: list[str] = []
    fetched: list[str] = []
    # a browser that only shows pages has the one it was started with
    borrowed = request.config.getoption("--chromium")
    page = browser.contexts[0].pages[0] if borrowed else browser.new_page()
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda sent: fetched.append(sent.url))
    page.goto(address)
    yield page
    assert failures == []
    assert [url for url in fetched if not url.startswith(address)] == []


@pytest.fixture(autouse=True)
def forgetful(page: Any) -> None:
    """What another test left in the browser is gone."""
    page.evaluate("localStorage.clear()")
    page.reload()


def say(model: Scripted, tokenizer: RustBPETokenizer, *parts: str) -> None:
    """Let the model's answers be these parts; those like <|bos|> stand for themselves."""
    model.script = []
    for part in (*parts, "<|assistant_end|>"):
        special = part.startswith("<|")
        model.script += [tokenizer.encode_special(part)] if special else tokenizer.encode(part)


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def finish(page: Any) -> None:
    page.wait_for_selector("#send:enabled")
    page.wait_for_selector("#stop:disabled")


def until(page: Any, true: str) -> None:
    """Wait for an expression to be true; Playwright's own way is against the page's CSP."""
    for _ in range(500):
        if page.evaluate(true):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"it did not come true: {true}")


def test_a_tool_call_is_shown(page: Any, model: Scripted, tokenizer: RustBPETokenizer) -> None:
    hidden = "?" * (2 + len(tokenizer.encode("42")))  # where the tool's output is put
    say(model, tokenizer, "it is ", "<|python_start|>", "6*7", "<|python_end|>", hidden, "so 42")
    ask(page, "what is six times seven?")
    finish(page)
    assert page.inner_text(".user .text") == "what is six times seven?"
    assert page.locator(".assistant .tool").all_inner_texts() == ["» 6*7", "= 42"]
    assert page.locator(".assistant .text span").all_inner_texts() == ["it is ", "so 42"]
    assert page.input_value("#input") == ""
    ask(page, "and again?")  # the call goes back with the history
    finish(page)
    assert page.locator(".assistant .tool").count() == 4


def test_an_answer_streams_and_stops(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    say(model, tokenizer, "seven " * 60)
    ask(page, "count")
    until(page, "document.querySelector('.assistant .text')?.textContent.length > 20")
    assert page.is_disabled("#send")
    page.click("#stop")
    finish(page)
    text = page.inner_text(".assistant .text")
    assert text.startswith("seven seven")
    assert len(text) < len("seven " * 50)
    say(model, tokenizer, "six")
    ask(page, "go on")  # the slot is free again
    finish(page)
    assert page.locator(".assistant .text").all_inner_texts()[-1] == "six"


def test_regenerate_edit_and_new_chat(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    say(model, tokenizer, "it is six")
    ask(page, "what?")
    finish(page)
    say(model, tokenizer, "it is seven")
    page.click("text=regenerate")
    finish(page)
    assert page.locator(".assistant .text").all_inner_texts() == ["it is seven"]
    page.click("text=edit")
    assert page.locator(".message").count() == 0
    assert page.input_value("#input") == "what?"
    page.press("#input", "Enter")
    finish(page)
    assert page.locator(".message").count() == 2
    page.click("#clear")
    assert page.locator(".message").count() == 0


def test_parameters_are_sent_and_errors_are_shown(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    say(model, tokenizer, "seven " * 20)
    page.fill("#max_tokens", "3")
    ask(page, "count")
    finish(page)
    assert len(tokenizer.encode(page.inner_text(".assistant .text"))) == 3
    page.fill("#temperature", "3")
    ask(page, "count")
    finish(page)
    assert "temperature" in page.inner_text(".assistant .text.error")
    page.fill("#temperature", "0.5")
    ask(page, "count")  # what failed is not part of the conversation
    finish(page)
    assert page.locator(".assistant .text:not(.error)").count() == 2


def test_an_empty_answer_leaves_no_trace(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    say(model, tokenizer)
    ask(page, "what?")
    finish(page)
    say(model, tokenizer, "it is six")
    ask(page, "what?")
    finish(page)
    assert page.locator(".assistant .text").all_inner_texts() == ["it is six"]


def test_text_of_a_model_is_no_markup(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    say(model, tokenizer, "<b id=bad>\n<script>1</script> é 你")
    ask(page, "<i>x</i>")
    finish(page)
    assert page.inner_text(".assistant .text") == "<b id=bad>\n<script>1</script> é 你"
    assert page.inner_text(".user .text") == "<i>x</i>"
    assert page.locator("#bad").count() == 0


def test_a_refused_message_and_an_emptied_setting(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    say(model, tokenizer, "it is six")
    page.fill("#temperature", "3")
    ask(page, "a long question")
    finish(page)
    assert page.input_value("#input") == "a long question"  # to be changed and sent again
    page.fill("#temperature", "")
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    page.press("#input", "Enter")
    finish(page)
    assert "temperature" not in sent[0]
    assert page.locator(".assistant .text").all_inner_texts()[-1] == "it is six"


def test_escape_stops_and_scrolling_up_is_respected(
    page: Any, model: Scripted, tokenizer: RustBPETokenizer
) -> None:
    page.set_viewport_size({"width": 400, "height": 300})
    say(model, tokenizer, *["seven\n"] * 60)
    ask(page, "count")
    until(page, "document.querySelector('#messages').scrollTop > 60")  # follows
    page.evaluate("document.querySelector('#messages').scrollTop = 0")
    length = "document.querySelector('.assistant .text').textContent.length"
    before = page.evaluate(length)
    until(page, f"{length} > {before} + 20")
    assert page.evaluate("document.querySelector('#messages').scrollTop") == 0
    page.keyboard.press("Escape")
    finish(page)
    assert len(page.inner_text(".assistant .text")) < len("seven\n" * 55)


def test_a_reload_loses_nothing(page: Any, model: Scripted, tokenizer: RustBPETokenizer) -> None:
    say(model, tokenizer, "it is six")
    page.fill("#top_k", "7")
    ask(page, "what?")
    finish(page)
    page.reload()
    assert page.locator(".message .text").all_inner_texts() == ["what?", "it is six"]
    assert page.input_value("#top_k") == "7"
    page.click("#clear")
    page.reload()
    assert page.locator(".message").count() == 0


def test_a_key_is_asked_for_where_one_is_needed(
    browser: Any, page: Any, tokenizer: RustBPETokenizer, model: Scripted
) -> None:
    say(model, tokenizer, "it is six")
    assert page.is_hidden("#key")
    config = ServerConfig(max_tokens=100, api_key="open sesame")
    with serving(Engine(model, tokenizer, num_slots=1), config) as (host, port):
        other = browser.contexts[0].new_page() if browser.contexts else browser.new_page()
        other.goto(f"http://{host}:{port}/")
        ask(other, "what?")
        finish(other)
        assert "key" in other.inner_text(".assistant .text.error")
        other.fill("#key", "open sesame")
        other.press("#input", "Enter")
        finish(other)
        assert other.locator(".assistant .text").all_inner_texts()[-1] == "it is six"
        other.close()
