"""A chat over HTTP.

    prompt   a conversation cut to fit the context; tokens -> text as they arrive
    answer   generated tokens sorted into text and tool calls
    server   the HTTP API and the WebSocket; ui.html is its page

May import: infer, text.
"""
