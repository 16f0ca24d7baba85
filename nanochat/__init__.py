"""nanochat: train and study small GPTs end to end on custom Triton kernels.

At the door are the files that every entry point starts with, the model, and two commands:

    settings       what a setting may be: ranges and choices, beside the field they belong to
    command        how a command ends that was called wrongly: one line, exit code 2
    stages         the stages of training, each registered once
    configurator   defaults, config files, flags -> one frozen dataclass per script
    common         device, dtype, ranks, seed, base directory, signals
    locks          one writer at a time, with the owner's name
    hardware       datasheet peaks of each GPU, measured ceilings
    tracking       metrics.jsonl; Weights & Biases when a run is named
    scaling        depth -> width, heads, batch, horizon
    gpt            the model
    dataset        python -m nanochat.dataset: import, download, split text
    report         python -m nanochat.report: report.md from the records of every run

Everything else is in rooms, one subject each; a room's `__init__.py` says what is inside and what
it may import. Floors, from the ground; a module imports its own floor or below:

    settings command stages
    configurator common hardware locks kernels
    optim text profiler tracking scaling
    gpt data
    dataset report
    train infer
    eval serve sandbox
"""
