"""Pipelines of our own, in the manner of diffusers: input for the porter's tests."""
