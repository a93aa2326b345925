"""The packages that ``python -m build`` makes, and what a machine that installs one can do."""
