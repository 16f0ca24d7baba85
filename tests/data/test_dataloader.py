"""Batches: nothing lost, resumed exactly, made ahead in a thread that tells what goes wrong."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.data.dataloader import (
    BATCHES_AHEAD,
    Batch,
    CUDAPrefetcher,
    tokenizing_distributed_data_loader,
    tokenizing_distributed_data_loader_with_state,
)
from nanochat.data.documents import encode_documents
from nanochat.text.tokenizer import HuggingFaceTokenizer, RustBPETokenizer, TiktokenTokenizer
from tests.support.shards import (
    BOS,
    BYTES,
    break_row_group,
    documents,
    flat,
    loader,
    rows,
    take,
    write,
)
from tests.support.shards import write_three as write_three_shards

CPU = torch.device("cpu")


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    return write_three_shards(tmp_path / "data")


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few documents at once and few waiting, so that small data shows every seam."""
    monkeypatch.setattr("nanochat.data.dataloader.BESTFIT_DOCUMENTS", 5)
    monkeypatch.setattr("nanochat.data.documents.DOCUMENTS_AT_ONCE", 2)


def encoded(texts: list[str]) -> list[list[int]]:
    return [[BOS, *text.encode()] for text in texts]


def test_stream_is_the_text(three_shards: Path) -> None:
    tokens = list(itertools.chain.from_iterable(encoded(documents(0, 17))))
    batches = take(loader(three_shards), 12)
    found = flat(batches)
    assert found == (tokens * 3)[: len(found)]
    assert len(found) > len(tokens)  # beyond the end of the data
    for inputs, targets in batches:
        ahead = list(itertools.chain.from_iterable(targets))
        assert list(itertools.chain.from_iterable(inputs))[1:] == ahead[:-1]
    row_ends = [row[-1] for row in rows(batches)]
    assert row_ends[:-1] == [row[0] for row in rows(batches)[1:]]


def best_fit(texts: list[str], window: int, length: int, count: int) -> list[list[int]]:
    """Rows by looking through all that wait: the longest that fits, the oldest of equals."""
    coming = itertools.cycle(tokens[:length] for tokens in encoded(texts))
    waiting: list[list[int]] = []
    found = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            while len(waiting) < window:
                waiting.append(next(coming))
            room = length - len(row)
            fitting = [i for i, tokens in enumerate(waiting) if len(tokens) <= room]
            if fitting:
                taken = max(fitting, key=lambda i: len(waiting[i]))
            else:
                taken = min(reversed(range(len(waiting))), key=lambda i: len(waiting[i]))
            row += waiting.pop(taken)[:room]
        found.append(row)
    return found


@pytest.mark.parametrize("sequence_len", [7, 16, 40])
def test_bestfit_is_what_a_search_finds(
    three_shards: Path, small_steps: None, sequence_len: int
) -> None:
    batches = take(loader(three_shards, packing="bestfit", sequence_len=sequence_len), 20)
    assert rows(batches) == best_fit(documents(0, 17), 5, sequence_len + 1, 40)
    assert {row[0] for row in rows(batches)} == {BOS}


def test_bestfit_holds_batches_of_more_documents_than_wait(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [["ab"] * 3000, ["x"] * 3], row_group=1024)
    batches = take(loader(folder, packing="bestfit", batch_size=16, sequence_len=512), 2)
    assert all(row[:6] == [BOS, *b"ab", BOS, *b"ab"] for row in rows(batches))


def test_bestfit_loses_little_of_long_documents(tmp_path: Path) -> None:
    """Long documents that wait whole would fill gaps, and lose nearly all that they hold."""
    texts = [char * length for char in "abcdefgh" for length in (7, 60, 7, 7)]
    folder = write(tmp_path / "data", [texts, ["x"]])
    batches = take(loader(folder, packing="bestfit", sequence_len=15), 40)
    assert sum(row.count(BOS) == 1 for row in rows(batches)) >= 0.35 * 80


def test_ranks_share_the_documents_out(three_shards: Path) -> None:
    seen = []
    for rank in range(2):
        # more than one pass: the set of documents is what counts
        found = flat(take(loader(three_shards, rank=rank, world_size=2), 20))
        text = bytes(t if t < 256 else 0 for t in found)
        seen.append({part for part in text.split(b"\0")[1:-1] if part})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {text.encode() for text in documents(0, 17)}


def same(got: Batch, want: Batch) -> bool:
    return torch.equal(got.inputs, want.inputs) and torch.equal(got.targets, want.targets)


@pytest.mark.parametrize("packing", ["stream", "bestfit"])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (9, 11)])
@pytest.mark.parametrize("cached", [False, True])
def test_resume_is_exact(
    three_shards: Path,
    small_steps: None,
    tmp_path: Path,
    packing: str,
    rank: int,
    world_size: int,
    cached: bool,
) -> None:
    options: dict[str, Any] = {"packing": packing, "rank": rank, "world_size": world_size}
    options["token_cache"] = tmp_path / "cache" if cached else None
    whole = CUDAPrefetcher(loader(three_shards, **options, threads=1), CPU)
    batches = list(itertools.islice(whole, 30))
    whole.close()
    assert batches[-1].state["epoch"] > batches[0].state["epoch"]
    for at in range(0, 24, 3):
        torch.save(batches[at].state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = CUDAPrefetcher(loader(three_shards, state=state, threads=3, **options), CPU)
        for want in batches[at + 1 : at + 6]:
            got = next(again)
            assert same(got, want)
            assert str(got.state) == str(want.state)
        again.close()


def test_a_state_is_small_and_tells_where_it_is(three_shards: Path) -> None:
    used = sum(map(len, encoded(documents(0, 14))))
    state = next(loader(three_shards, batch_size=1, sequence_len=used + 2)).state
    place = {"epoch": 0, "pq_idx": 1, "rg_idx": 1, "document": 14, "offset": 2}
    assert state == loader(three_shards).identity | place


def test_batches_are_not_written_over(three_shards: Path) -> None:
    """A step holds all of its micro-batches at once."""
    batches = loader(three_shards)
    held = [next(batches) for _ in range(6)]
    assert [(b.inputs.tolist(), b.targets.tolist()) for b in held] == take(loader(three_shards), 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "greedy"}, "stream or bestfit"),
        ({"world_size": 50}, "fewer than the 50 ranks"),
        ({"split": "test"}, "choose train or val"),
    ],
)
def test_bad_options_are_refused(three_shards: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(three_shards, **options)


def test_a_state_of_another_run_is_refused(three_shards: Path, tmp_path: Path) -> None:
    state = next(loader(three_shards)).state
    more = TiktokenTokenizer.from_ranks(
        {bytes([i]): i for i in range(256)} | {b"xx": 256}, r"(?s:.)"
    )
    for options, name in (
        ({"packing": "bestfit"}, "packing = stream"),
        ({"world_size": 2}, "world_size = 1"),
        ({"token_cache": tmp_path / "cache"}, "world_size = 1, this run has any"),
        ({"tokenizer": more}, "tokenizer = "),
        ({"split": "val"}, "data = "),
        ({"state": state | {"version": 2}}, "version = 2"),
    ):
        with pytest.raises(ValueError, match=name):
            loader(three_shards, **({"state": state} | options))


def test_a_state_of_other_data_is_refused(three_shards: Path, tmp_path: Path) -> None:
    """As many documents in as many shards, but not the same ones."""
    state = next(loader(three_shards)).state
    shards = [documents(100, 10), documents(10, 7), documents(17, 8)]
    with pytest.raises(ValueError, match=r"saved with data = .*resume with the data"):
        loader(write(tmp_path / "other", shards), state=state)


def test_tokenizers_give_the_same_arrays() -> None:
    """Through tiktoken, from lists, and through rustbpe."""
    ranks = BYTES.encoding._mergeable_ranks
    others = [RustBPETokenizer.from_ranks(ranks, r"(?s:.)"), ByLists(BYTES)]
    texts = ["", "one", "\u00e9t\u00e9", "<|bos|>"]
    for tokenizer in (BYTES, *others):
        arrays = encode_documents(tokenizer, texts, threads=2)
        assert [array.tolist() for array in arrays] == encoded(texts)
        assert {array.dtype.name for array in arrays} == {"uint16"}


class ByLists(HuggingFaceTokenizer):
    """A tokenizer of another library, with the ids of tiktoken's."""

    def __init__(self, other: TiktokenTokenizer, vocab_size: int = 265) -> None:
        self.encode_ordinary_batch = other.encode_ordinary_batch
        self.encode_special = other.encode_special
        self.get_vocab_size = lambda: vocab_size


def test_large_vocabularies_are_not_cut_off() -> None:
    (array,) = encode_documents(ByLists(BYTES, vocab_size=2**16 + 1), ["a"], threads=1)
    assert array.dtype.name == "uint32"


def test_a_broken_row_group_reaches_the_consumer(
    three_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not before the batches that it has no part in, and again whenever one is asked for."""
    bad = three_shards / "shard_00000.parquet"
    whole = take(loader(three_shards), 2)
    break_row_group(bad, 2)
    batches = CUDAPrefetcher(loader(three_shards), CPU)
    found = [next(batches) for _ in range(2)]
    assert [(b.inputs.tolist(), b.targets.tolist()) for b in found] == whole
    for _ in range(BATCHES_AHEAD + 2):
        with pytest.raises(ValueError, match=r"shard_00000\.parquet"):
            next(batches)
    batches.close()
    left = [*documents(0, 6), *documents(9, 8)]
    tokens = list(itertools.chain.from_iterable(encoded(left)))
    found = flat(take(loader(three_shards, skip_bad_shards=True), 12))
    assert found == (tokens * 3)[: len(found)]
    assert capsys.readouterr().out.count("skipped: shard") == 1


def test_nothing_but_broken_row_groups_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [documents(0, 6), documents(6, 3)])
    for row_group in range(2):
        break_row_group(folder / "shard_00000.parquet", row_group)
    with pytest.raises(ValueError, match="all 2 row groups are bad"):
        next(loader(folder, skip_bad_shards=True))


def test_a_row_without_text_reaches_the_consumer(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", None, "b"]}), folder / "shard_00000.parquet")
    pq.write_table(pa.table({"text": ["c"]}), folder / "shard_00001.parquet")
    with pytest.raises(ValueError, match="has no text"):
        next(loader(folder))


def prefetcher_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "prefetcher" in thread.name]


class Numbered:
    """Batches 0, 1, 2, ...; number `fail_at` raises `error`, number `wait_at` waits for `go`."""

    def __init__(self, fail_at: int = -1, wait_at: int = -1) -> None:
        self.number, self.fail_at, self.wait_at = 0, fail_at, wait_at
        self.error: BaseException = ValueError("no such batch")
        self.go = threading.Event()
        self.closed = False

    def __next__(self) -> Batch:
        number = self.number
        self.number += 1
        if number == self.wait_at:
            assert self.go.wait(timeout=30)
        if number == self.fail_at:
            raise self.error
        tensor = torch.full((1, 2), number)
        return Batch(tensor, tensor + 1, {"number": number})

    def close(self) -> None:
        self.closed = True


def test_prefetcher_hands_on_what_the_loader_gives(three_shards: Path) -> None:
    plain = take(loader(three_shards), 9)
    assert take(CUDAPrefetcher(loader(three_shards), CPU), 9) == plain
    pairs = tokenizing_distributed_data_loader(BYTES, three_shards, 2, 16, "train")
    assert [(x.tolist(), y.tolist()) for x, y in itertools.islice(pairs, 3)] == plain[:3]
    with_state = tokenizing_distributed_data_loader_with_state(BYTES, three_shards, 2, 16, "train")
    _, _, state = next(with_state)
    assert take(loader(three_shards, state=state), 1) == plain[1:2]
    del pairs
    with_state.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert not prefetcher_threads()


def test_prefetcher_runs_ahead_and_no_farther() -> None:
    source = Numbered(wait_at=3 + BATCHES_AHEAD)
    batches = CUDAPrefetcher(source, CPU)
    # the batch after the one that is waited for would be asked for only now
    assert [next(batches).state["number"] for _ in range(3)] == [0, 1, 2]
    assert source.number <= 3 + BATCHES_AHEAD
    source.go.set()
    assert next(batches).state["number"] == 3
    batches.close()
    assert source.closed
    assert not prefetcher_threads()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


class Panic(BaseException):
    """As the panics of Rust extensions: no Exception."""


@pytest.mark.parametrize("error", [ValueError("no such batch"), StopIteration(), Panic("lost")])
def test_what_goes_wrong_in_the_thread_is_raised(error: BaseException) -> None:
    source = Numbered(fail_at=2)
    source.error = error
    batches = CUDAPrefetcher(source, CPU)
    assert [next(batches).state["number"] for _ in range(2)] == [0, 1]
    for _ in range(BATCHES_AHEAD + 2):
        with pytest.raises(type(error)):
            next(batches)
    batches.close()
    assert not prefetcher_threads()


class Recorder:
    """Stands for torch.cuda's streams and a batch's tensors; writes down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, ...]] = []
        self.active = "main"
        monkeypatch.setattr("torch.cuda.Stream", lambda _: self.stream("side"))
        monkeypatch.setattr("torch.cuda.current_stream", lambda _: self.stream("main"))
        monkeypatch.setattr("torch.cuda.stream", self.use)
        monkeypatch.setattr("torch.cuda.Event", self.event)

    def stream(self, name: str) -> SimpleNamespace:
        def wait_event(event: SimpleNamespace) -> None:
            self.log.append(("wait", name, f"for {event.of}"))

        return SimpleNamespace(name=name, wait_event=wait_event)

    def event(self) -> SimpleNamespace:
        def record(stream: SimpleNamespace) -> None:
            self.log.append(("record", stream.name))
            event.of = stream.name

        event = SimpleNamespace(record=record)
        return event

    @contextmanager
    def use(self, stream: SimpleNamespace) -> Iterator[None]:
        self.active = stream.name
        yield
        self.active = "main"

    def tensor(self, name: str) -> SimpleNamespace:
        def to(device: torch.device, non_blocking: bool) -> SimpleNamespace:
            self.log.append(("copy", name, self.active, str(device), str(non_blocking)))
            return self.tensor(name)

        def record_stream(stream: SimpleNamespace) -> None:
            self.log.append(("used on", stream.name, name))

        return SimpleNamespace(to=to, record_stream=record_stream)


def test_copies_and_their_use_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied on the side stream, waited for and recorded on the one that uses the batch."""
    recorder = Recorder(monkeypatch)
    numbers = iter(range(100))

    def batch() -> Any:
        number = next(numbers)
        return Batch(recorder.tensor(f"x{number}"), recorder.tensor(f"y{number}"), {})

    source = Numbered()
    monkeypatch.setattr(Numbered, "__next__", lambda _: batch())
    batches = CUDAPrefetcher(source, torch.device("cuda", 0))
    batches._thread.shutdown()  # all copies ahead are made
    copied = [("copy", "x0", "side", "cuda:0", "True"), ("copy", "y0", "side", "cuda:0", "True")]
    assert recorder.log[:3] == [*copied, ("record", "side")]
    del recorder.log[:]
    monkeypatch.setattr(batches._thread, "submit", lambda _: None)
    next(batches)
    assert recorder.log == [
        ("wait", "main", "for side"),
        ("used on", "main", "x0"),
        ("used on", "main", "y0"),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["stream", "bestfit"])
def test_batches_on_the_gpu_are_those_on_the_cpu(three_shards: Path, packing: str) -> None:
    """Kept all, while a busy stream delays their copies: no pinned block is written over."""
    device = torch.device("cuda", torch.cuda.current_device())
    options = {"batch_size": 8, "sequence_len": 1024, "packing": packing}
    plain = loader(three_shards, **options)
    batches = CUDAPrefetcher(loader(three_shards, device=device, **options), device)
    assert batches.side_stream is not None
    sums = []
    for _ in range(40):
        with torch.cuda.stream(batches.side_stream):
            torch.cuda._sleep(2_000_000)
        batch = next(batches)
        sums.append((batch.inputs.clone(), batch.targets.clone()))
        torch.cuda._sleep(1_000_000)
    batches.close()
    for inputs, targets in sums:
        want = next(plain)
        assert torch.equal(inputs.cpu(), want.inputs)
        assert torch.equal(targets.cpu(), want.targets)


@pytest.mark.gpu
def test_batches_for_the_gpu_are_pinned(three_shards: Path) -> None:
    batch = next(loader(three_shards, device="cuda"))
    assert batch.inputs.is_pinned()
    assert batch.targets.is_pinned()
