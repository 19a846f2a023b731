"""Who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lsgm_fast
from lsgm_fast._constant import assume_constant_result

PACKAGE = Path(lsgm_fast.__file__).resolve().parent

# CONTRIBUTING's table, from the top down: a module imports from its own layer and from those below. Modules are named
# by what follows "lsgm_fast.", packages with all that is in them.
LAYERS: dict[str, tuple[str, ...]] = {
    "command line": ("__main__", "cli", "commands", "info", "bench", "aot"),
    "profiles": ("profiling",),
    "training": ("training",),
    "evaluation": ("evaluation",),
    "data": ("data",),
    "engine": ("engine",),
    "models": ("models", "nn", "checkpoints"),
    "proofs": ("testing",),
    "mathematics": ("sde", "weighting", "discretisation", "distributions", "random", "sampling"),
    "operations": ("ops", "composed"),
    "dispatcher": ("dispatch", "fused", "selftest", "native"),
    "implementations": ("reference", "kernels"),
    "foundations": (
        "config", "presets", "distributed", "env", "errors", "files", "images", "trace", "_constant", "_discovery",
    ),
}  # fmt: skip

# (module, what it imports from above): each with its reason in CONTRIBUTING.
EXCEPTIONS = {
    ("models.lsgm", "engine.plan"),
    ("selftest", "testing"),
    ("selftest", "info"),
    ("reference.nvae_cell", "ops"),
    ("reference.group_norm_resample", "ops"),
}


def modules() -> dict[str, Path]:
    """Every module, the kernels included, by what follows ``lsgm_fast.``; the package itself is ``""``."""
    found = {}
    for root in map(Path, lsgm_fast.__path__):
        folders = [root] if root.resolve() == PACKAGE else [root / "kernels"]
        for path in (p for folder in folders for p in folder.rglob("*.py")):
            *parts, last = path.relative_to(root).with_suffix("").parts
            found[".".join(parts if last == "__init__" else [*parts, last])] = path
    return found


MODULES = modules()


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All but what stands under ``if TYPE_CHECKING``, which does not run."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield statement
                yield from nodes(statement)
        else:
            yield child
            yield from nodes(child)


def resolved(name: str) -> str | None:
    """The module in which a dotted name of the package lives; None for the package's own (its version)."""
    first, *rest = name.split(".")
    if first in lsgm_fast._EXPORTS:
        return lsgm_fast._EXPORTS[first].removeprefix("lsgm_fast.")
    parts = [first, *rest]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or None


def imported(source: str) -> set[str]:
    """What the source of a module imports of the package, at its top or inside of functions, or reaches through it."""
    found = set()
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("lsgm_fast.")]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute here"
            names = [
                f"{node.module}.{a.name}" for a in node.names if f"{node.module}.".startswith("lsgm_fast.")
            ]
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "lsgm_fast"
        ):
            names = [f"lsgm_fast.{node.attr}"]
        else:
            continue
        found |= {resolved(name.removeprefix("lsgm_fast.")) for name in names}
    return found - {None}


def layer(module: str) -> int:
    (place,) = [i for i, names in enumerate(LAYERS.values()) if module.split(".")[0] in names]
    return place


def upwards(module: str, source: str) -> set[tuple[str, str]]:
    return {(module, other) for other in imported(source) if layer(other) < layer(module)}


def test_every_module_has_a_layer():
    assert len(MODULES) > 150 and "kernels.mixed_score" in MODULES
    for module in MODULES:
        if module:
            layer(module)


def test_imports_go_downwards():
    found = set()
    for module, path in MODULES.items():
        if module:
            found |= upwards(module, path.read_text(encoding="utf-8"))
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    "source",
    [
        "from lsgm_fast.sampling import integrate",
        "from lsgm_fast import sampling",
        "import lsgm_fast.sampling.ode",
        "def f():\n    from lsgm_fast.sampling.ode import solve_ode",
        "import lsgm_fast\n\ndef f():\n    return lsgm_fast.load('demo')",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from lsgm_fast.models import LSGM",
    ],
)
def test_an_import_from_above_would_be_seen(source):
    assert upwards("ops.mixed_score", source)


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from lsgm_fast.sampling import integrate",
        "from lsgm_fast.reference.mixed_score import mixed_score",
        "from lsgm_fast import __version__",
        "import torch",
    ],
)
def test_other_imports_are_left_alone(source):
    assert not upwards("ops.mixed_score", source)


def test_the_table_of_contributing_has_these_layers():
    page = PACKAGE.parent / "CONTRIBUTING.md"
    if not page.is_file():
        pytest.skip("not a source tree")
    text = page.read_text(encoding="utf-8").partition("## The layers")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    table = {row[1].strip(): row[2] for row in rows if "---" not in row[1] and row[1].strip() != "layer"}
    assert list(table) == list(LAYERS)
    for name, members in LAYERS.items():
        for member in members:
            if not member.startswith("_"):
                assert member in table[name], f"{member} is missing in the row of {name}"
    for module, other in EXCEPTIONS:
        assert f"`{module.replace('.', '/')}.py`" in text and f"`{other.replace('.', '/')}" in text


# What only some uses need. The compiler, sympy and SciPy take longer to import than all of this package together.
HEAVY = {
    "torch._dynamo", "torch._inductor", "sympy", "triton", "scipy", "torchdiffeq", "matplotlib", "PIL", "typer", "rich",
    "yaml", "mlxtend", "lmdb", "tensorboard", "pytest", "hypothesis", "lsgm_fast.training", "lsgm_fast.evaluation",
    "lsgm_fast.testing", "lsgm_fast.profiling", "lsgm_fast.kernels",
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    """What PyTorch has not brought itself."""
    command = (
        f"import json, sys, torch; before = set(sys.modules); {code}; "
        "print(json.dumps([*set(sys.modules) - before]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_next_to_nothing():
    added = modules_after("import lsgm_fast")
    assert {name for name in added if not name.startswith("lsgm_fast")} <= {"importlib", "pathlib"}
    assert added & {"lsgm_fast"} == {name for name in added if name.startswith("lsgm_fast")}


def test_the_first_use_imports_nothing_heavy():
    """Of the operations, the models and the solvers: some 0.3 s after PyTorch's own import."""
    added = modules_after("import lsgm_fast; lsgm_fast.load; lsgm_fast.LSGM")
    assert {"lsgm_fast.models.lsgm", "lsgm_fast.ops.mixed_score"} <= added
    assert not added & HEAVY


def test_the_mark_is_that_of_pytorch():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert assume_constant_result(ours) is ours
    assert ours.__dict__ == torch.compiler.assume_constant_result(theirs).__dict__ != {}
