"""Every golden file with an adapter, against the published code's outputs. `--golden DIR` reads other files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from regard import catalog
from tests.parity.harness import Adapters, Golden, golden_files, run

ADAPTERS = Adapters(slugs=catalog.names())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        files = [f for f in golden_files(metafunc.config.getoption("golden")) if ADAPTERS.slug(f.stem)]
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


def test_reproduces_published_code(golden_file: Path, record_property: Callable[[str, object], None]) -> None:
    adapter = ADAPTERS.load(golden_file.stem)
    not_compared = getattr(adapter, "NOT_COMPARED", {})
    results = run(adapter.check, Golden.read(golden_file), not_compared)
    for result in results:
        record_property("parity", str(result))
    for pattern, reason in not_compared.items():
        record_property("parity", f"{golden_file.stem} {pattern} not compared: {reason}")
    failures = [str(result) for result in results if result.problem]
    assert not failures, "\n".join(failures)
