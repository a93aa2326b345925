"""The estimator ``calibrated``: bases that are given, made of calibration data."""
