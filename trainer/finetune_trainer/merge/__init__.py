"""A whole model from a base model and an adapter: folded in, written, reopened and compared before it counts."""
