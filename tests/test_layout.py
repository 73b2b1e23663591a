"""The packages of the library: imports point one way."""

import ast

import pytest
from conftest import ROOT

LIBRARY = ROOT / "allo_lib"
# Each may import those after it; the modules beside them (`allo_lib.align` and its errors) are
# imported by anyone.
ORDER = ("cli", "report", "study", "evaluation", "data", "engine", "method", "profiles", "machine")
MODULES = sorted(path.relative_to(LIBRARY) for path in LIBRARY.glob("*/*.py"))
EVERY = [path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py")]


def imported(path) -> set[str]:
    """The packages that a module imports from, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((LIBRARY / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("allo_lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("allo_lib.")}
    return found & set(ORDER)


def test_every_package_has_its_place():
    assert {path.parts[0] for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    allowed = ORDER[ORDER.index(path.parts[0]) :]
    assert imported(path) <= set(allowed)


def test_no_file_is_longer_than_a_reader_holds():
    lines = {p: len((LIBRARY / p).read_text(encoding="utf-8").splitlines()) for p in EVERY}
    assert {path: count for path, count in lines.items() if count > 450} == {}
