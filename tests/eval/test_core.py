"""CORE: prompts by hand, answers against one whole forward pass a row, the bundle's files."""

import hashlib
import http.server
import json
import random
import shutil
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import Runtime, setup_training
from nanochat.eval.core import (
    Example,
    batches,
    centred,
    evaluate_task,
    make_example,
    prompts,
    score_examples,
)
from nanochat.eval.core_bundle import CoreTask, get_bundle, load_tasks
from nanochat.gpt import GPT, GPTConfig
from nanochat.text.tokenizer import RustBPETokenizer

TEXT = "the cat sat on a mat and the dog ran far away from it because they wait"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    text = " ".join(WORDS) + " Question: Answer: \n"
    return RustBPETokenizer.train_from_iterator([text * 20], 320)


@pytest.fixture(scope="module")
def model(tokenizer: RustBPETokenizer) -> GPT:
    model = GPT(GPTConfig(160, tokenizer.get_vocab_size(), 2, 2, 1, 32))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def runtime() -> Runtime:
    return setup_training("cpu")


def sentence(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def dataset(kind: str, count: int = 14) -> list[dict[str, Any]]:
    draw = random.Random(kind)
    if kind == "multiple_choice":
        return [
            {
                "query": sentence(draw, 2, 9),
                "choices": [sentence(draw, 1, 4) for _ in range(draw.randint(2, 4))],
                "gold": draw.randint(0, 1),
            }
            for _ in range(count)
        ]
    if kind == "schema":
        return [
            {
                "context_options": [f"{sentence(draw, 2, 7)} {w}" for w in ("they", "it")],
                "continuation": sentence(draw, 2, 4),
                "gold": draw.randint(0, 1),
            }
            for _ in range(count)
        ]
    return [
        {"context": sentence(draw, 2, 8) + " ", "continuation": sentence(draw, 1, 2)}
        for _ in range(count)
    ]


KINDS = ["multiple_choice", "schema", "language_modeling"]


def core_task(tmp_path: Path, kind: str, num_fewshot: int, delimiter: str = " ") -> CoreTask:
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in dataset(kind)))
    return CoreTask("toy", kind, num_fewshot, delimiter, 25.0, path)


def test_prompts_by_hand() -> None:
    shots = [{"query": "A?", "choices": ["x", "y"], "gold": 1}]
    item = {"query": "B?", "choices": ["u", "v"], "gold": 0}
    assert prompts("multiple_choice", item, shots, "\nAnswer: ") == [
        "A?\nAnswer: y\n\nB?\nAnswer: u",
        "A?\nAnswer: y\n\nB?\nAnswer: v",
    ]
    shots = [{"context_options": ["C", "D"], "continuation": "c", "gold": 0}]
    item = {"context_options": ["E", "F"], "continuation": "f", "gold": 1}
    assert prompts("schema", item, shots, " ") == ["C c\n\nE f", "C c\n\nF f"]
    shots = [{"context": " G ", "continuation": "g"}]
    item = {"context": "H ", "continuation": "h"}
    assert prompts("language_modeling", item, shots, " ") == ["G g\n\nH", "G g\n\nH h"]


def naive(model: GPT, example: Any, by_loss: bool) -> bool:
    """One whole row at a time through the model, no cache."""
    losses = []
    for row, start, end in zip(example.rows, example.starts, example.ends, strict=True):
        logits = model(torch.tensor([row]))[0]
        if not by_loss:
            return logits[start - 1 : end - 1].argmax(dim=-1).tolist() == row[start:end]
        target = torch.tensor(row[start:end])
        losses.append(F.cross_entropy(logits[start - 1 : end - 1], target).item())
    return losses.index(min(losses)) == example.gold


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_shared_prefixes_change_no_answer(
    tmp_path: Path, tokenizer: Any, model: GPT, kind: str, num_fewshot: int
) -> None:
    task = core_task(tmp_path, kind, num_fewshot)
    data = task.load()
    examples = [make_example(tokenizer, task, data, i, 160) for i in range(len(data))]
    by_loss = kind != "language_modeling"
    with torch.no_grad():
        want = [naive(model, example, by_loss) for example in examples]
    assert score_examples(model, examples, by_loss) == want
    assert [score_examples(model, [example], by_loss)[0] for example in examples] == want
    if by_loss:
        assert 0 < sum(want) < len(want)


def test_the_worked_example(model: GPT) -> None:
    """The one in the docstring of score_examples: three tokens are shared, the fourth predicts."""
    rows = [[256, 7, 8, 9, 4, 5], [256, 7, 8, 9, 6]]
    examples = [Example(rows, [4, 4], [6, 5], gold) for gold in (0, 1)]
    assert examples[0].num_shared == 3
    with torch.no_grad():
        want = [naive(model, example, True) for example in examples]
    assert sorted(want) == [False, True]
    assert score_examples(model, examples, by_loss=True) == want


def test_likeliest_tokens_are_right(tmp_path: Path, tokenizer: Any, model: GPT) -> None:
    """A continuation the model itself would write, found by asking it."""
    task = core_task(tmp_path, "language_modeling", 0)
    example = make_example(tokenizer, task, task.load(), 0, 160)
    start, end = example.starts[0], example.ends[0]
    told = list(model.generate(example.rows[0][:start], end - start, temperature=0))
    example.rows[0][start:end] = told
    assert score_examples(model, [example], by_loss=False) == [True]
    example.rows[0][end - 1] = (told[-1] + 1) % 256
    assert score_examples(model, [example], by_loss=False) == [False]


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_keep_their_ends(
    tmp_path: Path, tokenizer: Any, model: GPT, kind: str
) -> None:
    task = core_task(tmp_path, kind, 10)
    data = task.load()
    whole = make_example(tokenizer, task, data, 0, 10_000)
    short = make_example(tokenizer, task, data, 0, 40)
    for row, cut, end in zip(whole.rows, short.rows, short.ends, strict=True):
        assert len(cut) == min(len(row), 40) == end
        assert cut == row[-len(cut) :]
    lengths = [e - s for s, e in zip(whole.starts, whole.ends, strict=True)]
    assert lengths == [e - s for s, e in zip(short.starts, short.ends, strict=True)]
    by_loss = kind != "language_modeling"
    with torch.no_grad():
        assert score_examples(model, [short], by_loss) == [naive(model, short, by_loss)]


def test_few_shots_are_others_and_as_many_as_there_are(tmp_path: Path, tokenizer: Any) -> None:
    task = core_task(tmp_path, "language_modeling", 100)
    data = task.load()
    text = tokenizer.decode(make_example(tokenizer, task, data, 3, 100_000).rows[0])
    assert text.count("\n\n") == len(data) - 1


def test_batches_fit_the_context(tmp_path: Path, tokenizer: Any, model: GPT) -> None:
    """A row with a long prefix beside one with a long rest would be padded beyond the context."""
    task = core_task(tmp_path, "schema", 9)
    data = task.load()
    examples = [make_example(tokenizer, task, data, i, 160) for i in range(len(data))]
    limit = max(max(example.ends) for example in examples)
    together = list(batches(examples, 10**6, limit))
    assert sum(len(batch) for batch in together) == len(examples)
    assert 1 < len(together) < len(examples)
    for batch in together:
        rest = max(max(e.ends) - e.num_shared for e in batch)
        assert max(e.num_shared for e in batch) + rest <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_does_not_depend_on_batches(
    tmp_path: Path, tokenizer: Any, model: GPT, runtime: Runtime, kind: str
) -> None:
    task = core_task(tmp_path, kind, 2)
    got = {evaluate_task(model, tokenizer, task, runtime, batch_tokens=n) for n in (1, 500, 50_000)}
    assert len(got) == 1
    assert evaluate_task(model, tokenizer, task, runtime, max_per_task=1) in (0.0, 1.0)


def test_centred() -> None:
    assert centred(0.25, 25) == 0
    assert centred(1.0, 25) == 1
    assert centred(0.1, 50) == pytest.approx(-0.8)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "eval_bundle"
    (folder / "eval_data").mkdir(parents=True)
    entries = []
    for kind in KINDS:
        core_task(folder / "eval_data", kind, 0)
        entries.append(
            f"-\n  label: {kind}_toy\n  dataset_uri: {kind}.jsonl\n  num_fewshot: [0]\n"
            f"  icl_task_type: {kind}\n"
        )
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entries))
    rows = [f"{kind}_toy,20" for kind in KINDS]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Random baseline", *rows]))
    return folder


def test_tasks_of_a_bundle(bundle: Path) -> None:
    tasks = load_tasks(bundle)
    assert [task.label for task in tasks] == [f"{kind}_toy" for kind in KINDS]
    assert tasks[0].guessing_percent == 20
    assert tasks[0].delimiter == " "
    assert [t.label for t in load_tasks(bundle, "schema_toy")] == ["schema_toy"]
    with pytest.raises(ValueError, match=r"no task squid; known: multiple_choice_toy"):
        load_tasks(bundle, "squid,schema_toy")
    (bundle / "eval_data" / "schema.jsonl").unlink()
    with pytest.raises(ValueError, match=r"schema.jsonl is missing"):
        load_tasks(bundle)
    with pytest.raises(ValueError, match=r"no core.yaml"):
        load_tasks(bundle.parent)


def test_a_bad_line_is_named(bundle: Path) -> None:
    path = bundle / "eval_data" / "schema.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"schema.jsonl:15: not JSON"):
        load_tasks(bundle)[1].load()


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, as the real server does."""

    requests: list[str] = []

    def do_GET(self) -> None:
        body = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        wanted = self.headers.get("Range", "")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[str]:
    archive = tmp_path / "eval_bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(bundle.rglob("*")):
            file.write(path, path.relative_to(bundle.parent))
    RangeHandler.requests.clear()
    handler = partial(RangeHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_download_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    base = tmp_path / "home"
    base.mkdir()
    whole = (tmp_path / "eval_bundle.zip").read_bytes()
    (base / "eval_bundle.zip.part").write_bytes(whole[:700])
    folder = get_bundle(base, f"{server}/eval_bundle.zip")
    assert len(load_tasks(folder)) == 3
    assert RangeHandler.requests == ["bytes=700-"]
    get_bundle(base, "http://127.0.0.1:9/never-asked")
    names = ["eval_bundle", "eval_bundle.lock", "eval_bundle.sha256"]
    assert sorted(p.name for p in base.iterdir()) == names


def test_the_bundle_stays_the_one_of_the_first_download(server: str, tmp_path: Path) -> None:
    base = tmp_path / "home"
    base.mkdir()
    url, archive = f"{server}/eval_bundle.zip", tmp_path / "eval_bundle.zip"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not 0123"):
        get_bundle(base, url, "0123" * 16)
    folder = get_bundle(base, url, digest.upper())
    assert get_bundle(base, url, digest) == folder
    with pytest.raises(ValueError, match=f"is of an archive of SHA-256 {digest}, not 0123"):
        get_bundle(base, url, "0123" * 16)
    shutil.rmtree(folder)
    content = bytearray(archive.read_bytes())
    content[-1] ^= 1  # in the archive's comment length, say: what is unpacked may be the same
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=rf"not {digest} as .*eval_bundle\.sha256 says"):
        get_bundle(base, url)


def test_what_is_no_archive_is_removed(server: str, tmp_path: Path) -> None:
    base = tmp_path / "home"
    base.mkdir()
    (tmp_path / "junk.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="was not an archive"):
        get_bundle(base, f"{server}/junk.zip")
    assert len(load_tasks(get_bundle(base, f"{server}/eval_bundle.zip"))) == 3


def test_unreachable_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot download http://127.0.0.1:9/x.*--bundle_dir"):
        get_bundle(tmp_path, "http://127.0.0.1:9/x")
