"""Scores from reward models: in this process, or from a server."""
