"""Offline: pictures and histories to captions, reasoning traces, scores and shards. The only room with PyTorch."""
