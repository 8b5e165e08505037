"""Whether a recipe that was imported passes this stage's own check, but for what is only on its user's machine."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_stage.tools.recipe_file import parse_without_run


_MODELS = ("ref_model", "reward_model", "adapter_name_or_path", "ref_model_adapters", "reward_model_adapters")
# The parser reads the model's config. This one has no limit of positions, no heads and no quantization.
_STAND_IN_CONFIG = {"model_type": "mamba", "tie_word_embeddings": False}


def refusal_of(recipe: Mapping[str, Any]) -> str | None:
    """Why the parser of a run refuses the recipe; None if it does not.

    A stand-in takes the place of the model, and a user's own reward functions and other models are left out.
    """
    with tempfile.TemporaryDirectory(prefix="grpo-stage-import-") as folder:
        Path(folder, "config.json").write_text(json.dumps(_STAND_IN_CONFIG), encoding="utf-8")
        values = {key: value for key, value in recipe.items() if key not in _MODELS}
        try:
            parse_without_run({**values, "model_name_or_path": folder}, on_device=False)
        except ValueError as error:
            return str(error)
    return None
