"""Imports go down only, from the engine to the table of sizes."""
import ast
from graphlib import TopologicalSorter

import pytest
from show_structure import FLOORS, imports, modules, wing

FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def test_every_module_has_a_floor():
    """A new wing says where it stands."""
    assert {wing(name) for name in modules()} == FLOOR.keys()


def test_no_circles():
    """Modules can be put in an order in which all imports look back."""
    graph = imports()
    assert 'models.layers' in graph['models.bifpn']
    assert 'registry' in graph['models.bifpn']
    list(TopologicalSorter(graph).static_order())  # CycleError


@pytest.mark.parametrize('name', modules())
def test_imports_go_down(name):
    """A wing imports itself and lower floors."""
    for target in imports()[name]:
        if wing(target) != wing(name):
            assert FLOOR[wing(target)] < FLOOR[wing(name)], target


@pytest.mark.parametrize('name, path', modules().items(), ids=modules())
def test_no_import_hides_in_a_function(name, path):
    """Inside functions, only other projects' modules are imported."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                assert not (isinstance(node, ast.ImportFrom) and node.level)
