"""Find every softmax(QK^T)V in a Dynamo graph, decide about it, rewrite it."""
