"""gCOG: every target by the interpreter, and the published models."""

from collections.abc import Iterable

import torch

import regard
from regard.tasks.gcog_program import evaluate_program
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5
OF_ONE_CLASS = ("SSTFMR_nblocks",)  # the weights say how many there are


def check(golden: Golden) -> Iterable[Comparison]:
    for output in golden.outputs:
        kind, _, name = output.partition(".")
        if kind != "model":
            programs = zip(golden.inputs[f"{kind}.rule"], golden.inputs[f"{kind}.stim"], strict=True)
            found = torch.tensor([evaluate_program(rule, stim) for rule, stim in programs])
            yield golden.compare(output, found, 0.0)
            continue
        variant, _, positions = name.partition("_")
        state = golden.state(f"{name}/")
        given = {key: value for key, value in golden.kwargs.items() if key not in OF_ONE_CLASS}
        if blocks := {key.split(".")[1] for key in state if key.startswith("blocks.")}:
            given["nblocks"] = len(blocks)
        given["positional_encoding"] = positions or "absolute"
        model = regard.from_official("gcog", state, variant=variant, **given)
        yield golden.compare(
            output, model(golden.inputs["model.rule_inputs"], golden.inputs["model.stim_inputs"]), ATOL
        )
