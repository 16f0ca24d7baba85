"""Training data: shards of text on disk become resumable batches of tokens.

    digests               of shards: computed once, checked whenever a part is read
    shards                parquet files, their row blocks, who reads which
    embedded              a corpus made of the text that comes with Python, no download
    hub                   downloads from the Hugging Face Hub, resumed and checked
    documents             row blocks -> encoded documents, in order, ahead of time
    token_cache           encoded documents kept on disk, shared by any number of ranks
    dataloader            documents -> batches of (inputs, targets), resumable to the token
    conversation_loader   conversations -> the same batches, with a loss mask

May import: common, kernels, locks, text.
"""
