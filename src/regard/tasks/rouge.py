"""ROUGE-1 recall, on words reduced to their stems (Porter, "An algorithm for suffix stripping", 1980)."""

import re
from collections import Counter

_SHORTEST = 4  # shorter words are left as they are
#: suffix -> replacement, where something with a vowel and a consonant after it stands before
_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
    "logi": "log",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


def rouge1_recall(reference: str, response: str, *, stemmed: bool = True) -> float:
    """Share of the reference's words, counted with repetition, that the response has: 0 to 1; 0 without any words.

    Words are runs of letters and digits of ASCII, in lower case.
    """
    wanted, given = (Counter(_words(text, stemmed)) for text in (reference, response))
    return (wanted & given).total() / max(1, wanted.total())


def stem(word: str) -> str:
    """Porter's stem of a word in lower case, in his revised version (``bli``, ``logi``)."""
    if len(word) < 3:
        return word
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and _vowel_in(word[:-1]):
        word = word[:-1] + "i"
    for rules in (_STEP_2, _STEP_3):
        suffix = _longest(word, tuple(rules))
        if suffix and _measure(word[: -len(suffix)]) > 0:
            word = word[: -len(suffix)] + rules[suffix]
    suffix = _longest(word, _STEP_4)
    before = word[: len(word) - len(suffix)]
    if suffix and _measure(before) > 1 and (suffix != "ion" or before.endswith(("s", "t"))):
        word = before
    if word.endswith("e"):
        m = _measure(word[:-1])
        if m > 1 or (m == 1 and not _short(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and _measure(word) > 1:
        word = word[:-1]
    return word


def _words(text: str, stemmed: bool) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(word) if len(word) >= _SHORTEST else word for word in words] if stemmed else words


def _plural(word: str) -> str:
    if word.endswith("sses") or word.endswith("ies"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    suffix = _longest(word, ("ed", "ing"))
    before = word[: len(word) - len(suffix)]
    if not suffix or not _vowel_in(before):
        return word
    if before.endswith(("at", "bl", "iz")) or (_measure(before) == 1 and _short(before)):
        return before + "e"
    doubled = len(before) > 1 and before[-1] == before[-2] and before[-1] not in "aeioulsz"
    return before[:-1] if doubled else before


def _kinds(word: str) -> str:
    """``v`` for vowels, ``c`` for consonants; y is a vowel after a consonant."""
    kinds = ""
    for letter in word:
        kinds += "v" if letter in "aeiou" or (letter == "y" and kinds.endswith("c")) else "c"
    return kinds


def _measure(stem: str) -> int:
    """How often a consonant follows a vowel."""
    return _kinds(stem).count("vc")


def _vowel_in(stem: str) -> bool:
    return "v" in _kinds(stem)


def _short(stem: str) -> bool:
    """Whether it ends consonant, vowel, consonant, the last not w, x or y."""
    return _kinds(stem).endswith("cvc") and stem[-1] not in "wxy"


def _longest(word: str, suffixes: tuple[str, ...]) -> str:
    return max((suffix for suffix in suffixes if word.endswith(suffix)), key=len, default="")
