"""The accuracy gate of this repository: every model of the zoo under every estimator."""
