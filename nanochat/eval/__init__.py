"""How good a model is: bits per byte, CORE, tasks.

    loss          bits per byte and mean loss over batches
    core_bundle   the files of CORE: downloaded, unpacked, read
    core          CORE's in-context learning tasks, batched, shared prefixes computed once
    tasks         accuracy on tasks by likelihood or generation, pass@k, ChatCORE

May import: common, files, gpt, infer, text.
"""
