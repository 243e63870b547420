"""The documentation page of a working system, made from its entry, its docstring and its signature."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from regard.catalog.findings import FINDINGS
from regard.catalog.loader import System

_USES = {
    "self": "noncausal self-attention",
    "causal-self": "causal self-attention",
    "cross": "cross-attention",
    "causal-cross": "causal cross-attention",
}
_STATES = {
    None: "no: it has no streaming form",
    "constant": "yes, with a state of constant size",
    "growing": "yes, with a state that grows with the tokens seen",
}
_WIDTH = 120  # of a line of an example
_PICTURE = (
    "How much the output at the marked position depends on the input at each, in a freshly made layer on a grid of "
    "14 × 14: logarithmic, from dark (little) to light; grey where there is no influence at all. `regard.probes.reach` "
    "measures it."
)


def page(system: System) -> str:
    """Markdown: what it is, its paper, an example, what it computes, its arguments, cost and limits.

    Raises:
        Unsupported: the system is planned.
    """
    found = system.load()
    parts = [f"# {system.name} (`{system.slug}`)", system.summary, _paper(system)]
    parts += ["## Example", f"```python\n{example(system)}\n```"]
    parts += ["## What it computes", _description(found)]
    if any(hasattr(system.load(part), "example_grid") for part in (None, *system.parts)):
        parts += ["## What one position sees", f"![](pictures/{system.slug}.svg)", _PICTURE]
    if system.finding is not None:
        link = f"../studies/findings/{system.finding}"
        parts += [
            "## What it shows",
            f"[![{FINDINGS[system.finding]}]({link}.svg)]({link}.md)",
            FINDINGS[system.finding],
        ]
    if facts := list(_facts(found)):
        parts += ["## Use and cost", "\n".join(f"- **{name}**: {value}" for name, value in facts)]
    if table := list(_arguments(found)):
        parts += ["## Arguments", "\n".join(table)]
    for name in system.parts:
        part = system.load(name)
        parts += [f"## `{system.slug}/{name}`", _description(part), "\n".join(_arguments(part))]
    if system.models:
        rows = (f"| `{name}` | {_config(system.load_model(name)[1])} |" for name in system.models)
        parts += ["## Models", "\n".join(["| name | configuration |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _description(found: Any) -> str:
    doc = inspect.getdoc(found) or ""
    first = re.search(r"^(Args|Returns|Raises|Attributes):$", doc, re.MULTILINE)
    return _prose((doc[: first.start()] if first else doc).strip())


def _config(config: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in config.items())


def example(system: System) -> str:
    """About ten lines of Python that run as they stand for a mechanism, and show the way for anything else."""
    found = system.load()
    if getattr(found, "patterns", None):
        return "\n".join(_mechanism_example(system.slug, found))
    if hasattr(found, "example_grid"):
        return "\n".join(_grid_example(system.slug, found))
    if hasattr(found, "forward_features") and system.models:
        return "\n".join(_backbone_example(system.models[0], found.example_size))
    module, _, attribute = (system.object or "").partition(":")
    lines = ["import regard", f"from {module} import {attribute}"]
    if hasattr(found, "attend"):  # a method
        return "\n".join(
            [*lines, "", f"with regard.apply(model, {attribute}()):", "    model.generate(**inputs, max_new_tokens=64)"]
        )
    required = [f"{p.name}=..." for p in _parameters(found) if p.default is p.empty]
    result = _snake(attribute) if attribute != _snake(attribute) else "found"  # a function's result is not its name
    call = f"{result} = {attribute}({', '.join(required)})"
    if len(call) > _WIDTH:
        call = "\n".join([f"{result} = {attribute}(", *(f"    {one}," for one in required), ")"])
    return "\n".join([*lines, "", call])


def example_arguments(cls: Any) -> dict[str, Any]:
    """Arguments of the example of a mechanism, for sequences or grids."""
    accepted = {p.name for p in _parameters(cls)}
    return {name: value for name, value in {"dim": 64, "num_heads": 4}.items() if name in accepted} | cls.example


def _mechanism_example(slug: str, cls: Any) -> Iterator[str]:
    given, accepted = example_arguments(cls), {p.name for p in _parameters(cls)}
    arguments = "".join(f", {name}={value!r}" for name, value in given.items())
    yield from ("import regard", "import torch", "")
    yield f'layer = regard.create("{slug}"{arguments})'
    yield f"x = torch.randn(2, {cls.example_length}, {given.get('dim', 64)})  # (batch, tokens, channels)"
    yield "y = layer(x)"
    if "cross" in cls.patterns:
        yield ""
        both = "causal" in accepted
        yield f'reader = regard.create("{slug}"{arguments}{", causal=False" if both else ""})'
        yield f"y = reader(x, torch.randn(2, 50, {given.get('dim', 64)}))  # x reads another sequence"
    if cls.state is not None:
        yield ""
        yield "state = None  # the same outputs, a few tokens at a time"
        yield f"for piece in x.split({max(1, cls.example_length // 4)}, dim=1):"
        yield "    y, state = layer.stream(piece, state)"


def _grid_example(slug: str, cls: Any) -> Iterator[str]:
    given = example_arguments(cls)
    arguments = "".join(f", {name}={value!r}" for name, value in given.items())
    height, width = cls.example_grid
    yield from ("import regard", "import torch", "")
    yield f'layer = regard.create("{slug}"{arguments})'
    yield f"x = torch.randn(2, {height}, {width}, {given.get('dim', 64)})  # (batch, height, width, channels)"
    yield "y = layer(x)"


def _backbone_example(model: str, side: int) -> Iterator[str]:
    yield from ("import regard", "import torch", "")
    yield f'model = regard.create("{model}", num_classes=10).eval()'
    yield f"images = torch.randn(2, 3, {side}, {side})"
    yield "y = model(images)  # logits (2, 10)"
    yield ""
    yield f'backbone = regard.create("{model}", features_only=True)'
    yield "for stride, x in zip(backbone.strides, backbone(images), strict=True):"
    yield "    print(stride, x.shape)  # a feature map of every stage, channels first"


def _paper(system: System) -> str:
    published = system.venue or str(system.year or "unpublished")
    paper = f"Paper: *{system.title}*" + (f", arXiv:{system.arxiv}" if system.arxiv else "")
    code = f"Published code: {system.official} on GitHub." if system.official else "No code was published."
    return f"{paper} ({published}). {code}"


def _facts(found: Any) -> Iterator[tuple[str, str]]:
    if getattr(found, "patterns", None):
        yield "legitimate uses", ", ".join(_USES[use] for use in _USES if use in found.patterns)
    if hasattr(found, "cost"):
        yield "cost", found.cost
    if getattr(found, "patterns", None):
        yield "streams", _STATES[found.state]


def _arguments(found: Any) -> Iterator[str]:
    documented, parameters = argument_help(found), _parameters(found)
    if parameters:
        yield from ("| argument | default | meaning |", "|---|---|---|")
    for parameter in parameters:
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        meaning = documented.get(parameter.name, "").replace("|", "\\|")
        yield f"| `{parameter.name}` | {default} | {meaning} |"


def _parameters(found: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(found).parameters.values() if p.kind not in kinds]


def argument_help(implementation: Any) -> dict[str, str]:
    """What the ``Args:`` sections of docstrings say about each argument; bases fill in what a class leaves out."""
    found: dict[str, str] = {}
    for owner in reversed(getattr(implementation, "__mro__", (implementation,))):
        section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", inspect.cleandoc(owner.__doc__ or ""), re.MULTILINE)
        if section is None:
            continue
        entry = r"^ {4}(\w+(?:, \w+)*)(?: \(.*?\))?: (.*(?:\n {8}.*)*)"  # "name: text" or "one, two (type): text"
        for names, text in re.findall(entry, section[1], re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def _prose(text: str) -> str:
    """Docstring to Markdown: indented equations become code blocks, double backquotes single ones."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if all(line.startswith("    ") or not line.strip() for line in lines):
            blocks.append("```text\n" + inspect.cleandoc("\n" + block) + "\n```")
        else:
            blocks.append(block.replace("``", "`"))
    return "\n\n".join(blocks)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
