"""What the workers share. They run as files of this folder, so that no source tree comes before installed packages."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Cannot(Exception):
    """One sentence for the user: what was asked for cannot be done."""


class Status:
    """Tells the parent process how far the work is, through status.json."""

    def __init__(self, folder: Path):
        self._file = folder / "status.json"
        self._content: dict[str, Any] = {}

    def __call__(self, **content: Any) -> None:
        """doing: a few words. done, total: of what is done; forgotten with the next `doing`."""
        if "doing" in content:
            self._content = {}
        self._content.update(content)
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(self._content))
        temporary.replace(self._file)


def run(work: Callable[[Path, dict[str, Any], Status], None]) -> NoReturn:
    """Call work(folder, request, status) with the folder that the command line names, and exit."""
    folder = Path(sys.argv[1])
    status = Status(folder)
    status(doing="starting")
    try:
        work(folder, json.loads((folder / "request.json").read_text()), status)
    except Cannot as error:
        status(cannot=str(error))
        sys.exit(2)
    status(finished=True)
    # Engines leave threads and child processes behind that can take minutes to end by themselves.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def plugin_state() -> dict[str, str] | None:
    """What the plugin did for each of its features in this process, or None where vLLM did not load it."""
    plugin = sys.modules.get("vllm_b200_plugin.plugin")
    return plugin.results() if plugin else None


def engine_arguments(arguments: list[str]) -> dict[str, Any]:
    """Arguments of vllm serve -> those of vllm.LLM, only the given ones. Raises Cannot."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise Cannot(f"vLLM does not take these arguments in-process: {message}.")

    parser = EngineArgs.add_cli_args(Parser(add_help=False))
    unset = object()
    names = vars(parser.parse_args([])).keys()
    given = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    if "model" in given:
        raise Cannot("the model is named before the --, not among vLLM's arguments.")
    return given
