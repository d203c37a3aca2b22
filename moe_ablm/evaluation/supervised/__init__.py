"""Heads on an encoder, folds, and baselines without one."""
