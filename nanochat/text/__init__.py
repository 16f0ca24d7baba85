"""Text as tokens: tokenizers, and conversations as token sequences with a loss mask.

    tokenizer_base   special tokens, the split pattern, what every tokenizer can do
    tokenizer        train, load, encode, decode: rustbpe, tiktoken, Hugging Face
    chat_format      a conversation -> tokens and the mask of what is learned; a worked example
    tokenizer_json   tokenizer and conversations as transformers reads them, and back

May import: common.
"""
