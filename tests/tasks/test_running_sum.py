"""Running sums: traces and rewards by hand, and a policy that reinforcement makes better."""

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks.running_sum import EQUALS, RunningSum, imitate, new_policy, reinforce, sample


def test_traces_are_right_without_noise() -> None:
    task, generator = RunningSum(terms=4), torch.Generator().manual_seed(0)
    prompts = task.prompts(50, generator)
    assert prompts.shape == (50, task.prompt_length)
    assert (prompts[:, -1] == EQUALS).all()
    assert len(prompts[:, :-1].unique()) == 10
    for row in task.traces(prompts, generator, noise=0).tolist():
        digits, response = row[:4], row[5:]
        assert response[::2] == digits
        assert response[1::2] == [sum(digits[: i + 1]) % 10 for i in range(4)]
    assert task.rewards(task.traces(prompts, generator, noise=0)).all()
    one = RunningSum(terms=1)
    assert not one.rewards(one.traces(prompts[:, -2:], generator, noise=1)).any()


def test_noise_is_carried_on() -> None:
    task, generator = RunningSum(terms=6, noise=0.15), torch.Generator().manual_seed(0)
    traces = task.traces(task.prompts(20_000, generator), generator)
    sums, digits = traces[:, 8::2], traces[:, 7::2]
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    wrong = (before + digits) % 10 != sums  # beside the sum before it, right or not
    assert abs(wrong.float().mean() - 0.15) < 0.01


def test_credit_reaches_the_policy() -> None:
    """No credit, no change; and what is drawn is scored as it was drawn."""
    task, policy = RunningSum(terms=2), new_policy(RunningSum(terms=2))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    seen = []
    rewards = reinforce(
        policy, task, lambda _, t, start: torch.zeros(len(t), t.shape[1] - start), 2, on_step=lambda *s: seen.append(s)
    )
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert seen == [(1, rewards[0]), (2, rewards[1])]
    reinforce(policy, task, None, 3)
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_imitation_teaches_the_format() -> None:
    task, policy = RunningSum(terms=2, noise=0.0), new_policy(RunningSum(terms=2))
    generator = torch.Generator().manual_seed(0)
    assert imitate(policy, task, 60) < 1.6  # half the tokens are copies: less than guessing all, log 10
    prompts = task.prompts(64, generator)
    tokens = sample(policy, task, prompts, generator)
    assert torch.equal(tokens[:, :3], prompts)
    assert (tokens[:, 3] == prompts[:, 0]).float().mean() > 0.5


def test_refusals() -> None:
    for wrong in ({"terms": 0}, {"noise": 1.5}):
        with pytest.raises(ArgumentError, match="expected terms >= 1"):
            RunningSum(**wrong)
