"""Published weights under our names."""

from collections.abc import Mapping

from torch import Tensor, nn

from regard.errors import ArgumentError


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], rename: Mapping[str, str] | None = None) -> None:
    """Load every tensor of ``state`` into ``module``, whose own names may differ by prefixes.

    Args:
        module: what gets the weights, in place; dtypes are kept as they are in the module.
        state: tensors by their published names.
        rename: published prefix to own prefix, the longest that fits is used. Prefixes end at a dot or the name's end.

    Raises:
        ArgumentError: names are missing or left over, or a shape differs; all of them are named.
    """
    own = {_renamed(name, rename or {}): tensor for name, tensor in state.items()}
    expected = module.state_dict()
    for name, tensor in own.items():
        if name in expected and tensor.shape == (*expected[name].shape, 1, 1):
            own[name] = tensor.flatten(1)  # a 1×1 convolution is a linear layer
    problems = [f"missing {name}" for name in expected.keys() - own.keys()]
    problems += [f"unexpected {name}" for name in own.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(own[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in own.keys() & expected.keys()
        if own[name].shape != expected[name].shape
    ]
    if problems:
        raise ArgumentError(f"state_dict does not fit {type(module).__name__}: {'; '.join(sorted(problems))}")
    module.load_state_dict(own)


def split_rows(
    state: dict[str, Tensor], fused: str, names: tuple[str, ...], sizes: tuple[int, ...] | None = None
) -> None:
    """Cut a fused projection ``<fused>.weight`` (and ``.bias``) into one per name along its rows, in place.

    ``sizes`` are the rows of each part, equal parts by default.
    """
    for kind in ("weight", "bias"):
        if (tensor := state.pop(f"{fused}.{kind}", None)) is not None:
            parts = tensor.chunk(len(names)) if sizes is None else tensor.split(sizes)
            state |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    fitting = [old for old in rename if name == old or name.startswith(old if old.endswith(".") else f"{old}.")]
    if not fitting:
        return name
    old = max(fitting, key=len)
    return rename[old] + name[len(old) :]
