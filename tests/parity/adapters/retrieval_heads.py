"""Retrieval heads: the score after all decoding steps, and where the needle is found."""

from collections.abc import Iterable

import torch

from regard.probes import RetrievalScore, find_needle
from tests.parity.harness import Comparison, Golden

ATOL = 1e-6


def check(golden: Golden) -> Iterable[Comparison]:
    given = golden.inputs
    attentions = given["attentions"]
    score = RetrievalScore(
        *attentions.shape[1:3],
        needle_span=tuple(given["needle_span"].tolist()),
        prompt_ids=given["prompt_ids"],
        topk=golden.kwargs["topk"],
    )
    for rows, width, token in zip(attentions, given["kv_len"].tolist(), given["generated_ids"], strict=True):
        score.update([layer[None, :, None, :width] for layer in rows], token)
    yield golden.compare("retrieval_score", score.result(), ATOL)
    found = find_needle(given["prompt_ids"].tolist(), given["needle_ids"].tolist())
    yield golden.compare("needle_found", torch.tensor(found), 0)
