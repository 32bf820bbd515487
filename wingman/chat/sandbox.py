"""The jinja2 environment in which chat templates run: what they may do, and how much of it.

Templates come from model files and their data from clients, so both are hostile. They get a sandbox with
a short list of methods and filters, and every loop turn, call, filter and printed character is paid
from the budget of the render, so nested loops and growing strings end with OutOfBudget. Charges are
written into the syntax tree before it is compiled: no tracing, no clock. Not charged by size is what
templates hardly do: hashing nested tuples, and comparing in the tests of `select`.

The semantics are those of transformers' apply_chat_template, for which templates are written, with the
leniency of llama.cpp's own jinja engine, with which they are tested: what is missing counts as empty,
also in the middle of `a.b.c` and when it is joined to text, and None prints as nothing.

Pure but for `strftime_now`; environments are shared by threads.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from jinja2 import ChainableUndefined, Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, StrictUndefined, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT: Final = 16 * 1024 * 1024
"""Longest text and list, also in between: no context is as long, and a template could multiply its input."""
MAX_COST: Final = 5_000_000
"""What a render may cost, in turns of an empty loop: a few seconds. Some templates look at every message for
every message: they reach it with some 2000 messages."""
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
_COMPARED: Final = " compared"

_METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: frozenset(
        "capitalize count endswith find format index isalnum isalpha isdigit islower isspace isupper join lower "
        "lstrip removeprefix removesuffix replace rfind rpartition partition rsplit rstrip split splitlines "
        "startswith strip title upper".split()
    ),
    list: frozenset({"append", "pop"}),
    dict: frozenset({"get", "items", "keys", "values"}),
    LoopContext: frozenset(
        "index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle".split()
    ),
}
"""What templates may use of values. Lists can grow, unlike in transformers: some templates need it."""
_LIBRARY_FILTERS: Final = (
    "abs capitalize count dictsort first float groupby int last length list lower map max min reject rejectattr "
    "reverse round select selectattr sort title trim truncate unique upper wordcount"
).split()
_DEEP_FILTERS: Final = frozenset("groupby max min sort unique".split())
"""Those that compare what is in lists."""
_LISTING_FILTERS: Final = _DEEP_FILTERS | frozenset("list map reject select".split())
"""Those that would make a list of the characters of a text."""
_SPLITTING: Final = frozenset({"split", "rsplit", "splitlines"})
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

    def weigh(self, value: Any) -> None:
        """Pay for everything within a value: a list that twice holds a list that ... is large."""
        left = [value]
        while left:
            item = left.pop()
            self.charge(1, len(item) if isinstance(item, str) else 0)
            if isinstance(item, Mapping):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                left += item

    def text(self, value: Any) -> str:
        """What a value is in text. Missing values are nothing."""
        if isinstance(value, Mapping | list | tuple):
            self.weigh(value)
        elif not isinstance(value, str | int | float):
            return ""
        return str(self.check(value))

    def join(self, separator: str, items: Iterable[Any]) -> str:
        """The texts of the items in one. Raises OutOfBudget before it is made."""
        texts = [self.text(item) for item in items]
        _limit(sum(map(len, texts)) + len(separator) * len(texts))
        return str(self.check(separator.join(texts)))


def compile_template(source: str) -> Template:
    """The template, for `run_template`. Raises anything jinja2 does."""
    environment = _Environment()
    tree = _Metering(environment).visit(environment.parse(source))
    return environment.from_string(tree)


def run_template(template: Template, variables: Mapping[str, Any], budget: int) -> str:
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
            is_search = operand.op in ("in", "notin")
            if is_search or not isinstance(node.expr, nodes.Const):
                operand.expr = self._compared(operand.expr, is_search)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.args = [self._compared(argument, False) for argument in node.args]
        return node

    def _compared(self, value: nodes.Expr, is_search: bool) -> nodes.Expr:
        """The right side of a comparison, paid for; a literal costs next to nothing."""
        if isinstance(value, nodes.Const):
            return value
        return self._filter(value, _COMPARED, [nodes.Const(is_search)])

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
        if isinstance(obj, Undefined | Namespace):
            return super().is_safe_attribute(obj, attr, value)
        return attr in _METHODS.get(type(obj), ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        return StrictUndefined(f"{attribute} is not allowed", exc=SecurityError)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict) and attribute not in _METHODS[dict]:  # jinja2 would try `dict.copy` first
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter: Meter = context[_METER]
        if operator == "+":
            return meter.check(_add(meter, left, right))
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
            named = {key: item for key, item in kwargs.items() if not key.startswith("_")}  # jinja2's own
            return meter.check(_call_text(meter, owner, __obj, args, named))
        return super().call(__context, __obj, *args, **kwargs)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """What `{{ value }}` prints."""
    return context[_METER].text(value)


def _add(meter: Meter, left: Any, right: Any) -> Any:
    """`+`, which also joins text to anything."""
    if isinstance(left, str) or isinstance(right, str):
        return meter.text(left) + meter.text(right)
    return left + right


def _repeated_size(left: Any, right: Any) -> int:
    sizes = [len(item) if isinstance(item, str | list | tuple) else item for item in (left, right)]
    return 0 if all(isinstance(item, int | float) for item in (left, right)) else int(sizes[0] * sizes[1])


# -- methods of texts -----------------------------------------------------------------------------


def _call_text(meter: Meter, text: str, method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a method of `text`. Raises OutOfBudget before a much larger value is made."""
    meter.charge(0, len(text))
    name = method.__name__
    if name in _STRING_CALLS:
        return _STRING_CALLS[name](meter, text, *args, **kwargs)
    if name in _SPLITTING:
        _limit(text.count(args[0]) * _ITEM if args and args[0] else len(text) * 4)
    return method(*args, **kwargs)


def _replace(meter: Meter, text: str, old: Any, new: Any, count: int = -1) -> str:
    old, new = meter.text(old), meter.text(new)
    found = text.count(old) if old else len(text) + 1
    _limit(len(text) + found * len(new))
    return text.replace(old, new, count)


def _format(meter: Meter, text: str, *args: Any) -> str:
    """`{}` only: the library's format could reach attributes and make any width."""
    pieces = text.split("{}")
    if len(args) < len(pieces) - 1 or any("{" in piece or "}" in piece for piece in pieces):
        raise SecurityError("only plain {} can be formatted")
    filled = (part for pair in zip(pieces, (*args, ""), strict=False) for part in pair)
    return meter.join("", filled)


_STRING_CALLS: Final[Mapping[str, Callable[..., str]]] = {
    "replace": _replace,
    "join": lambda meter, text, items: meter.join(text, items),
    "format": _format,
}
"""Methods whose result may be much longer than the text."""


# -- filters and globals --------------------------------------------------------------------------


def _metered(name: str) -> Callable[..., Any]:
    @pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context[_METER]
        meter.charge(_CALL, len(value) * _ITEM if hasattr(value, "__len__") else 0)
        if name in _LISTING_FILTERS and isinstance(value, str):
            _limit(len(value) * _ITEM)
        if name in _DEEP_FILTERS:
            meter.weigh(value)
        made = _PLAIN.call_filter(name, value, args, kwargs, context=context)
        return meter.check(list(made) if isinstance(made, Iterator) else made)

    return run


@pass_context
def _step(context: Context, turns: int) -> str:
    context[_METER].charge(turns)
    return ""


@pass_context
def _concat(context: Context, items: list[Any]) -> Any:
    return context[_METER].join("", items)


@pass_context
def _slice(context: Context, value: Any, *bounds: Any) -> Any:
    return value if isinstance(value, Undefined) else context[_METER].check(value[slice(*bounds)])


@pass_context
def _compared(context: Context, value: Any, is_search: bool) -> Any:
    """The right side of `==` and the like, or of `in`, which doesn't look at all of a mapping."""
    if not (is_search and isinstance(value, Mapping)):
        context[_METER].weigh(value)
    return value


@pass_context
def _replace_filter(context: Context, value: Any, old: Any, new: Any, count: int = -1) -> Any:
    meter: Meter = context[_METER]
    return meter.check(_replace(meter, meter.text(value), old, new, count))


@pass_context
def _join_filter(context: Context, value: Any, d: str = "", attribute: Any = None) -> Any:
    if attribute is not None:
        value = context.environment.call_filter("map", value, (), {"attribute": attribute}, context=context)
    return context[_METER].join(d, value)


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
    context[_METER].weigh(value)
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
    meter: Meter = context[_METER]
    return meter.check(
        _PLAIN.call_filter("indent", meter.text(value), (width, first, blank), context=context)
    )


@pass_context
def _string(context: Context, value: Any) -> str:
    """Also `safe`, as nothing is escaped. Here None is a word, unlike where it is printed."""
    return "None" if value is None else str(context[_METER].text(value))


@pass_context
def _escape(context: Context, value: Any) -> Any:
    return context[_METER].check(html.escape(context[_METER].text(value)))


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
    _COMPARED: _compared,
    "d": _default,
    "default": _default,
    "e": _escape,
    "escape": _escape,
    "indent": _indent,
    "items": _items,
    "join": _join_filter,
    "replace": _replace_filter,
    "safe": _string,
    "string": _string,
    "tojson": _to_json,
}


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message)[:500])


def _strftime_now(form: str) -> str:
    return time.strftime(form[:100])  # a directive may be made into a much longer text
