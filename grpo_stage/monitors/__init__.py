"""Monitors of a run, one file each."""
