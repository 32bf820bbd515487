"""The jinja2 environment in which chat templates run: what they may do, and how much of it.

Templates come from model files and their data from clients, so both are hostile. They get a sandbox with
a short list of methods and filters, and every loop turn, call, filter and printed character is paid
from the budget of the render, so nested loops and growing strings end with OutOfBudget. Charges are
written into the syntax tree before it is compiled: no tracing, no clock. What `==` and tests like
`is in` do with large values is not charged by their size.

The semantics are those of transformers' apply_chat_template, for which templates are written, with the
leniency of llama.cpp's own jinja engine, with which they are tested: what is missing counts as empty,
also in the middle of `a.b.c` and when it is joined to text, and None prints as nothing.

Pure but for `strftime_now`; environments are shared by threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from jinja2 import ChainableUndefined, Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, StrictUndefined, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEXT: Final = 16 * 1024 * 1024
"""Longest text and list, also in between: no context is as long, and a template could multiply its input."""
MAX_COST: Final = 5_000_000
"""What a render may cost, in turns of an empty loop; about two seconds."""
PROBE_COST: Final = 50_000
"""The same for a conversation of a few messages."""
_CHARS_PER_TURN: Final = 2048
"""Characters that cost as much as a turn of a loop: copying them takes no longer."""
_CALL: Final = 10
"""Turns that a call or a filter takes."""
_ITEM: Final = 64
"""Characters that an item of a list, or one that a filter has to look at, counts as."""
_MAX_BITS: Final = 256
"""Longest whole number."""
_MAX_INDENT: Final = 64

_METER: Final = " meter"  # a template can't write a name with a space
_STEP: Final = " step"
_CONCAT: Final = " concat"
_SLICE: Final = " slice"
_SEARCHED: Final = " searched"

_METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: frozenset(
        "capitalize count endswith find format index isalnum isalpha isdigit islower isspace isupper join lower "
        "lstrip removeprefix removesuffix replace rfind rpartition partition rsplit rstrip split splitlines "
        "startswith strip title upper".split()
    ),
    list: frozenset("append count index pop".split()),
    tuple: frozenset("count index".split()),
    dict: frozenset("get items keys values".split()),
}
"""What templates may call. Lists can grow, unlike in transformers: some templates need it."""
_LIBRARY_FILTERS: Final = (
    "abs capitalize count dictsort e escape first float groupby int last length list lower map max min reject "
    "rejectattr reverse round select selectattr sort string title trim truncate unique upper urlencode wordcount"
).split()
_PLAIN: Final = SandboxedEnvironment()
"""Where the library's own filters are found."""


class OutOfBudget(Exception):
    """A render takes too much work or makes too large a value."""


class TemplateRefusal(Exception):
    """A template called raise_exception: the conversation has a form it does not support."""


class Meter:
    """What is left of a render's budget."""

    def __init__(self, budget: int) -> None:
        self._left = budget

    def charge(self, turns: int, n_chars: int = 0) -> None:
        """Pay for some work. Raises OutOfBudget."""
        self._left -= turns + n_chars // _CHARS_PER_TURN
        if self._left < 0:
            raise OutOfBudget

    def check(self, value: Any) -> Any:
        """`value`, paid for by its size. Raises OutOfBudget, also when it is too large."""
        if isinstance(value, str | list | tuple):
            _limit(len(value) if isinstance(value, str) else len(value) * _ITEM)
            self.charge(1, len(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise OutOfBudget
        return value


def compile_template(source: str) -> Template:
    """The template, to be rendered with `generate`. Raises anything jinja2 does."""
    environment = _Environment()
    tree = _Metering(environment).visit(environment.parse(source))
    return environment.from_string(tree)


def run_template(template: Template, variables: Mapping[str, Any], budget: int = MAX_COST) -> str:
    """The output. Raises OutOfBudget, TemplateRefusal, or anything else on unexpected data."""
    meter = Meter(budget)
    parts = []
    n_chars = 0
    for part in template.generate({**variables, _METER: meter}):
        n_chars += len(part)
        _limit(n_chars)
        parts.append(part)
    return "".join(parts)


def _limit(n_items: int) -> None:
    if n_items > MAX_TEXT:
        raise OutOfBudget


# -- the syntax tree ------------------------------------------------------------------------------


class _Metering(NodeTransformer):
    """Puts charges into loops and macros, and makes `~` a call that can be charged for."""

    def __init__(self, environment: SandboxedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.test is not None:
            node.test = nodes.And(nodes.Not(self._step(1)), node.test)
        return self._charged(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._charged(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._charged(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes), _CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return self._filter(node.node, _SLICE, [bound or nodes.Const(None) for bound in bounds])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                operand.expr = self._filter(operand.expr, _SEARCHED)
        return node

    def _charged(self, node: Any) -> nodes.Node:
        """The node with its text paid for whenever its body runs."""
        n_chars = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([self._step(1 + n_chars // _CHARS_PER_TURN)], lineno=node.lineno))
        node.set_environment(self._environment)
        return node  # type: ignore[no-any-return]

    def _step(self, turns: int) -> nodes.Filter:
        return self._filter(nodes.Const(turns), _STEP)

    def _filter(self, value: nodes.Expr, name: str, args: Sequence[nodes.Expr] = ()) -> nodes.Filter:
        made = nodes.Filter(value, name, list(args), [], None, None, lineno=1)
        made.set_environment(self._environment)
        return made


class _Generation(Extension):
    """`{% generation %}`, by which transformers marks what the assistant said: renders what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# -- the environment ------------------------------------------------------------------------------


class _Environment(SandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            extensions=[loopcontrols, _Generation],
            undefined=ChainableUndefined,
            finalize=_finalize,
        )
        self.filters = {name: _metered(name) for name in _LIBRARY_FILTERS} | _FILTERS
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")} | {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = _METHODS.get(type(obj))
        return super().is_safe_attribute(obj, attr, value) if allowed is None else attr in allowed

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        return StrictUndefined(f"{attribute} is not allowed", exc=SecurityError)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict) and attribute in obj and attribute not in _METHODS[dict]:
            return obj[attribute]  # jinja2 would take a method that is then refused, like `copy`
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter: Meter = context[_METER]
        if operator == "+":
            return meter.check(_add(left, right))
        if operator == "*":
            _limit(_repeated_size(left, right))
        elif operator != "-" and not isinstance(left, int | float):
            raise SecurityError("only numbers")  # text % values could have any width
        elif operator == "**" and (abs(left) > 2**16 or abs(right) > 16):
            raise OutOfBudget
        return meter.check(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - see jinja2
        meter: Meter = __context[_METER]
        meter.charge(_CALL)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            meter.charge(0, len(owner))
            special = _STRING_CALLS.get(__obj.__name__)
            if special is not None:
                named = {key: item for key, item in kwargs.items() if not key.startswith("_")}  # jinja2's own
                return meter.check(special(owner, *args, **named))
        return super().call(__context, __obj, *args, **kwargs)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, Undefined) else str(value)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """What `{{ value }}` prints."""
    return context[_METER].check(_text(value))


def _add(left: Any, right: Any) -> Any:
    """`+`, which also joins text to anything."""
    if isinstance(left, str) or isinstance(right, str):
        return _text(left) + _text(right)
    return left + right


def _repeated_size(left: Any, right: Any) -> int:
    sizes = [len(item) if isinstance(item, str | list | tuple) else item for item in (left, right)]
    return 0 if all(isinstance(item, int | float) for item in (left, right)) else int(sizes[0] * sizes[1])


def _replace(text: str, old: Any, new: Any, count: int = -1) -> str:
    old, new = _text(old), _text(new)
    found = text.count(old) if old else len(text) + 1
    _limit(len(text) + found * len(new))
    return text.replace(old, new, count)


def _join_text(separator: str, items: Any) -> str:
    texts = [_text(item) for item in items]
    _limit(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    """`{}` only: the library's format could reach attributes and make any width."""
    pieces = text.split("{}")
    if kwargs or len(args) < len(pieces) - 1 or any("{" in piece or "}" in piece for piece in pieces):
        raise SecurityError("only plain {} can be formatted")
    return pieces[0] + "".join(_text(arg) + piece for arg, piece in zip(args, pieces[1:], strict=False))


_STRING_CALLS: Final[Mapping[str, Callable[..., str]]] = {
    "replace": _replace,
    "join": _join_text,
    "format": _format,
}
"""Methods whose result may be much longer than the text."""


# -- filters and globals --------------------------------------------------------------------------


def _metered(name: str) -> Callable[..., Any]:
    @pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context[_METER]
        meter.charge(_CALL, len(value) * _ITEM if hasattr(value, "__len__") else 0)
        made = _PLAIN.call_filter(name, value, args, kwargs, context=context)
        return meter.check(list(made) if isinstance(made, Iterator) else made)

    return run


@pass_context
def _step(context: Context, turns: int) -> str:
    context[_METER].charge(turns)
    return ""


@pass_context
def _concat(context: Context, items: list[Any]) -> Any:
    return context[_METER].check(_join_text("", items))


@pass_context
def _slice(context: Context, value: Any, *bounds: Any) -> Any:
    return value if isinstance(value, Undefined) else context[_METER].check(value[slice(*bounds)])


@pass_context
def _searched(context: Context, value: Any) -> Any:
    """The right side of `in`."""
    context[_METER].charge(0, len(value) if isinstance(value, str | list | tuple) else 0)
    return value


@pass_context
def _replace_filter(context: Context, value: Any, old: Any, new: Any, count: int = -1) -> Any:
    return context[_METER].check(_replace(_text(value), old, new, count))


@pass_context
def _join_filter(context: Context, value: Any, d: str = "", attribute: Any = None) -> Any:
    if attribute is not None:
        value = context.environment.call_filter("map", value, (), {"attribute": attribute}, context=context)
    return context[_METER].check(_join_text(d, value))


@pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    *,
    separators: Any = None,
    sort_keys: bool = False,
) -> Any:
    """JSON text, as in transformers: not escaped for HTML."""
    if indent is not None and indent > _MAX_INDENT:
        raise OutOfBudget
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_null
    )  # fmt: skip
    context[_METER].charge(_CALL, len(text) * _ITEM)
    return context[_METER].check(text)


def _null(value: Any) -> None:
    """Missing values within JSON are null."""
    if not isinstance(value, Undefined):
        raise TypeError


@pass_context
def _indent(
    context: Context, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> Any:
    if (width if isinstance(width, int) else len(width)) > _MAX_INDENT:
        raise OutOfBudget
    return context[_METER].check(
        _PLAIN.call_filter("indent", _text(value), (width, first, blank), context=context)
    )


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    """`default`, which also takes the place of None."""
    is_missing = value is None or isinstance(value, Undefined) or (boolean and not value)
    return default_value if is_missing else value


def _items(value: Any) -> list[tuple[Any, Any]]:
    return [] if value is None or isinstance(value, Undefined) else list(value.items())


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    _STEP: _step,
    _CONCAT: _concat,
    _SLICE: _slice,
    _SEARCHED: _searched,
    "d": _default,
    "default": _default,
    "indent": _indent,
    "items": _items,
    "join": _join_filter,
    "replace": _replace_filter,
    "safe": _text,
    "tojson": _to_json,
}


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message)[:500])


def _strftime_now(form: str) -> str:
    return time.strftime(form[:100])  # a directive may be made into a much longer text
