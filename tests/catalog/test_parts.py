"""Systems of several classes: parts by name, and published configurations."""

import pytest
from torch import nn

import regard
from regard import catalog
from regard.errors import ArgumentError

SYSTEMS = [system for system in catalog.systems(status="works") if system.parts or system.models]


@pytest.mark.parametrize("system", SYSTEMS, ids=[system.slug for system in SYSTEMS])
def test_parts_and_models_can_be_loaded(system) -> None:
    for part in system.parts:
        assert issubclass(system.load(part), nn.Module)
    sizes = {name for part in (None, *system.parts) for name in getattr(system.load(part), "sizes", {})}
    assert sizes == set(system.models)


def test_names_of_models_are_no_slugs() -> None:
    assert not set(catalog.model_names()) & set(catalog.names())


def test_a_part_is_created_by_name() -> None:
    model = regard.create("titans/model", vocab_size=11, dim=16, depth=1, segment_len=4, num_heads=2)
    assert isinstance(model, catalog.get("titans").load("model"))


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no part 'head'; it has: model"):
        regard.create("titans/head")
    with pytest.raises(ArgumentError, match="no part 'model'; it has: none"):
        regard.create("sigmoid-attention/model")
