"""MLLMRec-R1 in JAX: GRPO post-training of language models for multimodal sequential recommendation."""

__version__ = "0.1.0"
