"""A chat, in the terminal or over HTTP.

    chat_model     settings of a chat script -> device, tokenizer, model, engine
    prompt         a conversation that fits the context; tokens -> text as they arrive
    answer         generated tokens sorted into text and tool calls, up to a stop string
    terminal       a chat in the terminal: its conversation and its commands
    config         what whoever runs a server decides: defaults, limits, who may come in
    errors         refusals and failures as clients get them
    schema         what clients may send
    metrics        numbers for Prometheus
    engine_thread  steps the engine whatever goes wrong, and says whether it answers
    generation     requests of clients on their way through the engine
    streams        answers on their way to clients who may leave, or stop reading
    openai_shapes  answers in OpenAI's shapes, whole and in chunks
    openai_api     /v1: models, chats, completions; the tokenizer
    chat_api       the page (ui.html), /chat, /chat/completions and the WebSocket
    guard          host, origin, key, size and time, before any route
    server         the application: all of it around one engine
    workers        one process or several behind one port

May import: command, common, gpt, infer, kernels, settings, stages, text, train.
"""
