"""The policy: a decoder of the Qwen3 / Qwen2 / Llama family on the group layout, adapters, weights from and to Hugging Face folders."""
