"""Methods by name, and the one-line notation for them: ``"xkv(rank_k=64), dhsa(budget=0.25)"``."""

import ast
import difflib
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from regard.errors import ArgumentError
from regard.sites import Method

#: name -> where the class lives; imported when asked for
_METHODS = {
    "sliding-window": "regard.methods.language.sliding_window:SlidingWindow",
    "streaming-llm": "regard.methods.language.streaming_llm:StreamingLLM",
    "h2o": "regard.methods.language.h2o:H2O",
    "xkv": "regard.methods.language.xkv:XKV",
    "power-attention": "regard.methods.language.power_attention:PowerAttention",
    "longheads": "regard.methods.language.longheads:LongHeads",
    "dhsa": "regard.methods.language.dhsa:DHSA",
    "moa": "regard.methods.language.moa:MoA",
    "mask-heads": "regard.methods.language.mask_heads:MaskHeads",
    "act": "regard.methods.language.act:ACT",
}


def names() -> list[str]:
    """The names of all methods."""
    return list(_METHODS)


def get(name: str) -> type[Method]:
    """The class of the method called `name`.

    Raises:
        ArgumentError: there is none; the message suggests close names.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"methods: {', '.join(_METHODS)}"
        raise ArgumentError(f"unknown method {name!r}; {hint}")
    module, _, attribute = _METHODS[name].partition(":")
    return getattr(import_module(module), attribute)


def create(name: str, **arguments: Any) -> Method:
    """Build the method called `name`; unknown arguments are refused with the list of known ones."""
    cls = get(name)
    known = {f.name: f for f in fields(cls) if f.init}
    for argument in arguments:
        if argument not in known:
            listed = ", ".join(n if f.default is MISSING else f"{n}={f.default!r}" for n, f in known.items())
            raise ArgumentError(f"{name} has no argument {argument!r}; it takes {listed}")
    return cls(**arguments)


def parse(text: str) -> list[Method]:
    """Read a comma-separated list of ``name`` or ``name(argument=value, ...)``; values are Python literals.

    Raises:
        ArgumentError: the text cannot be read, or names an unknown method or argument.
    """
    return [_parse_one(part) for part in _split(text)]


def _split(text: str) -> list[str]:
    """Split at the commas outside parentheses and brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    if depth != 0 or not all(part.strip() for part in parts):
        raise ArgumentError(f"cannot read methods {text!r}; expected name or name(argument=value, ...), with commas")
    return [part.strip() for part in parts]


def _parse_one(text: str) -> Method:
    name, bracket, rest = text.partition("(")
    arguments = {}
    if bracket:
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
                raise ValueError("positional arguments")
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        except (SyntaxError, ValueError) as error:
            raise ArgumentError(f"cannot read method {text!r}; expected name(argument=value, ...)") from error
    return create(name.strip(), **arguments)
