"""Every attack of attacks.py is stopped by what the table says, as this user and as nobody."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from nanochat.sandbox.confinement import BARRIERS
from nanochat.sandbox.execution import execute, isolation_level, judge
from tests.sandbox import attacks
from tests.support.runs import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        set(isolation_level()) != set(BARRIERS),
        reason=f"this kernel grants only {isolation_level()}",
    ),
]
NAMES = [attack.name for attack in attacks.ATTACKS]
NAMES += [f"verdict: {name}" for name in attacks.FORGERIES]
ATTACKED = {"ATTACKED": "a secret"}


@pytest.fixture(scope="module")
def outcome() -> Callable[[str], dict[str, str]]:
    """What went wrong with every attack, by user."""
    known: dict[str, dict[str, str]] = {}
    command = {
        "this user": ["tests.sandbox.attacks", "--run"],
        "nobody": ["tests.support.unprivileged", "tests.sandbox.attacks", "--run"],
        "no filter": [
            *("tests.support.denied", "prctl", "-m", "tests.sandbox.attacks"),
            "--run-without-seccomp",
        ],
    }

    def of(user: str) -> dict[str, str]:
        if user not in known:
            done = subprocess.run(
                [sys.executable, "-m", *command[user]],
                cwd=ROOT,
                env={**os.environ, **ATTACKED},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
            known[user] = json.loads(done.stdout)
        return known[user]

    return of


def test_no_attack_reaches_anything(outcome: Callable[[str], dict[str, str]]) -> None:
    assert list(outcome("this user")) == NAMES
    assert not {name: said for name, said in outcome("this user").items() if said}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_no_attack_of_nobody_reaches_anything(outcome: Callable[[str], dict[str, str]]) -> None:
    assert list(outcome("nobody")) == NAMES
    assert not {name: said for name, said in outcome("nobody").items() if said}


def test_without_seccomp_the_other_barriers_hold(
    outcome: Callable[[str], dict[str, str]],
) -> None:
    problems = outcome("no filter")
    assert len(problems) > 50
    assert not {name: said for name, said in problems.items() if said}


def test_no_worker_remembers_a_text() -> None:
    """A candidate that finds a test in the memory it was forked with passes it."""
    execute(attacks.TEST)
    judge("", attacks.TEST, "f")
    finder = attacks.FORGERIES["the test found in memory"]
    assert not any(judge(finder, attacks.TEST, "f").success for _ in range(3))


def test_names_are_unique_and_enough() -> None:
    assert len(set(NAMES)) == len(NAMES) > 60


def test_the_table_of_the_document_is_fresh() -> None:
    text = attacks.DOCUMENT.read_text(encoding="utf-8")
    assert attacks.table() in text, "run python -m tests.sandbox.attacks --write"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who may do all of it")
def test_attacks_work_where_nothing_stops_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Otherwise they prove nothing."""
    harmless = []
    with attacks.victims() as targets:
        for attack in attacks.ATTACKS:
            if not attack.outside:
                continue
            command = [sys.executable, "-I", "-S", "-c", attacks.program(attack, targets)]
            done = subprocess.run(
                command,
                cwd=tmp_path_factory.mktemp("attack"),
                env=ATTACKED,
                capture_output=True,
                text=True,
                timeout=30,
            )
            if attacks.BREACH not in done.stdout:
                harmless.append((attack.name, done.stderr[-300:]))
    assert not harmless


def test_a_right_answer_passes_the_test_that_forgeries_fail() -> None:
    right = "def f(x): return [2] if x == [1] else x + 10"
    result = judge(right, attacks.TEST, "f")
    assert result.success, result
