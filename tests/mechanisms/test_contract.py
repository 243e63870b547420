"""What `Mechanism` promises, for every mechanism in the catalogue."""

import pytest
import torch
from torch import Tensor

from regard import catalog
from regard.errors import ShapeError, Unsupported
from regard.mechanisms import Mechanism, select_batch, state_bytes
from regard.mechanisms.registry import BASELINES, module_class
from tests.mechanisms.case import Case, all_cases

ALL = all_cases()
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def named(found: list[tuple[str, Case]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("slug", "case"), found, ids=[f"{slug}-{case.name}" for slug, case in found])


def causal_cases() -> list[tuple[str, Case]]:
    return [(slug, case) for slug, case in ALL if case.make(slug).causal]


def tokens(mechanism: Mechanism, length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, mechanism.dim, generator=torch.Generator().manual_seed(length))


def test_every_working_mechanism_is_held_to_the_contract() -> None:
    """Parts of a system that are mechanisms too."""
    working = set(BASELINES)
    for system in catalog.systems(status="works"):
        names = (system.slug, *(f"{system.slug}/{part}" for part in system.parts))
        found = (system.load(), *(system.load(part) for part in system.parts))
        pairs = zip(names, found, strict=True)
        working |= {name for name, cls in pairs if isinstance(cls, type) and issubclass(cls, Mechanism)}
    assert working == {slug for slug, _ in ALL}


@named(ALL)
def test_it_says_what_it_is(slug: str, case: Case) -> None:
    cls = module_class(slug)
    assert cls.patterns
    assert cls.patterns <= {"self", "causal-self", "cross", "causal-cross"}
    assert cls.cost.startswith("O(")
    assert cls.state in (None, "constant", "growing")
    assert (cls.stream is Mechanism.stream) == (cls.state is None)
    assert cls.__doc__
    assert "arXiv:" in cls.__doc__


@named(ALL)
def test_shapes_at_all_lengths(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    for length in case.lengths:
        y = mechanism(tokens(mechanism, length))
        assert y.shape == (2, length, mechanism.dim)
        assert y.isfinite().all()


@named(causal_cases())
def test_no_token_sees_a_later_one(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    length = max(case.lengths)
    x = tokens(mechanism, length)
    before = mechanism(x)
    for changed in {1, length // 2, length - 1}:
        other = x.clone()
        other[:, changed] += 3.0
        after = mechanism(other)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-5, rtol=0)
        assert not torch.allclose(after[:, changed:], before[:, changed:])


@named([(slug, case) for slug, case in ALL if (slug, case) not in causal_cases()])
def test_noncausal_ones_do_not_stream(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    with pytest.raises(Unsupported):
        mechanism.stream(tokens(mechanism, 3))


@named([(slug, case) for slug, case in causal_cases() if module_class(slug).state])
def test_streaming_equals_parallel(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    length = max(case.lengths)
    x = tokens(mechanism, length)
    want = mechanism(x)
    for pieces in ([1] * length, [length], [length // 2, 1, length - length // 2 - 1]):
        state, got = None, []
        for piece in x.split(pieces, dim=1):
            y, state = mechanism.stream(piece, state)
            got.append(y)
        torch.testing.assert_close(torch.cat(got, 1), want, atol=case.atol, rtol=case.atol)


@named([(slug, case) for slug, case in causal_cases() if module_class(slug).state])
def test_the_state_is_as_large_as_it_says_and_follows_its_beam(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    length = max(case.lengths)
    x = tokens(mechanism, length)
    _, early = mechanism.stream(x[:, : length // 2])
    _, late = mechanism.stream(x[:, length // 2 :], early)
    if module_class(slug).state == "constant":
        assert state_bytes(late) == state_bytes(early)
    else:
        assert state_bytes(late) > 0
    new = tokens(mechanism, 1)
    swapped, _ = mechanism.stream(new.flip(0), select_batch(late, torch.tensor([1, 0])))
    plain, _ = mechanism.stream(new, late)
    torch.testing.assert_close(swapped.flip(0), plain, atol=case.atol, rtol=case.atol)


@named([(slug, case) for slug, case in ALL if case.pads])
def test_padding_changes_nothing(slug: str, case: Case) -> None:
    """A shorter sequence beside a longer one gives what it gives alone, whatever the padding holds."""
    mechanism = case.make(slug)
    length = max(case.lengths)
    x = tokens(mechanism, length)
    short = length - 3
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, short:] = False
    want = mechanism(x[1:, :short])
    for rubbish in (0.0, 50.0):
        padded = x.clone()
        padded[1, short:] = rubbish
        got = mechanism(padded, valid=valid)
        assert got.isfinite().all()
        torch.testing.assert_close(got[1:, :short], want, atol=case.atol, rtol=case.atol)


@named(ALL)
def test_every_parameter_gets_a_gradient(slug: str, case: Case) -> None:
    mechanism = case.make(slug).train()
    mechanism(tokens(mechanism, max(case.lengths))).square().sum().backward()
    without = [name for name, p in mechanism.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in mechanism.parameters() if p.grad is not None)


@named([(slug, case) for slug, case in ALL if case.bf16_atol is not None])
def test_bfloat16(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    x = tokens(mechanism, max(case.lengths))
    want = mechanism(x)
    got = mechanism.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=case.bf16_atol * want.abs().max().item(), rtol=0)


@named(ALL)
def test_weights_go_into_a_state_dict_and_a_folder_and_back(slug: str, case: Case, tmp_path) -> None:
    mechanism = case.make(slug)
    x = tokens(mechanism, max(case.lengths))
    want = mechanism(x)
    fresh = type(mechanism)(**case.config).eval()
    fresh.load_state_dict(mechanism.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), want, atol=0, rtol=0)
    mechanism.save_pretrained(tmp_path)
    torch.testing.assert_close(type(mechanism).from_pretrained(tmp_path).eval()(x), want, atol=0, rtol=0)


@named([(slug, case) for slug, case in ALL if case.compiles])
def test_it_compiles_in_one_graph(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    x = tokens(mechanism, max(case.lengths))
    torch._dynamo.reset()
    compiled = torch.compile(mechanism, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mechanism(x), atol=1e-5, rtol=1e-5)


@named(ALL)
def test_bad_input_is_refused(slug: str, case: Case) -> None:
    mechanism = case.make(slug)
    x = tokens(mechanism, max(case.lengths))
    with pytest.raises(ShapeError, match="x: expected"):
        mechanism(x[..., :-1])
    with pytest.raises(ShapeError, match="x: expected"):
        mechanism(x[0])
    if "cross" not in mechanism.patterns and "causal-cross" not in mechanism.patterns:
        with pytest.raises(Unsupported, match="context"):
            mechanism(x, x)
    if case.pads:
        with pytest.raises(ShapeError, match="valid"):
            mechanism(x, valid=torch.ones(2, 1, 1, dtype=torch.bool))
