"""A policy of a few thousand parameters learns to add, by GRPO with any credit per token.

    3 1 7 ... = 3 3 1 4 7 1 ...       each number again, and after it the sum so far modulo 10

Only the last digit is rewarded. Before that the policy imitates traces in which some sums are wrong, so that what it
draws is wrong about as often; reinforcement has to take the errors out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, require
from regard.tasks.grpo import group_advantages, grpo_loss

EQUALS, VOCAB = 10, 11
#: tokens (B, N) and where the response begins -> γ (B, response)
Credit = Callable[[nn.Module, Tensor, int], Tensor]


@dataclass(frozen=True)
class RunningSum:
    """Sums of `terms` digits; a share `noise` of the sums in `traces` is wrong, and carried on."""

    terms: int = 6
    noise: float = 0.15

    def __post_init__(self) -> None:
        if self.terms < 1 or not 0 <= self.noise <= 1:
            raise ArgumentError(f"expected terms >= 1 and 0 <= noise <= 1, got {self.terms} and {self.noise}")

    @property
    def prompt_length(self) -> int:
        return self.terms + 1

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, terms + 1)."""
        digits = torch.randint(10, (count, self.terms), generator=generator)
        return F.pad(digits, (0, 1), value=EQUALS)

    def traces(self, prompts: Tensor, generator: torch.Generator, noise: float | None = None) -> Tensor:
        """(B, terms + 1 + 2 terms): the prompts with their responses."""
        digits = prompts[:, :-1]
        wrong = torch.rand(digits.shape, generator=generator) < (self.noise if noise is None else noise)
        error = wrong * torch.randint(1, 10, digits.shape, generator=generator)
        sums = (digits + error).cumsum(1) % 10
        return torch.cat([prompts, torch.stack([digits, sums], -1).flatten(1)], 1)

    def rewards(self, tokens: Tensor) -> Tensor:
        """(B,) 1.0 where the last digit is the sum."""
        return (tokens[:, -1] == tokens[:, : self.terms].sum(1) % 10).float()


def new_policy(task: RunningSum, seed: int = 0) -> nn.Module:
    """A random Llama of two layers and four heads."""
    transformers = require("transformers", "build the policy")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4 * task.terms, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def imitate(policy: nn.Module, task: RunningSum, steps: int, seed: int = 0, batch: int = 64) -> float:
    """Train on `steps` batches of noisy traces; returns the last loss."""
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(policy.parameters(), 2e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        tokens = task.traces(task.prompts(batch, generator), generator)
        loss = -_log_probabilities(policy, tokens, task.prompt_length).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def sample(policy: nn.Module, task: RunningSum, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Prompts with responses drawn at temperature 1."""
    tokens, new, cache = prompts, prompts, None
    for _ in range(2 * task.terms):
        out = policy(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        new = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def reinforce(
    policy: nn.Module,
    task: RunningSum,
    credit: Credit | None,
    steps: int,
    seed: int = 0,
    *,
    prompts: int = 8,
    group: int = 8,
    lr: float = 3e-4,
    on_step: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """GRPO, one batch a step and two updates of it; returns the mean reward of what was drawn in each step.

    Args:
        credit: None for plain GRPO.
        prompts, group: questions a step, and answers to each.
        on_step: called with steps done and the reward.
    """
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(policy.parameters(), lr)
    rewards = []
    for step in range(steps):
        asked = task.prompts(prompts, generator).repeat_interleave(group, 0)
        tokens = sample(policy, task, asked, generator)
        reward = task.rewards(tokens)
        advantages = group_advantages(reward.view(prompts, group)).flatten()
        with torch.no_grad():
            old = _log_probabilities(policy, tokens, task.prompt_length)
            gamma = None if credit is None else credit(policy, tokens, task.prompt_length)
        for _ in range(2):
            new = _log_probabilities(policy, tokens, task.prompt_length)
            loss = grpo_loss(new, old, advantages, gamma, torch.ones_like(new, dtype=torch.bool))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(float(reward.mean()))
        if on_step is not None:
            on_step(step + 1, rewards[-1])
    return rewards


def _log_probabilities(policy: nn.Module, tokens: Tensor, start: int) -> Tensor:
    """(B, response)."""
    logits = policy(input_ids=tokens[:, :-1], use_cache=False).logits[:, start - 1 :]
    return logits.log_softmax(-1).gather(-1, tokens[:, start:, None])[..., 0]
