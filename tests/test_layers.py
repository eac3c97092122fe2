"""Who may import whom: the table of the design, checked by reading the imports."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A layer may import itself, torch and the world, and the layers named here; the longest matching name is the layer.
MAY: dict[str, set[str]] = {
    "invdiff.protocols": set(),
    "invdiff.units": set(),
    "invdiff.linalg": set(),
    "invdiff.fourier": set(),
    "invdiff.wavelets": set(),
    "invdiff.noise": set(),
    "invdiff.files": set(),
    "invdiff.metrics": set(),
    "invdiff.config": set(),
    "invdiff.circuits": {"invdiff.protocols", "invdiff.files"},
    "invdiff.priors": {"invdiff.protocols", "invdiff.files", "invdiff.config", "invdiff.circuits"},
    "invdiff.measured": {
        "invdiff.protocols", "invdiff.linalg", "invdiff.noise", "invdiff.priors", "invdiff.config", "invdiff.files",
        "invdiff.problem",
    },
    "invdiff.posterior": {"invdiff.protocols", "invdiff.priors"},
    "invdiff.calibration": {"invdiff.posterior"},
    "invdiff.problem": {"invdiff.protocols", "invdiff.linalg", "invdiff.noise", "invdiff.units"},
    "invdiff.run": {"invdiff.protocols", "invdiff.linalg", "invdiff.files"},
    "invdiff.samplers": {
        "invdiff.protocols", "invdiff.linalg", "invdiff.noise", "invdiff.wavelets", "invdiff.measured",
        "invdiff.problem",
    },
    "invdiff.uncertainty": {"invdiff.protocols", "invdiff.calibration", "invdiff.priors", "invdiff.run"},
    "invdiff.invented": {
        "invdiff.protocols", "invdiff.linalg", "invdiff.noise", "invdiff.priors", "invdiff.problem", "invdiff.units",
    },
    "invdiff.reconstruction": {
        "invdiff.protocols", "invdiff.noise", "invdiff.priors", "invdiff.problem", "invdiff.run", "invdiff.samplers",
        "invdiff.uncertainty", "invdiff.units",
    },
    "invdiff.operators": {
        "invdiff.protocols", "invdiff.linalg", "invdiff.fourier", "invdiff.noise", "invdiff.units",
    },
    "invdiff.datasets": {"invdiff.units", "invdiff.files", "invdiff.noise", "invdiff.fourier"},
    "invdiff.pipelines": {"invdiff"},
}  # fmt: skip
FOLDERS = {"invdiff": "invdiff", "operators": "invdiff.operators", "datasets": "invdiff.datasets",
           "pipelines": "invdiff.pipelines"}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *[p for p in parts if p != "__init__"]])] = path
    return found


def layer(module: str) -> str:
    fitting = [k for k in MAY if module == k or module.startswith(k + ".")]
    return max(fitting, key=len) if fitting else "invdiff"


def imports(path: Path, top: bool = False) -> set[str]:
    """Modules of the project that a file imports; with ``top`` only those that importing it imports at once."""
    tree, out = ast.parse(path.read_text()), set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            out |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "invdiff" else {str(node.module)}
    return {m for m in out if m.split(".")[0] in (*FOLDERS, "tests")}


@pytest.mark.parametrize("module", sorted(modules()))
def test_layers(module: str) -> None:
    if module == "invdiff":
        return  # its lazy attributes are the public face
    allowed = MAY[layer(module)]
    for other in imports(modules()[module]):
        ok = other.startswith("invdiff") and (
            layer(other) == layer(module) or layer(other) in allowed or "invdiff" in allowed
        )
        assert ok, f"{module} imports {other}"


def test_no_cycles() -> None:
    known = modules()
    graph = {m: {o if o in known else o.rsplit(".", 1)[0] for o in imports(p, top=True)} for m, p in known.items()}
    done: set[str] = set()

    def visit(m: str, path: tuple[str, ...]) -> None:
        assert m not in path, f"cycle: {' -> '.join((*path, m))}"
        if m not in done:
            for other in graph.get(m, set()) - {m}:
                visit(other, (*path, m))
            done.add(m)

    for m in graph:
        visit(m, ())


def test_every_package_is_named_in_pyproject() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = set(document["tool"]["setuptools"]["packages"])
    found = {m for m, path in modules().items() if path.name == "__init__.py"}
    assert named == found


def test_no_double_import() -> None:
    import sys

    import invdiff.operators  # noqa: F401

    assert "operators" not in sys.modules
    assert "datasets" not in sys.modules or not str(getattr(sys.modules["datasets"], "__file__", "")).startswith(
        str(ROOT)
    )


def test_importing_is_light_and_silent() -> None:
    import subprocess
    import sys

    heavy = "{'monai', 'diffusers', 'sigpy', 'astra', 'finufft', 'matplotlib'}"
    code = f"import invdiff, invdiff.samplers, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
