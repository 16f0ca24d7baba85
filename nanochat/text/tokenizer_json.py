r"""A tokenizer as Hugging Face's `tokenizers` and `transformers` read it, and back.

tokenizer.json wants the pairs that were merged, where ours has a rank for each token. A pair is
found by encoding the token with the ranks below its own: two parts are left. With "ab" learned
before "abc":

    >>> from nanochat.text.tokenizer import TiktokenTokenizer
    >>> ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    >>> merge_of(b"abc", ranks)
    (b'ab', b'c')
    >>> ours = TiktokenTokenizer.from_ranks(ranks, SPLIT_PATTERN)
    >>> theirs = tokenizers.Tokenizer.from_str(to_json(ours))
    >>> theirs.encode("abcab").ids, theirs.encode("abcab", add_special_tokens=False).ids
    ([258, 257, 256], [257, 256])

Inside of a token no merge reaches across its ends, so that the parts meet in the same order there
as in any text: the ids are the same.

One thing differs: they read the name of a special token in a text as that token. The chat template
therefore refuses messages with such names; for plain text there is `split_special_tokens=True`.
"""

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from nanochat.text.chat_format import PART_FRAMES
from nanochat.text.tokenizer import TiktokenTokenizer, byte_level_alphabet
from nanochat.text.tokenizer_base import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN

END = "<|assistant_end|>"


def to_json(tokenizer: TiktokenTokenizer) -> str:
    """The content of tokenizer.json: a text gets <|bos|> in front unless add_special_tokens=False.

    Raises  ValueError for a tokenizer whose ids the format does not give: a token that is no merge
            of two others, one spelled like a special token, a byte that is no token, a split
            pattern other than ours, which is the one that both engines are known to read alike.
    """
    pattern = tokenizer.encoding._pat_str
    if pattern != SPLIT_PATTERN:
        raise ValueError(
            f"the tokenizer splits text by {pattern!r}; tokenizer.json is known to give the same "
            f"ids only for {SPLIT_PATTERN!r}"
        )
    ranks, alphabet = tokenizer.encoding._mergeable_ranks, byte_level_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    taken = sorted(set(SPECIAL_TOKENS) & {*names.values()})
    if taken:
        raise ValueError(
            f"the tokenizer learned {taken[0]!r} as text, which tokenizer.json cannot tell from "
            "the special token; train it on text without that name"
        )
    absent = [byte for byte in range(NUM_BYTES) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"the tokenizer has no token for byte {absent[0]}; train another")
    by_rank = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [merge_of(token, ranks) for token in by_rank]
    model = models.BPE(
        vocab={names[token]: rank for token, rank in ranks.items()},
        merges=[(names[left], names[right]) for left, right in merges],
        ignore_merges=True,  # a piece that is a token is that token: what tiktoken does too
    )
    theirs = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces: Any = theirs  # the stubs of the library lack these setters
    pieces.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    pieces.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(list(SPECIAL_TOKENS))
    bos = SPECIAL_TOKENS[0]
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.get_bos_token_id())],
    )
    return theirs.to_str(pretty=True)


def from_json(content: str | bytes) -> TiktokenTokenizer:
    """The tokenizer of a tokenizer.json that `to_json` could have written.

    Raises  ValueError naming what it has and our tokenizers have not.
    """
    try:
        stored = json.loads(content)
        vocab = stored["model"]["vocab"]
        special = {token["content"]: token["id"] for token in stored["added_tokens"]}
        to_byte = {char: byte for byte, char in byte_level_alphabet().items()}
        ranks = {
            bytes(to_byte[char] for char in name): rank
            for name, rank in vocab.items()
            if name not in special
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"tokenizer.json is no byte-level BPE ({error!r}); use the one "
            "that the model was exported with"
        ) from error
    if special != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}:
        raise ValueError(
            f"tokenizer.json has the special tokens {special}; ours are "
            f"{', '.join(SPECIAL_TOKENS)} as the last ids: it is another conversation format"
        )
    tokenizer = TiktokenTokenizer.from_ranks(ranks, SPLIT_PATTERN)
    wanted = json.loads(to_json(tokenizer))
    # the rest (decoder, post-processor, truncation, padding) has no part in our ids
    differing = [k for k in ("normalizer", "pre_tokenizer", "model") if wanted[k] != stored.get(k)]
    if differing:
        raise ValueError(
            f"tokenizer.json has another {', '.join(differing)} than our tokenizers with the same "
            "tokens: the ids would differ; use the one that the model was exported with"
        )
    return tokenizer


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made this one.

    Raises  ValueError if two parts cannot be reached with the ranks below its own.
    """
    parts, beyond = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], beyond) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= beyond:
            raise ValueError(
                f"token {beyond}, {token!r}, is no merge of two tokens before it, and "
                "tokenizer.json knows no others; train a tokenizer with python -m scripts.tok_train"
            )
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def tokenizer_config(sequence_len: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_len,
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": END,
        "pad_token": END,  # a batch is padded with it and masked; <|bos|> begins real text
        "additional_special_tokens": [
            x for x in SPECIAL_TOKENS if x not in (SPECIAL_TOKENS[0], END)
        ],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def chat_template() -> str:
    """The content of chat_template.jinja: `chat_format.segments` in Jinja, refusals included."""
    frames = {kind: [opening, closing] for kind, (opening, closing, _) in PART_FRAMES.items()}
    values = {"SPECIAL": list(SPECIAL_TOKENS), "FRAMES": frames}
    head = "".join(f"{{%- set {name} = {json.dumps(x)} -%}}\n" for name, x in values.items())
    return head + _TEMPLATE


_TEMPLATE = """\
{%- macro plain(text) -%}
    {%- if text is not string -%}
        {{- raise_exception('the content of a message must be a text here') -}}
    {%- endif -%}
    {%- for name in SPECIAL -%}
        {%- if name in text -%}
            {{- raise_exception('a message contains ' ~ name ~ ', which would become a token') -}}
        {%- endif -%}
    {%- endfor -%}
    {{- text -}}
{%- endmacro -%}
{%- set turn = namespace(system='', index=0) -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if loop.first and message['role'] == 'system' -%}
        {%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
            {{- raise_exception('a system message must be followed by a message of the user') -}}
        {%- endif -%}
        {%- set turn.system = plain(message['content']) ~ '\\n\\n' -%}
    {%- else -%}
        {%- set expected = 'assistant' if turn.index % 2 else 'user' -%}
        {%- if message['role'] != expected -%}
            {{- raise_exception(expected ~ ' is next, not ' ~ message['role']) -}}
        {%- endif -%}
        {%- if expected == 'user' -%}
            {{- '<|user_start|>' ~ turn.system ~ plain(message['content']) ~ '<|user_end|>' -}}
            {%- set turn.system = '' -%}
        {%- elif message['content'] is string -%}
            {{- '<|assistant_start|>' ~ plain(message['content']) ~ '<|assistant_end|>' -}}
        {%- else -%}
            {{- '<|assistant_start|>' -}}
            {%- for part in message['content'] -%}
                {%- if part['type'] not in FRAMES -%}
                    {{- raise_exception('a part is of the unknown type ' ~ part['type']) -}}
                {%- endif -%}
                {{- FRAMES[part['type']][0] ~ plain(part['text']) ~ FRAMES[part['type']][1] -}}
            {%- endfor -%}
            {{- '<|assistant_end|>' -}}
        {%- endif -%}
        {%- set turn.index = turn.index + 1 -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""
