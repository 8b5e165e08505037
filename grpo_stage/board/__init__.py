"""GRPO in LLaMA Board."""
