"""The two sides of a comparison, each in processes of its own: the baseline (stock vLLM) and the plugin.

A side works in its own folder; side.json says what the results in the folder belong to. A side that is interrupted
goes on from there.
"""

import contextlib
import hashlib
import importlib.machinery
import importlib.metadata
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.processes import Progress, SideFailed, ended_by_signals
from vllm_b200_plugin import environment, features
from vllm_b200_plugin.demo.server import Server, ServerFailed, free_port, root_cause
from vllm_b200_plugin.environment import CannotRun

BASELINE, PLUGIN = "baseline", "plugin"
STOCK = "stock"
_ROOT = Path(__file__).resolve().parents[1]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class Side:
    """name: BASELINE or PLUGIN. what: the same for people. env: what its processes need on top of ours.

    url: of a server that is already running; then env does nothing.
    """

    name: str
    what: str
    env: Mapping[str, str]
    url: str | None = None


def both(baseline: str, urls: tuple[str, str] | None = None) -> tuple[Side, Side]:
    """(baseline, plugin). baseline: "stock", or the features that its plugin goes without, separated by commas.

    urls: of their running servers. Raises CannotRun for an unknown feature.
    """
    if urls is not None:
        return tuple(  # type: ignore[return-value]
            Side(name, f"server {url}", {}, url.rstrip("/").removesuffix("/v1"))
            for name, url in zip((BASELINE, PLUGIN), urls, strict=True)
        )
    plugin = Side(PLUGIN, "the plugin", {})
    if baseline == STOCK:
        return Side(BASELINE, "stock vLLM", {"VLLM_PLUGINS": _other_plugins()}), plugin
    names = [name.strip() for name in baseline.split(",")]
    known = [feature.name for feature in features.FEATURES]
    if unknown := [name for name in names if name not in known]:
        raise CannotRun(
            f"--baseline takes {STOCK} or features of the plugin to go without ({', '.join(known)}); "
            f"got {', '.join(unknown)}."
        )
    disabled = [*filter(None, os.environ.get("VLLM_B200_DISABLE", "").split(",")), *names]
    return Side(BASELINE, f"the plugin without {', '.join(names)}", {"VLLM_B200_DISABLE": ",".join(disabled)}), plugin


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(ours, vLLM's): what stands before -- on a command line, and what stands behind it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def _other_plugins() -> str:
    """For VLLM_PLUGINS: all that would be loaded but ours."""
    wanted = os.environ.get("VLLM_PLUGINS")
    group = environment.ENTRY_POINT_GROUP
    names = [entry.name for entry in importlib.metadata.entry_points(group=group)]
    names = [name for name in names if name != environment.ENTRY_POINT and (wanted is None or name in wanted)]
    return ",".join(names) or "none"


def check_installed() -> dict[str, str]:
    """Versions of what both sides run. Raises CannotRun where vLLM or the plugin is missing for this Python."""
    vllm, _ = environment.check_vllm()
    if not environment.has_entry_point():
        raise CannotRun(
            f"vLLM would not find the plugin: {sys.executable} has no entry point of {environment.DISTRIBUTION}; "
            "install the package with pip instead of running it from its source."
        )
    if environment.ENTRY_POINT not in os.environ.get("VLLM_PLUGINS", environment.ENTRY_POINT).split(","):
        raise CannotRun(
            f"VLLM_PLUGINS leaves out {environment.ENTRY_POINT}, so there would be no side with the plugin."
        )
    return {"vllm": vllm, "torch": environment.version_of("torch") or "?", "plugin": plugin_digest()}


def plugin_digest() -> str:
    """Version and a hash of the files of the plugin that the sides load: not those of this folder where both exist."""
    paths = [path for path in sys.path if path and Path(path).resolve() != _ROOT]
    found = importlib.machinery.PathFinder.find_spec("vllm_b200_plugin", paths)
    folder = Path(found.origin).parent if found and found.origin else _ROOT / "vllm_b200_plugin"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"{environment.version_of(environment.DISTRIBUTION)} {digest.hexdigest()[:12]}"


def check_model(model: str, arguments: Sequence[str]) -> str:
    """The model, as an absolute path where it is a folder. Raises CannotRun where that is no model with a tokenizer."""
    folder = Path(model)
    if not folder.exists():
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise CannotRun(f"there is no folder {model}.")
        return model
    if not folder.is_dir() or not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise CannotRun(f"{model} is no model: there is no config.json.")
    other = any(argument.split("=")[0] == "--tokenizer" for argument in arguments)
    if not other and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CannotRun(
            f"{model} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): name one with -- --tokenizer."
        )
    return str(folder.absolute())


def model_digest(model: str) -> str:
    """Changes with the names, sizes or times of a local model's files."""
    folder = Path(model)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12] if stats else ""


def served_model(url: str, name: str | None = None) -> str:
    """What the server at `url` serves: `name`, or without it the first one. Raises CannotRun where it does not."""
    try:
        answer = get_json(f"{url}/v1/models", timeout=10)
        names = [str(entry["id"]) for entry in answer["data"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise CannotRun(
            f"no server answers at {url} ({reason}): start it with vllm serve, or correct the URL."
        ) from None
    if name is not None and name not in names:
        raise CannotRun(f"the server at {url} does not serve {name} but {', '.join(names) or 'nothing'}.")
    if not names:
        raise CannotRun(f"the server at {url} serves no model.")
    return name or names[0]


def get_json(url: str, body: object = None, timeout: float = 600) -> Any:
    """GET, or POST of `body`, never through a proxy. Raises OSError or ValueError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
        return json.load(answer)


def identity(side: Side, versions: Mapping[str, str]) -> dict[str, Any]:
    """What a side's results depend on besides what was asked: stock vLLM's do not depend on the plugin."""
    stock = "VLLM_PLUGINS" in side.env
    mine = {name: version for name, version in versions.items() if name != "plugin" or not stock}
    return {"side": side.what, "env": dict(side.env), "versions": mine}


def claim(folder: Path, settings: Mapping[str, Any], fresh: bool) -> None:
    """Make `folder` one whose results belong to `settings`.

    fresh: results of other settings are removed. Raises CannotRun where there are some and it is not, and where the
    folder cannot be written.
    """
    file = folder / "side.json"
    try:
        if file.exists():
            known = json.loads(file.read_text())
            differ = sorted(key for key in known.keys() | settings.keys() if known.get(key) != settings.get(key))
            if not differ:
                return
            if not fresh:
                raise CannotRun(
                    f"{folder} holds results with another {', '.join(differ)}: name another --out, or replace them "
                    "with --fresh."
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise CannotRun(f"{folder} cannot be used ({error}): name another --out.") from None


def offline_environment(model: str, own_data: bool = False) -> dict[str, str]:
    """A model that is a folder needs no hub, nor does a dataset of one's own."""
    env = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return {**env, "HF_DATASETS_OFFLINE": "1"} if own_data else env


def check_features(side: Side, state: Mapping[str, str] | None) -> None:
    """Whether the side's engine had the plugin or not, as it should. Raises SideFailed.

    state: feature -> what became of it, or None where vLLM did not load the plugin.
    """
    stock = "VLLM_PLUGINS" in side.env
    if stock and state is not None:
        raise SideFailed(f"{side.what} loaded the plugin: this would compare the plugin with itself.")
    if not stock and state is None:
        raise SideFailed(f"{side.what} did not load the plugin: this would compare vLLM with itself.")


@contextlib.contextmanager
def running_server(
    side: Side, model: str, arguments: Sequence[str], folder: Path, timeout: float
) -> Iterator[tuple[str, str]]:
    """(URL, name of the model) of the side's server; one is started here, and stopped on leaving, unless it has a URL.

    Raises SideFailed.
    """
    if side.url is not None:
        yield side.url, served_model(side.url, model or None)
        return
    log = folder / "server.log"
    env = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"), **offline_environment(model), **side.env}
    cpu = environment.torch_is_cpu_only()
    progress = Progress(f"{side.what}: vllm serve")
    with Server(model, log, free_port(), cpu=cpu, options=arguments, env=env) as server, ended_by_signals():
        server.start()
        try:
            with progress:
                server.wait(timeout, lambda seconds, doing: progress.show({"doing": doing}))
        except ServerFailed as error:
            raise SideFailed(f"{side.what}: {error} Cause: {root_cause(server.lines())} (see {log})") from None
        yield server.url, served_model(server.url)
