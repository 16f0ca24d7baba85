"""The tokenizers against tiktoken and Hugging Face on many kinds of text; the chat format."""

import doctest
import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanochat.text.chat_format
import nanochat.text.tokenizer
from nanochat.text.chat_format import (
    conversation_text,
    render_conversation,
    render_for_completion,
    visualize_tokenization,
)
from nanochat.text.tokenizer import (
    HuggingFaceTokenizer,
    RustBPETokenizer,
    TiktokenTokenizer,
    byte_tokenizer,
    get_token_bytes,
    get_tokenizer,
)
from nanochat.text.tokenizer_base import SPECIAL_TOKENS, Tokenizer
from rustbpe import Tokenizer as RustTokenizer

SAMPLES = [
    "Hello world! It's 2024, isn't it? We'LL see 12345 things.",
    "def f(x):\n\treturn x  # comment\n\n\n    y = [1, 2,3]\r\n",
    "한국어 문장과 日本語の文と中文句子。",
    "مرحبا بالعالم שלום עולם",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 done",
    "   leading and trailing   \n \t \n",
    "a<|bos|>b<|user_start|>",
    "\x00\u0085\u3000\u180e \u017ft \u01c5 e\u0301",
    "",
]
CORPUS = SAMPLES * 3 + [Path(json.__file__).read_text(), Path(pickle.__file__).read_text()]
VOCAB = 600


@pytest.fixture(scope="module")
def ours() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(CORPUS, VOCAB)


@pytest.fixture(scope="module")
def hugging_face() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train_from_iterator(CORPUS, VOCAB)


@pytest.fixture(params=["ours", "hugging_face"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(each: Tokenizer, text: str) -> None:
    assert each.decode(each.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(ours: RustBPETokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text


def test_vocabularies_overlap_with_hugging_face(
    ours: RustBPETokenizer, hugging_face: HuggingFaceTokenizer
) -> None:
    """Only ties are broken differently."""
    a, b = ({x for x in t.token_bytes() if x} for t in (ours, hugging_face))
    assert len(a & b) >= 0.97 * (VOCAB - 9)


def test_special_tokens_come_last(each: Tokenizer) -> None:
    assert each.get_vocab_size() == VOCAB
    ids = [each.encode_special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB - 9, VOCAB))
    assert each.get_bos_token_id() == VOCAB - 9
    with pytest.raises(ValueError, match="not a special token"):
        each.encode_special("the")


def test_text_never_becomes_a_special_token(each: Tokenizer) -> None:
    text = "".join(SPECIAL_TOKENS)
    ids = each.encode(text)
    assert max(ids) < VOCAB - 9
    assert each.decode(ids) == text


def test_lists_affixes_and_threads(each: Tokenizer) -> None:
    bos = each.get_bos_token_id()
    single = [each.encode(text, prepend=bos, append="<|user_end|>") for text in SAMPLES]
    assert each.encode(SAMPLES, prepend="<|bos|>", append="<|user_end|>", num_threads=2) == single
    assert single[-1] == [bos, VOCAB - 7]
    with pytest.raises(ValueError, match="must be a str"):
        each.encode(3)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_saved_and_loaded_is_the_same(ours: RustBPETokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    (file,) = tmp_path.iterdir()
    json.loads(file.read_text())  # a plain file
    loaded = get_tokenizer(tmp_path)
    assert [loaded.encode(t) for t in SAMPLES] == [ours.encode(t) for t in SAMPLES]


def test_hugging_face_saved_and_loaded(hugging_face: HuggingFaceTokenizer, tmp_path: Path) -> None:
    hugging_face.save(tmp_path)
    loaded = HuggingFaceTokenizer.from_directory(tmp_path)
    assert [loaded.encode(t) for t in SAMPLES] == [hugging_face.encode(t) for t in SAMPLES]


def test_token_bytes_are_raw_bytes(ours: RustBPETokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    token_bytes = get_token_bytes("cpu", tmp_path)
    assert token_bytes.dtype == torch.int32
    assert token_bytes.shape == (VOCAB,)
    assert token_bytes[-9:].tolist() == [0] * 9
    assert token_bytes[:256].tolist() == [1] * 256  # also bytes that are no text by themselves
    for text in SAMPLES:
        assert token_bytes[ours.encode(text)].sum().item() == len(text.encode())


def test_a_tiny_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="--vocab_size=265"):
        RustBPETokenizer.train_from_iterator(CORPUS, 264)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="more text"):
        RustBPETokenizer.train_from_iterator(["ab"], 400)


def test_missing_damaged_and_pickled_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scripts\.tok_train"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer_ranks.json").write_text('{"tokens": [1]}')
    with pytest.raises(ValueError, match="is damaged"):
        get_tokenizer(tmp_path)


def test_doubled_ranks_are_refused() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 7}
    with pytest.raises(ValueError, match="ranks"):
        TiktokenTokenizer.from_ranks(ranks, ".")


class TestEncoders:
    """rustbpe and tiktoken give the same ids."""

    @pytest.fixture(params=["rustbpe", "tiktoken"])
    def chosen(self, request: pytest.FixtureRequest, ours: RustBPETokenizer) -> RustBPETokenizer:
        if request.param == "rustbpe" and not hasattr(RustTokenizer, "from_ranks"):
            pytest.skip("the published rustbpe cannot load ranks")
        return RustBPETokenizer(ours.encoding, request.param)

    def test_ids(self, chosen: RustBPETokenizer, ours: RustBPETokenizer) -> None:
        texts = [*CORPUS, "lone \ud800 and \udc00\ud800 and a pair \ud83d\udc69"]
        ids = [ours.encoding.encode_ordinary(text) for text in texts]
        assert chosen.encode(texts, num_threads=2) == ids
        assert [chosen.encode(text) for text in texts] == ids
        assert pickle.loads(pickle.dumps(chosen)).encode(texts) == ids

    @pytest.mark.parametrize("prepend", [None, "<|bos|>", 7])
    def test_arrays(self, chosen: RustBPETokenizer, prepend: str | int | None) -> None:
        texts = ["", *CORPUS, "\ud800", ""]
        tokens, offsets = chosen.encode_to_numpy(texts, prepend, num_threads=2)
        assert (tokens.dtype, offsets.dtype) == (np.uint16, np.int64)
        parts = [tokens[i:j].tolist() for i, j in pairwise(offsets)]
        assert parts == chosen.encode(texts, prepend=prepend)
        assert [len(array) for array in chosen.encode_to_numpy([])] == [0, 1]

    def test_wide_ids(self) -> None:
        """With the special tokens there are more than fit 16 bits."""
        pairs = (bytes([i, j]) for i in range(256) for j in range(255))
        ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *pairs])}
        tokenizer = RustBPETokenizer.from_ranks(ranks, r"(?s:.)")
        assert tokenizer.get_vocab_size() == 2**16 + 9
        tokens, _ = tokenizer.encode_to_numpy(["a"], prepend="<|bos|>")
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == [2**16, ord("a")]

    def test_the_choice(self, ours: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="'fast' is not one of"):
            RustBPETokenizer(ours.encoding, "fast")  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(nanochat.text.tokenizer, "RustTokenizer", object)
        assert RustBPETokenizer(ours.encoding).encoder == "tiktoken"
        with pytest.raises(ValueError, match=r"dev/install\.sh"):
            RustBPETokenizer(ours.encoding, "rustbpe")


class TestConversation:
    """Ids and masks written out: every byte is its own token."""

    @pytest.fixture
    def tokenizer(self) -> TiktokenTokenizer:
        return byte_tokenizer()

    def test_masks(self, tokenizer: TiktokenTokenizer) -> None:
        bos, user, user_end, assistant, assistant_end, py, py_end, out, out_end = range(256, 265)
        messages = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "u"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "t"},
                    {"type": "python", "text": "p"},
                    {"type": "python_output", "text": "o"},
                ],
            },
            {"role": "user", "content": "v"},
            {"role": "assistant", "content": "w"},
        ]
        ids, mask = render_conversation(tokenizer, {"messages": messages})
        expected = [
            (bos, 0), (user, 0), (ord("S"), 0), (10, 0), (10, 0), (ord("u"), 0), (user_end, 0),
            (assistant, 0), (ord("t"), 1), (py, 1), (ord("p"), 1), (py_end, 1),
            (out, 0), (ord("o"), 0), (out_end, 0), (assistant_end, 1),
            (user, 0), (ord("v"), 0), (user_end, 0), (assistant, 0), (ord("w"), 1),
            (assistant_end, 1),
        ]  # fmt: skip
        assert list(zip(ids, mask, strict=True)) == expected
        cut = render_conversation(tokenizer, {"messages": messages}, max_tokens=8)
        assert cut == (ids[:8], mask[:8])
        completion = render_for_completion(tokenizer, {"messages": messages})
        assert completion == [*ids[:19], assistant]
        assert len(messages) == 5
        assert "(256)" in visualize_tokenization(tokenizer, ids, mask, with_token_id=True)
        assert conversation_text({"messages": messages}).splitlines() == [
            "<|bos|><|user_start|>S",
            "",
            "u<|user_end|>",
            "<|assistant_start|>t<|python_start|>p<|python_end|>",
            "<|output_start|>o<|output_end|>",
            "<|assistant_end|>",
            "<|user_start|>v<|user_end|>",
            "<|assistant_start|>w<|assistant_end|>",
        ]

    def test_every_tokenizer_renders(self, each: Tokenizer) -> None:
        """The methods that people know from upstream are the functions of chat_format."""
        parts = [{"type": "python", "text": "1+1"}, {"type": "text", "text": "two <|bos|>"}]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]
        conversation = {"messages": messages}
        ids, mask = each.render_conversation(conversation)
        assert (ids, mask) == render_conversation(each, conversation)
        assert each.decode(ids) == conversation_text(conversation).replace("\n", "")
        assert each.render_conversation(conversation, max_tokens=3) == (ids[:3], mask[:3])
        prompt = each.render_for_completion(conversation)
        assert prompt == ids[: len(prompt)] == render_for_completion(each, conversation)
        shown = each.visualize_tokenization(ids, mask, with_token_id=True)
        assert shown == visualize_tokenization(each, ids, mask, with_token_id=True)
        assert each.visualize_tokenization(ids, mask) != shown

    def test_the_worked_example(self) -> None:
        result = doctest.testmod(nanochat.text.chat_format)
        assert result.attempted > 4
        assert not result.failed

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            [{"role": "user", "content": ["a"]}],
            [{"role": "system", "content": "a"}],
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "image", "text": ""}]},
            ],
        ],
    )
    def test_bad_conversations_are_refused(
        self, tokenizer: TiktokenTokenizer, messages: list[dict]
    ) -> None:
        with pytest.raises(ValueError, match=r"message|part"):
            render_conversation(tokenizer, {"messages": messages})

    def test_completion_needs_an_assistant(self, tokenizer: TiktokenTokenizer) -> None:
        with pytest.raises(ValueError, match="not from the assistant"):
            render_for_completion(tokenizer, {"messages": [{"role": "user", "content": "a"}]})


def test_ids_equal_a_plain_tiktoken_encoding(ours: RustBPETokenizer) -> None:
    plain = tiktoken.Encoding(
        "plain",
        pat_str=ours.encoding._pat_str,
        mergeable_ranks=ours.encoding._mergeable_ranks,
        special_tokens={},
    )
    for text in CORPUS:
        assert ours.encode(text) == plain.encode_ordinary(text)
