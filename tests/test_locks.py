"""Locks: one writer, named to whoever comes second, and nothing left by the dead."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nanochat import locks
from nanochat.locks import LockedError, OwnedLock, Owner
from tests.support.runs import ROOT

HOLD = (
    "import sys, time; from pathlib import Path; from nanochat.locks import OwnedLock;"
    "lock = OwnedLock(Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(60)"
)


def holder(base: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(base)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_learns_of_the_first_and_the_dead_hold_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "d12" / ".run"
    other = holder(base)
    try:
        with pytest.raises(LockedError) as error:
            OwnedLock(base, "use another --model_tag")
        message = str(error.value)
        assert f"{base.parent} is in use by process {other.pid} on " in message
        assert str(base) in message, "the command that holds it"
        assert "since 20" in message
        assert message.endswith("use another --model_tag")
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert (base.parent / ".run.owner.json").exists(), "it had no time to tidy up"
    with OwnedLock(base, "x"):
        assert f"left by process {other.pid}" in capsys.readouterr().out
        owner = json.loads((base.parent / ".run.owner.json").read_text())
        assert owner["pid"] == os.getpid()
    OwnedLock(base, "x").close()
    assert capsys.readouterr().out == ""
    assert not (base.parent / ".run.owner.json").exists()


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({"host": "elsewhere", "boot": "another"}, False),
        ({"host": "elsewhere"}, True),  # a container of this machine, whose locks are seen here
        ({"boot": "another"}, True),  # this machine before it was restarted
    ],
)
def test_an_owner_on_another_machine_is_left_to_a_person(
    tmp_path: Path, changes: dict[str, str], free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("this\n")
    monkeypatch.setattr(locks, "BOOT_ID", boot)
    owner_file = tmp_path / ".run.owner.json"
    owner = replace(Owner.of_this_process(), **changes)  # pyright: ignore[reportArgumentType]
    owner_file.write_text(json.dumps(asdict(owner)))
    if not free:
        with pytest.raises(LockedError, match=rf"on elsewhere .*delete {owner_file}"):
            OwnedLock(tmp_path / ".run", "use another --model_tag")
        owner_file.unlink()
    OwnedLock(tmp_path / ".run", "x").close()


def test_one_may_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".shard.owner.json").write_text('{"pid": 1')  # cut short by a full disk
    first = OwnedLock(tmp_path / ".shard", "x")
    taken: list[OwnedLock] = []
    thread = threading.Thread(
        target=lambda: taken.append(OwnedLock(tmp_path / ".shard", "let it finish", wait=True))
    )
    thread.start()
    thread.join(0.3)
    assert not taken
    first.close()
    thread.join(30)
    taken[0].close()
    assert f"waiting: {tmp_path} is in use by process {os.getpid()}" in capsys.readouterr().out
