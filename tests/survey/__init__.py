"""A survey of real models: what the pass finds, against counts and labels made without it."""
