"""Recommenders that need no language model: the floors every table shows."""
