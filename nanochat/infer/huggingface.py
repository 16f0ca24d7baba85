"""A model as `transformers` knows it, NanoChatForCausalLM, and back: names and configuration.

What differs: the packed projection is three matrices there, and the vocabulary has no padding.
With C 2, four tokens and 128 rows in our embedding and head:

    >>> config = GPTConfig(sequence_len=8, vocab_size=4, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
    >>> with torch.device("meta"):
    ...     ours = GPT(config).state_dict()
    >>> theirs, padding = to_huggingface(ours, config)
    >>> for name, weight in {**theirs, **padding}.items():
    ...     print(f"{name:42}", *weight.shape)
    model.embed_tokens.weight                  4 2
    lm_head.weight                             4 2
    model.layers.0.self_attn.q_proj.weight     2 2
    model.layers.0.self_attn.k_proj.weight     2 2
    model.layers.0.self_attn.v_proj.weight     2 2
    model.layers.0.self_attn.o_proj.weight     2 2
    model.layers.0.mlp.fc1.weight              8 2
    model.layers.0.mlp.fc2.weight              2 8
    wte.padding                                124 2
    lm_head.padding                            124 2
    >>> from_huggingface({**theirs, **padding}, config).keys() == ours.keys()
    True

The rows of padding stand for no token, and a head with them would give such ids a probability.
They are kept apart, so that a checkpoint comes back bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat.gpt import GPT, ROPE_BASE, SOFTCAP, GPTConfig
from nanochat.infer.engine import STOP_NAMES
from nanochat.kernels.rms_norm import EPS
from nanochat.text.tokenizer_base import Tokenizer

VOCABULARY = {"wte": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
QKV = ("q_proj", "k_proj", "v_proj")
BLOCK = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
# theirs -> ours, for the sizes a GPTConfig has
SIZES = {
    "max_position_embeddings": "sequence_len",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
}
# what a GPT is without a choice; where their file says nothing, it means the same
FIXED = {
    "hidden_act": "relu2",
    "rms_norm_eps": EPS,
    "final_logit_softcapping": SOFTCAP,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
ROPE = {"rope_type": "default", "rope_theta": ROPE_BASE}


def to_huggingface(
    state: Mapping[str, Tensor], config: GPTConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(their state dict, the rows of padding that it has no place for); views, not copies."""
    theirs: dict[str, Tensor] = {}
    padding: dict[str, Tensor] = {}
    for ours, name in VOCABULARY.items():
        theirs[name] = state[f"{ours}.weight"][: config.vocab_size]
        if rest := len(state[f"{ours}.weight"]) - config.vocab_size:
            padding[f"{ours}.padding"] = state[f"{ours}.weight"][-rest:]
    for layer in range(config.n_layer):
        block, there = f"blocks.{layer}", f"model.layers.{layer}"
        parts = state[f"{block}.attn.c_qkv.weight"].split(config.qkv_rows)
        for name, part in zip(QKV, parts, strict=True):
            theirs[f"{there}.self_attn.{name}.weight"] = part
        for ours, name in BLOCK.items():
            theirs[f"{there}.{name}.weight"] = state[f"{block}.{ours}.weight"]
    return theirs, padding


def from_huggingface(theirs: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our state dict in float32 of what `to_huggingface` gives; absent rows of padding are zero.

    Raises  ValueError naming tensors that are missing, too many, of another shape or no floats.
    """
    with torch.device("meta"):
        ours = GPT(config).state_dict()
    expected, padding = to_huggingface(ours, config)
    missing, foreign = expected.keys() - theirs.keys(), theirs.keys() - {*expected, *padding}
    if missing or foreign:
        raise ValueError(
            f"the weights lack {sorted(missing)[:3] or 'nothing'} and have "
            f"{sorted(foreign)[:3] or 'nothing'} beyond a NanoChatForCausalLM of this config.json"
        )
    weights = dict(theirs)
    for name, meta in {**expected, **padding}.items():
        weight = weights.setdefault(name, torch.zeros(meta.shape))
        if weight.shape != meta.shape or not weight.is_floating_point():
            raise ValueError(
                f"{name} is {tuple(weight.shape)} of {weight.dtype}; config.json asks for "
                f"{tuple(meta.shape)} of floating-point numbers"
            )
        weights[name] = weight.float()  # exact from bfloat16 and float16
    state: dict[str, Tensor] = {}
    for name in ours:
        module = name.removesuffix(".weight")
        if module in VOCABULARY:
            rows = [weights[VOCABULARY[module]], weights.get(f"{module}.padding")]
            state[name] = torch.cat([part for part in rows if part is not None])
            continue
        _, layer, inside = module.split(".", 2)
        there = f"model.layers.{layer}"
        if inside in BLOCK:
            state[name] = weights[f"{there}.{BLOCK[inside]}.weight"]
        else:
            state[name] = torch.cat([weights[f"{there}.self_attn.{x}.weight"] for x in QKV])
    return state


def config_json(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "intermediate_size": 4 * config.n_embd,
        **{name: value for name, value in FIXED.items() if value is not None},
        "rope_parameters": ROPE,
        **_token_ids(tokenizer),
    }


def generation_config(tokenizer: Tokenizer, temperature: float, top_k: int) -> dict[str, Any]:
    """The content of generation_config.json: stop where our engine does, sample as ours does."""
    stops = [tokenizer.encode_special(name) for name in STOP_NAMES]
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    return _token_ids(tokenizer) | {"eos_token_id": stops} | drawn


def gpt_config(theirs: Mapping[str, Any]) -> GPTConfig:
    """Our sizes of a config.json.

    Raises  ValueError naming what it has and a GPT has not.
    """
    sizes = dict(theirs)
    if sizes.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    lacking = [name for name in SIZES if sizes.get(name) is None]
    if lacking:
        raise ValueError(
            f"config.json has no {', '.join(lacking)}; it is of no NanoChatForCausalLM"
        )
    config = GPTConfig(**{ours: sizes[name] for name, ours in SIZES.items()})
    defaults = {"head_dim": config.head_dim, "rope_scaling": None, **FIXED}
    wanted = {"model_type": "nanochat", "intermediate_size": 4 * config.n_embd, **defaults}
    found = {name: theirs.get(name, defaults.get(name)) for name in wanted}
    # older files have the base of the rotation by itself
    rope = theirs.get("rope_parameters") or {"rope_theta": theirs.get("rope_theta", ROPE_BASE)}
    found["rope_parameters"] = ROPE | rope if isinstance(rope, dict) else rope
    for name, value in (wanted | {"rope_parameters": ROPE}).items():
        if found[name] != value:
            raise ValueError(
                f"config.json has {name} {found[name]!r}; a GPT can only have {value!r} there"
            )
    return config


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    end = tokenizer.encode_special(STOP_NAMES[0])
    # padding is masked, and <|bos|> begins real text: it must not look like padding
    bos = tokenizer.get_bos_token_id()
    return {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": end}


def model_card(name: str, made_by: str, config: GPTConfig, results: str) -> str:
    """The content of README.md.

    name     of the folder
    made_by  the stage, in words
    results  Markdown tables of what was measured; "" if nothing was
    """
    sizes = "\n".join(f"| `{name}` | {getattr(config, ours):,} |" for name, ours in SIZES.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanochat
---

# {name}

A small GPT trained with nanochat; its last stage was: {made_by.lower()}. It opens in
`transformers` 5 or later, without remote code:

```python
from transformers import pipeline

chat = pipeline("text-generation", model="FOLDER OR NAME OF THIS MODEL")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
print(chat(messages)[0]["generated_text"][-1]["content"])
```

| size | |
|---|---|
{sizes}

## What to know

- The model may write a call of its calculator between `<|python_start|>` and `<|python_end|>`.
  Nothing here runs it, so that the model makes up the result itself; nanochat's own engine puts the
  true one in.
- The chat template refuses messages that contain the name of a special token. Plain text with such
  names becomes ordinary tokens with `split_special_tokens=True`.
- A text without the chat template begins with `<|bos|>`, as every document in training did.

## Results

{results or "No results were recorded at this step."}
"""
