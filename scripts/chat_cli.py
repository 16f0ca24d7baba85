"""Talk to a chat model in the terminal.

python -m scripts.chat_cli --checkpoint=chatsft_checkpoints/latest.pt --max_tokens=256
python -m scripts.chat_cli -p "Why is the sky blue?"
python -m scripts.chat_cli -p - --json

Exit codes: 0, it was answered; 1, the generation failed; 2, a setting, a checkpoint or a question
that cannot be; 130, Ctrl-C.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import tyro
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from nanochat import command, configurator
from nanochat.common import get_base_dir
from nanochat.serve.chat_model import ChatSettings, load_chat_model
from nanochat.serve.terminal import Answer, AnswerSettings, Conversation, Leave, Printer
from nanochat.settings import Count, CountOrZero, NonNegative, Range, Seed

HISTORY = "chat_history"  # file of past lines, in the base directory
BARE_COMMANDS = ("quit", "exit", "clear")  # these need no slash
FAILED, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Settings(ChatSettings):
    """Chat in the terminal, or answer one question."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""  # answer this; - reads it from stdin
    json: bool = False  # one JSON object for each answer, and nothing else, on standard output
    system: str = ""  # what the model is told first
    temperature: Annotated[NonNegative, tyro.conf.arg(aliases=["-t"])] = 0.6  # 0 is the likeliest
    top_k: Annotated[CountOrZero, tyro.conf.arg(aliases=["-k"])] = 50  # likeliest tokens; 0 is all
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0  # probability kept; 1 is all
    max_tokens: Count = 256  # longest answer
    seed: Seed = 42  # of the answers
    verbose: bool = False  # print which kernels run, and why


def main() -> None:
    settings = configurator.load(Settings)
    prompt = sys.stdin.read().strip() if settings.prompt == "-" else settings.prompt
    if settings.prompt and not prompt:
        raise ValueError("--prompt=-: standard input is empty; write the question to it")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers
        chat = load_chat_model(settings, settings.seed, print_kernels=settings.verbose)
    drawn = {name: getattr(settings, name) for name in vars(AnswerSettings())}
    about = f"model: {chat.path}, {chat.stage.name}"
    conversation = Conversation(chat.engine(num_slots=1), AnswerSettings(**drawn), about)
    conversation.system = settings.system
    if prompt:
        code = answer_once(conversation, prompt, settings.json)
    else:
        code = converse(conversation, settings.json)
    chat.runtime.close()
    sys.exit(code)


def answer_once(conversation: Conversation, prompt: str, as_json: bool) -> int:
    """Print the answer to one question, and nothing else; returns the exit code.

    Raises  ValueError if the question is too long for the context.
    """
    try:
        answer = answer_and_print(conversation, prompt, as_json)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return INTERRUPTED if answer.finish_reason == "stopped" else 0


def answer_and_print(conversation: Conversation, text: str, as_json: bool) -> Answer:
    """Print the answer as it comes, or as JSON at its end."""
    printer = Printer(lambda piece: print(piece, end="", flush=True))
    answer = conversation.answer(text, (lambda *_: None) if as_json else printer.show)
    if as_json:
        print(answer.as_json(), flush=True)
    else:
        printer.finish()
        print(flush=True)
    if answer.num_dropped:
        say(f"{answer.num_dropped} old messages did not fit and were left out")
    if answer.finish_reason == "stopped":
        say("stopped")
    return answer


def converse(conversation: Conversation, as_json: bool) -> int:
    """Answer lines and carry out commands until the user leaves; returns the exit code."""
    code = 0
    for line in lines(conversation):
        text = f"/{line}" if line in BARE_COMMANDS else line
        try:
            if text.startswith("/"):
                say(conversation.command(text))
            elif text:
                answer_and_print(conversation, text, as_json)
        except Leave:
            break
        except (ValueError, OSError) as error:  # the user's mistake: say it, and continue
            say(f"error: {error}")
        except RuntimeError as error:
            say(f"error: {error}")
            code = FAILED
    return code


def lines(conversation: Conversation) -> Iterator[str]:
    """What the user types, with editing, history and completion; plain lines of a pipe or file."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from (line.strip() for line in sys.stdin)
        return
    words = [f"/{name}" for name in (*conversation.commands(), *vars(conversation.settings))]
    session: PromptSession[str] = PromptSession(
        "user: ",
        multiline=True,
        prompt_continuation="      ",
        key_bindings=keys(),
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        history=FileHistory(str(get_base_dir() / HISTORY)),
    )
    say("/help lists the commands")
    while True:
        try:
            yield session.prompt().strip()
        except KeyboardInterrupt:  # drops the line
            continue
        except EOFError:
            return


def keys() -> KeyBindings:
    """Enter sends, Alt+Enter breaks the line; text that is pasted keeps its line breaks."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def say(text: str) -> None:
    """Tell the user something that is no answer."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(main)
