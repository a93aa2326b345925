"""Builds both packages, installs the wheel into an empty environment, and works with it there.

    python -m tests.packages [--folder dist] [--pip-args "..."]

The environment is a new one of this interpreter, in a temporary folder: pip installs the wheel into
it with everything that it depends on, torch too, from the index or from what pip finds beside it.
Then, in another folder, with nothing of this checkout to be imported: the CPU kernel is compiled
from the wheel's sources, and the README's first example, an example of ``examples/`` and the
README's commands are run. The first step that fails ends it, with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from tests import readme

ROOT = Path(__file__).parents[2]
KERNEL = """
import sys, distr_compile
from distr_compile.kernels.attention import build, cpu
build.LIMIT_S = 200.0
print(distr_compile.__file__)
sys.exit(cpu.unavailable_reason())
"""


def build(folder: Path) -> Path:
    """Make the sdist, and from it the wheel, in place of those of before; the wheel's path."""
    for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
        old.unlink()
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = folder.glob("*.whl")
    (_,) = folder.glob("*.tar.gz")
    return wheel


def run(folder: Path, *command: str) -> str:
    """What a command prints that is run in a folder, without our own paths."""
    print("$", *(shlex.quote(part) for part in command[:1]), *command[1:], flush=True)
    start = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")
    print(f"  {time.perf_counter() - start:.1f} s", flush=True)
    return done.stdout


def use(bin_folder: Path, folder: Path) -> None:
    """Everything that a new user does first; the folder is empty, and is filled."""
    python = str(bin_folder / "python")
    (folder / "kernel.py").write_text(KERNEL, encoding="utf-8")
    (folder / "tour.py").write_text(readme.tour(), encoding="utf-8")
    file, commands = readme.tuning()
    (folder / "mine.py").write_text(file, encoding="utf-8")
    shutil.copy(ROOT / "examples" / "own_module.py", folder)

    imported = Path(run(folder, python, "kernel.py").strip())
    assert bin_folder.parent in imported.parents, f"imported {imported}"
    print(run(folder, python, "tour.py"))
    assert "3 distr, 1 exact" in run(folder, python, "own_module.py")
    run(folder, str(bin_folder / "distr"), "--version")
    for line in commands:
        name, *arguments = shlex.split(line, comments=True)
        assert name == "distr"
        run(folder, str(bin_folder / name), *arguments)
    run(folder, str(bin_folder / "distr"), "policy", "check", "distr.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="of the packages")
    parser.add_argument("--pip-args", default="", help="more arguments of pip install")
    options = parser.parse_args()
    wheel = build(options.folder.absolute())
    print(f"{wheel.name}: {wheel.stat().st_size >> 10} KiB", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        environment, folder = Path(temporary, "environment"), Path(temporary, "work")
        venv.create(environment, with_pip=True)
        folder.mkdir()
        bin_folder = environment / "bin"
        pip = [str(bin_folder / "python"), "-m", "pip", "--quiet", "install"]
        run(folder, *pip, *shlex.split(options.pip_args), str(wheel))
        use(bin_folder, folder)
    print("The wheel works in an environment of its own.")


if __name__ == "__main__":
    main()
