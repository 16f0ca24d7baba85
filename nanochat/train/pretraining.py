"""What a base model is trained with: the settings of base_train, and of what profiles its steps."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.data.dataloader import PACKERS
from nanochat.dataset import DATASETS
from nanochat.settings import (
    Choices,
    Count,
    CountOrMinusOne,
    PositiveOrMinusOne,
    Share,
)
from nanochat.train.session import TrainingSettings


@dataclass(frozen=True)
class PretrainingSettings(TrainingSettings):
    """Every size follows from --depth unless it is given."""

    use_dummy_wandb: bool = False  # never use wandb, whatever the run is called
    dataset: Annotated[str, Choices(DATASETS)] = "auto"  # auto: what is downloaded, else embedded
    data_dir: str = ""  # folder of parquet, JSONL or text files to train on instead of a dataset
    depth: Count = 20  # transformer blocks
    n_kv_head: CountOrMinusOne = -1  # key/value heads (grouped queries); -1: as many as query heads
    max_seq_len: Count = 2048  # tokens of context
    num_iterations: CountOrMinusOne = -1  # optimizer steps; -1 derives them from the next two
    target_flops: PositiveOrMinusOne = -1.0  # FLOPs of the whole run; -1 takes the data ratio
    target_param_data_ratio: PositiveOrMinusOne = 20.0  # training tokens for each parameter
    total_batch_size: Count = 524_288  # tokens of one optimizer step over all devices
    warmup_ratio: Share = 0.0  # share of the run in which the rates rise
    warmdown_ratio: Share = 0.2  # share of the run in which the rates fall
    final_lr_frac: Share = 0.0  # the rates at the very end, as a share of their peak
    eval_tokens: Count = 20 * 524_288  # validation tokens
    core_metric_every: CountOrMinusOne = -1  # steps between CORE scores, and at the end; -1: never
    core_metric_max_per_task: CountOrMinusOne = 500  # examples of each CORE task; -1 is all
    core_bundle_dir: str = ""  # unpacked CORE bundle; empty downloads it to the base directory
    core_bundle_sha256: str = ""  # of its archive; empty is that of the first download
    sample_every: CountOrMinusOne = 2000  # steps between samples; -1 samples only at the end
    model_tag: str = ""  # folder of the checkpoints; empty is d<depth>
    compile: bool = False  # torch.compile the model
    precision: str = "plain"  # plain: the compute dtype; mxfp4: block-scaled, experiments/mxfp4
    mx_recipe: str = ""  # recipe of --precision=mxfp4; empty is mx8f_mx4b
    mx_backend: str = ""  # native, an error where the GPU has no such products; or emulate
    mx_keep: str = ""  # layers left in the compute dtype: blocks.0,blocks.*.mlp.c_proj
    packing: Annotated[str, Choices(PACKERS)] = "stream"  # bestfit: each row begins with a document
    skip_bad_shards: bool = False  # leave out unreadable shards instead of stopping
    token_cache: bool = False  # tokenize once, into <base dir>/token_cache, and read from there

    def __post_init__(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.warmup_ratio + self.warmdown_ratio > 1:
            raise ValueError(
                f"--warmup_ratio={self.warmup_ratio} and --warmdown_ratio={self.warmdown_ratio} "
                "must not add up to more than 1, the whole run; lower one of them"
            )
