"""What looks at a model and its data beforehand, to choose how its attention is approximated."""
