"""What samples of a start model say about a GRPO run that has not begun: pure functions, no I/O."""
