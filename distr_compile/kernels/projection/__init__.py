"""The estimator ``projection``: a basis of the strongest directions of QK^T, block by block."""
