"""Programs that completions contain, run in a sandbox against tests of the dataset: docs/code_rewards.md."""
