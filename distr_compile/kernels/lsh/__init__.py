"""The LSH estimators: columns of Q that are alike, grouped (arXiv 2507.17245, section 3.2)."""
