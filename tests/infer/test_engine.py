"""Batched generation against the model's plain definition of it, request by request."""

import random
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from nanochat.gpt import GPT, GPTConfig, KVCache
from nanochat.infer import slots
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request, TokenEvent, ToolCalls, check_whole
from nanochat.infer.sampling import SamplingSettings
from nanochat.kernels.attention import attention
from nanochat.text.tokenizer import RustBPETokenizer

CONTEXT = 96
VOCAB = 280
GREEDY = SamplingSettings(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["how many letters 12+30 " * 3], VOCAB)


def build(model: GPT) -> GPT:
    model.to_empty(device="cpu")
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # an untrained head predicts every token equally
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def small(n_kv_head: int = 2, dtype: torch.dtype = torch.float32) -> GPT:
    with torch.device("meta"):
        model = GPT(GPTConfig(CONTEXT, VOCAB, 2, 4, n_kv_head, 64), dtype)
    return build(model)


@pytest.fixture(scope="module")
def model() -> GPT:
    return small()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def without_stops(tokens: Sequence[int], max_tokens: int | None = 16) -> Request:
    return Request(tokens, max_tokens, GREEDY, stop_tokens=())


@pytest.fixture(params=["reference", "sdpa"])
def attend(request: pytest.FixtureRequest) -> Iterator[None]:
    before = attention.selected
    attention.use(request.param)
    yield
    attention.use(before)


@pytest.mark.long
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_greedy_tokens_are_the_models_own(
    tokenizer: RustBPETokenizer, n_kv_head: int, attend: None
) -> None:
    model = small(n_kv_head)
    requests = [without_stops(tokens) for tokens in prompts(16)]
    want = [list(model.generate(list(r.tokens), 16, temperature=0)) for r in requests]
    assert len({tuple(tokens) for tokens in want}) > 10
    engine = Engine(model, tokenizer)
    assert [handle.tokens for handle in engine.complete(requests)] == want
    assert [engine.complete([request])[0].tokens for request in requests] == want


def test_200_answers_do_not_depend_on_their_company(
    model: GPT, tokenizer: RustBPETokenizer
) -> None:
    kinds = [(0.0, None, 1.0), (1.0, None, 1.0), (1.0, 20, 1.0), (0.8, None, 0.9), (1.5, 50, 0.95)]
    requests = [
        Request(tokens, 3 + i % 11, SamplingSettings(*kinds[i % 5], seed=i // 7, sample=i % 7))
        for i, tokens in enumerate(prompts(200, longest=20))
    ]
    want = [handle.tokens for handle in Engine(model, tokenizer, 64).complete(requests)]
    order = random.Random(1).sample(range(200), 200)
    shuffled = Engine(model, tokenizer, 7, 50).complete([requests[i] for i in order])
    assert [handle.tokens for handle in shuffled] == [want[i] for i in order]
    alone = Engine(model, tokenizer, 1)
    assert [alone.complete([request])[0].tokens for request in requests[:50]] == want[:50]
    assert len({tuple(tokens) for tokens in want}) > 190


def test_a_slot_forgets(model: GPT, tokenizer: RustBPETokenizer) -> None:
    engine = Engine(model, tokenizer, num_slots=2)
    long = [without_stops(tokens, 40) for tokens in prompts(2, seed=5, longest=50)]
    short = without_stops([7], 10)
    fresh = Engine(model, tokenizer, num_slots=2).complete([short])[0]
    engine.complete([*long, Request([3], 5, SamplingSettings(2.0, 3, 0.5), stop_tokens=range(250))])
    assert engine.num_active == engine.num_waiting == 0
    assert engine.complete([short])[0].events == fresh.events


def test_an_idle_slot_stays_within_what_the_others_read(
    model: GPT, tokenizer: RustBPETokenizer
) -> None:
    engine = Engine(model, tokenizer, num_slots=2)
    long, short = [5] * 75, [9, 4]
    want = list(model.generate(short, 40, temperature=0))
    for cancelled in (False, True):
        ends_first = engine.submit(without_stops(long, 40 if cancelled else 3))
        goes_on = engine.submit(without_stops(short, 40))
        for _ in range(4):
            engine.step()
        engine.cancel(ends_first)
        while engine.step():
            pass
        assert goes_on.tokens == want


def test_a_prompt_is_copied_from_a_slot_that_still_answers_it(
    model: GPT, tokenizer: RustBPETokenizer
) -> None:
    first, other, *_ = prompts(2, seed=11)
    engine = Engine(model, tokenizer, num_slots=2)
    handles = [
        engine.submit(without_stops(tokens, length))
        for tokens, length in ((first, 30), (other, 4), (first, 12))
    ]
    while engine.step():
        pass
    want = list(model.generate(first, 30, temperature=0))
    assert [handle.tokens for handle in (handles[0], handles[2])] == [want, want[:12]]


def test_more_requests_than_slots_take_turns(model: GPT, tokenizer: RustBPETokenizer) -> None:
    engine = Engine(model, tokenizer, num_slots=3)
    handles = [engine.submit(without_stops([i], 1 + i % 4)) for i in range(10)]
    seen = 0
    while engine.step():
        assert engine.num_active + engine.num_waiting + sum(h.done for h in handles) == 10
        seen = max(seen, sum(bool(h.events) and not h.done for h in handles))
    assert seen <= 3
    assert [len(handle.tokens) for handle in handles] == [1 + i % 4 for i in range(10)]
    assert not engine.step()


def test_length_ends_an_answer(model: GPT, tokenizer: RustBPETokenizer) -> None:
    handle = Engine(model, tokenizer).complete([without_stops([1, 2], 5)])[0]
    assert len(handle.tokens) == 5
    assert handle.finish_reason == "length"
    assert [event.finish_reason for event in handle.events] == [""] * 4 + ["length"]


@pytest.mark.parametrize("length", [1, CONTEXT - 3, CONTEXT])
def test_the_context_ends_an_answer(model: GPT, tokenizer: RustBPETokenizer, length: int) -> None:
    tokens = prompts(1, seed=3)[0] * CONTEXT
    tokens = tokens[:length]
    handle, other = Engine(model, tokenizer).complete([without_stops(tokens, None)] * 2)
    room = CONTEXT - length + 1  # the last token need not be fed
    assert handle.tokens == list(model.generate(tokens, room, temperature=0))
    assert handle.finish_reason == other.finish_reason == "length"
    assert handle.events == other.events


def test_stop_tokens_end_an_answer(model: GPT, tokenizer: RustBPETokenizer) -> None:
    engine = Engine(model, tokenizer)
    tokens = prompts(1, seed=8)[0]
    whole = engine.complete([without_stops(tokens, 12)])[0].tokens
    stop = whole[6]
    first = whole.index(stop)
    handle = engine.complete([Request(tokens, 12, GREEDY, stop_tokens=[stop, whole[-1]])])[0]
    assert handle.tokens == whole[:first]
    assert handle.events[-1].token == stop
    assert handle.finish_reason == "stop"
    assert len(handle.masks) == len(handle.logprobs) == first


def test_log_probabilities_are_the_models(model: GPT, tokenizer: RustBPETokenizer) -> None:
    tokens = prompts(1, seed=2)[0]
    request = Request(tokens, 20, SamplingSettings(0.7, 30, 0.9), stop_tokens=())
    handle = Engine(model, tokenizer).complete([request])[0]
    with torch.no_grad():
        logits = model(torch.tensor([[*tokens, *handle.tokens]]))[0, len(tokens) - 1 : -1]
    want = logits.log_softmax(-1)[torch.arange(20), handle.tokens]
    assert torch.allclose(torch.tensor(handle.logprobs), want, atol=1e-5)


class Counting(GPT):
    """Counts the positions that go through the model, step by step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shapes: list[tuple[int, ...]] = []

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        self.shapes.append(tuple(idx_BT.shape))
        return super().hidden(idx_BT, cache)


def counting() -> Counting:
    with torch.device("meta"):
        model = Counting(GPTConfig(CONTEXT, VOCAB, 2, 4, 2, 64))
    build(model)
    return model


def test_a_prompt_is_prefilled_once_for_all_its_samples(tokenizer: RustBPETokenizer) -> None:
    model, tokens = counting(), prompts(1, seed=4)[0][:20]
    engine = Engine(model, tokenizer, num_slots=5)
    requests = [Request(tokens, 4 + i, SamplingSettings(sample=i), ()) for i in range(12)]
    got = [handle.tokens for handle in engine.complete(requests)]
    assert [shape for shape in model.shapes if shape[1] > 1] == [(1, len(tokens) - 1)]
    alone = Engine(model, tokenizer)
    assert got == [alone.complete([request])[0].tokens for request in requests]
    assert len({tokens[0] for tokens in got}) > 6  # the first token is drawn for each sample


def test_prefill_of_a_step_is_bounded(tokenizer: RustBPETokenizer) -> None:
    model = counting()
    engine = Engine(model, tokenizer, num_slots=16, prefill_tokens=64)
    engine.complete([without_stops(tokens, 3) for tokens in prompts(30, seed=6)])
    prefills = [rows * width for rows, width in model.shapes if width > 1]
    assert max(prefills) <= 64
    assert max(rows for rows, width in model.shapes if width > 1) > 1
    long = without_stops(prompts(1, longest=1)[0] * 80, 2)
    assert len(engine.complete([long, long])[1].tokens) == 2


def test_cancelled_requests_leave_the_others_alone(model: GPT, tokenizer: RustBPETokenizer) -> None:
    engine = Engine(model, tokenizer, num_slots=2)
    requests = [without_stops(tokens, 12) for tokens in prompts(4, seed=9)]
    want = [engine.complete([request])[0].tokens for request in requests]
    handles = [engine.submit(request) for request in requests]
    for _ in range(3):
        engine.step()
    for index in (0, 3):  # one is decoding, one waits
        engine.cancel(handles[index])
    engine.step()
    assert handles[0].finish_reason == handles[3].finish_reason == "cancelled"
    assert handles[0].tokens == want[0][:3]
    assert handles[3].tokens == []
    assert engine.num_active == 2
    while engine.step():
        pass
    assert [handles[i].tokens for i in (1, 2)] == [want[i] for i in (1, 2)]
    engine.cancel(handles[1])
    assert not engine.step()
    assert handles[1].finish_reason == "length"


def test_a_stream_gives_tokens_as_they_come(model: GPT, tokenizer: RustBPETokenizer) -> None:
    engine = Engine(model, tokenizer)
    request = without_stops([1, 2, 3], 9)
    want = engine.complete([request])[0].tokens
    heard: list[TokenEvent] = []
    handle = engine.submit(request, on_event=heard.append)
    stream = engine.stream(request)
    first = next(stream)
    assert [event.token for event in heard] == [first.token] == want[:1]
    rest = list(stream)
    assert [event.token for event in (first, *rest)] == want
    assert [event.finish_reason for event in rest] == [""] * 7 + ["length"]
    assert heard == handle.events
    assert handle.tokens == want

    unread = engine.stream(request)
    next(unread)
    unread.close()
    engine.step()
    assert engine.num_active == 0


class TestColumns:
    """The interface of one prompt and many samples."""

    def test_columns_are_the_answers(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        engine = Engine(model, tokenizer, num_slots=2)
        columns = list(engine.generate([5, 6], 3, 7, 1.0, 0, seed=1))
        rows = [Request([5, 6], 7, SamplingSettings(1.0, 0, seed=1, sample=i)) for i in range(3)]
        assert [list(row) for row in zip(*(ids for ids, _ in columns), strict=True)] == [
            handle.tokens for handle in engine.complete(rows)
        ]
        assert all(masks == [1, 1, 1] for _, masks in columns)

    def test_greedy_column(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        got = [ids[0] for ids, _ in Engine(model, tokenizer).generate([9], 1, 8, temperature=0)]
        assert got == list(model.generate([9], 8, temperature=0))

    def test_batch_has_the_prompt_and_no_stop(
        self, model: GPT, tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = Engine(model, tokenizer)
        engine.stop_tokens = tuple(range(0, VOCAB, 5))
        columns = list(engine.generate([5, 6], 6, 30, seed=2))
        sequences, masks = engine.generate_batch([5, 6], 6, 30, seed=2)
        assert len({len(sequence) for sequence in sequences}) > 2
        for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
            answer = sequence[2:]
            assert sequence[:2] == [5, 6]
            assert mask == [0, 0] + [1] * len(answer)
            column = [ids[row] for ids, _ in columns]
            assert column[: len(answer)] == answer
            assert not set(answer) & set(engine.stop_tokens)
            rest = column[len(answer) :]
            assert set(rest) == {rest[0]} <= set(engine.stop_tokens)
            sampled = [column_masks[row] for _, column_masks in columns]
            assert sampled == [1] * (len(answer) + 1) + [0] * (len(rest) - 1)

    def test_an_unread_generator_frees_its_slots(
        self, model: GPT, tokenizer: RustBPETokenizer
    ) -> None:
        engine = Engine(model, tokenizer)
        columns = engine.generate([5], 4, 30)
        next(columns)
        columns.close()
        assert not engine.step()
        assert engine.num_active == 0


class Scripted(GPT):
    """Says a given token after each number of positions, and remembers what it was fed."""

    script: Sequence[int] = ()

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        assert cache is not None
        positions = cache.lengths[:, None] + torch.arange(idx_BT.shape[1])
        fed = dict(zip(positions[0].tolist(), idx_BT[0].tolist(), strict=True))
        self.fed = {**getattr(self, "fed", {}), **fed}
        cache.lengths += idx_BT.shape[1]
        return positions[..., None].float()

    def head(self, y: Tensor) -> Tensor:
        says = torch.tensor(self.script)[y[..., 0].long().clamp(max=len(self.script) - 1)]
        return torch.full((*says.shape, VOCAB), -20.0).scatter(-1, says[..., None], 20.0)


class TestCalculator:
    """Tool calls: what the model says at each position is given, what the tool says is not."""

    def answer(
        self, tokenizer: RustBPETokenizer, said: str, **options: bool
    ) -> tuple[str, list[int], list[int]]:
        with torch.device("meta"):
            model = Scripted(GPTConfig(CONTEXT, VOCAB, 1, 4, 4, 64))
        build(model)
        model.script = [0, *self.ids(tokenizer, said)]
        handle = Engine(model, tokenizer).complete([Request([1, 2], 60, GREEDY, **options)])[0]
        assert handle.finish_reason == "stop"
        fed = [model.fed[position] for position in range(2, 2 + len(handle.tokens))]
        assert fed == handle.tokens  # what was forced is what the model reads
        return tokenizer.decode(handle.tokens), handle.masks, handle.tokens

    def ids(self, tokenizer: RustBPETokenizer, text: str) -> list[int]:
        """Tokens of a text in which words like <|bos|> stand for themselves."""
        ids: list[int] = []
        for part in text.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
            special = part.startswith("<|")
            ids += [tokenizer.encode_special(part)] if special else tokenizer.encode(part)
        return ids

    def test_result_is_forced(self, tokenizer: RustBPETokenizer) -> None:
        call = "so <|python_start|>12+30<|python_end|>"
        output = "<|output_start|>42<|output_end|>"
        # the model would say something else where the output is put
        wrong = "????????????????????"[: len(self.ids(tokenizer, output))]
        text, masks, tokens = self.answer(tokenizer, f"{call}{wrong}yes<|assistant_end|>")
        assert text == f"{call}{output}yes"
        assert tokens == self.ids(tokenizer, text)
        lengths = [len(self.ids(tokenizer, part)) for part in (call, output, "yes")]
        assert masks == [1] * lengths[0] + [0] * lengths[1] + [1] * lengths[2]

    def test_two_calls(self, tokenizer: RustBPETokenizer) -> None:
        first, second = "<|python_start|>7*6<|python_end|>", "<|python_start|>1/4<|python_end|>"
        out = ["<|output_start|>42<|output_end|>", "<|output_start|>0.25<|output_end|>"]
        hidden = ["?" * len(self.ids(tokenizer, o)) for o in out]
        said = f"{first}{hidden[0]}{second}{hidden[1]}<|python_end|>.<|assistant_end|>"
        want = f"{first}{out[0]}{second}{out[1]}<|python_end|>."
        assert self.answer(tokenizer, said)[0] == want

    @pytest.mark.parametrize(
        "said",
        [
            "<|python_start|>import os<|python_end|>then<|assistant_end|>",
            "<|python_end|>1+1<|python_end|><|assistant_end|>",
            "<|python_start|><|python_end|>.<|assistant_end|>",
            "<|python_start|>1+1<|bos|>",
        ],
    )
    def test_what_has_no_value_is_not_answered(
        self, tokenizer: RustBPETokenizer, said: str
    ) -> None:
        text, masks, _ = self.answer(tokenizer, said)
        assert text == said.removesuffix("<|assistant_end|>").removesuffix("<|bos|>")
        assert set(masks) == {1}

    def test_it_can_be_switched_off(self, tokenizer: RustBPETokenizer) -> None:
        call = "<|python_start|>1+1<|python_end|>"
        assert self.answer(tokenizer, f"{call}<|assistant_end|>", calculator=False)[0] == call

    def test_forced_tokens_count(self, tokenizer: RustBPETokenizer) -> None:
        with torch.device("meta"):
            model = Scripted(GPTConfig(CONTEXT, VOCAB, 1, 4, 4, 64))
        build(model)
        model.script = [0, *self.ids(tokenizer, "<|python_start|>1+1<|python_end|>????????")]
        call = len(self.ids(tokenizer, "<|python_start|>1+1<|python_end|>"))
        handle = Engine(model, tokenizer).complete([Request([1, 2], call + 2, GREEDY)])[0]
        assert tokenizer.decode(handle.tokens).endswith("<|output_start|>2")
        assert handle.finish_reason == "length"
        columns = list(Engine(model, tokenizer).generate([1, 2], 2, call + 2, temperature=0))
        assert [masks for _, masks in columns] == [[1, 1]] * call + [[0, 0]] * 2


class TestThreads:
    def test_one_thread_steps_for_all(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        engine, stop = Engine(model, tokenizer, num_slots=4), threading.Event()

        def own() -> None:
            while not stop.is_set():
                if not engine.step():
                    engine.wait(0.05)

        owner = threading.Thread(target=own)
        owner.start()
        want = {i: list(model.generate([i, 3], 8, temperature=0)) for i in range(20)}
        got: dict[int, list[int]] = {}

        def ask(i: int) -> None:
            done = threading.Event()
            request = without_stops([i, 3], 8)
            handle = engine.submit(request, lambda event: event.finish_reason and done.set())
            if done.wait(60):
                got[i] = handle.tokens

        clients = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        stop.set()
        owner.join()
        assert got == want

    def test_every_thread_may_step(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        engine = Engine(model, tokenizer, num_slots=4)
        want = [list(model.generate([i], 8, temperature=0)) for i in range(6)]
        got: dict[int, list[int]] = {}

        def ask(i: int) -> None:
            got[i] = [ids[0] for ids, _ in engine.generate([i], 1, 8, temperature=0)]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[i] for i in range(6)] == want

    def test_waiting_ends_when_there_is_work(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        engine = Engine(model, tokenizer)
        engine.complete([without_stops([1])])
        assert not engine.step()
        assert not engine.wait(0.01)
        handle = engine.submit(without_stops([1]))
        assert engine.wait(0)
        engine.step()
        engine.cancel(handle)
        assert engine.wait(0)


def test_a_failed_step_ends_its_requests_and_no_others(
    tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counting()
    engine = Engine(model, tokenizer, num_slots=2)
    handles = [engine.submit(without_stops([1, 2, i], 6)) for i in range(3)]
    engine.step()
    with monkeypatch.context() as patch:

        def exhausted(y: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("planted")

        patch.setattr(model, "head", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert [handle.finish_reason for handle in handles] == ["error", "error", ""]
    assert handles[0].events[-1].error == "OutOfMemoryError: planted"
    assert (engine.num_active, engine.num_waiting) == (0, 1)
    engine.complete([])
    while engine.step():
        pass
    for i in (1, 2):
        after = engine.complete([without_stops([1, 2, i], 6)])[0].tokens
        assert after == list(model.generate([1, 2, i], 6, temperature=0))
    assert handles[2].tokens == after


def test_a_failed_prefill_leaves_running_answers_alone(
    tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counting()
    engine = Engine(model, tokenizer, num_slots=4)
    running = engine.submit(without_stops([5, 6, 7], 8))
    engine.step()
    real = model.hidden

    def too_long(idx_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        if idx_BT.shape[1] > 20:
            raise IndexError("planted")
        return real(idx_BT, cache)

    monkeypatch.setattr(model, "hidden", too_long)
    failing = [engine.submit(without_stops([i] * 30, 5)) for i in range(2)]
    with pytest.raises(IndexError, match="planted"):
        engine.step()
    assert [handle.finish_reason for handle in failing] == ["error"] * 2
    with pytest.raises(RuntimeError, match="IndexError: planted"):
        check_whole(failing)
    while engine.step():
        pass
    assert running.tokens == list(model.generate([5, 6, 7], 8, temperature=0))


def test_a_device_that_is_lost_answers_nobody_until_it_is_back(
    tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counting()
    engine = Engine(model, tokenizer, num_slots=1)
    handles = [engine.submit(without_stops([1, i], 4)) for i in range(3)]
    with monkeypatch.context() as patch:

        def lost(*_: object) -> None:
            raise RuntimeError("device lost")

        patch.setattr(model, "hidden", lost)
        patch.setattr(engine._device, "clean", lost)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="device lost"):
                engine.step()
    assert [handle.finish_reason for handle in handles] == ["error"] * 3
    after = engine.complete([without_stops([1, 2], 4)])[0]
    assert after.tokens == list(model.generate([1, 2], 4, temperature=0))


def test_what_is_no_number_ends_its_request_and_leaves_the_slot_clean(
    tokenizer: RustBPETokenizer,
) -> None:
    model = small()
    want = list(model.generate([1, 2, 3], 30, temperature=0))
    engine = Engine(model, tokenizer, num_slots=1)
    poisoned = [9] * 70  # reaches further than the short answer after it
    weight = model.wte.weight.data
    row = weight[9].clone()
    weight[9] = float("nan")
    handle = engine.submit(without_stops(poisoned, 4))
    engine.step()
    scoring = engine.submit(Request(poisoned, 0, prompt_logprobs=0))
    engine.step()
    weight[9] = row
    for broken in (handle, scoring):
        assert broken.finish_reason == "error"
        assert "not numbers" in broken.events[-1].error
    assert engine.complete([without_stops([1, 2, 3], 30)])[0].tokens == want


def test_a_failing_tool_or_listener_ends_its_own_request(
    model: GPT, tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, num_slots=3)
    want = list(model.generate([3, 1], 8, temperature=0))

    def broken(*_: object) -> None:
        raise LookupError("planted")

    monkeypatch.setattr(ToolCalls, "see", broken)
    tool = engine.submit(Request([7, 7], 8, GREEDY, ()))
    deaf = engine.submit(Request([8, 8], 8, GREEDY, (), calculator=False), broken)
    fine = engine.submit(Request([3, 1], 8, GREEDY, (), calculator=False))
    while engine.step():
        pass
    assert (tool.finish_reason, tool.events[-1].error) == ("error", "LookupError: planted")
    assert deaf.finish_reason == "cancelled"
    assert fine.tokens == want


class TestScores:
    """Log-probabilities of prompts and of what else might have been said."""

    def scores(self, model: GPT, tokens: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([list(tokens)]))[0].log_softmax(-1)

    @pytest.mark.parametrize("length", [1, 2, 40, CONTEXT])
    @pytest.mark.parametrize("chunk", [1, 7, 2**24])
    def test_prompts_are_scored(
        self,
        model: GPT,
        tokenizer: RustBPETokenizer,
        monkeypatch: pytest.MonkeyPatch,
        length: int,
        chunk: int,
    ) -> None:
        monkeypatch.setattr(slots, "SCORED_LOGITS", chunk * VOCAB)
        tokens = (prompts(1, seed=3)[0] * CONTEXT)[:length]
        request = Request(tokens, 0, prompt_logprobs=3)
        handle = Engine(model, tokenizer).complete([request])[0]
        assert (handle.finish_reason, handle.tokens, handle.masks) == ("length", [], [])
        assert [scored.token for scored in handle.prompt] == tokens[1:]
        want = self.scores(model, tokens)
        for position, scored in enumerate(handle.prompt):
            assert scored.logprob == pytest.approx(float(want[position, scored.token]), abs=1e-4)
            best = want[position].topk(3)
            assert [token for token, _ in scored.top] == best.indices.tolist()
            assert [p for _, p in scored.top] == pytest.approx(best.values.tolist(), abs=1e-4)

    def test_alternatives_are_the_models_and_only_where_asked_for(
        self, model: GPT, tokenizer: RustBPETokenizer
    ) -> None:
        engine = Engine(model, tokenizer)
        plain, rich = engine.complete(
            [Request([4, 5], 6, GREEDY, (), top_logprobs=k) for k in (0, VOCAB + 5)]
        )
        assert plain.tokens == rich.tokens
        assert all(event.top == () for event in plain.events)
        want = self.scores(model, [4, 5, *rich.tokens])[1:]
        for position, event in enumerate(rich.events):
            assert len(event.top) == VOCAB
            assert event.top[0] == (event.token, event.logprob)  # greedy
            assert [t for t, _ in event.top[:5]] == want[position].topk(5).indices.tolist()

    def test_a_prompt_in_the_cache_is_scored_all_the_same(
        self, model: GPT, tokenizer: RustBPETokenizer
    ) -> None:
        engine = Engine(model, tokenizer, num_slots=4)
        tokens = prompts(1, seed=12)[0]
        alone = engine.complete([Request(tokens, 0, prompt_logprobs=1)])[0]
        running = engine.submit(without_stops(tokens, 9))
        engine.step()
        pair = [Request([*tokens[:-1], last], 1, prompt_logprobs=1) for last in (tokens[-1], 3)]
        handles = engine.complete(pair)
        assert [len(handle.events) for handle in handles] == [1, 1]
        assert handles[0].prompt == alone.prompt
        assert handles[1].prompt[:-1] == alone.prompt[:-1]
        assert handles[1].prompt[-1].token == 3
        while engine.step():
            pass
        assert running.tokens == list(model.generate(tokens, 9, temperature=0))


def test_weights_are_cast_once(tokenizer: RustBPETokenizer) -> None:
    model = small(dtype=torch.bfloat16)
    engine = Engine(model, tokenizer)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    request = without_stops([1, 2, 3], 12)
    want = list(model.generate([1, 2, 3], 12, temperature=0))
    assert engine.complete([request])[0].tokens == want

    other = small(dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        other.lm_head.weight.mul_(-1)
    assert engine.complete([request])[0].tokens == want
    engine.update_weights()
    assert engine.complete([request])[0].tokens == list(
        other.generate([1, 2, 3], 12, temperature=0)
    )


def test_float32_weights_are_not_copied(model: GPT, tokenizer: RustBPETokenizer) -> None:
    assert Engine(model, tokenizer).model is model


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "a prompt of 0 tokens"),
        (Request([1] * (CONTEXT + 1)), "prompt of 97 tokens: the context holds 1 to 96"),
        (Request([VOCAB]), "token 280 is outside the vocabulary, 0 to 279"),
        (Request([-1]), "token -1"),
        (Request([1], stop_tokens=[VOCAB]), "token 280"),
        (Request([1], max_tokens=0), "max_tokens 0 must be at least 1"),
        (Request([1], max_tokens=-1, prompt_logprobs=0), "max_tokens -1 must be at least 0"),
        (Request([1], top_logprobs=-1), "top_logprobs -1"),
        (Request([1], prompt_logprobs=-1), "prompt_logprobs -1"),
    ],
)
def test_impossible_requests_are_refused(
    model: GPT, tokenizer: RustBPETokenizer, request_: Request, message: str
) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    with pytest.raises(ValueError, match=message):
        engine.complete([Request([1]), request_])
    assert not engine.step()


def test_an_engine_needs_a_slot(model: GPT, tokenizer: RustBPETokenizer) -> None:
    with pytest.raises(ValueError, match="num_slots=0"):
        Engine(model, tokenizer, num_slots=0)
