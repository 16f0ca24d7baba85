"""Bits per byte of a base checkpoint on train and validation text, and samples.

python -m scripts.base_loss --checkpoint=base_checkpoints/latest.pt
"""

import itertools
from dataclasses import dataclass

from nanochat import configurator
from nanochat.common import print0, setup_training
from nanochat.data.dataloader import CUDAPrefetcher, DataLoader
from nanochat.dataset import resolve_data_dir
from nanochat.eval.loss import evaluate_bpb
from nanochat.kernels.registry import format_choices, select
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.tracking import Tracker
from nanochat.train import run

PROMPTS = ("The", "The capital of France is", "Returns", "def ", "")
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """Score a base checkpoint in bits per byte."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    model_tag: str = ""  # tag to look in when --checkpoint is empty or a step
    dataset: str = "auto"  # embedded, fineweb-edu, climbmix, or auto: what is downloaded
    data_dir: str = ""  # folder of parquet, JSONL or text files instead of a dataset
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    device_batch_size: int = 32  # sequences a device holds at once
    split_tokens: int = 20 * 524_288  # tokens scored of each split, over all devices
    temperature: float = 0.8  # of the samples; 0 takes the likeliest token
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    skip_bad_shards: bool = False  # leave out unreadable shards instead of stopping


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device)
    print0(format_choices(select(settings.kernels, runtime.device, runtime.dtype)))
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, meta, path = run.load_pretrained(
        settings.checkpoint, "base", runtime, tokenizer, settings.model_tag
    )
    model.eval()
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    data_dir = resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir)
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
        pairs = ((batch.inputs, batch.targets) for batch in batches)
        num_batches = max(1, settings.split_tokens // micro_batch)
        bpb = evaluate_bpb(model, itertools.islice(pairs, num_batches), token_bytes, runtime)
        batches.close()
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
    main()
