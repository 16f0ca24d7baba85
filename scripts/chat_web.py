"""Serve a chat model: a page at http://127.0.0.1:8000/ and the API that it uses.

python -m scripts.chat_web --checkpoint=chatsft_checkpoints/latest.pt
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
import uvicorn

from nanochat import command, configurator
from nanochat.common import print0
from nanochat.serve.chat_model import ChatSettings, load_chat_model
from nanochat.serve.server import Defaults, create_app
from nanochat.settings import Count, CountOrZero, NonNegative, Range


@dataclass(frozen=True)
class Settings(ChatSettings):
    """Serve a chat model over HTTP, to this machine unless --host says otherwise."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is every one of this machine
    port: Annotated[int, Range(0, 65_535), tyro.conf.arg(aliases=["-p"])] = 8000  # to listen on
    num_slots: Count = 16  # answers written at a time; others wait
    temperature: Annotated[NonNegative, tyro.conf.arg(aliases=["-t"])] = 0.8  # if none is asked
    top_k: Annotated[CountOrZero, tyro.conf.arg(aliases=["-k"])] = 50  # if none is asked
    max_tokens: Annotated[Count, tyro.conf.arg(aliases=["-m"])] = 512  # if none is asked


def main() -> None:
    settings = configurator.load(Settings)
    chat = load_chat_model(settings)
    defaults = Defaults(
        temperature=settings.temperature, top_k=settings.top_k, max_tokens=settings.max_tokens
    )
    print0(f"nanochat: http://{settings.host}:{settings.port}/")
    uvicorn.run(
        create_app(chat.engine(settings.num_slots), defaults),
        host=settings.host,
        port=settings.port,
        log_level="warning",
    )
    chat.runtime.close()


if __name__ == "__main__":
    command.run(main)
