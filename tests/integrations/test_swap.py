"""fused_po.integrations.swap, which replaces functions of other packages by ours."""

import sys
import types

import pytest

from fused_po.integrations.swap import Swap


@pytest.fixture
def package(monkeypatch):
    """(home, importer): a module that defines `f` and `g`, and one that has imported `f` as `h`."""
    home, importer = types.ModuleType("swapped.home"), types.ModuleType("swapped.importer")
    home.f, home.g = object(), object()
    importer.h = home.f
    for module in (types.ModuleType("swapped"), home, importer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return home, importer


def test_replaces_every_import_and_restores_it(package, monkeypatch):
    home, importer = package
    before, ours, swap = home.f, object(), Swap()
    swap.replace([("swapped.home", "f", ours)])
    assert swap and home.f is importer.h is ours
    swap.replace([("swapped.home", "f", object())])
    assert home.f is ours
    late = types.ModuleType("swapped.late")
    late.f = home.f
    monkeypatch.setitem(sys.modules, "swapped.late", late)
    swap.undo()
    assert home.f is importer.h is late.f is before and not swap
    swap.undo()


@pytest.mark.parametrize("place, error", [(("swapped.home", "no"), RuntimeError), (("swapped.no", "f"), ImportError)])
def test_all_or_none(package, place, error):
    home, importer = package
    before, swap = home.f, Swap()
    with pytest.raises(error, match="no"):
        swap.replace([("swapped.home", "f", object()), (*place, object())])
    assert home.f is importer.h is before and not swap


def test_replacing_an_inherited_method():
    class Base:
        name = 1

    class Child(Base):
        pass

    swap = Swap()
    swap.put(Child, "name", 2)
    swap.put(Child, "name", 3)
    swap.put(Base, "name", 4)
    assert (Child.name, Base.name) == (3, 4)
    swap.undo()
    assert Base.name == Child.name == 1 and "name" not in vars(Child)
