"""What a language model is tested on, and how an answer is scored."""

from regard.tasks.grpo import group_advantages, grpo_loss
from regard.tasks.metrics import agreement, negative_log_likelihood, perplexity
from regard.tasks.needle import Needle, NeedleRun, needle_in_haystack, needle_run
from regard.tasks.passkey import Passkey, PasskeyTask, passkey_task
from regard.tasks.rouge import rouge1_recall
from regard.tasks.text import english, read_text, tokenize

__all__ = [
    "Needle",
    "NeedleRun",
    "Passkey",
    "PasskeyTask",
    "agreement",
    "english",
    "group_advantages",
    "grpo_loss",
    "needle_in_haystack",
    "needle_run",
    "negative_log_likelihood",
    "passkey_task",
    "perplexity",
    "read_text",
    "rouge1_recall",
    "tokenize",
]
