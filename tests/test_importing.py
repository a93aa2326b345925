"""What an import registers, in whatever order, and what it does not load."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, **environment: str) -> str:
    """What a script prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALLS = """
    q = torch.randn(1, 2, 20, 64)
    given = dict(scale=0.125, rank=32, estimator="projection", grouping_block=0)
    got = torch.ops.distr.attention(q, q, q, **given)
    print(torch.equal(got, distr_compile.attention(q, q, q)))
"""

ORDERS = {
    "torch first": "import torch\n    import distr_compile",
    "by the module": "import distr_compile, torch\n    import distr_compile.ops",
    "only the module": "import distr_compile.ops\n    import distr_compile, torch",
}


@pytest.mark.parametrize(
    ("order", "logs"),
    [*((order, "") for order in ORDERS), ("torch first", "+distr_compile,distr_compile.lowering")],
)
def test_an_import_registers_the_op(order: str, logs: str) -> None:
    """With logs of this package torch imports it while torch itself is loading."""
    lines = ORDERS[order]
    if logs:
        lines += "\n    import distr_compile.ops"
    environment = {"TORCH_LOGS": logs} if logs else {}
    assert run(f"    {lines}\n{CALLS}", **environment) == "True\n"


@pytest.mark.parametrize("logs", ["", "+distr_compile"])
def test_the_package_before_torch(logs: str) -> None:
    """Nothing is registered then, and the first function that is asked for registers it."""
    script = """
        import distr_compile, sys
        early = 'torch' in sys.modules
        import torch
        print(early, hasattr(torch.ops.distr, 'attention'))
        q = torch.randn(1, 2, 20, 64)
        distr_compile.attention(q, q, q)
        print(hasattr(torch.ops.distr, 'attention'))
    """
    environment = {"TORCH_LOGS": logs} if logs else {}
    assert run(script, **environment) == "False False\nTrue\n"


def test_registering_loads_no_compiler() -> None:
    """That is what makes it cheap: the parts that take a second come when they are needed."""
    script = """
        import sys, torch
        before = set(sys.modules)
        import distr_compile
        new = {name.partition('.')[0] for name in set(sys.modules) - before}
        heavy = {'scipy', 'pydantic', 'tomlkit', 'rich', 'transformers', 'torchvision'}
        print(sorted(new & heavy))
        compilers = {'torch._dynamo', 'torch._inductor', 'torch._functorch'}
        print(sorted(compilers & (set(sys.modules) - before)))
    """
    assert run(script) == "[]\n[]\n"


def test_a_policy_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "distr.toml").write_text("[default]\ngroup_size = 2\n")
    script = f"""
        import sys
        sys.modules['torch'] = None
        import distr_compile
        from distr_compile.cli import main
        print(main(['policy', 'check', {str(tmp_path / "distr.toml")!r}]))
    """
    assert run(script).endswith("0\n")
