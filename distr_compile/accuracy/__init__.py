"""What an approximation costs a model: policies measured on data, and held against a baseline."""
