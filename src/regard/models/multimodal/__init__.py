"""Models for more than one kind of input."""
