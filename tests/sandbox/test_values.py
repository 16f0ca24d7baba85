"""Values across the channel: they arrive as they are, and nothing else does."""

import copy
import json
import math
from collections import Counter, OrderedDict
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.sandbox.values import Table, UnknownValueError, exception_named

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary()
    | st.text() | st.complex_numbers(allow_nan=False) | st.fractions()
    | st.decimals(allow_nan=False)
)  # fmt: skip
HASHABLE = st.recursive(SCALARS, lambda x: st.tuples(x, x) | st.frozensets(x), max_leaves=3)
VALUES = st.recursive(
    HASHABLE,
    lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(HASHABLE, x) | st.sets(HASHABLE),
    max_leaves=8,
)


def across(value: Any) -> Any:
    sender, receiver = Table(), Table()
    index = sender.add(value)
    receiver.decode(json.loads(json.dumps(sender.encode())))
    return receiver.objects[index]


def types(value: Any) -> Any:
    """The types in a value, in its shape."""
    if isinstance(value, dict):
        return dict, {key: types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [types(item) for item in value]
    return type(value)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_values_arrive_as_they_are(value: Any) -> None:
    arrived = across(value)
    assert arrived == value
    assert types(arrived) == types(value)
    assert repr(arrived) == repr(value) or isinstance(value, list | tuple | dict | set | frozenset)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (-0.0, -0.0),
        ("\ud800\0é", "\ud800\0é"),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (range(1, 9, 2), range(1, 9, 2)),
        (Decimal("1.50"), Decimal("1.5")),
        (Fraction(1, 3), Fraction(1, 3)),
        (True, True),
        ([True, 1, 1.0], [True, 1, 1.0]),
    ],
)
def test_unusual_values(value: Any, arrives: Any) -> None:
    arrived = across(value)
    assert arrived == arrives
    assert types(arrived) == types(arrives)


def test_a_long_integer_arrives() -> None:
    assert across(-(10**5000)) == -(10**5000)


def test_nan_arrives() -> None:
    assert math.isnan(across(float("nan")))


def test_an_iterator_arrives_as_one() -> None:
    arrived = across(x * x for x in range(4))
    assert next(arrived) == 0
    assert list(arrived) == [1, 4, 9]


def test_sharing_and_cycles_arrive() -> None:
    shared = [1]
    cycle: list[Any] = [shared, shared]
    cycle.append((cycle, {"me": cycle}))
    arrived = across(cycle)
    assert arrived[0] is arrived[1]
    assert arrived[2][0] is arrived[2][1]["me"] is arrived


def test_a_deep_list_arrives() -> None:
    value: list[Any] = []
    for _ in range(20_000):
        value = [value]
    arrived, depth = across(value), 0
    while arrived:
        arrived, depth = arrived[0], depth + 1
    assert depth == 20_000


def test_changes_of_arguments_come_back() -> None:
    numbers, table = [3, 1, 2], {"a": {1}}
    caller, callee = Table(), Table()
    indices = [caller.add(numbers), caller.add(table)]
    callee.decode(caller.encode())
    given_numbers, given_table = (callee.objects[i] for i in indices)
    known = len(callee.objects)
    given_numbers.sort()
    given_table["a"].add(2)
    given_table["b"] = given_numbers
    result = callee.add((given_numbers, "new"))
    inner = table["a"]
    caller.decode(json.loads(json.dumps(callee.encode(known))))
    assert numbers == [1, 2, 3]
    assert table == {"a": {1, 2}, "b": [1, 2, 3]}
    assert table["b"] is numbers
    assert table["a"] is inner
    assert caller.objects[result][0] is numbers


class Equal:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("value", [Equal(), print, lambda: 0, type, object()])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(UnknownValueError, match=f"type {type(value).__name__}"):
        across([value])


def test_subclasses_arrive_as_what_they_are_a_class_of() -> None:
    subclass = type("Liar", (int,), {"__eq__": lambda *_: True, "__hash__": int.__hash__})
    assert across(subclass(3)) == 3
    assert across(subclass(3)) != 4


@pytest.mark.parametrize(
    "nodes",
    [
        [["tuple", [0]]],
        [["tuple", [1]], ["frozenset", [0]]],
        [["list", [7]]],
        [["list", "ab"]],
        [["int", 3]],
        [["int", "zz"]],
        [["object", None]],
        [["dict", [0]]],
        [["set", [1]], ["list", []]],
        [["range", ["1"]]],
        [["Decimal", "x"]],
        [["Fraction", "1/0"]],
        [["complex", [1, 2, 3]]],
        [None],
        [3],
        ["list"],
        [["float", "x"]],
        [["bytes", "x"]],
        [[]],
        [["str"]],
        [[["str"], 1]],
    ],
)
def test_nodes_of_no_value_are_refused(nodes: Any) -> None:
    with pytest.raises(UnknownValueError):
        Table().decode(copy.deepcopy(nodes))


def test_a_list_cannot_become_a_dict() -> None:
    table = Table()
    table.add([1])
    table.encode()
    with pytest.raises(UnknownValueError, match="a list became a dict"):
        table.decode([["dict", []], None])


def test_many_references_to_one_tuple_are_no_cycle() -> None:
    nodes = [["tuple", [1] * 1000], ["tuple", [2, 2]], ["int", "1"]]
    table = Table()
    table.decode(nodes)
    assert table.objects[0] == ((1, 1),) * 1000


def test_exceptions_by_name() -> None:
    assert type(exception_named("ZeroDivisionError", "x")) is ZeroDivisionError
    for name in ("SystemExit", "KeyboardInterrupt", "print", "Mine", "UnicodeDecodeError"):
        assert type(exception_named(name, "x")) is RuntimeError
