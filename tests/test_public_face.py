"""What ``distr_compile`` offers, whatever else of it has been imported."""

import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import importlib, pkgutil, types
    import distr_compile

    for module in pkgutil.walk_packages(distr_compile.__path__, "distr_compile."):
        importlib.import_module(module.name)
    names = {name: getattr(distr_compile, name) for name in distr_compile.__all__}
    modules = [name for name, value in names.items() if isinstance(value, types.ModuleType)]
    assert not modules, modules
    assert all(map(callable, names.values()))
    assert all(value.__name__ == name for name, value in names.items())
    assert sorted(dir(distr_compile)) == sorted(names)
"""


def test_no_submodule_hides_a_public_name() -> None:
    """Importing a submodule sets an attribute of that name on its package."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
