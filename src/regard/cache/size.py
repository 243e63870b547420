"""How much memory a cache really holds."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nbytes(cache: Any) -> int:
    """Bytes of all tensor storage reachable from a transformers cache (or cache layer), each storage counted once.

    Counts what is allocated, not what a formula promises: a view of a big buffer counts the buffer.
    """
    storages = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple)):
        parts = list(thing)
    elif hasattr(thing, "layers") or _is_of_a_cache(type(thing)):
        parts = [value for name, value in vars(thing).items() if name != "regard_method"]
    else:
        return
    for part in parts:
        yield from _tensors(part, seen)


def _is_of_a_cache(cls: type) -> bool:
    """Whether the class, or one it derives from (a policy's own layer), belongs to a cache."""
    return any(base.__module__.startswith(("regard.cache", "transformers.cache")) for base in cls.__mro__)
