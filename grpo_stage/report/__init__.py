"""`grpo-stage report`: what a run's folder tells, on one page."""
