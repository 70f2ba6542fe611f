"""A Jinja sandbox for chat templates in which nothing runs for long or grows without end.

Beyond Jinja's own sandbox (no attributes that lead out, no changes to what is passed in) it counts loop items and
calls, and bounds what operators and the output may grow to. Not bounded: the memory of one filter call
(`'x'|center(10**10)`). jinja2 is imported with this file, so import it where a template is used.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000  # loop items and calls of one rendering, a second or two of work
STEPS_OF_A_CALL = 4
MAX_CHARACTERS = 16 << 20  # of one string, and of the output
MAX_INTEGER_BITS = 4096


class Sandbox:
    """One compiled template. Renders one conversation at a time; safe to share between threads."""

    def __init__(self, text: str) -> None:
        self._environment = LimitedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        self._template = self._environment.limited_template(text)
        self._lock = threading.Lock()

    def render(self, variables: Mapping[str, Any]) -> str:
        with self._lock:
            self._environment.steps_left = MAX_STEPS
            return "".join(_limited(self._template.generate(**variables)))


def _limited(pieces: Iterable[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        _require(length <= MAX_CHARACTERS, f"it wrote more than {MAX_CHARACTERS} characters")
        yield piece


def _require(allowed: bool, complaint: str) -> None:
    if not allowed:
        raise TemplateRuntimeError(complaint)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """`steps_left` is spent by loops and calls of the rendering at hand."""

    intercepted_binops = frozenset(("+", "*", "**"))
    steps_left: int = MAX_STEPS

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters.update(tojson=tojson, mindgen_counted=self._counted, mindgen_limited=_limited_string)
        self.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        self.globals.update(dict=make_dict, namespace=make_namespace)

    def limited_template(self, text: str) -> Any:
        """Compiles `text` with its loops counted and its string joins bounded."""
        tree = self.parse(text)
        for reference in tree.find_all(nodes.NSRef):
            _require_public_name(reference.attr)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = self._filtered(loop.iter, "mindgen_counted")
        for concatenation in list(tree.find_all(nodes.Concat)):
            concatenation.nodes = [self._filtered(node, "mindgen_limited") for node in concatenation.nodes]
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._spend(STEPS_OF_A_CALL)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        GROWTH[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _spend(self, num_steps: int) -> None:
        self.steps_left -= num_steps
        _require(self.steps_left >= 0, f"it took more than {MAX_STEPS} loop steps and calls")

    def _filtered(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self)


def _limited_string(value: Any) -> str:
    text = str(value)
    _require(len(text) <= MAX_CHARACTERS, f"a string grew beyond {MAX_CHARACTERS} characters")
    return text


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _check_sum(left: Any, right: Any) -> None:
    _require(_size(left) + _size(right) <= MAX_CHARACTERS, f"a sum grew beyond {MAX_CHARACTERS} items")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require(left.bit_length() + right.bit_length() <= MAX_INTEGER_BITS, "a product is too large")
    for sequence, count in ((left, right), (right, left)):
        if isinstance(count, int):
            _require(_size(sequence) * count <= MAX_CHARACTERS, f"a product grew beyond {MAX_CHARACTERS} items")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require(left.bit_length() * right <= MAX_INTEGER_BITS, "a power is too large")


GROWTH: Mapping[str, Callable[[Any, Any], None]] = {"+": _check_sum, "*": _check_product, "**": _check_power}


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_dict(*pairs: Any, **items: Any) -> dict[Any, Any]:
    return dict(*pairs, **items)


def make_namespace(*pairs: Any, **items: Any) -> Namespace:
    attributes = dict(*pairs, **items)
    for name in attributes:
        _require_public_name(name)
    return Namespace(attributes)


def _require_public_name(name: Any) -> None:
    _require(not str(name).startswith("_"), f"namespace attribute {name!r} starts with an underscore")
