"""Talk to a chat model in the terminal.

python -m scripts.chat_cli --checkpoint=chatsft_checkpoints/latest.pt --max_tokens=256
python -m scripts.chat_cli -p "Why is the sky blue?"
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from nanochat import command, configurator
from nanochat.common import print0
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingSettings
from nanochat.serve.answer import AnswerReader
from nanochat.serve.chat_model import ChatSettings, load_chat_model
from nanochat.serve.prompt import fit_prompt
from nanochat.settings import Count, CountOrZero, NonNegative, Range, Seed

HELP = "/clear forgets the conversation, /help prints this, /quit or Ctrl-D leaves"


@dataclass(frozen=True)
class Settings(ChatSettings):
    """Chat in the terminal."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""  # answer this and leave
    temperature: Annotated[NonNegative, tyro.conf.arg(aliases=["-t"])] = 0.6  # 0 is the likeliest
    top_k: Annotated[CountOrZero, tyro.conf.arg(aliases=["-k"])] = 50  # likeliest tokens; 0 is all
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0  # probability kept; 1 is all
    max_tokens: Count = 256  # longest answer
    seed: Seed = 42  # of the answers
    verbose: bool = False  # print which kernels run, and why


def main() -> None:
    settings = configurator.load(Settings)
    chat = load_chat_model(settings, settings.seed, print_kernels=settings.verbose)
    engine = chat.engine(num_slots=1)
    if settings.prompt:
        answer(engine, [{"role": "user", "content": settings.prompt}], settings)
    else:
        converse(engine, settings)
    chat.runtime.close()


def converse(engine: Engine, settings: Settings) -> None:
    """Read questions and print answers until the user leaves."""
    messages: list[dict[str, Any]] = []
    print0(HELP)
    while True:
        try:
            text = input("\nuser: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/quit", "/exit", "quit", "exit"):
            return
        if text in ("/clear", "clear"):
            messages.clear()
            print("cleared")
        elif text == "/help":
            print(HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            print("assistant: ", end="", flush=True)
            try:
                content = answer(engine, messages, settings)
            except ValueError as error:
                # too long for the context: say so and forget it, the conversation continues
                print(error)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": content})


def answer(engine: Engine, messages: list[dict[str, Any]], settings: Settings) -> Any:
    """Print the answer to the last message as it is generated; return its content. Ctrl-C stops it.

    Raises  ValueError if the last message is too long for the context.
    """
    room = max(1, engine.capacity - settings.max_tokens)
    fitted = fit_prompt(engine.tokenizer, messages, room)
    if fitted.num_dropped:
        print(f"[{fitted.num_dropped} old messages left out] ", end="")
    # the length of the conversation selects the random numbers: other ones in every turn, the same
    # ones in every run
    sampling = SamplingSettings(
        settings.temperature, settings.top_k, settings.top_p, settings.seed, len(messages)
    )
    request = Request(fitted.tokens, settings.max_tokens, sampling)
    reader, shown = AnswerReader(engine.tokenizer), "text"
    try:
        for event in engine.stream(request):
            if event.token is None or event.finish_reason == "stop":
                continue
            kind, piece = reader.add(event.token)
            shown = show(kind, piece, shown)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    show(*reader.finish(), shown)
    print(flush=True)
    return reader.content


def show(kind: str, piece: str, shown: str) -> str:
    """Print a piece of an answer, tool calls as [2*3 = 6]; return the kind printed last.

    shown  the kind printed before this piece
    """
    if not piece:
        return shown
    frames = {"text": "", "python": " [", "python_output": " = "}
    if kind != shown:
        sys.stdout.write(("]" if shown == "python_output" else "") + frames[kind])
    sys.stdout.write(piece)
    sys.stdout.flush()
    return kind


if __name__ == "__main__":
    command.run(main)
