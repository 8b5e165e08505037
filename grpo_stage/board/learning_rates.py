"""The learning rate and LoRA's alpha that the form and the first recipe start with.

The wider a model is, the lower is the rate that it stands; adapters stand about ten times the rate of all weights, in
reinforcement learning as well ("LoRA Without Regret", Schulman et al. 2025). `_OF_WIDTH_1 / hidden_size` goes through
rates at which a reward was seen to rise with LoRA: 3e-4 for SmolLM2-135M (hidden size 576, the quick start), and 1e-4
for Llama-3.2-1B (2048) and 4e-5 for Llama-3.1-8B (4096) of the Tinker cookbook (`math_rl/README.md`, `rl_loop.py`).
All are with an alpha of 32: a step of LoRA is as large as rate times alpha, whatever its rank.
"""

from grpo_stage.host.known_models import config_here


LORA_ALPHA = 32
_OF_WIDTH_1 = 0.17
_WIDTH_OF_AN_UNKNOWN_MODEL = 4096
"""That of many models of 8B: a rate that is too low costs steps, and one that is too high costs the model."""
_ADAPTERS = ("lora", "oft")


def start_rate(method: str, model: str) -> str:
    """The learning rate, with one digit, as the form holds it.

    Args:
        method: `finetuning_type`.
        model: a folder, or a hub's id; its width is known if its config is on this machine.
    """
    config = config_here(model)
    width = (config.get("text_config") or config).get("hidden_size")  # of a model for images, its language model's
    rate = _OF_WIDTH_1 / (width or _WIDTH_OF_AN_UNKNOWN_MODEL) * (1 if method in _ADAPTERS else 0.1)
    digit, exponent = f"{rate:.0e}".split("e")
    return f"{digit}e{int(exponent)}"
