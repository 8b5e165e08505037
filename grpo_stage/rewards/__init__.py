"""Rewards: what a completion is worth. docs/rewards.md is the user's page."""
