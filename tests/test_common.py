"""What every entry point starts with."""

import os
import signal
from pathlib import Path

import pytest

from nanochat.common import SAME_REQUEST, StopRequest, replace_file


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "file.json"
    replace_file(path, "one é\n")
    assert path.read_text(encoding="utf-8") == "one é\n"
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        order.append("fsync")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> Path:
        order.append("replace")
        assert path.read_text(encoding="utf-8") == "one é\n", "the old file is there until then"
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    replace_file(path, b"two")
    assert order == ["fsync", "replace"]
    assert path.read_bytes() == b"two"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, "three")
    assert path.read_bytes() == b"two"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_but_not_an_echo_of_the_first(number: signal.Signals) -> None:
    pid = os.fork()
    if pid == 0:  # the child ends by the signal, or with a code that says where it went wrong
        stop = StopRequest()
        signal.raise_signal(number)
        signal.raise_signal(number)  # by torchrun, say
        if (stop.number, stop.exit_code) != (number, 128 + number):
            os._exit(1)
        stop.since -= 2 * SAME_REQUEST
        signal.raise_signal(number)
        os._exit(2)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"it lived on: {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == number
