"""Makes an export and says where it lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from metaloom.errors import MetaloomError
from metaloom.export.card import card_of_run
from metaloom.export.request import Request
from metaloom.export.trained import result_of_run
from metaloom.export.writing import tell, write_export
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.tracking.console import make_console


def main(request_json: str) -> int:
    """Does what a `Request` in JSON asks for; returns the exit code."""
    torch.set_num_threads(1)
    request, console = Request(**json.loads(request_json)), make_console()
    try:
        folder, output = RunFolder(Path(request.run)), Path(request.output)
        recipe = load_recipe(folder.recipe)
        trained = result_of_run(folder, recipe, request.step, console.warn)
        card = card_of_run(folder, recipe, trained.step)
        write_export(trained, card, output, request.format, merge=request.merge, replace=request.replace)
    except MetaloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    tell(console, card, output, request.format)
    return 0
