"""Where a training step's time and memory go, read from a trace of real steps."""
