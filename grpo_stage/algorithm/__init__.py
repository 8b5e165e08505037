"""The mathematics of GRPO: pure torch, no state, no input or output."""
