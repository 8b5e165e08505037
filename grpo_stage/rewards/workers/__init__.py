"""Worker processes that can be killed: of a user's function, and of math-verify."""
