"""Tasks without code: files of problems, their columns, which answers are right."""

import csv
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import configurator
from nanochat.text.chat_format import Conversation
from scripts import chat_eval, chat_rl
from tasks.file_answers import PATTERN_SECONDS, Reader
from tasks.file_rows import short_name
from tasks.registry import (
    get_evaluated_task,
    get_evaluated_tasks,
    get_rewarded_task,
    record_name,
)
from tests.support.documented import documented_files
from tests.support.hub import Hub, serving
from tests.support.runs import ROOT, run_here

SUMS = [{"question": f"What is {i} plus {i}?", "answer": 2 * i} for i in range(1, 13)]


def write(path: Path, rows: Any) -> str:
    """Rows in the form that the file's suffix tells; other values as JSON, texts as they are."""
    if isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def described(folder: Path, rows: Any, **keys: Any) -> str:
    """A description of rows in a file beside it."""
    write(folder / "rows.jsonl", rows)
    return write(folder / "my_task.json", {"rows": "rows.jsonl", **keys})


def asked(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation["messages"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_is_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = get_evaluated_task(write(tmp_path / f"sums{suffix}", SUMS))
    assert [asked(c) for c in task] == [[r["question"], str(r["answer"])] for r in SUMS]
    assert task.eval_type == "generative"
    assert [task.reward(task[2], text) for text in ("3+3=6", "6 or 7", "six")] == [1.0, 0.0, 0.0]


def test_training_and_testing_share_no_problem(tmp_path: Path) -> None:
    name = write(tmp_path / "sums.jsonl", SUMS)
    train, test = (
        {asked(c)[0] for c in get_rewarded_task(name, split)} for split in ("train", "test")
    )
    assert not train & test
    assert len(train) == 10
    assert len(test) == 2
    with pytest.raises(ValueError, match=r"one problem; training and testing need two"):
        get_rewarded_task(write(tmp_path / "one.jsonl", SUMS[:1]), "train")


def test_choices(tmp_path: Path) -> None:
    three, two = ["iron", "water", "salt"], ["ice", "steam"]
    rows = [
        {"question": "Which is liquid?", "choices": three, "answer": "B"},
        {"question": "Which is liquid?", "choices": three, "answer": 1},
        {"question": "Which is liquid?", "choices": three, "answer": "water"},
        {"question": "Which is cold?", "choices": two, "answer": 0},
        {"question": "?", "choices": {"text": ["4", "3"], "label": ["1", "2"]}, "answer": 2},
    ]
    name = write(tmp_path / "quiz.jsonl", rows)
    task = get_evaluated_task(name)
    assert task.eval_type == "categorical"
    assert [asked(c)[1] for c in task] == ["B", "B", "B", "A", "2"]
    assert [c["letters"] for c in task][2:] == [("A", "B", "C"), ("A", "B"), ("1", "2")]
    assert [task.evaluate(task[0], letter) for letter in "ABC"] == [False, True, False]
    with pytest.raises(ValueError, match="has no reward to learn from"):
        get_rewarded_task(name, "train")
    # a CSV with a column for each choice; one has fewer of them
    table = [
        {"question": "1?", "A": "x", "B": "y, z", "C": "w", "answer": "C"},
        {"question": "2?", "A": "x", "B": "y", "C": "", "answer": "y"},
    ]
    task = get_evaluated_task(write(tmp_path / "table.csv", table))
    assert [(asked(c)[1], c["letters"]) for c in task] == [("C", tuple("ABC")), ("B", tuple("AB"))]
    assert "- y, z=B\n" in asked(task[0])[0]
    # columns of other names, in the order of a description
    rows = [{"q": "?", "right": "a", "wrong": "b", "key": "a"}]
    keys = {"question": "q", "choices": ["wrong", "right"], "answer": "{key}"}
    assert asked(get_evaluated_task(described(tmp_path, rows, **keys))[0])[1] == "B"


CODE = [
    {
        "question": "Write double(x).",
        "tests": ["assert double(2) == 4", "assert double(0) == 0"],
        "entry_point": "double",
    },
    {
        "prompt": 'import math\n\ndef up(x):\n    """ Round up. """\n',
        "test": "def check(candidate):\n    assert candidate(1.5) == math.ceil(1.5)\n",
        "entry_point": "up",
    },
]


def test_programs_are_judged_in_the_sandbox(tmp_path: Path) -> None:
    name = write(tmp_path / "code.jsonl", CODE)
    task = get_evaluated_task(name, allow_weaker_sandbox=True)
    task.ready()
    right = "```python\ndef double(x):\n    return 2 * x\n```"
    for answer, verdict in [
        (right, True),
        (right.replace("2 * x", "4"), False),
        ("import os\nos._exit(0)", False),
    ]:
        assert task.evaluate(task[0], answer) is verdict
    assert task.evaluate(task[1], "def up(x):\n    return math.ceil(x)")
    assert not task.evaluate(task[1], "def up(x):\n    return 1")
    assert get_rewarded_task(name, "train", allow_weaker_sandbox=True).runs_code


def test_a_missing_barrier_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []

    class Sandbox:
        def ready(self) -> None:
            raise ValueError("this kernel does not grant user")

    def shared(weaker: bool) -> Sandbox:
        asked_for.append(weaker)
        return Sandbox()

    monkeypatch.setattr("tasks.programs.shared_sandbox", shared)
    name = write(tmp_path / "code.jsonl", CODE)
    for flag in ("", " --allow_weaker_sandbox"):
        with pytest.raises(SystemExit, match="does not grant user"):
            run_here(tmp_path, f"python -m scripts.chat_eval -a {name} --device=cpu{flag}")
    assert asked_for == [False, True]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,319.00 people.", "1319"),
        ("#### 1 319, and not 7", "1319"),
        ("10-3 = 7", "7"),
        ("7 is 10-3", "3"),
        ("so x is -5", "-5"),
        ("so x is \N{MINUS SIGN}5.", "-5"),
        ("-$2.50", "-2.5"),
        ("(.5)", "0.5"),
        ("5.", "5"),
        ("1.5e3", "1500"),
        ("1e999999999999", "999999999"),  # the digits that are left: no infinite exponent
        ("lists of 100 200 300", "300"),
        ("٣", None),
        ("none", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    found = Reader.last_number(text)
    if number == "999999999":
        assert found is not None
        assert found.is_finite()
    else:
        assert found == (None if number is None else Decimal(number))


def test_texts(tmp_path: Path) -> None:
    rows = [{"input": "1?", "target": "Yes"}, {"input": "2?", "target": "12"}]
    name = write(tmp_path / "yes.jsonl", rows)
    task = get_evaluated_task(name)
    # one answer is no number: none is compared as one
    said = [(0, " Yes\n"), (0, "yes"), (0, "It is Yes"), (1, "12"), (1, "12.0")]
    assert [task.evaluate(task[i], text) for i, text in said] == [True, False, False, True, False]
    keys = {"pattern": r"answer is (\w+)", "ignore_case": True}
    task = get_evaluated_task(described(tmp_path, rows, **keys))
    said = [(0, "The answer is yes."), (0, "yes"), (0, "answer is no, or: answer is yes")]
    assert [task.evaluate(task[i], text) for i, text in said] == [True, False, True]
    assert not task.evaluate(task[0], "the answer is yes, no: the answer is no")
    numbers = [{"question": "?", "answer": "007"}]
    for compare, verdict in (("", True), ("number", True), ("text", False)):
        task = get_evaluated_task(described(tmp_path, numbers, compare=compare))
        assert task.evaluate(task[0], "7") is verdict


def test_a_pattern_reads_the_right_answer_too(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": "2*3 is 6, so <6>"}]
    task = get_evaluated_task(described(tmp_path, rows, pattern="<(.*?)>"))
    said = ["<6.0>", "6", "<5> <6>", "<6> <5>", "<6> <>"]
    assert [task.evaluate(task[0], text) for text in said] == [True, False, True, False, True]


def test_a_pattern_that_never_ends_is_ended(tmp_path: Path) -> None:
    keys = {"pattern": "((?:a|aa)+)c", "compare": "text"}
    task = get_evaluated_task(described(tmp_path, [{"question": "?", "answer": "b"}], **keys))
    with pytest.raises(ValueError, match=f"takes over {PATTERN_SECONDS} s on 'aaa.*repetitions"):
        task.evaluate(task[0], "a" * 100)


def test_shots_come_first_and_are_not_asked(tmp_path: Path) -> None:
    task = get_evaluated_task(described(tmp_path, SUMS[:4], shots=2))
    shown = [str(SUMS[i][key]) for i in (0, 1) for key in ("question", "answer")]
    assert [asked(c) for c in task] == [
        [*shown, SUMS[i]["question"], str(SUMS[i]["answer"])] for i in (2, 3)
    ]
    assert [m["role"] for m in task[0]["messages"]] == ["user", "assistant"] * 3
    assert task.evaluate(task[0], "6")
    assert not task.evaluate(task[0], "2")
    write(tmp_path / "others.jsonl", [{"question": "Other?", "answer": 0}, SUMS[11]])
    keys = {"shots": 1, "shots_from": "others.jsonl"}
    task = get_evaluated_task(described(tmp_path, SUMS[:4], **keys))
    assert [asked(c)[:3] for c in task] == [["Other?", "0", SUMS[i]["question"]] for i in range(4)]
    code = [row | {"answer": "def double(x): return x + x"} for row in CODE[:1]] * 2
    task = get_evaluated_task(described(tmp_path, code, shots=1), allow_weaker_sandbox=True)
    assert task.evaluate(task[0], "def double(x): return x + x")


GOOD = '{"question": "1?", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("file", "rows", "keys", "said"),
    [
        ("x.jsonl", GOOD + '{"quest', {}, r"x.jsonl:2: not JSON"),
        ("x.jsonl", GOOD + "[1]", {}, r"x.jsonl:2: \[1\] is no row; write an object such as"),
        (
            "x.jsonl",
            GOOD + '{"question": "?"}',
            {},
            r"x.jsonl:2: no answer among .* question; call",
        ),
        ("x.jsonl", GOOD + '{"answer": "?"}', {}, r"x.jsonl:2: no question among .*problem"),
        (
            "x.jsonl",
            GOOD + '{"question": " ", "answer": 1}',
            {},
            r":2: column question is ' '; wri",
        ),
        (
            "x.jsonl",
            '{"question": 1, "answer": null}',
            {},
            r":1: column answer is None; write a te",
        ),
        (
            "x.jsonl",
            '{"question": 1, "answer": true}',
            {},
            r":1: column answer is True; write a te",
        ),
        (
            "x.jsonl",
            '{"question": 1, "answer": NaN}',
            {},
            r":1: column answer is nan; write a text",
        ),
        ("x.jsonl", '{"question": 1, "input": 2}', {}, r"question and input may both be the quest"),
        ("x.jsonl", "", {}, r"x.jsonl has no rows; write one"),
        ("x.csv", "question,answer\n1,1\n2,2,2\n", {}, r"x.csv: .* line 3 has not 2 cells"),
        ("x.csv", "question,answer\n1\n", {}, r"x.csv: .* line 2 has not 2 cells"),
        ("x.csv", "question,question\n1,2\n", {}, r"x.csv: two columns have one name"),
        ("x.csv", "question,answer\n1,\n", {}, r"x.csv:2: column answer is ''; write"),
        ("x.json", "[1", {}, r"x.json:1: not JSON"),
        ("x.json", {"a": [], "b": []}, {}, r"x.json: 2 lists of rows; .* description"),
        ("x.parquet", "PAR1 cut", {}, r"x.parquet: "),
        ("x.txt", "1", {"question": "1"}, r"x.txt: rows are in a file .jsonl, .json, .csv"),
        ("x.jsonl", GOOD, {"qestion": "1"}, r"unknown key 'qestion'; did you mean 'question'"),
        ("x.jsonl", GOOD, {"shots": "2"}, r"shots is '2'; write a int"),
        ("x.jsonl", GOOD, {"shots": True}, r"shots is True; write a int"),
        ("x.jsonl", GOOD, {"shots": -1}, r"shots is -1; write at least 1"),
        ("x.jsonl", GOOD, {"shots": 1}, r"shots 1 leave no problem to ask"),
        ("x.jsonl", GOOD, {"shots": 2, "shots_from": "x.jsonl"}, r"are more than there"),
        ("x.jsonl", GOOD, {"question": "{quest}"}, r":1: no column 'quest' .* 'question'"),
        ("x.jsonl", GOOD, {"answer": "answers"}, r":1: no column 'answers' .* 'answer'"),
        ("x.jsonl", GOOD, {"pattern": "("}, r"pattern '\(': missing \)"),
        ("x.jsonl", GOOD, {"pattern": "x"}, r"pattern 'x' has 0 groups; write \(...\)"),
        ("x.jsonl", GOOD, {"pattern": "(x)(y)"}, r"has 2 groups; .* \(\?:...\) around"),
        ("x.jsonl", GOOD, {"compare": "words"}, r"compare is 'words'; write number or text"),
        (
            "x.jsonl",
            '{"question": 1, "answer": "x"}',
            {"compare": "number"},
            r":1: .* is no number",
        ),
        ("x.jsonl", GOOD, {"choices": "question"}, r":1: column question is '1\?'; write a list"),
        ("x.jsonl", GOOD, {"choices": ["A", "B"]}, r":1: choices need two columns"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_and_what_to_write(
    tmp_path: Path, file: str, rows: Any, keys: dict[str, Any], said: str
) -> None:
    name = write(tmp_path / file, rows)
    if keys:
        name = write(tmp_path / "described.json", {"rows": file, **keys})
    with pytest.raises(ValueError, match=said) as caught:
        get_evaluated_task(name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


QUIZ = {"question": "?", "choices": ["x", "y"], "answer": "A"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (QUIZ | {"answer": "C"}, "answer 'C' is none of the choices; write its letter, A or B"),
        (QUIZ | {"answer": 2}, "answer 2 is none of the choices"),
        (QUIZ | {"answer": -1}, "answer -1 is none of the choices"),
        (QUIZ | {"answer": "1"}, "answer '1' is none of the choices"),
        (QUIZ | {"choices": ["B", "A"]}, "answer 'A' is two of the choices"),
        (QUIZ | {"choices": ["x"]}, "column choices is .* list of 2 to 26"),
        (QUIZ | {"choices": ["x", ""]}, "column choices is ''; write a text"),
        (CODE[0] | {"tests": "assert ("}, "tests is no Python"),
        (CODE[0] | {"entry_point": "f()"}, r"entry_point 'f\(\)' is no name of a function"),
        ({k: v for k, v in CODE[0].items() if k != "entry_point"}, "no entry_point among"),
        (
            SUMS[0],
            "the kind of its answer is answer, of the one in .*:1 it is choice; write files",
        ),
    ],
)
def test_a_row_of_a_kind_that_does_not_fit(tmp_path: Path, row: Any, said: str) -> None:
    name = write(tmp_path / "x.jsonl", [QUIZ, row])
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {said}"):
        get_evaluated_task(name)


def test_keys_without_a_meaning_are_refused(tmp_path: Path) -> None:
    for rows, kind in (([QUIZ], "choice"), (CODE, "program")):
        with pytest.raises(
            ValueError, match=f"pattern has no meaning .* is a {kind}; leave it out"
        ):
            get_evaluated_task(described(tmp_path, rows, pattern="(x)"))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no answer to show; write one"):
        get_evaluated_task(described(tmp_path, CODE, shots=1))


def test_names(tmp_path: Path) -> None:
    one = write(tmp_path / "sums.jsonl", SUMS)
    assert list(get_evaluated_tasks([one, "SpellingBee"])) == ["sums", "SpellingBee"]
    assert [record_name(name) for name in (one, "GSM8K")] == ["sums", "GSM8K"]
    with pytest.raises(ValueError, match=r"two of .* are called sums; rename a file"):
        get_evaluated_tasks([one, write(tmp_path / "sums.csv", SUMS)])
    with pytest.raises(ValueError, match=r"would be reported as the task GSM8K; rename the file"):
        get_evaluated_task(write(tmp_path / "GSM8K.jsonl", SUMS))
    with pytest.raises(SystemExit, match=r"gone\.jsonl is not a file; name one that is, or hub:"):
        run_here(tmp_path, "python -m scripts.chat_eval -a gone.jsonl --device=cpu")
    for settings, flag in ((chat_eval.Settings, "--task_name"), (chat_rl.Settings, "--task")):
        configurator.load(settings, [f"{flag}={one}"])
        with pytest.raises(SystemExit):
            configurator.load(settings, [f"{flag}=sums.txt"])


def test_a_digest_is_of_what_is_asked_and_how(tmp_path: Path) -> None:
    def digest(name: str) -> str:
        return get_evaluated_task(name).digest

    first = digest(write(tmp_path / "a.jsonl", SUMS))
    assert first == digest(write(tmp_path / "a.csv", SUMS))
    assert first != digest(write(tmp_path / "a.jsonl", SUMS[1:]))
    assert first != digest(described(tmp_path, SUMS, compare="text"))
    assert len({digest(described(tmp_path, SUMS, shots=n)) for n in (1, 2)}) == 2


def test_a_data_set_of_the_hub(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    names = ["data/test-00000-of-00001.parquet", "hard/train-00000-of-00001.parquet"]
    files = {}
    for path, rows in zip(names, (SUMS, SUMS[:3]), strict=True):
        write(tmp_path / "rows.parquet", [{"q": r["question"], "a": r["answer"]} for r in rows])
        files[path] = (tmp_path / "rows.parquet").read_bytes()
    revision = "5" * 40
    with serving(Hub("someone/sums", revision, files)) as hub:
        fetch = huggingface_hub.snapshot_download
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download",
            lambda *args, **named: fetch(*args, **named | {"endpoint": hub.endpoint}),
        )
        name = f"hub:someone/sums@{revision}"
        with pytest.raises(ValueError, match=r": row 1: no question among the columns q, a; call"):
            get_evaluated_task(name)
        for rows, count in ((name, 12), (f"{name}:hard:train", 3)):
            keys = {"rows": rows, "question": "q", "answer": "a"}
            task = get_evaluated_task(write(tmp_path / "sums.json", keys))
            assert asked(task[1]) == [SUMS[1]["question"], "4"]
            assert len(task) == count
        with pytest.raises(ValueError, match=r"cannot download none/test-\*.parquet of someone/su"):
            get_evaluated_task(f"{name}:none")
        assert len(hub.downloads) == 2
    assert short_name("hub:someone/sums") == "sums"
    with pytest.raises(ValueError, match=r"'hub:sums' names no data set .*; write hub:owner/name"):
        get_evaluated_task("hub:sums")


def test_the_documented_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/adding_a_task.md, among them one like SVAMP and one like BBH."""
    documented_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["my_task.jsonl", "quiz.csv", "code.jsonl", "svamp.json", "bbh.json"]
    tasks = get_evaluated_tasks(names)
    answers = {
        "my_task": "She has 3 + 4 = 7 pears.",
        "quiz": "B",
        "svamp": "8 - 3 = 5 are left",
        "bbh": "not True is False. So the answer is false.",
    }
    for name, answer in answers.items():
        task = tasks[name]
        assert task.evaluate(task[0], answer), name
        assert not task.evaluate(task[0], "A"), name
    assert asked(tasks["svamp"][0])[0] == "Tom had 8 marbles. He lost 3 of them. How many are left?"
    assert [len(asked(c)) for c in tasks["bbh"]] == [4, 4]
    section = (ROOT / "docs" / "adding_a_task.md").read_text(encoding="utf-8")
    assert set(re.findall(r"[\w]+\.(?:jsonl|csv|json)(?=[|\" \n])", section)) >= {*names}
