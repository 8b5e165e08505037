"""Memory: what a run will take, told from the model's config, and what a step takes, measured."""
