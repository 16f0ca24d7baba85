"""Start of every entry point: device, ranks, seed, compute dtype, base directory, signals."""

import gc
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from nanochat.command import RunFailedError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLLECTIVE_TIMEOUT = 1800.0  # seconds that a rank waits for the others, on a slow disk say
SAME_REQUEST = 1.0  # seconds; torchrun and a job scheduler both pass on one and the same signal


def get_base_dir() -> Path:
    """The folder of all runs, data and tokenizers: $NANOCHAT_BASE_DIR or ~/.cache/nanochat.

    Raises  ValueError if it cannot be created or written.
    """
    configured = os.environ.get("NANOCHAT_BASE_DIR")
    base_dir = Path(configured).expanduser() if configured else Path.home() / ".cache" / "nanochat"
    base_dir = base_dir.absolute()
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot create the base directory {base_dir} ({error.strerror}); "
            "set NANOCHAT_BASE_DIR to a folder you may write"
        ) from error
    if not os.access(base_dir, os.W_OK):
        raise ValueError(
            f"no permission to write the base directory {base_dir}; "
            "set NANOCHAT_BASE_DIR to a folder you may write"
        )
    return base_dir


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that at any moment it is the old or the new one, whole.

    The folder is created where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before what it names
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def print0(*values: object) -> None:
    """print, on rank 0 only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*values, flush=True)


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: one frozen value, passed to whoever needs it."""

    device: torch.device
    dtype: torch.dtype  # of activations and matrix products; parameters are float32
    rank: int
    local_rank: int
    world_size: int
    seed: int
    base_dir: Path
    stop: "StopRequest | None" = None  # None: signals end the process as they usually do

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal asked this rank to stop; other ranks may not know it yet."""
        return self.stop is not None and self.stop.number != 0

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes records."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            with collective():
                dist.barrier()

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM):
        """Reduce `tensor` over the ranks in place and return it (MAX, SUM, ...)."""
        if self.world_size > 1:
            with collective():
                dist.all_reduce(tensor, op=op)
        return tensor

    def sum_over_ranks(self, size: int, compute: Callable[[], torch.Tensor]) -> list[float]:
        """Sums over the ranks of the `size` numbers that `compute` gives on each.

        Where one rank cannot give its numbers, none waits for them:
        Raises  on every rank torch.OutOfMemoryError if one ran out of memory, StoppedError if
                check_stop() found one asked to stop.
        """
        values = torch.zeros(size + 2, dtype=torch.float64, device=self.device)
        # only flags leave the handlers: an error at hand would keep the memory of its frames
        try:
            values[:size] = compute()
        except torch.OutOfMemoryError:
            values[-2] = 1.0
        except StoppedError:
            values[-1] = 1.0
        *sums, out_of_memory, stopped = self.all_reduce(values).tolist()
        if stopped:
            raise StoppedError
        if out_of_memory:
            raise torch.OutOfMemoryError(f"{out_of_memory:.0f} of {self.world_size} ranks")
        return sums

    def check_stop(self) -> None:
        """Raise StoppedError if this rank was asked to stop; between the batches of `compute`."""
        if self.asked_to_stop:
            raise StoppedError

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class StoppedError(Exception):
    """A signal asked this rank, or another one, to stop."""


@contextmanager
def collective() -> Iterator[None]:
    """Around what waits for other ranks: one that is gone or silent ends this one with one line."""
    try:
        yield
    except RuntimeError as error:  # neither gloo nor NCCL raises anything more precise
        raise RunFailedError(
            f"another rank has ended, or did not answer within --collective_timeout ({error}); "
            "its own message says why. Continue with --resume, or start with torchrun "
            "--max-restarts=3 and --resume, which continues by itself"
        ) from error


def setup_training(
    device: str = "auto",
    seed: int = 42,
    stop: "StopRequest | None" = None,
    collective_timeout: float = COLLECTIVE_TIMEOUT,
) -> Runtime:
    """Choose device and dtype, seed every generator, join the ranks torchrun started.

    device  "auto" (CUDA, then MPS, then CPU), "cuda", "mps" or "cpu".
    dtype   bfloat16 on CUDA, float32 elsewhere; $NANOCHAT_DTYPE overrides it.
    stop    where signals are to be remembered instead of ending the process.
    collective_timeout  seconds that a rank waits for the others.
    Raises  ValueError for an unknown or absent device or dtype.
    """
    chosen = _choose_device(device)
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if chosen.type == "cuda":
        # every rank of the machine finds the mistake, so that the first can say it
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        if local_ranks > torch.cuda.device_count():
            raise ValueError(
                f"{local_ranks} ranks on this machine, {torch.cuda.device_count()} GPUs found; "
                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        _join_ranks(chosen, timedelta(seconds=collective_timeout))
    random.seed(seed)
    torch.manual_seed(seed)
    return Runtime(
        device=chosen,
        dtype=_choose_dtype(chosen),
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        seed=seed,
        base_dir=get_base_dir(),
        stop=stop,
    )


def _join_ranks(device: torch.device, timeout: timedelta) -> None:
    """Open the process group through the store that torchrun keeps."""
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun restarts the ranks on the store of those that died: without a prefix of their own
    # they would connect to the addresses that the dead have left there
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    with collective():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device_id,
        )


def freeze_garbage() -> None:
    """Stop scanning long-lived objects: cycles found mid-training cost pauses, not memory."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _choose_device(device: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if device not in available:
        raise ValueError(f"device {device!r} is unknown; choose auto, {', '.join(available)}")
    if not available[device]:
        raise ValueError(
            f"device {device!r} was asked for, but torch {torch.__version__} finds none; "
            "use --device=cpu, or check the driver with nvidia-smi"
        )
    return torch.device(device)


def _choose_dtype(device: torch.device) -> torch.dtype:
    name = os.environ.get("NANOCHAT_DTYPE") or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise ValueError(f"NANOCHAT_DTYPE={name!r} is unknown; choose {', '.join(DTYPES)}")
    return DTYPES[name]


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that the run can save and leave between two micro-batches.

    A second signal ends the process at once. One within SAME_REQUEST seconds is the first again:
    torchrun passes on to its ranks what a job scheduler has sent to all of them already.
    """

    def __init__(self) -> None:
        self.number = 0
        self.since = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.since = number, now
        elif now - self.since > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def name(self) -> str:
        """Name of the signal that came; on a rank that got none, that another rank did."""
        return signal.Signals(self.number).name if self.number else "another rank was stopped"

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended, so that it stops as well."""
        return 128 + (self.number or signal.SIGTERM)
