"""What the end of a pod means, by the exit codes of the command in it."""

from __future__ import annotations

# Stopped from outside, and saved: goes on where it stopped.
ASKED_TO_STOP = 75
# A mistake in the recipe, a command that the image does not have, and someone's Ctrl-C: they come again.
# Those of data, checkpoints, run folder and tracking store (3 to 6) may come of a storage that is down.
FINAL = (2, 126, 127, 130)
# What someone may have to mend.
MISTAKES = (2, 3, 4, 5, 6)
EXIT_MEANINGS = {
    1: "a fault",
    2: "a mistake in the recipe",
    3: "the data",
    4: "a checkpoint",
    5: "the launch or the run folder",
    6: "the tracking store",
    75: "stopped from outside, and saved",
    126: "its command cannot be executed",
    127: "its command is not in the image",
    128: "its command could not be started",
    129: "its terminal was closed",
    130: "interrupted",
    137: "killed",
    139: "a segmentation fault",
    143: "ended by SIGTERM before it could save",
}


def exit_words(code: int) -> str:
    """An exit code with what it means: exit code 2 (a mistake in the recipe)."""
    meaning = EXIT_MEANINGS.get(code)
    return f"exit code {code}" + (f" ({meaning})" if meaning else "")
