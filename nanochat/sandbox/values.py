"""Plain values as JSON, for two processes of which one must not trust the other.

A value becomes a table of nodes, each [kind, content], that refer to each other by index, so what
two places share stays shared, and lists can hold themselves:

    ([1], [1]) with both the same list  ->  [["list", [1]], ["int", "1"], ["tuple", [0, 0]]]

A function is called across with the same table: it answers with the new content of the lists, dicts
and sets it was given, and its caller writes them into its own. Whatever is read back is of a type
from this file: no class, and so no `__eq__` or `__hash__`, comes from the other side. Iterators
arrive as iterators over what they held.
"""

import builtins
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

Node = list[Any]  # [kind, content]
MUTABLE = {"list": list, "dict": dict, "set": set}
SCALARS = {
    "bool": (bool, bool, bool),
    "int": (int, hex, lambda text: int(text, 16)),  # any length, at the speed of its length
    "float": (float, float, float),
    "complex": (complex, lambda z: [z.real, z.imag], lambda pair: complex(*pair)),
    "str": (str, str, str),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "Decimal": (Decimal, str, Decimal),
    "Fraction": (Fraction, str, Fraction),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda three: range(*three)),
}
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class UnknownValueError(ValueError):
    """A value that is not plain, or nodes that are not the nodes of a value."""


class Table:
    """Nodes of the values of one call, on either side.

    objects  the value of each node, at its index
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.indices: dict[int, int] = {}

    def add(self, value: Any) -> int:
        """Index of the value, a new one unless it is there."""
        if id(value) not in self.indices:
            self.indices[id(value)] = len(self.objects)
            self.objects.append(value)  # which keeps it alive, and its id its own
        return self.indices[id(value)]

    def encode(self, start: int = 0) -> list[Node | None]:
        """Nodes from `start` on, with everything they refer to; only lists, dicts and sets can
        have changed among those before, the others are None there.

        Raises  UnknownValueError for a value of another type.
        """
        nodes: list[Node | None] = []
        while len(nodes) < len(self.objects):
            node = self._node(self.objects[len(nodes)])
            known = len(nodes) < start and node[0] not in MUTABLE
            nodes.append(None if known else node)
        return nodes

    def _node(self, value: Any) -> Node:
        if value is None:
            return ["none", None]
        for kind, (cls, write, _) in SCALARS.items():
            if isinstance(value, cls):
                return [kind, write(value)]
        for kind, cls in SEQUENCES.items():
            if isinstance(value, cls):
                return [kind, [self.add(item) for item in value]]
        if isinstance(value, dict):
            return ["dict", [self.add(x) for pair in value.items() for x in pair]]
        if isinstance(value, Iterator):
            return ["iterator", [self.add(item) for item in value]]
        name = type(value).__name__
        raise UnknownValueError(f"a value of type {name} cannot be passed on; plain types can")

    def decode(self, nodes: list[Node | None]) -> None:
        """Append the values of new nodes, and give the lists, dicts and sets of the table the
        content that their nodes now have.

        Raises  UnknownValueError for nodes that are not those of values.
        """
        known = len(self.objects)
        try:
            content_lists = [n[1] for n in nodes if n and isinstance(n[1], list)]
            longest_wait = len(nodes) + sum(map(len, content_lists))
            # 1. Lists, dicts and sets first, empty, so that anything can refer to them.
            for index, node in enumerate(nodes):
                if index >= known:
                    kind = node[0] if node else ""
                    self.objects.append(MUTABLE[kind]() if kind in MUTABLE else nodes)
            # 2. The others, those they refer to before them; `nodes` stands for one not yet made.
            for index in range(known, len(nodes)):
                self._build(index, nodes, longest_wait)
            # 3. Content, in the order it was written in.
            for index, node in enumerate(nodes):
                if node and node[0] in MUTABLE:
                    self._fill(self.objects[index], *node)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UnknownValueError(f"not a value: {error}") from error
        self.indices = {id(value): index for index, value in enumerate(self.objects)}

    def _build(self, index: int, nodes: list[Node | None], longest_wait: int) -> None:
        waiting = [index]
        while waiting:
            if len(waiting) > longest_wait:
                raise UnknownValueError("a tuple that holds itself")
            index = waiting[-1]
            if self.objects[index] is not nodes:
                waiting.pop()
                continue
            kind, content = nodes[index] or ("nothing", [])
            if kind not in (*SEQUENCES, "iterator"):
                self.objects[index] = None if kind == "none" else SCALARS[kind][2](content)
                continue
            missing = dict.fromkeys(i for i in content if self.objects[i] is nodes)
            waiting += missing
            if not missing:
                items = [self.objects[i] for i in content]
                self.objects[index] = iter(items) if kind == "iterator" else SEQUENCES[kind](items)

    def _fill(self, value: Any, kind: str, content: list[int]) -> None:
        if not isinstance(value, MUTABLE[kind]):
            raise UnknownValueError(f"a {type(value).__name__} became a {kind}")
        items = [self.objects[i] for i in content]
        value.clear()
        if kind == "dict":
            value.update(zip(items[::2], items[1::2], strict=True))
        else:
            value.extend(items) if kind == "list" else value.update(items)


def exception_named(name: str, message: str) -> Exception:
    """The built-in exception of this name, or a RuntimeError that says it."""
    found = getattr(builtins, name, None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(message)
        except TypeError:  # UnicodeDecodeError and its like take more than a message
            pass
    return RuntimeError(f"{name}: {message}")
