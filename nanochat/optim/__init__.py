"""Optimizers: AdamW for embeddings and the head, Muon for matrices, each on one device or sharded.

    schedule   step -> learning-rate multiplier, Muon's momentum
    sharding   reduce-scatter and all-gather of parameters of any shape over any number of ranks
    adamw      AdamW, and DistAdamW on shards of the parameters
    muon       Muon: momentum orthogonalised by Newton-Schulz, and DistMuon

May import: common, kernels.
"""
