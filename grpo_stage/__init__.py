"""GRPO as a training stage of LLaMA-Factory."""

__version__ = "0.1.0"
