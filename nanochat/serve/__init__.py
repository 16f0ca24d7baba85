"""A chat, in the terminal or over HTTP.

    chat_model   settings of a chat script -> device, tokenizer, model, engine
    prompt       a conversation that fits the context; tokens -> text as they arrive
    answer       generated tokens sorted into text and tool calls
    server       the HTTP API and the WebSocket; ui.html is its page

May import: common, gpt, infer, kernels, settings, stages, text, train.
"""
