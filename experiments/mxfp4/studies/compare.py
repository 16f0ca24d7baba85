"""Train recipes on the same text in the same order, from the same weights, and record the results.

    python -m experiments.mxfp4.studies.compare --dataset=embedded --output=DIR
    python -m experiments.mxfp4.studies.report DIR

Every recipe and seed is a cell: one JSON file in --output. Finished cells are not trained again, so
a comparison can be stopped at any time and resumed; cells that another process is training are left
to it, so one process per GPU shares the work. A seed decides the weights and everything random; the
text and its order are the same in all cells.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from experiments.mxfp4.layers import coverage
from experiments.mxfp4.layers.convert import convert
from experiments.mxfp4.layers.recipes import PRODUCTS, Recipe
from experiments.mxfp4.studies.cells import PLAIN, chosen_cells
from nanochat import command, configurator
from nanochat.common import Runtime, print0, setup_training
from nanochat.data.dataloader import tokenizing_distributed_data_loader
from nanochat.dataset import resolve_data_dir
from nanochat.eval.loss import evaluate_bpb
from nanochat.kernels.registry import format_choices, select
from nanochat.optim import schedule
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.tracking import environment, write_json
from nanochat.train import run
from nanochat.train.step import set_rates, train_step

# settings that do not change a cell's numbers
NOT_COMPARED = ("cells", "seeds", "output")
AVERAGED_STEPS = 10  # the last ones, of whose training losses the mean is given


@dataclass(frozen=True)
class Settings:
    """Compare recipes at equal tokens and data order."""

    output: str = ""  # folder of the cells; empty is <base dir>/mxfp4/d<depth>
    cells: str = ""  # names, separated by commas; empty is all recipes and ablations
    seeds: int = 3  # cells of each name
    backend: str = "emulate"  # emulate, or native where the GPU has such products
    dataset: str = "auto"  # embedded, fineweb-edu, climbmix, or auto: what is downloaded
    data_dir: str = ""  # folder of text to train on instead of a dataset
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    depth: int = 2  # transformer blocks
    max_seq_len: int = 64  # tokens of context
    device_batch_size: int = 8  # sequences of a micro-batch
    micro_batches: int = 1  # of an optimizer step
    num_iterations: int = 80  # optimizer steps
    matrix_lr: float = 0.02  # Muon rate of the matrices
    embedding_lr: float = 0.2  # AdamW rate of the embedding at width 768
    unembedding_lr: float = 0.004  # AdamW rate of the head at width 768
    warmdown_ratio: float = 0.2  # share of the run in which the rates fall
    eval_tokens: int = 16_384  # validation tokens
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa


def train_cell(
    settings: Settings,
    recipe: Recipe,
    seed: int,
    batches_of: Callable[..., Iterator[tuple[Tensor, Tensor]]],
    token_bytes: Tensor,
    runtime: Runtime,
) -> dict[str, Any]:
    """Train once; the measured values of the cell.

    batches_of  a split -> its (inputs, targets) from the beginning, the same ones for every cell
    train_loss  nats per token, mean of the last steps
    """
    config = run.model_config(settings.depth, -1, settings.max_seq_len, len(token_bytes))
    model = run.build_model(config, runtime, seed)
    # Model and optimizers as base_train builds them; the same weights for every recipe of a seed.
    conversion = None
    if recipe != PLAIN:
        conversion = convert(model, recipe, (), settings.backend, seed)
    optimizers = model.setup_optimizers(
        settings.embedding_lr,
        settings.unembedding_lr,
        settings.matrix_lr,
        weight_decay=0.0,
        distributed=False,
    )
    batches = batches_of(split="train")
    losses: list[Tensor] = []
    started = time.perf_counter()
    for step in range(settings.num_iterations):
        if conversion is not None:
            conversion.begin_step(step)
        scale = schedule.lr_scale(
            step, settings.num_iterations, 0.0, settings.warmdown_ratio, final_frac=0.0
        )
        set_rates(optimizers, scale, schedule.muon_momentum(step))
        micro_batches = list(itertools.islice(batches, settings.micro_batches))
        losses.append(train_step(model, optimizers, micro_batches, runtime).loss)
    runtime.synchronize()
    seconds = time.perf_counter() - started
    # Evaluation on the first validation batches, the same ones for every cell.
    num_batches = settings.eval_tokens // (settings.device_batch_size * settings.max_seq_len)
    validation = itertools.islice(batches_of(split="val"), max(1, num_batches))
    tokens = settings.num_iterations * settings.micro_batches * config.sequence_len
    tokens *= settings.device_batch_size
    return {
        "bpb": evaluate_bpb(model, validation, token_bytes, runtime),
        "train_loss": fmean(float(loss) for loss in losses[-AVERAGED_STEPS:]),
        "first_loss": float(losses[0]),
        "tokens": tokens,
        "num_params": model.num_parameters().total,
        "flop_shares": coverage.shares(conversion.rows) if conversion else {},
        "seconds": seconds,  # of the cell: with emulated products this is no speed
    }


def cell_record(settings: Settings, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What identifies a cell, before it is trained."""
    products = {name: recipe.product(name) for name in PRODUCTS}
    fixed = {name: v for name, v in asdict(settings).items() if name not in NOT_COMPARED}
    for folder in ("data_dir", "tokenizer_dir"):  # the same folder in another place is the same
        fixed[folder] = Path(fixed[folder]).name
    return {
        "cell": recipe.name,
        "seed": seed,
        "path": "plain" if recipe == PLAIN else settings.backend,
        "products": {n: p and f"{p.a} | {p.b}" for n, p in products.items()},
        "signs": recipe.signs,
        "quest": recipe.quest,
        "settings": fixed,
    }


def finished(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the cell is finished. Raises ValueError if its file is of other settings."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise ValueError(
            f"{path} is of other {', '.join(different)}: {found.get(different[0])}, now "
            f"{wanted[different[0]]}; choose another --output"
        )
    return True


def main() -> None:
    settings = configurator.load(Settings)
    recipes = chosen_cells(settings.cells)
    runtime = setup_training(settings.device)
    print0(format_choices(select(settings.kernels, runtime.device, runtime.dtype)))
    output = Path(settings.output or runtime.base_dir / "mxfp4" / f"d{settings.depth}")
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    batches_of = functools.partial(
        tokenizing_distributed_data_loader,
        tokenizer,
        resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir),
        settings.device_batch_size,
        settings.max_seq_len,
        device=runtime.device,
    )
    facts = {
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    # every recipe with one seed before the next seed: what is finished can always be compared
    for seed, recipe in itertools.product(range(settings.seeds), recipes):
        path = output / f"{recipe.name}_seed{seed}.json"
        record = cell_record(settings, recipe, seed)
        try:
            lock = FileLock(output / f".{path.stem}.lock").acquire(timeout=0)
        except Timeout:
            print0(f"{recipe.name:16} seed {seed} | another process trains it")
            continue
        with lock:
            if finished(path, record):
                continue
            values = train_cell(settings, recipe, seed, batches_of, token_bytes, runtime)
            write_json(path, {**record, **values, **facts})
        print0(
            f"{recipe.name:16} seed {seed} | validation bpb {values['bpb']:.4f} | training loss "
            f"{values['train_loss']:.4f} | {values['seconds']:.0f} s"
        )
    print0(f"python -m experiments.mxfp4.studies.report {output}")


if __name__ == "__main__":
    command.run(main)
