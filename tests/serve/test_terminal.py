"""The terminal chat: its commands, what it prints where, line editing, exit codes."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from nanochat.infer.engine import Engine
from nanochat.serve.terminal import AnswerSettings, Conversation, Leave, Printer
from scripts import chat_cli
from tasks.customjson import CustomJSON
from tests.support.servers import CONTEXT, tiny_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = tiny_engine(num_slots=1)
    engine.stop_tokens = ()
    return engine


@pytest.fixture
def chat(engine: Engine) -> Conversation:
    return Conversation(engine, AnswerSettings(temperature=0.0, max_tokens=8), "model: tiny")


def silent(kind: str, piece: str) -> None:
    """Show nothing."""


def test_an_answer_joins_the_conversation(chat: Conversation) -> None:
    shown: list[str] = []
    answer = chat.answer("hello", lambda kind, piece: shown.append(piece))
    assert answer.text == "".join(shown)
    assert (answer.finish_reason, answer.num_generated, answer.num_dropped) == ("length", 8, 0)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    second = chat.answer("hello", silent)
    assert second.num_prompt > answer.num_prompt
    assert chat.command("/new") == "a new conversation"
    assert chat.answer("hello", silent).content == answer.content


def test_old_messages_make_room(chat: Conversation) -> None:
    while not chat.answer("there " * 60, silent).num_dropped:
        assert len(chat.messages) < 40
    with pytest.raises(ValueError, match="shorten it"):
        chat.answer("x y " * 900, silent)


def test_what_has_no_answer_is_forgotten(
    chat: Conversation, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ending(error: BaseException, after: int) -> Callable[[], bool]:
        real, steps = type(engine).step, iter(range(100))

        def step() -> bool:
            if next(steps) == after:
                raise error
            return real(engine)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", ending(KeyboardInterrupt(), 0))
        assert chat.answer("hello", silent).finish_reason == "stopped"
    assert chat.messages == []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", ending(RuntimeError("out of memory"), 3))
        with pytest.raises(RuntimeError, match="out of memory"):
            chat.answer("hello", silent)
    assert chat.messages == []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", ending(KeyboardInterrupt(), 5))
        stopped = chat.answer("hello", silent)
    assert (stopped.finish_reason, stopped.num_generated) == ("stopped", 5)
    assert len(chat.messages) == 2
    assert chat.answer("hello", silent).finish_reason == "length"


class TestCommands:
    def test_settings(self, chat: Conversation) -> None:
        for line, said in (
            ("/temperature 0.5", "temperature = 0.5"),
            ("/seed", "seed = 42"),
            ("/seed 7", "seed = 7"),
            ("/max_tokens 3", "max_tokens = 3"),
        ):
            assert chat.command(line) == said
        assert chat.answer("hello", silent).num_generated == 3
        assert chat.settings == AnswerSettings(0.5, 50, 1.0, 3, 7)

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            ("/foo", "unknown command /foo"),
            ("/sede 5", "did you mean '/seed'"),
            ("/hlep", "did you mean '/help'"),
            ("/", "unknown command /"),
            ("/seed x", "wanted a number"),
            ("/seed -1", "must be from 0"),
            ("/temperature nan", "must be finite"),
            ("/top_p 0", "must be above 0"),
            ("/max_tokens 0", "at least 1"),
            ("/save", "needs the name"),
        ],
    )
    def test_wrong_ones_are_refused(self, chat: Conversation, line: str, part: str) -> None:
        with pytest.raises(ValueError, match=part.replace("?", r"\?")):
            chat.command(line)
        assert chat.settings == AnswerSettings(0.0, 50, 1.0, 8, 42)

    def test_help_names_every_command(self, chat: Conversation) -> None:
        said = chat.command("/help")
        for name in ("help", "new", "system", "save", "seed", "temperature", "stats", "quit"):
            assert f"/{name} " in said

    def test_a_system_message(self, chat: Conversation) -> None:
        plain = chat.answer("hello", silent).num_prompt
        assert chat.command("/system be brief, please") == "system: be brief, please"
        chat.command("/new")
        assert chat.answer("hello", silent).num_prompt > plain
        assert chat.command("/system -") == chat.command("/system") == "system: (nothing)"

    def test_what_is_saved_is_training_data(self, chat: Conversation, tmp_path: Path) -> None:
        chat.command("/system be brief")
        chat.answer("hello", silent)
        chat.command(f"/save {tmp_path / 'chat.jsonl'}")
        (example,) = CustomJSON(tmp_path / "chat.jsonl").conversations
        assert example["messages"] == [{"role": "system", "content": "be brief"}, *chat.messages]

    def test_stats(self, chat: Conversation) -> None:
        assert "none used" in chat.command("/stats")
        answer = chat.answer("hello", silent)
        said = chat.command("/stats")
        assert said.startswith("model: tiny\n")
        assert f"{answer.num_prompt + 8} of {CONTEXT} tokens used" in said
        assert "8 tokens, length" in said
        assert "tokens/s" in said

    @pytest.mark.parametrize("line", ["/quit", "/exit"])
    def test_leaving(self, chat: Conversation, line: str) -> None:
        with pytest.raises(Leave):
            chat.command(line)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ("is|python:2*3|python_output:6| six", "is [2*3 = 6] six"),
        ("python:1+1|python_output:2", " [1+1 = 2]"),
        ("python:import os|then", " [import os]then"),
        ("a|b", "ab"),
    ],
)
def test_tool_calls_are_framed(pieces: str, shown: str) -> None:
    written: list[str] = []
    printer = Printer(written.append)
    for piece in pieces.split("|"):
        kind, _, text = piece.rpartition(":")
        printer.show(kind or "text", text)
    printer.finish()
    assert "".join(written) == shown


class TestOutput:
    def test_one_answer_is_all_there_is_on_standard_output(
        self, chat: Conversation, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert chat_cli.answer_once(chat, "hello", as_json=False) == 0
        printed = capsys.readouterr()
        assert chat.last is not None
        assert (printed.out, printed.err) == (f"{chat.last.text}\n", "")
        chat.command("/new")
        assert chat_cli.answer_once(chat, "hello", as_json=True) == 0
        (line,) = capsys.readouterr().out.splitlines()
        said = json.loads(line)
        assert said["response"] == said["content"] == chat.last.text
        assert (said["finish_reason"], said["num_generated"]) == ("length", 8)

    def test_a_failure_has_an_exit_code(
        self, chat: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr(chat, "answer", broken)
        assert chat_cli.answer_once(chat, "hello", as_json=False) == 1
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", "error: planted\n")

    def test_lines_of_a_pipe(
        self, chat: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        typed = "hello\n/seed 5\n/nonsense\n\nclear\nhello\n/quit\nhello\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert chat_cli.converse(chat, as_json=True) == 0
        printed = capsys.readouterr()
        first, second = map(json.loads, printed.out.splitlines())
        assert first["content"] == second["content"]
        assert "seed = 5\nerror: unknown command /nonsense" in printed.err
        assert printed.err.endswith("a new conversation\n")


def test_lines_are_edited_remembered_and_broken(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch, base_dir: Path
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    left, up, alt_enter = "\x1b[D", "\x1b[A", "\x1b\r"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        lines = chat_cli.lines(chat)
        keys.send_text(f"helo{left}l\r")
        assert next(lines) == "hello"
        keys.send_text(f"one{alt_enter}two\r")
        assert next(lines) == "one\ntwo"
        keys.send_text(f"{up}{up}{up}\r")
        assert next(lines) == "hello"
        keys.send_text("thrown away\x03kept\r")
        assert next(lines) == "kept"
        keys.send_text("\x04")
        assert list(lines) == []
    assert "+hello" in (base_dir / chat_cli.HISTORY).read_text()
