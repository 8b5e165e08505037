"""The reward functions that a recipe can name without a file."""
