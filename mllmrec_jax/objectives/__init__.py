"""Log-probs on the group layout, losses, advantages, KL estimators: pure functions, no optimizer, no I/O."""
