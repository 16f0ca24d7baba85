"""Batches of conversations: what is a target, how rows are filled, exact resume."""

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from nanochat.data.conversation_loader import ConversationLoader, estimate_tokens, render_to_fit
from nanochat.text.chat_format import render_conversation
from nanochat.text.tokenizer import RustBPETokenizer


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["hello there, what is two and three? " * 9], 285)


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


CONVERSATIONS = [
    conversation(f"what is {n} and two?" + " please" * (n % 5), "it is " + "three " * (n % 7 + 1))
    for n in range(23)
]


def loader(tokenizer: Any, packing: str, **options: Any) -> ConversationLoader:
    conversations = options.pop("conversations", CONVERSATIONS)
    return ConversationLoader(conversations, tokenizer, 3, 128, packing, **options)


def test_padded_row_is_one_conversation_with_its_mask(tokenizer: Any) -> None:
    batch = next(loader(tokenizer, "padded"))
    assert batch.inputs.shape == batch.targets.shape == (3, 128)
    for row in range(3):
        ids, mask = render_conversation(tokenizer, CONVERSATIONS[row])
        want = [token if trained else -1 for token, trained in zip(ids[1:], mask[1:], strict=True)]
        assert batch.inputs[row, : len(ids)].tolist() == ids
        assert batch.targets[row, : len(want)].tolist() == want
        assert (batch.targets[row, len(want) :] == -1).all()


def test_stream_is_every_token_in_order(tokenizer: Any) -> None:
    rows = list(islice(loader(tokenizer, "stream"), 4))
    got = torch.cat([b.inputs.flatten() for b in rows]).tolist()
    stream = [t for c in CONVERSATIONS * 9 for t in render_conversation(tokenizer, c)[0]]
    assert got == stream[: len(got)]
    targets = torch.cat([b.targets.flatten() for b in rows]).tolist()
    assert targets == stream[1 : len(targets) + 1]


def test_packed_rows_hold_whole_conversations_once(tokenizer: Any) -> None:
    many = CONVERSATIONS * 20
    bos = tokenizer.get_bos_token_id()
    seen: list[list[int]] = []
    for batch in islice(loader(tokenizer, "packed", conversations=many), 20):
        assert (batch.targets != bos).all()
        for inputs in batch.inputs.tolist():
            starts = [i for i, token in enumerate(inputs) if token == bos] + [len(inputs)]
            seen += [inputs[a:b] for a, b in pairwise(starts)]
    rendered = [render_conversation(tokenizer, c)[0] for c in CONVERSATIONS]
    filler = tokenizer.encode_special("<|assistant_end|>")
    for row in seen:
        assert any(
            row[: len(r)] == r[: len(row)] and set(row[len(r) :]) <= {filler} for r in rendered
        )
    assert len(seen) > 20 * 3 * 1.5  # more than one conversation a row


@pytest.mark.parametrize("packing", ["stream", "padded", "packed"])
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_is_exact(tokenizer: Any, packing: str, stop: int) -> None:
    whole = list(islice(loader(tokenizer, packing), 12))
    resumed = loader(tokenizer, packing, state=whole[stop - 1].state)
    for want, got in zip(whole[stop:], resumed, strict=False):
        assert torch.equal(want.inputs, got.inputs)
        assert torch.equal(want.targets, got.targets)
        assert want.state == got.state


def test_ranks_share_the_conversations(tokenizer: Any) -> None:
    def first_inputs(rank: int, world_size: int, batches: int) -> list[list[int]]:
        ranked = loader(tokenizer, "padded", rank=rank, world_size=world_size)
        return [row for b in islice(ranked, batches) for row in b.inputs.tolist()]

    alone = first_inputs(0, 1, 4)
    shared = [first_inputs(rank, 2, 2) for rank in range(2)]
    assert [row for pair in zip(*shared, strict=True) for row in pair] == alone


def test_a_long_conversation_ends_at_a_turn(tokenizer: Any) -> None:
    long = conversation("hello", "there", "what is two?", "two and two " * 50)
    end = tokenizer.encode_special("<|assistant_end|>")
    first_turn = render_conversation(tokenizer, conversation("hello", "there"))[0]
    assert render_to_fit(tokenizer, long, 60).ids == first_turn
    assert first_turn[-1] == end
    cut = render_to_fit(tokenizer, conversation("hello", "three " * 500), 60)
    assert len(cut.ids) == 60


def test_conversations_without_targets_are_left_out(tokenizer: Any) -> None:
    question = conversation("what is two? " * 100, "two")
    batch = next(loader(tokenizer, "padded", conversations=[question, CONVERSATIONS[0]]))
    assert ((batch.targets != -1).sum(dim=1) > 0).all()
    with pytest.raises(ValueError, match="none of 1 conversations has a token of the assistant"):
        next(loader(tokenizer, "padded", conversations=[question]))


def test_estimate_is_near_the_truth(tokenizer: Any) -> None:
    many: Sequence[Any] = CONVERSATIONS * 60
    want = 60 * sum(len(render_conversation(tokenizer, c)[0]) for c in CONVERSATIONS)
    assert abs(estimate_tokens(tokenizer, many) - want) < 0.05 * want


def test_bad_input_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="packing 'tight' is unknown"):
        loader(tokenizer, "tight")
    with pytest.raises(ValueError, match="no conversations"):
        loader(tokenizer, "padded", conversations=[])
    state = next(loader(tokenizer, "padded")).state
    with pytest.raises(ValueError, match="num_conversations 23"):
        loader(tokenizer, "padded", conversations=CONVERSATIONS[:5], state=state)
