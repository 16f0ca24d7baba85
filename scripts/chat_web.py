"""Serve a chat model: a page at http://127.0.0.1:8000/ and the API that it uses.

python -m scripts.chat_web --checkpoint=chatsft_checkpoints/latest.pt
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
import uvicorn

from nanochat import configurator
from nanochat.common import print0
from nanochat.serve.chat_model import load_chat_model
from nanochat.serve.server import Defaults, create_app


@dataclass(frozen=True)
class Settings:
    """Serve a chat model over HTTP, to this machine unless --host says otherwise."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"  # base, mid, sft or rl
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # tag to look in
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is every one of this machine
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000  # port to listen on
    num_slots: int = 16  # answers written at a time; others wait
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8  # unless a request says
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # unless a request says
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512  # unless a request says
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa


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
    main()
