"""Metrics, protocol and report."""
