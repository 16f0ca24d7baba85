"""rustbpe against a slow twin, Hugging Face tokenizers and tiktoken.

What only the rustbpe of this repository has is skipped with the published one.
"""

import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from nanochat.text.tokenizer import byte_level_alphabet
from nanochat.text.tokenizer_base import SPLIT_PATTERN
from rustbpe import Tokenizer

GPT4_PATTERN = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
SAMPLES = [
    "Hello world! It's 2024, isn't it? We'LL see 12345 things they'Ve done.",
    "def f(x):\n\treturn x  # comment\n\n\n    y = [1, 2,3]\r\n",
    "long s: it'\u017f, 'ST; titlecase \u01c5 \u01f2; Kelvin \u212a",
    "marks: e\u0301 a\u0308\u0308 \u0301x 9\u0301 \u0e33; Thai กำ; Hindi हिन्दी",
    "spaces: \u0085\u0085x\u00a0y\u3000z \u3000 \u180e \u2028\u2029 \u200b \ufeff \x0b\x0c\x1c z  ",
    "\r\n\r\n \r\n\t\r x \n \n  y\n",
    "\x00\x00 nul \x00",
    "numbers: 1234567 ½ Ⅷ ٣٤٥ ๑๒๓ ¹²³ 3.14159",
    "한국어 문장과 日本語の文と中文句子。「」",
    "مرحبا بالعالم שלום עולם ١٢٣",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 done",
    "   leading and trailing   \n \t \n",
    "<|bos|>b<|user_start|>",
    "x" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 3000 + "7" * 3000,
    "",
]
CORPUS = [*SAMPLES, *(Path(str(m.__file__)).read_text() for m in (json, pickle, random))]
BYTES = {bytes([i]): i for i in range(256)}
VOCAB = 1000
# what tells the branches of the split pattern apart, beside any other character
SNIPPETS = [
    "the", "a", "S", "'s", "'LL", "'", "12", "!", "_", " ", "  ", "\n", "\r", "\t", "\x00",
    "\u0085", "\u3000", "\u180e", "\u2019", "\u0663", "\u017f", "\u01c5", "\u0301", "\u200d",
    "\u4e2d", "👩",
]  # fmt: skip
# libraries differ in the newest characters: those that Python does not know are left out
known_characters = st.characters(exclude_categories=["Cs", "Cn"])
text_of_all_kinds = st.lists(st.sampled_from(SNIPPETS) | known_characters).map("".join)

only_ours = pytest.mark.skipif(
    not hasattr(Tokenizer, "from_ranks"), reason="the published rustbpe lacks it"
)


def trained(texts: list[str], vocab_size: int, **options: object) -> Tokenizer:
    tokenizer = Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **{"pattern": SPLIT_PATTERN, **options})
    return tokenizer


def tokens(tokenizer: Tokenizer) -> list[bytes]:
    """Every token, by rank."""
    pairs = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in pairs] == list(range(len(pairs)))
    return [bytes(token) for token, _ in pairs]


def tiktoken_of(ranks: dict[bytes, int], pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def slow_tokens(texts: list[str], vocab_size: int) -> list[bytes]:
    """Counts every pair again after each merge; the smaller pair of ids comes first."""
    pieces = Counter(piece for text in texts for piece in regex.findall(SPLIT_PATTERN, text))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    learnt = [bytes([i]) for i in range(256)]
    while len(learnt) < vocab_size:
        counts: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for ids, _ in words:
            i = 0
            while i + 1 < len(ids):
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(learnt)]
                i += 1
        learnt.append(learnt[best[0]] + learnt[best[1]])
    return learnt


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return trained(CORPUS, VOCAB)


@pytest.fixture(scope="module")
def oracle(ours: Tokenizer) -> tiktoken.Encoding:
    return tiktoken_of(dict(ours.get_mergeable_ranks()), SPLIT_PATTERN)


class TestTraining:
    def test_slow_twin(self) -> None:
        texts = [*SAMPLES, Path(json.__file__).read_text()]
        assert tokens(trained(texts, 400)) == slow_tokens(texts, 400)

    @settings(max_examples=60, deadline=None)
    @given(texts=st.lists(text_of_all_kinds, max_size=4))
    @example(texts=["aaaa aaa aaaaa baaab", "abab ababab"])
    def test_slow_twin_of_any_text(self, texts: list[str]) -> None:
        assert tokens(trained(texts, 270)) == slow_tokens(texts, 270)

    def test_merges_of_rustbpe_0_1_0(self) -> None:
        """SHA-256 of its 2,000 tokens of this text, many of them ties."""
        draw = random.Random(0)
        letters = "etaoinshr é中"
        texts = ["".join(draw.choices(letters, k=2000)) for _ in range(20)]
        digest = hashlib.sha256(b" ".join(tokens(trained(texts, 2000)))).hexdigest()
        assert digest == "cb3c1c49c459f30c971c1fad78bc93aa86ddc05cf8ec550718175f11e093af87"

    def test_default_pattern_is_gpt4s(self) -> None:
        tokenizer = Tokenizer()
        tokenizer.train_from_iterator(iter(["1234 1234 1234"]), 300)
        assert tokenizer.get_pattern() == GPT4_PATTERN
        assert tokens(tokenizer)[256:] == [b"12", b"123"]
        assert tokenizer.vocab_size == 258  # the text yields no more

    def test_other_patterns(self) -> None:
        assert tokens(trained(["ab, cd, ab; cd;"], 300, pattern=r"\w+"))[256:] == [b"ab", b"cd"]

    @only_ours
    def test_hugging_face(self) -> None:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        split = tokenizers.Regex(SPLIT_PATTERN.replace("?+", "?").replace("++", "+"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(split, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(iter(CORPUS), trainer)
        merges = ["".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
        alphabet = byte_level_alphabet()
        found = tokens(trained(CORPUS, VOCAB, tie_break="huggingface"))[256:]
        assert ["".join(alphabet[byte] for byte in token) for token in found] == merges
        assert found != tokens(trained(CORPUS, VOCAB))[256:]

    @only_ours
    @pytest.mark.parametrize("buffer_size", [1, 7, 8192])
    @pytest.mark.parametrize("num_threads", [1, 2, 5])
    def test_threads_batches_and_order_change_nothing(
        self, ours: Tokenizer, num_threads: int, buffer_size: int
    ) -> None:
        texts = random.Random(num_threads).sample(CORPUS, len(CORPUS))
        again = trained(texts, VOCAB, num_threads=num_threads, buffer_size=buffer_size)
        assert tokens(again) == tokens(ours)

    @only_ours
    def test_many_threads_on_much_text(self, ours: Tokenizer) -> None:
        """Enough that more than one thread counts; text repeated changes no order of counts."""
        texts = CORPUS * 60
        assert sum(map(len, texts)) > 4_000_000
        assert tokens(trained(texts, VOCAB, num_threads=8)) == tokens(ours)

    @only_ours
    def test_progress(self) -> None:
        seen = []
        trained(CORPUS, VOCAB, progress=lambda *args: seen.append(args))
        num_bytes = sum(len(text.encode()) for text in CORPUS)
        assert seen[-1] == ("merge", VOCAB - 256, VOCAB - 256)
        assert ("count", num_bytes, None) in seen

    @only_ours
    def test_an_exception_leaves_the_tokenizer_as_it_was(self) -> None:
        def broken() -> Iterator[str]:
            yield "ab ab ab"
            raise LookupError("the disk is gone")

        def refuse(stage: str, done: int, total: int | None) -> None:
            raise LookupError(f"no {stage}")

        tokenizer = trained(["ab ab"], 257)
        before = tokenizer.get_mergeable_ranks()
        with pytest.raises(LookupError, match="disk"):
            tokenizer.train_from_iterator(broken(), 300, buffer_size=1)
        with pytest.raises(LookupError, match="no count"):
            tokenizer.train_from_iterator(["cd"], 300, progress=refuse)
        assert (tokenizer.get_pattern(), tokenizer.get_mergeable_ranks()) == (SPLIT_PATTERN, before)

    @only_ours
    def test_a_signal_ends_it(self) -> None:
        """An iterator without Python code never lets a handler run by itself."""

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        tokenizer = Tokenizer()
        previous = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                tokenizer.train_from_iterator(itertools.repeat("ab " * 50_000, 20_000), 257)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert tokenizer.vocab_size == 256  # else the handler came after the training

    @only_ours
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"vocab_size": 255}, ValueError, "at least 256, not 255"),
            ({"buffer_size": 0}, ValueError, "buffer_size must be at least 1"),
            ({"num_threads": 0}, ValueError, "num_threads must be at least 1"),
            ({"tie_break": "coin"}, ValueError, '"coin" is not "rustbpe" or "huggingface"'),
            ({"pattern": "("}, ValueError, "Invalid regex pattern"),
            ({"pattern": ""}, ValueError, "pattern is empty"),
            ({"iterator": ["a", 3]}, TypeError, "int"),
            ({"iterator": 3}, TypeError, "not iterable"),
            ({"iterator": ["a", "b\ud800"]}, ValueError, "position 1: lone surrogates.*text 1"),
            ({"iterator": ["a" * 9000], "pattern": "(?:(?=a)a+)+b"}, RuntimeError, "backtracking"),
        ],
    )
    def test_errors(self, options: dict, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            Tokenizer().train_from_iterator(**{"iterator": ["ab"], "vocab_size": 300, **options})


class TestEncoding:
    @pytest.mark.parametrize("text", CORPUS)
    def test_tiktoken(self, ours: Tokenizer, oracle: tiktoken.Encoding, text: str) -> None:
        ids = ours.encode(text)
        assert ids == oracle.encode_ordinary(text)
        assert ours.encode(text) == ids  # now from a cache
        assert ours.decode(ids) == text

    @settings(max_examples=300, deadline=None)
    @given(text=text_of_all_kinds)
    def test_tiktoken_on_any_text(
        self, ours: Tokenizer, oracle: tiktoken.Encoding, text: str
    ) -> None:
        assert ours.encode(text) == oracle.encode_ordinary(text)

    def test_batches(self, ours: Tokenizer) -> None:
        assert ours.batch_encode(CORPUS) == [ours.encode(text) for text in CORPUS]
        assert ours.batch_encode([]) == []

    def test_unknown_ids(self, ours: Tokenizer) -> None:
        assert ours.decode([]) == ""
        with pytest.raises(ValueError, match="Unknown token id: 1000"):
            ours.decode([1, VOCAB])

    @only_ours
    @pytest.mark.parametrize("letters", ["a", "ab", "é", " ", "\n", "!"])
    def test_long_pieces(self, ours: Tokenizer, oracle: tiktoken.Encoding, letters: str) -> None:
        """A quadratic encoder would need minutes."""
        text = letters * (600_000 // len(letters))
        assert ours.encode(text) == oracle.encode_ordinary(text)

    @only_ours
    @pytest.mark.parametrize("num_threads", [1, 2, 3, None])
    def test_arrays_and_threads(self, ours: Tokenizer, num_threads: int | None) -> None:
        texts = CORPUS * 3
        ids = [ours.encode(text) for text in texts]
        assert ours.encode_batch(texts, num_threads) == ids
        flat, offsets = ours.encode_to_numpy(texts, num_threads=num_threads)
        assert (flat.dtype, offsets.dtype) == (np.uint16, np.int64)
        assert flat.tolist() == list(itertools.chain(*ids))
        assert np.diff(offsets).tolist() == [len(one) for one in ids]
        assert flat.flags.writeable
        nothing, offsets = ours.encode_to_numpy([])
        assert (len(nothing), offsets.tolist()) == (0, [0])

    @only_ours
    def test_any_ranks(self) -> None:
        """More than 65,536 tokens that no training made: each two bytes, in no sensible order."""
        pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
        random.Random(0).shuffle(pairs)
        ranks = BYTES | {pair: 256 + i for i, pair in enumerate([b"bcde", b"Hello", *pairs])}
        tokenizer = Tokenizer.from_ranks(ranks, GPT4_PATTERN)
        assert tokenizer.vocab_size == 256 + 2 + 65_536
        assert dict(tokenizer.get_mergeable_ranks()) == ranks
        oracle = tiktoken_of(ranks, GPT4_PATTERN)
        flat, offsets = tokenizer.encode_to_numpy(CORPUS)
        assert flat.dtype == np.uint32
        for i, text in enumerate([*CORPUS, "bcde abcdef Hello HelloHello"]):
            ids = oracle.encode_ordinary(text)
            assert tokenizer.encode(text) == ids
            if i < len(CORPUS):
                assert flat[offsets[i] : offsets[i + 1]].tolist() == ids

    @only_ours
    @pytest.mark.parametrize("pattern", [r"(?s:.)", r"\w+|\W", r"[a-z]+", r"(?<=a)b|\s+"])
    def test_other_patterns(self, ours: Tokenizer, pattern: str) -> None:
        """Text between the matches is no token, as in tiktoken."""
        ranks = dict(ours.get_mergeable_ranks())
        tokenizer = Tokenizer.from_ranks(ranks, pattern)
        oracle = tiktoken_of(ranks, pattern)
        for text in CORPUS:
            assert tokenizer.encode(text) == oracle.encode_ordinary(text)

    @only_ours
    def test_bytes_that_are_no_text(self, ours: Tokenizer) -> None:
        assert ours.decode_bytes([0xC3, 0x28, 256]) == b"\xc3(" + tokens(ours)[256]
        with pytest.raises(UnicodeDecodeError):
            ours.decode([0xC3, 0x28])

    @only_ours
    def test_the_gil_is_free(self, ours: Tokenizer) -> None:
        """Another thread gets to run, though no thread is ever asked to yield."""
        texts = [CORPUS[-1]] * 100
        runs, stop = [], threading.Event()

        def run() -> None:
            while not stop.wait(0.0005):
                runs.append(None)

        thread = threading.Thread(target=run)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(100)
        try:
            thread.start()
            before = len(runs)
            ours.encode_to_numpy(texts, num_threads=1)
            after = len(runs)
        finally:
            stop.set()
            sys.setswitchinterval(interval)
            thread.join()
        assert after > before

    @only_ours
    def test_errors(self, ours: Tokenizer) -> None:
        with pytest.raises(ValueError, match="no vocabulary yet; call train_from_iterator"):
            Tokenizer().encode("a")
        with pytest.raises(UnicodeEncodeError, match="position 2: lone surrogates are no text"):
            ours.encode("ab\udfff")
        with pytest.raises(UnicodeEncodeError, match="text 1 of these"):
            ours.encode_to_numpy(["ab", "\ud800"])
        with pytest.raises(ValueError, match="num_threads must be at least 1"):
            ours.encode_batch(["a"], 0)
        with pytest.raises(TypeError):
            ours.encode_batch("abc")
        with pytest.raises(TypeError):
            ours.encode(3)  # pyright: ignore[reportArgumentType]

    @only_ours
    @pytest.mark.parametrize(
        ("ranks", "match"),
        [
            (BYTES | {b"ab": 7}, "rank 7 belongs to more than one token"),
            ([*BYTES.items(), (b"a", 256)], r'token b"a" has more than one rank'),
            (BYTES | {b"ab": 257}, "without gaps; missing: 256"),
            ({b"%c" % i: i for i in range(250)}, "missing: 250, 251, 252, 253, 254, 255"),
            (BYTES | {b"": 256}, "rank 256 has no bytes"),
        ],
    )
    def test_bad_ranks(self, ranks: dict[bytes, int], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
        with pytest.raises(ValueError, match="Invalid regex"):
            Tokenizer.from_ranks(BYTES, "[")


@only_ours
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_default_number_of_threads() -> None:
    """The affinity, unless a cgroup's quota is smaller: that is tested in core/src/quota.rs."""
    program = "import os, rustbpe; {} print(rustbpe.default_num_threads())"
    pin = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
    one, all_of_them = (
        int(subprocess.check_output([sys.executable, "-c", program.format(first)]))
        for first in (pin, "")
    )
    assert one == 1
    assert 1 <= all_of_them <= len(os.sched_getaffinity(0))


@only_ours
class TestSplitting:
    @settings(max_examples=300, deadline=None)
    @given(text=text_of_all_kinds)
    def test_the_regex_module(self, text: str) -> None:
        for pattern in (SPLIT_PATTERN, GPT4_PATTERN):
            tokenizer = Tokenizer.from_ranks(BYTES, pattern)
            assert tokenizer.split(text) == regex.findall(pattern, text)

    def test_the_classes_of_characters_are_tiktokens(self) -> None:
        """Each character where a letter, a number, a space and any other are cut differently."""
        assigned = [*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0200)]
        chars = [chr(i) for i in assigned if chr(i) not in "\r\n"]
        alike = {}
        for pattern in (r"\p{L}", r"\p{N}", r"\s"):
            oracle = tiktoken_of(BYTES, pattern)
            alike[pattern] = set(oracle.decode(oracle.encode_ordinary("".join(chars))))
        expected = []
        for char in chars:
            if char in alike[r"\p{L}"]:
                pieces = [" " + char + "a"]
            elif char in alike[r"\p{N}"]:
                pieces = [" ", char, "a"]
            elif char in alike[r"\s"]:
                pieces = [" ", char + "a"]
            else:
                pieces = [" " + char, "a"]
            expected += ["\n", *pieces]
        tokenizer = Tokenizer.from_ranks(BYTES, SPLIT_PATTERN)
        assert tokenizer.split("".join(f"\n {char}a" for char in chars)) == expected


@only_ours
def test_real_text(real_data: Path) -> None:
    """Ids and merges on text of the kind it is for."""
    shards = sorted((real_data / "base_data").glob("*.parquet"))
    texts = pq.read_table(shards[0])["text"].to_pylist()
    tokenizer = trained(texts, 32_768)
    assert tokens(trained(texts[::-1], 32_768, num_threads=1, buffer_size=100)) == tokens(tokenizer)
    oracle = tiktoken_of(dict(tokenizer.get_mergeable_ranks()), SPLIT_PATTERN)
    unseen = pq.read_table(shards[-1])["text"].to_pylist()
    assert tokenizer.encode_batch(unseen) == oracle.encode_ordinary_batch(unseen, num_threads=2)
