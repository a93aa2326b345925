"""The public names are what they say, whatever was imported before."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import distr_compile


def submodules() -> list[str]:
    return [m.name for m in pkgutil.walk_packages(distr_compile.__path__, "distr_compile.")]


@pytest.mark.parametrize("name", distr_compile.__all__)
def test_no_module_bears_a_public_name(name: str) -> None:
    """An imported submodule becomes an attribute of the package, and hides a lazy name."""
    assert f"distr_compile.{name}" not in submodules()


def test_every_public_name_is_there_after_all_submodules_were_imported() -> None:
    for name in submodules():
        importlib.import_module(name)
    for name in distr_compile.__all__:
        assert not isinstance(getattr(distr_compile, name), ModuleType), name
