"""What a language model is tested on, and how an answer is scored."""

from regard.tasks.metrics import agreement, negative_log_likelihood, perplexity
from regard.tasks.passkey import Passkey, PasskeyTask, passkey_task
from regard.tasks.text import english, read_text, tokenize

__all__ = [
    "Passkey",
    "PasskeyTask",
    "agreement",
    "english",
    "negative_log_likelihood",
    "passkey_task",
    "perplexity",
    "read_text",
    "tokenize",
]
