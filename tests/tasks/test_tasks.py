"""Tasks: views and mixtures, what each task asks, which answers it accepts."""

import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from nanochat.infer.calculator import use_calculator
from nanochat.sandbox.confinement import BARRIERS
from nanochat.sandbox.execution import isolation_level
from nanochat.text.chat_format import Conversation, render_conversation, render_for_completion
from nanochat.text.tokenizer import RustBPETokenizer
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import (
    Task,
    TaskMixture,
    TaskSequence,
    final_number,
    last_text,
    multiple_choice,
    render_mc,
    shuffled,
)
from tasks.customjson import IDENTITY, CustomJSON, check_messages, identity
from tasks.gsm8k import GSM8K, solution_parts
from tasks.humaneval import HumanEval
from tasks.mixtures import mid_mixture, sft_mixture
from tasks.mmlu import MMLU
from tasks.programs import extract_code
from tasks.registry import evaluated_names, get_evaluated_task, get_task
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, load_words

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "fixtures"
GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class Numbers(Task):
    """Conversations that are told apart by a number; counts how many were made."""

    def __init__(self, first: int, count: int, **view: int | None) -> None:
        self.first = first
        self.made = 0
        super().__init__(count, **view)

    def get_example(self, index: int) -> Conversation:
        self.made += 1
        return {"number": self.first + index}


def numbers(task: Task) -> list[int]:
    return [conversation["number"] for conversation in task]


def question_of(conversation: Conversation) -> str:
    return conversation["messages"][0]["content"]


@pytest.mark.parametrize(
    "view", [{}, {"start": 3}, {"stop": 4}, {"start": 1, "stop": 9, "step": 3}, {"stop": 99}]
)
def test_a_view_is_a_slice(view: dict[str, int]) -> None:
    want = list(range(10))[slice(view.get("start"), view.get("stop"), view.get("step"))]
    task = Numbers(0, 10, **view)
    assert numbers(task) == want
    assert len(task) == len(want)
    assert [task[i]["number"] for i in range(-len(want), len(want))] == want + want
    with pytest.raises(IndexError):
        task[len(want)]
    assert numbers(Numbers(0, 10)[view.get("start") : view.get("stop") : view.get("step")]) == want
    assert numbers(task[1:][::2]) == want[1:][::2]


def test_an_error_inside_an_example_is_not_the_end_of_the_task() -> None:
    class Broken(Numbers):
        def get_example(self, index: int) -> Conversation:
            return {"number": [0, 1][index]}

    with pytest.raises(IndexError):
        numbers(Broken(0, 5))


def test_a_task_without_answers_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Numbers has no right answers"):
        Numbers(0, 1).evaluate({}, "1")


def test_mixture_has_everything_once_in_an_order_of_its_seed() -> None:
    parts = [Numbers(0, 50), Numbers(100, 0), Numbers(200, 7)[1:], Numbers(300, 1)]
    mixture = TaskMixture(parts)
    assert sum(part.made for part in parts) == 0
    want = [*range(50), *range(201, 207), 300]
    got = numbers(mixture)
    assert sorted(got) == want
    assert got != want
    assert numbers(TaskMixture(parts)) == got
    assert numbers(TaskMixture(parts, seed=1)) != got
    assert numbers(mixture[5:20]) == got[5:20]
    assert any(number >= 200 for number in got[:28])


def test_a_task_listed_twice_comes_twice() -> None:
    part = Numbers(0, 5)
    assert sorted(numbers(TaskMixture([part, part]))) == sorted(list(range(5)) * 2)


def test_sequence_keeps_the_order() -> None:
    assert numbers(TaskSequence([Numbers(5, 3), Numbers(0, 0), Numbers(0, 2)])) == [5, 6, 7, 0, 1]


def test_humaneval_is_in_no_mixture() -> None:
    for kind in (TaskMixture, TaskSequence):
        with pytest.raises(ValueError, match="HumanEval is for evaluation only"):
            kind([Numbers(0, 1), HumanEval(task_data=DATA)])
        with pytest.raises(ValueError, match="at least one task"):
            kind([])


def test_shuffled_is_the_usual_order() -> None:
    # datasets.Dataset.shuffle(seed=42) of ten rows
    assert shuffled(10).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]


def test_render_mc_is_as_models_were_trained_on() -> None:
    assert render_mc("Which is a color?", ["A", "B"], ["red", "ten"]) == (
        "Multiple Choice question: Which is a color?\n- red=A\n- ten=B\n\n"
        "Respond only with the letter of the correct answer."
    )
    with pytest.raises(ValueError, match="do not fit"):
        multiple_choice("?", ["A", "B"], ["red", "ten"], "C")
    with pytest.raises(ValueError, match="do not fit"):
        multiple_choice("?", ["A"], ["red", "ten"], "A")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_arc() -> None:
    task = ARC("ARC-Easy", "test", DATA)
    assert task.eval_type == "categorical"
    rows = {row["question"]: row for row in rows_of("arc/ARC-Easy/test.jsonl")}
    for conversation in task:
        row = rows.pop(re.findall("question: (.*)\n", question_of(conversation))[0])
        assert conversation["letters"] == tuple(row["choices"]["label"])
        for letter in conversation["letters"]:
            right = letter == row["answerKey"]
            assert task.evaluate(conversation, letter) is right
            assert task.reward(conversation, letter) == float(right)
        assert not task.evaluate(conversation, "")
    assert not rows
    with pytest.raises(ValueError, match="'ARC-Hard' is unknown; choose ARC-Easy or ARC-Challenge"):
        ARC("ARC-Hard", "test", DATA)


def test_mmlu() -> None:
    task = MMLU("test", DATA)
    right = {row["question"]: "ABCD"[row["answer"]] for row in rows_of("mmlu/all/test.jsonl")}
    for conversation in task:
        letter = right.pop(re.findall("question: (.*)\n", question_of(conversation))[0])
        assert [x for x in "ABCD" if task.evaluate(conversation, x)] == [letter]
    assert not right
    anatomy = MMLU("test", DATA, subjects=("anatomy",))
    assert [c["subject"] for c in anatomy] == ["anatomy"] * 2
    with pytest.raises(ValueError, match="unknown subject 'anatomie'; did you mean 'anatomy'"):
        MMLU("test", DATA, subjects=("anatomie",))


def test_gsm8k_calculations_are_tool_calls() -> None:
    parts = solution_parts("It has 3*4=<<3*4=12>>12 eggs.\n<<x==y=1>>#### 12")
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "It has 3*4="),
        ("python", "3*4"),
        ("python_output", "12"),
        ("text", "12 eggs.\n"),
        ("python", "x==y"),
        ("python_output", "1"),
        ("text", "#### 12"),
    ]


def test_last_text_is_what_the_assistant_writes() -> None:
    parts = [{"type": "python_output", "text": "#### 1"}, {"type": "text", "text": "#### 2"}]
    assert last_text({"messages": [*GOOD, {"role": "assistant", "content": parts}]}) == "#### 2"
    assert last_text({"messages": GOOD}) == "Hello"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 18", "18"),
        ("####18", "18"),
        ("####  -5 ", "-5"),
        ("#### 1,319", "1319"),
        ("#### 1 319", "1319"),
        ("#### 12,345,678 people", "12345678"),
        ("#### $18.00", "18"),
        ("#### -$2.50", "-2.5"),
        ("#### .5", "0.5"),
        ("#### 18.", "18"),
        ("#### 1 #### 2", "1"),
        ("18", None),
        ("#### eighteen", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_judges_the_number() -> None:
    task = GSM8K("test", DATA)
    by_number = {final_number(last_text(c)): c for c in task}
    assert set(by_number) == {Decimal("2.5"), 17, 1500}
    big, half = by_number[Decimal(1500)], by_number[Decimal("2.5")]
    for answer in ("#### 1500", "It grows. #### 1,500", "####1500.0", "#### $1500"):
        assert task.evaluate(big, answer)
        assert task.reward(big, answer) == 1.0
    for answer in ("1500", "#### 150", "#### 15000", "#### -1500", "####", "#### 1500.5"):
        assert not task.evaluate(big, answer)
        assert task.reward(big, answer) == 0.0
    assert task.evaluate(half, "#### 2.50")
    assert not task.evaluate(half, "#### 2")


def runs(candidate: str, test: str, function: str) -> bool:
    command = [sys.executable, "-c", f"{candidate}\n\n{test}"]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("function", "answer", "right"),
    [
        ("total", "def total(numbers: List[int]) -> int:\n    return sum(numbers)", True),
        ("total", "Sure:\n```python\ndef total(n):\n    return sum(n)\n```\nDone ```x```", True),
        ("total", "```\ndef total(n):\n    return sum(n)", True),
        ("total", "```python\ndef total(n):\n    return 3\n```", False),
        ("total", "Just add them up.", False),
        ("quadruple", "```py\ndef quadruple(x):\n    return double(double(x))\n```", True),
        ("quadruple", "def quadruple(x):\n    return double(x)", False),
    ],
)
def test_humaneval_runs_the_answer(function: str, answer: str, right: bool) -> None:
    task = HumanEval(task_data=DATA, judge=runs)
    (conversation,) = [c for c in task if c["entry_point"] == function]
    assert task.evaluate(conversation, answer) is right


sandboxed = pytest.mark.skipif(
    set(isolation_level()) != set(BARRIERS),
    reason=f"this kernel grants only {isolation_level()}",
)


@sandboxed
def test_humaneval_in_the_sandbox() -> None:
    task = HumanEval(task_data=DATA)
    assert task.evaluation_only
    for conversation in task:
        assert task.evaluate(conversation, last_text(conversation))
        assert not task.evaluate(conversation, "pass")


def test_the_weaker_sandbox_is_for_tasks_whose_answers_are_programs() -> None:
    task = get_evaluated_task("HumanEval", DATA, allow_weaker_sandbox=True)
    assert isinstance(task, HumanEval)
    assert task.allow_weaker_sandbox
    task.ready()
    assert not HumanEval(task_data=DATA).allow_weaker_sandbox
    get_evaluated_task("GSM8K", DATA, allow_weaker_sandbox=True).ready()


def test_code_blocks() -> None:
    assert extract_code("a\n```python\nx = 1\n\ny = 2\n```\nb\n```\nz\n```") == "x = 1\n\ny = 2"
    assert extract_code("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "task",
    [
        lambda: GSM8K("test", DATA),
        lambda: SpellingBee("train", size=500),
        lambda: Arithmetic("train", size=500),
    ],
)
def test_the_tool_gives_the_output_that_is_shown(task: Any) -> None:
    for conversation in task():
        parts = conversation["messages"][1]["content"]
        calls = [part["text"] for part in parts if part["type"] == "python"]
        outputs = [part["text"] for part in parts if part["type"] == "python_output"]
        assert calls
        assert [use_calculator(call) for call in calls] == outputs


@pytest.mark.parametrize("split", ["train", "test"])
def test_spelling_bee_counts_right(split: str) -> None:
    task = SpellingBee(split, size=300)
    counts = set()
    for index, conversation in enumerate(task):
        assert conversation == SpellingBee(split, size=301)[index]
        word = conversation["word"]
        text, call, output, last = conversation["messages"][1]["content"]
        ((found, letter),) = re.findall(r"^'(\w+)'\.count\('(\w)'\)$", call["text"])
        assert found == word
        assert word in question_of(conversation)
        count = sum(character == letter for character in word)
        assert output["text"] == str(count)
        assert final_number(last["text"]) == count
        assert len(re.findall(r"yes", text["text"])) == count
        assert f"{word}:{','.join(word)}\n" in text["text"]
        assert task.evaluate(conversation, f"#### {count}")
        assert not task.evaluate(conversation, f"#### {count + 1}")
        assert not task.evaluate(conversation, str(count))
        counts.add(count)
    assert {0, 1, 2} <= counts


def test_no_word_is_in_training_and_testing() -> None:
    kinds = (SpellingBee, SimpleSpelling)
    train, test = (
        {c["word"] for kind in kinds for c in kind(split, size=2000)} for split in ("train", "test")
    )
    assert len(train) > 1000
    assert len(test) > 200
    assert not train & test
    assert not set(load_words("train")) & set(load_words("test"))


def test_simple_spelling() -> None:
    task = SimpleSpelling("test", size=5)
    for conversation in task:
        word = conversation["word"]
        assert question_of(conversation) == f"Spell the word: {word}"
        assert task.evaluate(conversation, f" {word}:" + ",".join(word))
        assert not task.evaluate(conversation, word)


def test_arithmetic() -> None:
    asked = {}
    for split in ("train", "test"):
        task = get_task("Arithmetic", split, size=2000)
        asked[split] = set()
        for index, conversation in enumerate(task):
            assert conversation == Arithmetic(split, size=2001)[index]
            call, output, last = conversation["messages"][1]["content"]
            first, symbol, second = re.fullmatch(r"(\d+)([-+*])(\d+)", call["text"]).groups()
            assert re.findall(r"\d+", question_of(conversation)) == [first, second]
            spoken = {"+": "plus", "-": "minus", "*": "times"}[symbol]
            assert re.search(rf" ({re.escape(symbol)}|{spoken}) ", question_of(conversation))
            assert final_number(last["text"]) == int(output["text"])
            assert task.evaluate(conversation, f"#### {output['text']}")
            assert not task.evaluate(conversation, output["text"])
            asked[split].add((first, second))
    assert not asked["train"] & asked["test"]
    with pytest.raises(ValueError, match="'val' is unknown; choose train or test"):
        Arithmetic("val")


def test_words_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    path = tmp_path / "words" / "words_alpha.txt"
    path.write_text("\n".join(f"word{a}{b}" for a in "abcdefghi" for b in "abcdefghi"))
    words = {split: load_words(split, tmp_path) for split in ("train", "test")}
    assert sorted(words["train"] + words["test"]) == sorted(path.read_text().split())
    path.write_text("UPPER\r\nNo\n")
    with pytest.raises(ValueError, match=r"words_alpha\.txt has no words for train"):
        SpellingBee("train", tmp_path)
    with pytest.raises(ValueError, match="'val' is unknown; choose train or test"):
        SimpleSpelling("val")


def test_custom_json(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    longer = [{"role": "system", "content": "Be kind."}, *GOOD, *GOOD]
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({'messages': longer})}\n")
    assert [c["messages"] for c in CustomJSON(path)] == [GOOD, longer]
    assert len(CustomJSON(path, start=1)) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("3", "a list of messages"),
        ('{"text": "hello"}', "a list of messages"),
        ("[3]", "a list of messages"),
        ("[]", "0 messages"),
        (GOOD[:1], "1 messages"),
        ([*GOOD, GOOD[0]], "3 messages"),
        ([GOOD[1], GOOD[0]], "a message of 'assistant'; user is next"),
        ([GOOD[0], GOOD[0]], "a message of 'user'; assistant is next"),
        ([*GOOD, {"role": "system", "content": "x"}, GOOD[1]], "'system'; user is next"),
        ([GOOD[0], {"role": "assistant", "content": " "}], "the assistant says ' '"),
        ([GOOD[0], {"role": "assistant"}], "the assistant says None"),
        ([GOOD[0], {"role": "assistant", "content": []}], "the assistant says"),
        ([GOOD[0], {"role": "assistant", "content": [{"type": "image"}]}], "the assistant says"),
        ([{"role": "user", "content": 3}, GOOD[1]], "the user says 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    path = tmp_path / "own.jsonl"
    bad = line if isinstance(line, str | bytes) else json.dumps(line)
    path.write_bytes(
        json.dumps(GOOD).encode() + b"\n" + (bad.encode() if isinstance(bad, str) else bad) + b"\n"
    )
    with pytest.raises(ValueError, match=rf"own\.jsonl:2: .*{re.escape(reason)}"):
        CustomJSON(path)


def test_custom_json_wants_conversations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        CustomJSON(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no conversations"):
        CustomJSON(tmp_path / "empty.jsonl")


def test_identity(tmp_path: Path) -> None:
    conversations = list(identity())
    assert 60 <= len(conversations) <= 100
    assert len({json.dumps(c) for c in conversations}) == len(conversations)
    assert (ROOT / "tasks" / "data" / IDENTITY).read_bytes().isascii()
    (tmp_path / IDENTITY).write_text(json.dumps(GOOD))
    assert [c["messages"] for c in identity(tmp_path)] == [GOOD]


@pytest.mark.parametrize(
    ("name", "near"), [("GSM8k", "GSM8K"), ("arc-easy", "ARC-Easy"), ("SpelingBee", "SpellingBee")]
)
def test_unknown_task_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown task '{name}'; did you mean '{near}'"):
        get_task(name)


@pytest.mark.parametrize("mixture", [mid_mixture, sft_mixture])
def test_nothing_evaluated_is_trained_on(mixture: Any) -> None:
    trained = {question_of(conversation) for conversation in mixture("full", "train", DATA)}
    for name in evaluated_names():
        for conversation in get_task(name, task_data=DATA):
            assert question_of(conversation) not in trained
    for row in rows_of("gsm8k/main/train.jsonl"):
        assert row["question"] in trained


@pytest.mark.parametrize("mixture", [mid_mixture, sft_mixture])
def test_mixtures(mixture: Any) -> None:
    for split in ("train", "test"):
        for conversation in mixture("full", split, DATA)[:300]:
            check_messages(conversation["messages"], split)
        assert len(mixture("local", split)) > 400
    questions = {question_of(c) for c in mixture("local", "train")}
    assert {question_of(c) for c in identity()} <= questions
    assert not {question_of(c) for c in mixture("local", "test")} & questions
    with pytest.raises(ValueError, match="'small' is unknown; choose full or local"):
        mixture("small", "train", DATA)
    with pytest.raises(ValueError, match="'val' is unknown; choose train or test"):
        mixture("local", "val", DATA)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["the answer is the number of letters " * 9], 285)


def trained_text(conversation: Conversation) -> str:
    """What the assistant says itself, with the tokens that end it."""
    said = ""
    for message in conversation["messages"]:
        if message["role"] == "assistant":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] == "text":
                    said += part["text"]
                elif part["type"] == "python":
                    said += f"<|python_start|>{part['text']}<|python_end|>"
            said += "<|assistant_end|>"
    return said


@pytest.mark.parametrize(
    "task",
    [
        lambda: ARC("ARC-Challenge", "test", DATA),
        lambda: MMLU("test", DATA),
        lambda: GSM8K("test", DATA),
        lambda: HumanEval(task_data=DATA),
        lambda: SmolTalk("test", DATA),
        lambda: SpellingBee("train", size=20),
        lambda: SimpleSpelling("train", size=20),
        lambda: Arithmetic("train", size=20),
        identity,
    ],
)
def test_the_model_is_trained_on_what_the_assistant_says(tokenizer: Any, task: Any) -> None:
    for conversation in task():
        ids, mask = render_conversation(tokenizer, conversation, 2**20)
        trained = [token for token, bit in zip(ids, mask, strict=True) if bit]
        assert tokenizer.decode(trained) == trained_text(conversation)
        text = tokenizer.decode(ids)
        assert all(m["content"] in text for m in conversation["messages"] if m["role"] == "user")
        prompt = render_for_completion(tokenizer, conversation)
        assert tokenizer.decode(prompt).endswith("<|assistant_start|>")


def test_the_documented_task(tokenizer: Any) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "adding_a_task.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {"__name__": "documented"}
    exec("".join(blocks), names)
    train, mixture, problem = names["train"], names["mixture"], names["problem"]
    assert len(mixture) == 2 * len(train) + len(identity())
    first, second = map(int, re.findall(r"[0-9]+", question_of(problem)))
    assert train.evaluate(problem, f"#### {first + second}")
    assert train.reward(problem, "#### -1") == 0.0
    for conversation in train[:20]:
        ids, mask = render_conversation(tokenizer, conversation)
        trained = [token for token, bit in zip(ids, mask, strict=True) if bit]
        assert tokenizer.decode(trained) == trained_text(conversation)
    assert [entry.name for entry in names["TASKS"]] == ["Addition"]
    row = {"first": 2, "second": 3}
    conversation = names["WrittenAddition"].conversation(None, row)
    assert last_text(conversation) == "#### 5"


@pytest.fixture
def real_tasks(real_data: Path) -> Path:
    folder = real_data / "tasks"
    if not folder.is_dir():
        pytest.skip(f"needs real task files in {folder}")
    return folder


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda data: ARC("ARC-Easy", "train", data), 2251),
        (lambda data: ARC("ARC-Easy", "validation", data), 570),
        (lambda data: ARC("ARC-Easy", "test", data), 2376),
        (lambda data: ARC("ARC-Challenge", "train", data), 1119),
        (lambda data: ARC("ARC-Challenge", "validation", data), 299),
        (lambda data: ARC("ARC-Challenge", "test", data), 1172),
        (lambda data: MMLU("dev", data), 285),
        (lambda data: MMLU("validation", data), 1531),
        (lambda data: MMLU("test", data), 14042),
        (lambda data: GSM8K("train", data), 7473),
        (lambda data: GSM8K("test", data), 1319),
        (lambda data: HumanEval("test", data), 164),
    ],
)
def test_real_counts_are_as_published(real_tasks: Path, make: Any, count: int) -> None:
    task = make(real_tasks)
    assert len(task) == count
    for conversation in task:
        check_messages(conversation["messages"], type(task).__name__)
        if task.eval_type == "categorical":
            right = [x for x in conversation["letters"] if task.evaluate(conversation, x)]
            assert right == [last_text(conversation)]
    assert len({question_of(c) for c in task}) > 0.98 * count


def test_real_mmlu_has_57_subjects(real_tasks: Path) -> None:
    assert len({c["subject"] for c in MMLU("test", real_tasks)}) == 57


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_gsm8k_answers_are_numbers(real_tasks: Path, split: str) -> None:
    task = GSM8K(split, real_tasks)
    for conversation in task:
        text = last_text(conversation)
        assert final_number(text) == Decimal(text.rpartition("####")[2].replace(",", "").strip())
        assert task.evaluate(conversation, text)
        for part in conversation["messages"][1]["content"]:
            assert "<<" not in part["text"]


@sandboxed
def test_real_humaneval_solutions_pass_and_empty_answers_do_not(real_tasks: Path) -> None:
    task = HumanEval(task_data=real_tasks)
    assert not [c["entry_point"] for c in task if not task.evaluate(c, last_text(c))]
    assert not [c["entry_point"] for c in task if task.evaluate(c, "")]
