"""Generation: many requests decoded together, a key/value slot each.

    sampling     temperature, top-k, top-p; random numbers that belong to the request
    requests     what is asked for, what comes out, tool calls on the way
    calculator   the tool: arithmetic without eval
    weights      the model in its compute dtype
    slots        the cache on the device: prefill, scores of a prompt, the next token of every slot
    engine       one token a step for every request, late arrivals, failures that end no others
    huggingface  weights and configuration as transformers knows them, and back

May import: gpt, kernels, text.
"""
