"""Operations: mathematics in, tensors out. Nothing here knows of models.

    registry                      Op: a reference and faster implementations, chosen by --kernels
    launch                        how a Triton kernel starts: tiles, interpreter, recorder
    optional_triton               the package triton, or a stand-in where there is none
    interpreter                   narrow floats as hardware computes them, in Triton's interpreter
    workloads                     sizes of each operation inside d12, d20, d32
    roofline                      FLOPs and bytes -> speed-of-light seconds
    compiled                      what a compiled kernel does: trip counts, instructions, bytes
    aot                           compile every configuration for SM90 and SM120 without a GPU
    unexecuted                    launches of a step of any size, without running it
    forecast                      a kernel's time from its compiled code, without a GPU
    rms_norm                      RMSNorm, alone and fused with the residual addition
    norm_rope                     rotary embedding and norm of the heads of one tensor
    norm_rope_kernels             rotary embedding and norm: the Triton kernels
    qk_norm_rope                  rotary embedding and norm inside a packed QKV projection
    relu2_mlp                     the ReLU^2 network: the operation
    relu2_mlp_kernels             the ReLU^2 network: products with fused epilogues
    attention                     causal attention with grouped queries, by SDPA, Flash or flex
    linear_cross_entropy          head and loss without a logits matrix: the operation
    linear_cross_entropy_chunks   head and loss: chunks of rows in one buffer, and their products
    linear_cross_entropy_kernels  head and loss: the Triton kernels
    newton_schulz                 orthogonalisation by symmetric products, for Muon
    adamw_step                    AdamW's elementwise update in one pass

May import: nothing.
"""
