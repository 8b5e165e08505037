"""Recipes of other systems as recipes of this stage, with an account of every key."""
