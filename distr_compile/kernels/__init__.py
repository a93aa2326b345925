"""The arithmetic of approximate attention; knows nothing of graphs or of the op."""
