"""Language models: one decoder and encoder in which any sequence mechanism can be named."""

from regard.models.language.model import LanguageModel, LanguageState

__all__ = ["LanguageModel", "LanguageState"]
