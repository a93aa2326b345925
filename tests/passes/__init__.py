"""Tests of the matcher and the rewriter, on graphs that Dynamo captures."""
