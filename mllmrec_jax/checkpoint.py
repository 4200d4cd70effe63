"""Checkpoints: asynchronous, atomic, bound to a configuration and to the base weights they belong to (Orbax)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# Orbax logs a traceback for each of its threads that fails; the same error is raised here, once.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno < logging.ERROR)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that does not belong to this run."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX's preemption service follows one count of steps, that of `PreemptionGuard`, and a second would be lost in it."""
        return False


class Checkpoints:
    """A folder of checkpoints of one stage (SFT or GRPO).

    A checkpoint holds the trained weights, the optimizer state and the number of steps done; from that number the loader and the sampler
    go on exactly. Base weights are not copied: `identity` carries their hash, and it is checked on restore.

    Attributes:
      identity: plain values that a checkpoint must share with the run that reads it (config fingerprint, base weights' hash, data hash).
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, keep: int = 2):
        self.folder = folder.absolute()
        self.identity = json.loads(json.dumps(identity))
        # Half-written checkpoints of a killed or failed run take room, and are never read.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True, cleanup_tmp_directories=True)
        self._manager = _Manager(self.folder, options=options)

    def clear(self) -> None:
        """Deletes every checkpoint of this stage: it starts over."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    @property
    def latest_step(self) -> int | None:
        """Steps done at the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state`; returns once it is copied off the device. A failed earlier write raises here or in `close`.

        Raises:
          CheckpointError: the disk is full or the folder not writable; earlier checkpoints stay whole.
        """
        if self.latest_step == step:
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self.identity))
        try:
            self._manager.save(step, args=arguments)
        except (OSError, ValueError) as error:
            raise CheckpointError(self._write_failure(step, error)) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """(steps done, state shaped like `like`) of the newest whole checkpoint, or of `step`.

        Raises:
          CheckpointError: there is none, or it belongs to another configuration, other data or other base weights.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder}: expected a checkpoint, found none")
        stored: dict[str, Any] = self._manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))["identity"]
        differing = sorted(key for key in self.identity.keys() | stored.keys() if self.identity.get(key) != stored.get(key))
        if differing:
            details = "; ".join(f"{key}: expected {self.identity.get(key)}, got {stored.get(key)}" for key in differing)
            raise CheckpointError(
                f"{self.folder}/{step}: belongs to another run ({details}); use another output folder or run without --resume"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return step, restored["state"]

    def close(self) -> None:
        """Waits for the write under way.

        Raises:
          CheckpointError: that write failed.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(self._write_failure(None, error)) from error
        finally:
            self._manager.close()

    def _write_failure(self, step: int | None, error: Exception) -> str:
        what = "the last checkpoint" if step is None else f"checkpoint {step}"
        return f"{self.folder}: {what} could not be written: {error}; checkpoints written before it are whole (newest: {self.latest_step})"
