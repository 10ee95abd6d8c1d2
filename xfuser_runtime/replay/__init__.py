"""Runs calls of a port on several ranks of this machine and stores what they return.

`python -m xfuser_runtime.replay JOB.json` is how `porter verify` reaches the runtime.
"""
