"""A training run: what the four training scripts share around the loops they keep.

    step               micro-batches -> gradients -> one optimizer step
    precision          number format of the linear layers; the plug-in point for experiments
    checkpoint_read    find a checkpoint by any name, check it, read it without running pickles
    checkpoint_write   a checkpoint appears whole, by one rename, or not at all
    run                build or load a model; the state of a run, saved and restored
    profiling          --profile=N: which steps, and where the tables and the trace go
    session            settings and bookkeeping that the four training scripts share
    auto_batch         --device_batch_size=auto: foreseen, then tried
    pretraining        what a base model is trained with
    rehearsal          a step on the meta device: what it would allocate
    policy_gradient    advantages and token losses of reinforcement learning

May import: command, common, data, dataset, gpt, hardware, kernels, locks, optim, profiler,
            scaling, settings, stages, text, tracking.
"""
