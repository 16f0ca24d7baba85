"""Checkpoints: whole or absent under kills and full disks, found by every name, loaded safely."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanochat.common import Runtime
from nanochat.train import checkpoint_read, checkpoint_write


def runtime(base_dir: Path, rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, rank, rank, world_size, 0, base_dir)


def save(base_dir: Path, step: int, tag: str = "d4", stage: str = "base", **options) -> Path:
    return checkpoint_write.save(
        base_dir / f"{stage}_checkpoints",
        tag,
        step,
        {"_orig_mod.weight": torch.full((64, 8), float(step))},
        {"moments": torch.full((16,), float(step)), "rng": torch.get_rng_state()},
        {"model_config": {"vocab_size": 64, "n_layer": 4}, "kernels": {"rms_norm": "reference"}},
        runtime(base_dir),
        **options,
    )


def visible_steps(base_dir: Path, tag: str = "d4") -> list[str]:
    folder = base_dir / "base_checkpoints" / tag
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def assert_whole(step_dir: Path) -> None:
    step = checkpoint_read.load_meta(step_dir)["step"]
    assert torch.equal(
        checkpoint_read.load_model_state(step_dir)["weight"], torch.full((64, 8), float(step))
    )
    moments = checkpoint_read.load_rank_state(step_dir, 0)["moments"]
    assert torch.equal(moments, torch.full((16,), float(step)))


def in_child(work: Callable[[], None]) -> int:
    """Pid of a forked child that runs `work` and leaves without this process's cleanup."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_a_step_holds_what_was_saved_and_says_what_it_is(tmp_path):
    step_dir = save(tmp_path, 7)
    assert step_dir == tmp_path / "base_checkpoints/d4/000007"
    assert sorted(p.name for p in step_dir.iterdir()) == ["meta.json", "model.pt", "optim_rank0.pt"]
    assert_whole(step_dir)
    meta = checkpoint_read.load_meta(step_dir)
    assert (meta["step"], meta["tag"], meta["world_size"]) == (7, "d4", 1)
    assert meta["kernels"] == {"rms_norm": "reference"}
    assert meta["environment"]["torch"] == torch.__version__
    for name, entry in meta["files"].items():
        assert entry["bytes"] == (step_dir / name).stat().st_size


def test_latest_links_are_relative_and_follow_the_newest(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    stage = tmp_path / "base_checkpoints"
    assert (stage / "latest.pt").readlink() == Path("d4/000002/model.pt")
    assert (stage / "d4/latest.pt").readlink() == Path("000002/model.pt")
    moved = tmp_path / "moved"
    stage.rename(moved)
    assert torch.load(moved / "latest.pt", weights_only=True)["_orig_mod.weight"][0, 0] == 2


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        (None, 30),
        ("", 30),
        ("latest.pt", 5),
        ("base_checkpoints/latest.pt", 5),
        ("base_checkpoints", 30),
        ("d12", 30),
        ("d4", 40),
        ("d12_run_2_final", 5),
        ("d4/latest.pt", 40),
        ("base_checkpoints/d12", 30),
        ("d12/000010", 10),
        ("d12/10", 10),
        ("d12/000010/model.pt", 10),
        ("base_checkpoints/d12/000010/meta.json", 10),
        ("10", 10),
        (10, 10),
        ("40", 40),
        ("000040", 40),
        ("{base}/base_checkpoints/d12/000010/model.pt", 10),
        ("{base}/base_checkpoints/d12", 30),
    ],
)
def test_find_takes_every_form(tmp_path, spec, step):
    for tag, number in (("d12", 10), ("d12", 30), ("d4", 40), ("d12_run_2_final", 5)):
        save(tmp_path, number, tag)
    if isinstance(spec, str):
        spec = spec.format(base=tmp_path)
    found = checkpoint_read.find(spec, "base", tmp_path)
    assert checkpoint_read.load_meta(found)["step"] == step


def test_find_is_relative_to_the_working_directory_too(tmp_path, monkeypatch):
    step_dir = save(tmp_path / "elsewhere", 3)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for spec in ("base_checkpoints/latest.pt", "base_checkpoints/d4/3"):
        assert checkpoint_read.find(spec, "base", tmp_path / "empty") == step_dir


def test_a_bare_tag_is_the_base_directorys_before_the_working_directorys(tmp_path, monkeypatch):
    save(tmp_path / "elsewhere", 3)
    step_dir = save(tmp_path, 5)
    monkeypatch.chdir(tmp_path / "elsewhere/base_checkpoints")
    assert checkpoint_read.find("d4", "base", tmp_path) == step_dir


def test_without_a_depth_tag_the_last_written_counts(tmp_path):
    save(tmp_path, 9, "older_run")
    newer = save(tmp_path, 3, "newer_run")
    os.utime(tmp_path / "base_checkpoints/older_run", (1, 1))
    assert checkpoint_read.find(None, "base", tmp_path) == newer
    assert checkpoint_read.find(9, "base", tmp_path).parent.name == "older_run"


@pytest.mark.parametrize("spec", [None, "d99", "latest.pt", "12", "no/such/model.pt"])
def test_nothing_found_says_what_there_is(tmp_path, spec):
    with pytest.raises(checkpoint_read.CheckpointNotFoundError, match="holds none yet"):
        checkpoint_read.find(spec, "base", tmp_path)
    save(tmp_path, 3, "d4")
    if spec not in (None, "latest.pt"):
        with pytest.raises(ValueError, match=r"d4 \(steps to 3\)"):
            checkpoint_read.find(spec, "base", tmp_path)
    with pytest.raises(ValueError, match="stage 'bass' is unknown"):
        checkpoint_read.find(spec, "bass", tmp_path)


def _edit_meta(step_dir: Path) -> None:
    meta = step_dir / "meta.json"
    meta.write_text(meta.read_text().replace('"tag": "d4"', '"tag": "d5"'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "meta.json").unlink(), "meta.json cannot be read"),
        (lambda d: _edit_meta(d), "meta.json is damaged or was changed"),
        (lambda d: (d / "meta.json").write_text(""), "not one of this project's"),
        (lambda d: (d / "meta.json").write_text("[1]"), "not one of this project's"),
        (lambda d: (d / "optim_rank0.pt").unlink(), "optim_rank0.pt is missing"),
        (lambda d: os.truncate(d / "model.pt", 100), "model.pt has 100 bytes"),
    ],
)
def test_a_torn_step_is_skipped_with_a_warning_and_refused_by_name(tmp_path, damage, reason):
    good, torn = save(tmp_path, 1), save(tmp_path, 2)
    damage(torn)
    with pytest.warns(UserWarning, match=reason):
        assert checkpoint_read.find(None, "base", tmp_path) == good
    for spec in (2, "d4/2", "d4/000002/model.pt", "latest.pt"):
        with pytest.raises(ValueError, match=reason):
            checkpoint_read.find(spec, "base", tmp_path)
    assert checkpoint_read.has_checkpoint("d4", "base", tmp_path)
    damage(good)
    assert not checkpoint_read.has_checkpoint("d4", "base", tmp_path)


def test_foreign_folders_and_files_do_not_confuse_the_search(tmp_path):
    step_dir = save(tmp_path, 3)
    tag_dir = step_dir.parent
    for name in ("model_000200_old.pt", "metrics.jsonl"):
        (tag_dir / name).write_text("")
    for name in ("000900_backup_of_old", ".tmp-000950", "notes"):
        (tag_dir / name).mkdir()
    assert checkpoint_read.find(None, "base", tmp_path) == step_dir
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint_read.find(str(tag_dir / "model_000200_old.pt"), "base", tmp_path)


def test_a_dangling_latest_link_falls_back(tmp_path):
    first = save(tmp_path, 1)
    second = save(tmp_path, 2)
    second.rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match="points to nothing"):
        assert checkpoint_read.find("latest.pt", "base", tmp_path) == first


def test_rotation_keeps_the_newest_and_steps_of_an_abandoned_future(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep_last=2)
    assert visible_steps(tmp_path) == ["000003", "000010"]
    save(tmp_path, 4, keep_last=1)
    assert visible_steps(tmp_path) == ["000004", "000010"]
    save(tmp_path, 5, keep_last=0)
    assert visible_steps(tmp_path) == ["000004", "000005", "000010"]
    with pytest.raises(ValueError, match="keep_last=-1"):
        save(tmp_path, 6, keep_last=-1)


@pytest.mark.parametrize("tag", ["", "..", "a/b", ".hidden", "123", "a b"])
def test_a_tag_that_is_no_folder_name_is_refused(tmp_path, tag):
    with pytest.raises(ValueError, match="tag"):
        save(tmp_path, 1, tag)


def test_the_same_step_again_replaces_it(tmp_path):
    step_dir = save(tmp_path, 5)
    checkpoint_write.save(
        step_dir.parent.parent, "d4", 5, {"weight": torch.ones(2)}, {}, {}, runtime(tmp_path)
    )
    assert torch.equal(checkpoint_read.load_model_state(step_dir)["weight"], torch.ones(2))
    assert sorted(p.name for p in step_dir.parent.iterdir()) == ["000005", "latest.pt"]


CALLS = ["fsync", "rename", "replace", "unlink", "symlink", "mkdir", "rmdir"]


@pytest.mark.long
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_kill_before_any_system_call_leaves_whole_steps(tmp_path, monkeypatch, again):
    """SIGKILL before the n-th call that changes the disk, for every n of one save."""
    survived = 0
    for n in range(60):
        base_dir = tmp_path / str(n)
        save(base_dir, 1)
        save(base_dir, 2)

        def die_at(n=n, base_dir=base_dir):
            left = n

            def patch(name):
                real = getattr(os, name)

                def call(*arguments, **keywords):
                    nonlocal left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return real(*arguments, **keywords)

                monkeypatch.setattr(os, name, call)

            for name in CALLS:
                patch(name)
            save(base_dir, 2 if again else 3, keep_last=2)

        _, status = os.waitpid(in_child(die_at), 0)
        newest = checkpoint_read.find(None, "base", base_dir)
        assert checkpoint_read.load_meta(newest)["step"] in (2, 3)
        assert_whole(newest)
        for name in visible_steps(base_dir):
            assert_whole(base_dir / "base_checkpoints/d4" / name)
        save(base_dir, 4)
        assert_whole(checkpoint_read.find(2, "base", base_dir))
        hidden = [p.name for p in (base_dir / "base_checkpoints/d4").glob(".*")]
        assert hidden == []
        if not os.WIFSIGNALED(status):
            survived = n
            break
    assert survived > 10, "the save must have ended unharmed after its last call"


def test_kills_at_random_moments_leave_whole_steps(tmp_path):
    moments = random.Random(0)
    save(tmp_path, 1)
    for trial in range(12):
        start = checkpoint_read.load_meta(checkpoint_read.find(None, "base", tmp_path))["step"]

        def loop(start=start):
            for step in range(start, start + 10_000):
                save(tmp_path, step, keep_last=2)

        pid = in_child(loop)
        time.sleep(moments.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert checkpoint_read.find(None, "base", tmp_path), trial
        for name in visible_steps(tmp_path):
            assert_whole(tmp_path / "base_checkpoints/d4" / name)


@pytest.mark.parametrize("size", [1000, 1_000_000], ids=["at the flush", "in torch.save"])
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path, size):
    """RLIMIT_FSIZE makes the write itself fail, as a full disk does, in the middle of model.pt."""
    good = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OSError, match=r"needs [\d,]+ bytes") as caught:
            checkpoint_write.save(
                good.parent.parent, "d4", 2, {"w": torch.ones(size)}, {}, {}, runtime(tmp_path)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "000002" in str(caught.value)
    assert "NANOCHAT_BASE_DIR" in str(caught.value)
    assert [p.name for p in good.parent.glob(".*")] == []
    assert checkpoint_read.find(None, "base", tmp_path) == good
    assert_whole(good)


def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch):
    good = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="only 1,000 bytes are free"):
        save(tmp_path, 2)
    assert visible_steps(tmp_path) == [good.name]


def test_no_permission_is_a_clear_error(tmp_path):
    (tmp_path / "base_checkpoints").write_text("a file where a folder should be")
    with pytest.raises(checkpoint_write.CheckpointWriteError, match="check the permission"):
        save(tmp_path, 1)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_named(tmp_path):
    step_dir = save(tmp_path, 1)
    flip(step_dir / "model.pt")
    with pytest.raises(checkpoint_read.DamagedCheckpointError, match=r"model\.pt is damaged"):
        checkpoint_read.load_model_state(step_dir)


def test_every_flipped_byte_of_meta_is_found_or_harmless(tmp_path):
    step_dir = save(tmp_path, 1)
    meta = checkpoint_read.load_meta(step_dir)
    path = step_dir / "meta.json"
    whole, found = path.read_bytes(), 0
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :]
        )
        problem = checkpoint_read.problem_of(step_dir)
        found += bool(problem)
        if not problem:
            read = checkpoint_read.load_meta(step_dir)
            # white space; or the name of the digest, which leaves a member more
            assert {name: read[name] for name in meta if name in read} | {
                "sha256": meta["sha256"]
            } == meta
    assert found > 0.6 * len(whole)
    changed = meta | {"step": 2}
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="is damaged or was changed"):
        checkpoint_read.load_meta(step_dir)


@pytest.mark.parametrize("name", ["step", "tag", "world_size", "files"])
def test_what_meta_lacks_is_named(tmp_path, name):
    step_dir = save(tmp_path, 1)
    meta = checkpoint_read.load_meta(step_dir)
    for value in (None, [1.5]):
        changed = {key: entry for key, entry in meta.items() if key not in (name, "sha256")}
        changed |= {} if value is None else {name: value}
        (step_dir / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"it has no valid {name}"):
            checkpoint_read.load_meta(step_dir)
    del meta["files"]["optim_rank0.pt"]["sha256"]
    (step_dir / "meta.json").write_text(
        json.dumps(meta | {"sha256": checkpoint_read.meta_digest(meta)})
    )
    with pytest.raises(ValueError, match=r"lists no optim_rank0\.pt"):
        checkpoint_read.load_meta(step_dir)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("12", True),
        ("d4/000012", True),
        ("d4/12", True),
        ("/base/d4/000012/model.pt", True),
        ("d4/000012/", True),
        ("d4", False),
        ("latest.pt", False),
        ("d4/latest.pt", False),
        ("base_checkpoints", False),
    ],
)
def test_only_a_step_that_was_named_is_taken_alone(tmp_path, spec, named):
    assert checkpoint_read.names_a_step(spec) == named


def test_what_may_be_resumed_begins_with_the_newest(tmp_path):
    assert checkpoint_read.resumable(None, "base", tmp_path, "d4") == []
    steps = [save(tmp_path, step) for step in (1, 2, 3)]
    os.truncate(steps[1] / "model.pt", 100)
    for spec in (None, "d4", "latest.pt"):
        assert checkpoint_read.resumable(spec, "base", tmp_path, "d4") == [steps[2], steps[0]]
    assert checkpoint_read.resumable("d4/3", "base", tmp_path, "d4") == [steps[2]]


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_not_run(tmp_path):
    step_dir = save(tmp_path, 1)
    touched = tmp_path / "touched"
    evil = {"weight": _Payload(touched)}
    for write in (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))):
        write(evil, step_dir / "model.pt")
        _forge(step_dir, "model.pt")
        with pytest.raises(ValueError, match="more than tensors"):
            checkpoint_read.load_model_state(step_dir)
        assert not touched.exists()
    pickle.loads((step_dir / "model.pt").read_bytes())
    assert touched.exists(), "the payload must be one that works"


def _forge(step_dir: Path, name: str) -> None:
    """Make meta.json agree with a file that was put in place of the saved one."""
    meta = json.loads((step_dir / "meta.json").read_text())
    content = (step_dir / name).read_bytes()
    meta["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    meta["sha256"] = checkpoint_read.meta_digest(meta)
    (step_dir / "meta.json").write_text(json.dumps(meta))


def test_another_model_is_refused_naming_both(tmp_path):
    step_dir = save(tmp_path, 1)
    good = {"_orig_mod.weight": torch.zeros(64, 8)}
    assert list(checkpoint_read.load_model_state(step_dir, expected=good)) == ["weight"]
    with pytest.raises(ValueError, match=r"lacks \['bias'\]"):
        checkpoint_read.load_model_state(step_dir, expected={**good, "bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(64, 8\) there and \(65, 8\)"):
        checkpoint_read.load_model_state(step_dir, expected={"weight": torch.zeros(65, 8)})


def test_another_vocabulary_config_or_world_size_is_refused_naming_both():
    config = {"vocab_size": 64, "n_layer": 4}
    meta = {"model_config": config, "world_size": 2, "tokenizer_fingerprint": "abc"}
    checkpoint_read.check_compatible(meta, config, 2, "abc")
    checkpoint_read.check_compatible(meta, config)
    with pytest.raises(ValueError, match=r"vocabulary of 64 tokens.*gives 65"):
        checkpoint_read.check_compatible(meta, {**config, "vocab_size": 65})
    with pytest.raises(ValueError, match="n_layer=4, this run 6"):
        checkpoint_read.check_compatible(meta, {**config, "n_layer": 6})
    with pytest.raises(ValueError, match="2 ranks and this run has 3"):
        checkpoint_read.check_compatible(meta, config, 3)
    with pytest.raises(ValueError, match="tokenizer abc, this one is xyz"):
        checkpoint_read.check_compatible(meta, config, 2, "xyz")


class _Threads:
    """Ranks of one job as threads: what Runtime does through torch.distributed, by a barrier."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.values = [torch.tensor(0)] * world_size

    def runtime(self, base_dir: Path, rank: int) -> Runtime:
        shared = self

        class ThreadRuntime(Runtime):
            def barrier(self) -> None:
                shared.barrier.wait()

            def all_reduce(self, tensor, op=None):
                shared.values[self.rank] = tensor
                shared.barrier.wait()
                total = torch.stack(shared.values).sum(0)
                shared.barrier.wait()
                return total

        cpu = torch.device("cpu")
        return ThreadRuntime(cpu, torch.float32, rank, rank, len(self.values), 0, base_dir)


def save_on_ranks(base_dir: Path, step: int, world_size: int) -> list[Exception | None]:
    threads, results = _Threads(world_size), [None] * world_size

    def work(rank: int) -> None:
        try:
            checkpoint_write.save(
                base_dir / "base_checkpoints",
                "d4",
                step,
                {"weight": torch.full((4,), float(rank))},
                {"shard": torch.full((10,), float(rank))},
                {},
                threads.runtime(base_dir, rank),
            )
        except OSError as error:
            results[rank] = error

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def test_every_rank_has_its_shard(tmp_path):
    assert save_on_ranks(tmp_path, 1, 3) == [None] * 3
    step_dir = checkpoint_read.find(None, "base", tmp_path)
    assert checkpoint_read.load_meta(step_dir)["world_size"] == 3
    assert checkpoint_read.load_model_state(step_dir)["weight"][0] == 0
    for rank in range(3):
        assert checkpoint_read.load_rank_state(step_dir, rank)["shard"][0] == rank
    with pytest.raises(ValueError, match="saved by 3 ranks"):
        checkpoint_read.load_rank_state(step_dir, 3)
    (step_dir / "optim_rank2.pt").unlink()
    with pytest.raises(ValueError, match=r"optim_rank2\.pt is missing"):
        checkpoint_read.load_rank_state(step_dir, 0)


def test_one_failing_rank_fails_all_and_none_waits(tmp_path, monkeypatch):
    save_on_ranks(tmp_path, 1, 3)
    real = os.fsync

    def fail_for_rank_one(descriptor: int) -> None:
        if "optim_rank1" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_rank_one)
    results = save_on_ranks(tmp_path, 2, 3)
    assert all(isinstance(result, checkpoint_write.CheckpointWriteError) for result in results)
    assert "No space left" in str(results[1])
    assert "1 of 3 ranks failed" in str(results[0])
    assert visible_steps(tmp_path) == ["000001"]
    assert list((tmp_path / "base_checkpoints/d4").glob(".*")) == []
