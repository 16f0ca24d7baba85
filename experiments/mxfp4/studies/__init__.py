"""What fewer bits do to a training run: comparisons and tables of errors.

    cells         recipes and ablations: the rows of a comparison
    compare       trains every cell on the same text in the same order
    report        tables and a plot of a comparison
    error_tables  quantization errors of the operands of a trained model

May import: numbers, layers.
"""
