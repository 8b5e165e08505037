"""Rollout engines behind one Protocol (`grpo_stage.types.RolloutEngine`)."""
