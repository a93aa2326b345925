"""From the op to its implementations: ``op.py`` says what the op is, the others compute it."""
