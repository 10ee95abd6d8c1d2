"""Whole pipelines on forked ranks: what a user does with a wrapped pipeline."""
