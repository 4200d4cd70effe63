"""Readers, splits, candidates, tokens, shards and the loader."""
