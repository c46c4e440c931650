"""Optimization: steps, checkpoints, evaluation, and what a person sees meanwhile."""
