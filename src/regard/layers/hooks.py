"""The outputs of a model's layers by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from regard.errors import ArgumentError, Unsupported


def modules_named(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Submodules by their names in ``model.named_modules()``.

    Raises:
        ArgumentError: no list of names, or a name that the model does not have.
    """
    if isinstance(names, str) or not names:
        raise ArgumentError(f"layers: expected a list of names, got {names!r}")
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        known = ", ".join(filter(None, modules))
        raise ArgumentError(f"layers: the model has no module {unknown}; it has: {known}")
    return [modules[name] for name in names]


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named layers gave in the last forward inside the block; of a tuple its first.

        with captured(model, ["conv1", "conv2"]) as outputs:
            model(x)

    Raises:
        ArgumentError: a name that the model does not have.
        Unsupported: a layer gives no tensor.
    """
    outputs: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor):
                raise Unsupported(f"layers: {name} gives a {type(first).__name__}, expected a tensor")
            outputs[name] = first

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in zip(names, modules_named(model, names), strict=True)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
