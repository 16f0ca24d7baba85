"""Bits per byte of a base checkpoint on train and validation text, and samples.

python -m scripts.base_loss --checkpoint=base_checkpoints/latest.pt
"""

from dataclasses import dataclass
from typing import Annotated

from nanochat import command, configurator
from nanochat.common import print0, setup_training
from nanochat.data.dataloader import CUDAPrefetcher, DataLoader
from nanochat.data.shards import list_shards
from nanochat.dataset import DATASETS, resolve_data_dir
from nanochat.eval.loss import evaluate_bpb
from nanochat.kernels.registry import format_choices, select
from nanochat.settings import Choices, Count, ModelSettings, NonNegative
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.tracking import Tracker
from nanochat.train import run
from nanochat.train.session import first_batches

PROMPTS = ("The", "The capital of France is", "Returns", "def ", "")
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Settings(ModelSettings):
    """Score a base checkpoint in bits per byte."""

    dataset: Annotated[str, Choices(DATASETS)] = "auto"  # auto: what is downloaded, else embedded
    data_dir: str = ""  # folder of parquet, JSONL or text files instead of a dataset
    device_batch_size: Count = 32  # sequences a device holds at once
    split_tokens: Count = 20 * 524_288  # tokens scored of each split, over all devices
    temperature: NonNegative = 0.8  # of the samples; 0 takes the likeliest token
    skip_bad_shards: bool = False  # leave out unreadable shards instead of stopping


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device)
    kernels = select(settings.kernels, runtime.device, runtime.dtype)
    print0(format_choices(kernels, settings.verbose))
    data_dir = resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir)
    list_shards(data_dir)
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, meta, path = run.load_pretrained(
        settings.checkpoint, "base", runtime, tokenizer, settings.model_tag
    )
    model.eval()
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    tracker = Tracker(path.parent, runtime, "base_loss", settings, header={"checkpoint": str(path)})

    sequence_len = model.config.sequence_len
    micro_batch = settings.device_batch_size * sequence_len * runtime.world_size
    for split in ("train", "val"):
        batches = CUDAPrefetcher(
            DataLoader(
                tokenizer,
                data_dir,
                split,
                settings.device_batch_size,
                sequence_len,
                rank=runtime.rank,
                world_size=runtime.world_size,
                device=runtime.device,
                skip_bad_shards=settings.skip_bad_shards,
            ),
            runtime.device,
        )
        pairs = first_batches(batches, max(1, settings.split_tokens // micro_batch))
        bpb = evaluate_bpb(model, pairs, token_bytes, runtime)
        tracker.log("eval", meta["step"], split=split, bpb=bpb)
        print0(f"{split:5} bpb {bpb:.4f}")
    for seed, prompt in enumerate(PROMPTS if runtime.is_main else ()):
        ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
        sampled = model.generate(ids, SAMPLE_TOKENS, settings.temperature, top_k=50, seed=seed)
        text = tokenizer.decode([*ids, *sampled])
        tracker.log("sample", meta["step"], prompt=prompt, text=text)
        print0(f"---\n{text}")
    tracker.close()
    runtime.close()


if __name__ == "__main__":
    command.run(main)
