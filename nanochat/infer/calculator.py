"""The tool a chat model calls: arithmetic, and `'text'.count('part')`.

An expression is parsed and walked, never evaluated by Python: what is not listed here is refused.
Numbers stay below MAX_BITS, so no expression takes long. Nothing depends on signals or threads.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

Number = int | float

MAX_LENGTH = 256  # characters of an expression, and so the depth of its tree
MAX_BITS = 333  # of every whole number on the way: 100 digits
SIGNIFICANT_DIGITS = 12  # hides the rounding of doubles: 0.1 + 0.2 is 0.3
EXACT_BELOW = 2**53  # larger doubles have gaps above 1

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# what an expression may hold besides texts; Python's parser prints warnings about much else
TEXTS = re.compile(r"'[^'\\]*'|" r'"[^"\\]*"')
OUTSIDE_TEXTS = re.compile(r"(?:[\d\s.,eE+\-*/%()]|\.count)*")


class _RefusedError(ValueError):
    """The expression has a part that is not allowed."""


def use_calculator(expression: str) -> str | None:
    """The value of an expression as text; None for whatever is not a finite number.

    Whole results have no decimal point: `24/2` is `12`. Thousands may be separated by commas.
    Never raises for a str, and takes milliseconds at most.
    """
    outside_texts = TEXTS.sub("", expression[: MAX_LENGTH + 1])
    if len(expression) > MAX_LENGTH or not OUTSIDE_TEXTS.fullmatch(outside_texts):
        return None
    if outside_texts == expression:
        expression = THOUSANDS.sub("", expression)
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _text(_value(tree.body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return _bounded(BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.Call):
        return _count(node)
    raise _RefusedError


def _bounded(value: object) -> Number:
    """The value, if it is an int or float of an allowed size, and not a bool or complex."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and value.bit_length() <= MAX_BITS:
        return value
    raise _RefusedError


def _count(call: ast.Call) -> int:
    function, arguments = call.func, call.args
    if (
        not isinstance(function, ast.Attribute)
        or function.attr != "count"
        or len(arguments) != 1
        or call.keywords
    ):
        raise _RefusedError
    text, part = (
        node.value if isinstance(node, ast.Constant) else None
        for node in (function.value, arguments[0])
    )
    if not isinstance(text, str) or not isinstance(part, str):
        raise _RefusedError
    return text.count(part)


def _divide(left: Number, right: Number) -> Number:
    """left / right; a whole quotient of whole numbers keeps all its digits."""
    if isinstance(left, int) and isinstance(right, int) and left % right == 0:
        return left // right
    return left / right


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int):
        if exponent * base.bit_length() > 2 * MAX_BITS:
            raise _RefusedError
    elif base < 0 and exponent != int(exponent):
        raise _RefusedError  # a complex number
    return base**exponent


def _text(value: Number) -> str:
    if isinstance(value, int):
        return str(value)
    rounded = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    exact = rounded.is_integer() and abs(rounded) < EXACT_BELOW
    return str(int(rounded)) if exact else str(rounded)


UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
