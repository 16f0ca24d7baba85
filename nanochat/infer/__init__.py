"""Generation: many requests decoded together, a key/value slot each.

    sampling     temperature, top-k, top-p; random numbers that belong to the request
    requests     what is asked for, what comes out, tool calls on the way
    calculator   the tool: arithmetic without eval
    weights      the model in its compute dtype
    engine       prefill, one token a step for every slot, late arrivals

May import: gpt, text.
"""
