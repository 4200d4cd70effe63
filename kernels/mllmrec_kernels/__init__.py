"""Custom kernels, one folder an operation: api, plain reference, implementations."""
