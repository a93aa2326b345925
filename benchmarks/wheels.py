"""Wheels for a machine without a network: this project's, and what it needs that is missing there.

    python -m benchmarks.wheels [--folder dist/gpu]

fills the folder and prints the one line that runs the first stage there, from the root of a copy of
this repository. The machine has torch, Triton, Python 3.12 and what comes with them on x86-64; the
wheels are unpacked, not installed, so it needs neither pip nor an index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.store import ROOT, commit

LIMIT_BYTES = 64 << 20
"""Most that the folder may have."""

MISSING = ("pydantic", "tomlkit")
"""Packages that are not there; what they need comes along."""

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

SITE = "/tmp/distr-gpu"
"""Where the wheels are unpacked."""


def fill(folder: Path) -> list[Path]:
    """Make the wheels, in place of those of before.

    Raises:
        subprocess.CalledProcessError: pip could not; it says why.
        SystemExit: they are too large to be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    fetch = ["download", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    fetch += [f"--platform={name}" for name in PLATFORMS]
    subprocess.run([*pip, *fetch, "--dest", str(folder), *MISSING], check=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT_BYTES:
        raise SystemExit(
            f"{folder}: got {size >> 20} MiB; must be at most {LIMIT_BYTES >> 20}: remove what is "
            "in it besides wheels"
        )
    return sorted(folder.glob("*.whl"))


def line(folder: Path, stage: str = "first") -> str:
    """What runs a stage in bash from the repository's root; ``RESULTS`` says where results go."""
    unpack = f'for w in {folder}/*.whl; do python3 -m zipfile -e "$w" {SITE} || exit 1; done'
    run = (
        f"DISTR_COMMIT={commit()} PYTHONPATH={SITE} python3 -m benchmarks.gpu --stages {stage} "
        '${RESULTS:+--results "$RESULTS"}'
    )
    return f"({unpack}) && {run}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("dist/gpu"), help="from the root")
    folder = parser.parse_args(argv).folder
    for path in fill(ROOT / folder):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}", file=sys.stderr)
    print(line(folder))


if __name__ == "__main__":
    main()
