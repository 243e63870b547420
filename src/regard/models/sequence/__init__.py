"""Models of sequences and sets that read several domains."""
