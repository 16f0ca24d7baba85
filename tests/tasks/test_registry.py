"""The table of tasks: a task is declared once and found everywhere; samples in docstrings hold."""

import doctest
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tasks
from dev import task_table
from nanochat import configurator
from nanochat.eval.tasks import chatcore
from scripts import chat_eval
from tasks import registry
from tasks.arc import ARC
from tests.support.runs import run_here

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "fixtures"
PLANTED = '''
from tasks.common import Task
from tasks.registry import TaskEntry


class Parity(Task):
    """Whether a number is even."""

    eval_type = "{eval_type}"

    def __init__(self, split, task_data="", **view):
        super().__init__(10, **view)

    def get_example(self, index):
        question = {{"role": "user", "content": f"Is {{index}} even?"}}
        answer = {{"role": "assistant", "content": "no" if index % 2 else "yes"}}
        return {{"messages": [question, answer]}}

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]


TASKS = (TaskEntry("Parity", Parity, ("train", "test"), {options}),)
'''


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Writes a file into a folder that `tasks` then also consists of."""
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])

    def write(options: str = "", eval_type: str = "generative") -> None:
        text = PLANTED.format(options=options, eval_type=eval_type)
        (folder / "parity.py").write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop("tasks.parity", None)

    yield write
    sys.modules.pop("tasks.parity", None)


def test_a_planted_task_is_found_everywhere(plant, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Parity" not in registry.entries()
    plant("guessing=0.5, in_chatcore=True, has_reward=True, in_sft_tests=True")
    task = registry.get_task("Parity", stop=3)
    assert [task.reward(task[1], answer) for answer in ("no", "yes")] == [1.0, 0.0]
    assert registry.chatcore_baselines()["Parity"] == 0.5
    assert "Parity" in registry.sft_test_names()
    # --task of chat_rl, -a of chat_eval, --help
    assert len(registry.get_rewarded_task("Parity", "train")) == 10
    assert len(registry.get_evaluated_task("Parity")) == 10
    with pytest.raises(SystemExit):
        configurator.load(chat_eval.Settings, ["--help"])
    assert "Parity" in capsys.readouterr().out
    # the table in the documents is out of date, and says so
    row = "| Parity | `tasks/parity.py` | generative | train, test | 0.5 | yes | yes |"
    assert row in task_table.table()
    (part,) = task_table.PARTS
    page = part.document.read_text(encoding="utf-8")
    assert page != part.renewed(page)
    with pytest.raises(ValueError, match="unknown task 'Paritie'; did you mean 'Parity'"):
        registry.get_task("Paritie")


def test_a_planted_task_of_another_kind_is_refused(plant) -> None:
    plant(eval_type="none")
    with pytest.raises(ValueError, match=r"Parity has no right answers .* choose among ARC-Easy"):
        registry.get_evaluated_task("Parity")
    with pytest.raises(ValueError, match=r"Parity has no reward to learn from; .*SpellingBee"):
        registry.get_rewarded_task("Parity", "train")
    for options in ("in_chatcore=True", "in_sft_tests=True", "has_reward=True", "guessing=1.0"):
        plant(options, eval_type="none")
        with pytest.raises(AssertionError):
            registry.entries()


@pytest.mark.parametrize("name", ["HumanEval", "MMLU", "SmolTalk"])
def test_what_cannot_be_rewarded_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no reward to learn from; choose among"):
        registry.get_rewarded_task(name, "train", DATA)


def test_chatcore_is_the_mean_over_its_six_tasks() -> None:
    guessing = registry.chatcore_baselines()
    assert guessing == {
        "ARC-Easy": 0.25,
        "ARC-Challenge": 0.25,
        "MMLU": 0.25,
        "GSM8K": 0.0,
        "HumanEval": 0.0,
        "SpellingBee": 0.0,
    }
    assert chatcore(guessing, guessing) == 0.0
    perfect = dict.fromkeys(guessing, 1.0)
    assert chatcore(perfect, guessing) == 1.0
    assert chatcore(perfect | {"MMLU": 0.55}, guessing) == pytest.approx((5 + 0.4) / 6)
    assert chatcore(perfect | {"Arithmetic": 1.0}, guessing) is None
    assert chatcore({"MMLU": 1.0}, guessing) is None


def test_every_entry_makes_its_task() -> None:
    assert {"SmolTalk", "SimpleSpelling"} & set(registry.evaluated_names()) == {"SimpleSpelling"}
    for name, entry in registry.entries().items():
        task = registry.get_task(name, task_data=DATA)
        assert isinstance(task, entry.task)
        assert len(task) > 0
        assert len(registry.get_task(name, task_data=DATA, stop=1)) == 1
        with pytest.raises(ValueError, match="split"):
            registry.get_task(name, "none", DATA)
        if entry.source is None:
            assert all(registry.get_task(name, split) for split in entry.splits)
        else:
            assert entry.splits == entry.source.splits
    for name in ("ARC-Easy", "ARC-Challenge"):
        assert list(registry.get_task(name, task_data=DATA)) == list(ARC(name, "test", DATA))


MODULES = [module.name for module in pkgutil.iter_modules(tasks.__path__, "tasks.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that declares a task shows a sample problem: conversation, answer, verdict."""
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(name)
    if hasattr(module, "TASKS"):
        for step in ("conversation_text(task[0])", "task[0], "):
            assert step in (module.__doc__ or ""), f"{name} shows no {step}"
    assert not doctest.testmod(module).failed


def test_an_unknown_task_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"-a=GSM9K must be .*; did you mean 'GSM8K'"):
        run_here(tmp_path, "python -m scripts.chat_eval -a GSM9K --device=cpu")
