"""Made-up speech: what is spoken where, and that nothing else tells."""

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks.aligned_speech import SPAN, AlignedSpeech


def sample(task: AlignedSpeech, batch: int = 64, seed: int = 0):
    return task.sample(batch, torch.Generator().manual_seed(seed))


def test_each_token_is_spoken_in_one_of_its_slots() -> None:
    task = AlignedSpeech(num_tokens=5, slots=3)
    features, tokens, starts = sample(task)
    assert features.shape == (64, task.frames, 16)
    assert task.frames == 60
    assert tokens.shape == starts.shape == (64, 5)
    slot = starts // SPAN - 3 * torch.arange(5)
    assert set(slot.flatten().tolist()) == {0, 1, 2}
    assert (starts % SPAN == 0).all()
    assert set(tokens.flatten().tolist()) == set(range(12))


def test_sounds_stand_where_they_are_said_to_and_nowhere_else() -> None:
    task = AlignedSpeech(noise=0.0)
    features, tokens, starts = sample(task, 4)
    for spoken, said, where in zip(features, tokens, starts, strict=True):
        silent = spoken.amin()
        for token, start in zip(said.tolist(), where.tolist(), strict=True):
            sound = spoken[start : start + SPAN] - silent
            cosine = torch.cosine_similarity(sound.flatten(), task.sounds[token].flatten(), 0)
            assert cosine > 0.999
            spoken[start : start + SPAN] = silent
        assert (spoken - silent).abs().max() < 1e-4  # what is left is silence


def test_sounds_differ_and_come_from_the_seed() -> None:
    sounds = AlignedSpeech().sounds.flatten(1)
    near = torch.cdist(sounds, sounds) + 100 * torch.eye(12)
    assert near.min() > 0.5
    assert torch.equal(AlignedSpeech().sounds, AlignedSpeech().sounds)
    assert not torch.equal(AlignedSpeech(seed=1).sounds, AlignedSpeech().sounds)


def test_features_are_standardised_and_repeat() -> None:
    features = sample(AlignedSpeech()).features
    torch.testing.assert_close(features.mean((1, 2)), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std((1, 2)), torch.ones(64))
    assert torch.equal(sample(AlignedSpeech()).features, features)


def test_refusals() -> None:
    for arguments in ({"num_tokens": 0}, {"vocab_size": 1}, {"slots": 0}, {"channels": 2}, {"noise": -1.0}):
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            AlignedSpeech(**arguments)
