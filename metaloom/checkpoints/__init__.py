"""Checkpoints: written so that one is either complete and valid, or invisible."""

from metaloom.checkpoints.store import Checkpoint, CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore"]
