"""Checkpoints: written so that one is either complete and valid, or invisible."""
