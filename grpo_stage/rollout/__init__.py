"""Prompts -> completions: which prompts are due, who samples them, and what waits for its uses."""
