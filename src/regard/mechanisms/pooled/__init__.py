"""Mechanisms that go through, or end in, a few pooled vectors."""
