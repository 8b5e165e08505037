"""The learning rate that a model stands: what the form and the first recipe start with, and what is warned of.

The wider a model is, the lower is the rate that it stands. For LoRA, 0.17 / hidden_size goes through the rates of
three recipes: 3e-4 for SmolLM2-135M (576, the quick start), and 1e-4 for Llama-3.2-1B (2048, `math_rl/README.md`) and
4e-5 for Llama-3.1-8B (4096, `rl_loop.py`) in the Tinker cookbook. All have an alpha of 32: a step of LoRA is as large
as rate times alpha, whatever its rank. All weights stand a tenth of LoRA's rate ("LoRA Without Regret", Schulman et
al. 2025) at most; 0.004 / hidden_size is 1e-6, the default of TRL and verl, for a model of 8B.
"""

from collections.abc import Mapping

from grpo_stage.host.known_models import config_here


LORA_ALPHA = 32
_OF_WIDTH_1: Mapping[str, float] = {"lora": 0.17, "oft": 0.17, "full": 0.004, "freeze": 0.004}
_WIDTH_OF_AN_UNKNOWN_MODEL = 4096
"""That of many models of 8B: a rate that is too low costs steps, and one that is too high costs the model."""
_TIMES_TOO_HIGH = 30
"""Ten times its rate make the quick start collapse within ten steps (docs/survival.md); this is beyond doubt."""


def start_rate(method: str, model: str) -> str:
    """The learning rate, with one digit, as the form holds it.

    Args:
        method: `finetuning_type`.
        model: a folder, or a hub's id; its width is known if its config is on this machine.
    """
    return _one_digit(_OF_WIDTH_1[method] / (_width(model) or _WIDTH_OF_AN_UNKNOWN_MODEL))


def rate_instead(rate: float, method: str, model: str, lora_alpha: float) -> str | None:
    """The learning rate to take in place of one with which an optimizer of Adam's kind breaks the model.

    None if it does not, or the model's width is not known.
    """
    width = _width(model)
    if width is None:
        return None
    usual = _OF_WIDTH_1[method] / width * (LORA_ALPHA / lora_alpha if method == "lora" else 1)
    return _one_digit(usual) if rate > _TIMES_TOO_HIGH * usual else None


def _width(model: str) -> int | None:
    config = config_here(model)
    return (config.get("text_config") or config).get("hidden_size")  # of a model for images, its language model's


def _one_digit(rate: float) -> str:
    digit, exponent = f"{rate:.0e}".split("e")
    return f"{digit}e{int(exponent)}"
