"""The parity harness must fail when it should: shown on golden files written here."""

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.harness import Adapters, Comparison, Golden, golden_files, max_abs_error, run

WEIGHT = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
X = torch.tensor([[1.0, 3.0]])


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    path = tmp_path / "double-linear.safetensors"
    tensors = {
        "state/proj.weight": WEIGHT,
        "in/x": X,
        "out/y": 2 * X @ WEIGHT.T,
        "out/argmax": (X @ WEIGHT.T).argmax(-1),
        "grad/in/x": 2 * WEIGHT.sum(0, keepdim=True),
    }
    save_file(tensors, path, metadata={"kwargs": json.dumps({"factor": 2}), "official": "none"})
    return Golden.read(path)


def outputs(golden: Golden) -> dict[str, torch.Tensor]:
    x = golden.inputs["x"].requires_grad_()
    y = golden.kwargs["factor"] * torch.nn.functional.linear(x, golden.state("proj.")["weight"])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return {"y": y, "argmax": y.argmax(-1), "grad/in/x": gradient}


def check(golden: Golden) -> Iterable[Comparison]:
    return [golden.compare(name, got, atol=1e-6) for name, got in outputs(golden).items()]


def problems(golden: Golden, **changed: torch.Tensor) -> dict[str, str]:
    """What `run` finds wrong when some outputs are replaced."""

    def wrong(golden: Golden) -> Iterable[Comparison]:
        return [golden.compare(name, got, atol=1e-6) for name, got in (outputs(golden) | changed).items()]

    return {r.output: r.problem for r in run(wrong, golden) if r.problem}


def test_reads_all_parts_of_a_golden_file(golden: Golden) -> None:
    assert golden.name == "double-linear"
    assert golden.kwargs == {"factor": 2}
    assert golden.metadata["official"] == "none"
    assert golden.state().keys() == {"proj.weight"}
    assert golden.inputs.keys() == {"x"}
    assert golden.outputs.keys() == {"y", "argmax", "grad/in/x"}


def test_right_values_pass_and_print_as_a_line(golden: Golden) -> None:
    results = run(check, golden)
    assert [r.problem for r in results] == ["", "", ""]
    assert str(results[0]) == "double-linear y 0 1e-06"


def test_a_wrong_value_fails(golden: Golden) -> None:
    assert problems(golden, y=golden.outputs["y"] + 1e-4) == {"y": "differs"}
    assert problems(golden, y=golden.outputs["y"] * float("nan")) == {"y": "differs"}


def test_a_wrong_shape_fails_even_if_it_would_broadcast(golden: Golden) -> None:
    assert problems(golden, y=golden.outputs["y"][0]) == {"y": "shape (2,), expected (1, 2)"}


def test_exact_outputs_allow_no_tolerance(golden: Golden) -> None:
    assert problems(golden, argmax=golden.outputs["argmax"] + 1) == {"argmax": "differs"}
    loose = [Comparison("argmax", golden.outputs["argmax"], golden.outputs["argmax"], atol=1.0)]
    assert "tolerance 0" in run(lambda _: loose, golden)[0].problem


def test_outputs_left_out_fail_unless_declared(golden: Golden) -> None:
    def only_y(golden: Golden) -> Iterable[Comparison]:
        return [c for c in check(golden) if c.name == "y"]

    assert {r.output for r in run(only_y, golden) if r.problem == "not compared"} == {"argmax", "grad/in/x"}
    results = run(only_y, golden, not_compared={"grad/*": "the published code has no gradient here"})
    assert {r.output for r in results if r.problem} == {"argmax"}


def test_an_output_the_file_does_not_have_fails(golden: Golden) -> None:
    extra = [*check(golden), Comparison("z", X, X, atol=0.0)]
    assert [r.output for r in run(lambda _: extra, golden) if r.problem] == ["z"]
    with pytest.raises(KeyError, match="no output 'z'; outputs: argmax, y"):
        golden.compare("z", X, atol=0.0)


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0),
        ([float("-inf")], [float("inf")], float("inf")),
        ([float("nan")], [float("nan")], 0.0),
        ([float("nan")], [0.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_max_abs_error(got: list[float], want: list[float], error: float) -> None:
    assert max_abs_error(torch.tensor(got), torch.tensor(want)) == error


def test_adapters_take_their_slug_and_its_suffixes_only(tmp_path: Path) -> None:
    (tmp_path / "oat.py").write_text("def check(golden): return []\n")
    (tmp_path / "oat_metrics.py").write_text("raise ImportError('imported too early')\n")
    package = ModuleType("some_adapters")
    package.__path__ = [str(tmp_path)]
    adapters = Adapters(package, slugs=["oat", "oat-bran"])
    assert adapters.slug("oat") == "oat"
    assert adapters.slug("oat-small") == "oat"
    assert adapters.slug("oat-metrics") == "oat-metrics"
    assert adapters.slug("oatmeal") is None
    assert adapters.slug("oat-bran") is None, "another system of the catalogue"
    with pytest.raises(LookupError, match="no adapter for golden file oatmeal"):
        adapters.load("oatmeal")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors files in"):
        golden_files(tmp_path)


def test_whole_run_prints_lines_and_names_files_without_adapter(
    golden: Golden, tmp_path: Path, pytester: pytest.Pytester
) -> None:
    """The real conftest and test file, on a folder with one adapted and one unknown golden file, under xdist."""
    here = Path(__file__).parent
    files = {
        "tests/__init__.py": "",
        "tests/parity/__init__.py": "",
        "tests/conftest.py": (here.parent / "conftest.py").read_text(),
        "tests/parity/harness.py": (here / "harness.py").read_text(),
        "tests/parity/test_golden.py": (here / "test_golden.py").read_text(),
        "tests/parity/adapters/__init__.py": "",
        "tests/parity/adapters/double_linear.py": textwrap.dedent(
            """
            NOT_COMPARED = {"grad/*": "not differentiated here"}

            def check(golden):
                y = golden.kwargs["factor"] * golden.inputs["x"] @ golden.state()["proj.weight"].T
                return [golden.compare("y", y, 1e-6), golden.compare("argmax", y.argmax(-1) + 1, 0.0)]
            """
        ),
    }
    for name, text in files.items():
        path = pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    save_file({"out/y": X}, tmp_path / "unheard-of.safetensors")
    result = pytester.runpytest_subprocess("-n1", "--golden", str(tmp_path), "tests/parity/test_golden.py")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*parity: slug output max_abs_error tolerance*",
            "double-linear argmax 1 0  differs",
            "double-linear grad/* not compared: not differentiated here",
            "double-linear y 0 1e-06",
            "no adapter: unheard-of",
        ]
    )
