"""State, SFT step, GRPO step, loops."""
