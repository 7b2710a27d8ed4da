"""The house rules that can be read off the source: which way imports point, how long files are, what a name opens."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "ferrovae"

# A room may import rooms of a lower floor, and its own.
FLOORS = [
    {"kernels", "_core"},
    {"ops"},
    {"nn"},
    {"likelihoods", "priors", "compat"},
    {"evidence", "data", "models"},
    {"training", "bench"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEIGHBOURS = {("evidence", "data"), ("evidence", "models"), ("likelihoods", "priors")}
OPTIONAL = {"triton", "matplotlib", "sklearn", "huggingface_hub", "vector_quantize_pytorch", "mpmath", "hypothesis"}
OPTIONAL |= {"diffusers", "transformers"}
CORE_DOORS = {"ops/_rust.py", "data/_rust.py", "evidence/_rust.py"}


def python_files() -> list[Path]:
    # An editable build may leave copies of the kernels behind; the originals have rules of their own.
    copies = set((PACKAGE / "kernels").glob("*.py")) - {PACKAGE / "kernels" / "__init__.py"}
    return sorted(path for path in set(PACKAGE.rglob("*.py")) - copies if "__pycache__" not in path.parts)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def room_of(path: Path, package: Path) -> str:
    relative = path.relative_to(package)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, dotted module, whether at module level) of every executed import; `from a import b` is `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    inside = {child for node in ast.walk(tree) if isinstance(node, functions) for child in ast.walk(node)}
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}", node not in inside) for alias in node.names]
    return found


def violations(files: list[Path], package: Path = PACKAGE) -> list[str]:
    wrong = []
    for path in files:
        room, where = room_of(path, package), path.relative_to(package).as_posix()
        for line, module, _ in imports(path):
            parts = module.split(".")
            if parts[0] != "ferrovae" or len(parts) == 1 or room == "__init__":
                continue
            target = parts[1]
            if target not in FLOOR or target == room:
                continue
            beside = FLOOR[target] == FLOOR[room] and (room, target) not in NEIGHBOURS
            if FLOOR[target] > FLOOR[room] or beside:
                wrong.append(f"{where}:{line}: {room} imports {target}")
            if target == "_core" and where not in CORE_DOORS | {"bench/machine.py"}:
                wrong.append(f"{where}:{line}: only {sorted(CORE_DOORS)} import the extension")
            if target == "kernels" and room != "ops":
                wrong.append(f"{where}:{line}: only ops imports the kernels")
    return wrong


def test_imports_point_downward() -> None:
    assert violations(python_files()) == []


def test_every_room_has_a_floor() -> None:
    assert {room_of(path, PACKAGE) for path in python_files()} - set(FLOOR) == {"__init__"}


def test_optional_packages_are_imported_where_they_are_used() -> None:
    early = [
        f"{path.relative_to(PACKAGE)}:{line}: {module}"
        for path in python_files()
        for line, module, top in imports(path)
        if top and module.split(".")[0] in OPTIONAL
    ]
    assert early == []


def test_kernels_import_torch_triton_and_siblings_only() -> None:
    # And of Python's own, what reads a table of configurations.
    allowed = {"torch", "triton", "__future__", "math", "typing", "dataclasses", "collections"}
    allowed |= {"functools", "json", "pathlib"}
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path}: {names}"


def test_the_rules_can_fail(tmp_path: Path) -> None:
    room = tmp_path / "ops"
    room.mkdir()
    (room / "bad.py").write_text("from ferrovae.models import VAE\nimport ferrovae._core\n", encoding="utf-8")
    found = violations([room / "bad.py"], tmp_path)
    assert len(found) == 2
    assert "ops imports models" in found[0]


def test_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked("*.py", "*.rs", "*.pyi")
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    assert median(lengths.values()) <= 150


OPERATIONS = sorted(path.stem for path in (PACKAGE / "ops").glob("[a-z]*.py") if path.stem != "nearest_code_distances")
# Compositions of other operations: they have no kernels of their own.
COMPOSED = {"code_cross_entropy", "expected_code", "mean_code_entropy"}
# On a GPU these run on their plain-torch reference.
WITHOUT_TRITON = COMPOSED | {
    "categorical_log_prob",
    "continuous_bernoulli_log_prob",
    "gaussian_log_prob",
    "negative_binomial_log_prob",
    "poisson_log_prob",
}


def test_operations_are_found() -> None:
    assert {"reparameterize_kl", "nearest_code", "bernoulli_log_prob"} < set(OPERATIONS)
    assert set(OPERATIONS) > WITHOUT_TRITON


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_name_through_every_layer(name: str) -> None:
    core, binding = ROOT / "rust" / "core" / "src", ROOT / "rust" / "python" / "src" / f"{name}.rs"
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file()
    assert (ROOT / "kernels" / f"{name}.py").is_file() == (name not in WITHOUT_TRITON)
    in_rust = (core / f"{name}.rs").is_file() or (core / name / "mod.rs").is_file()
    assert in_rust == binding.is_file() == (name not in COMPOSED)
