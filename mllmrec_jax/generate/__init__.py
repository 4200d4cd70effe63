"""Rollout and ranking: token ids in, token ids and scores out."""
