"""Compression of the trained tokenizer on seven kinds of text, beside GPT-2's and GPT-4's.

python -m scripts.tok_eval
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import requests
from rich.console import Console
from rich.table import Table

from nanochat import command, configurator
from nanochat.common import print0, setup_training
from nanochat.data.shards import iter_documents, list_shards
from nanochat.dataset import DATASETS, resolve_data_dir
from nanochat.settings import Choices
from nanochat.text.tokenizer import TiktokenTokenizer, get_tokenizer
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.tracking import Tracker

TEXTS = {
    "news": """The city council voted on Tuesday evening to reopen the old harbour bridge to
cyclists, ending a dispute that had lasted since the storms of 2019. "We heard the residents," said
the mayor, "and we have found the money." Repairs worth $4.2 million begin in March; ferries
will run every 20 minutes until then.""",
    "korean": """오늘 아침 도서관 앞 광장에서 작은 시장이 열렸다. 사람들은 갓 구운 빵과 따뜻한 차를
사며 서로 인사를 나누었다. 비가 그친 뒤라 하늘은 맑았고, 아이들은 분수 옆에서 뛰어놀았다.""",
    "code": """def moving_average(values: list[float], width: int) -> list[float]:
    if not 1 <= width <= len(values):
        raise ValueError(f"width {width} must lie between 1 and {len(values)}")
    total = sum(values[:width])
    means = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        means.append(total / width)
    return means
""",
    "math": r"""Let $f(x) = x^3 - 6x^2 + 11x - 6$. Since $f(1) = f(2) = f(3) = 0$, we have
\[ f(x) = (x - 1)(x - 2)(x - 3), \qquad \int_1^3 f(x)\,dx = 0 \]
because $f$ is odd about $x = 2$. In general $\sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}$.""",
    "science": """Photosynthesis converts light into chemical energy: in the thylakoid membrane,
photosystem II splits water, releasing oxygen and passing electrons through plastoquinone to the
cytochrome b6f complex. The resulting proton gradient (about 3 pH units) drives ATP synthase.""",
}
SPLIT_DOCUMENTS = 200
BASELINES = ("gpt2", "cl100k_base")


@dataclass(frozen=True)
class Settings:
    """Compare the tokenizer's compression with that of tiktoken's encodings."""

    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    dataset: Annotated[str, Choices(DATASETS)] = "auto"  # auto: what is downloaded, else embedded
    data_dir: str = ""  # folder of parquet, JSONL or text files instead of a dataset
    skip_bad_shards: bool = False  # leave out unreadable shards instead of stopping


def bytes_per_token(tokenizer: Tokenizer, name: str, text: str) -> float:
    """UTF-8 bytes of the text for each of its tokens.

    Raises  ValueError if decoding does not give the text back.
    """
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise ValueError(f"{name}: decoding the tokens does not give the text back; train it again")
    return len(text.encode()) / len(ids)


def load_baselines() -> dict[str, Tokenizer]:
    """tiktoken's encodings that are cached or can be fetched; says which are not."""
    found: dict[str, Tokenizer] = {}
    for name in BASELINES:
        try:
            found[name] = TiktokenTokenizer.from_pretrained(name)
        except (requests.RequestException, OSError) as error:
            print0(f"{name} is left out: tiktoken cannot load it ({type(error).__name__})")
    return found


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training("cpu")
    data_dir = resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir)
    list_shards(data_dir)
    tokenizer_dir = Path(settings.tokenizer_dir or runtime.base_dir / "tokenizer")
    tokenizers: dict[str, Tokenizer] = {"ours": get_tokenizer(tokenizer_dir), **load_baselines()}
    texts = dict(TEXTS)
    for split in ("train", "val"):
        documents = iter_documents(data_dir, split, settings.skip_bad_shards)
        texts[split] = "\n".join(itertools.islice(documents, SPLIT_DOCUMENTS))

    tracker = Tracker(tokenizer_dir, runtime, "tok_eval", settings)
    table = Table("text", "bytes", *tokenizers, title="bytes per token (higher is better)")
    for name, text in texts.items():
        ratios = {who: bytes_per_token(one, who, text) for who, one in tokenizers.items()}
        cells = [
            f"{ratio:.2f}" if who == "ours" else f"{ratio:.2f} ({ratios['ours'] / ratio - 1:+.1%})"
            for who, ratio in ratios.items()
        ]
        table.add_row(name, f"{len(text.encode()):,}", *cells)
        tracker.log("compression", 0, text=name, **ratios)
    tracker.close()
    Console().print(table)


if __name__ == "__main__":
    command.run(main)
