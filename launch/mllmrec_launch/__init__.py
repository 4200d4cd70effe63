"""Starts the processes of a run where clusters are launched from: one module a scheduler, one template beside it."""
