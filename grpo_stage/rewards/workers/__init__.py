"""Processes that can be killed: a user's function, and math-verify."""
