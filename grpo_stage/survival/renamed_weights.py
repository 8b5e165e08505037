"""Whole weights of a checkpoint that names them differently than the model does.

transformers renames and fuses weights of mixtures and of vision-language models when it loads a checkpoint, and takes
that back when it saves one. Trainer would find none of them, warn, and go on with those of the start.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def load_renamed_weights(model: Any, folder: str) -> bool:
    """Load the weights in `folder` into the model if their names differ. Returns whether they do."""
    if not isinstance(model, PreTrainedModel):
        return False
    names = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    if revert_weight_conversion(model, names).keys() == names.keys():
        return False
    saved = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype="auto")
    model.load_state_dict(saved.state_dict())
    return True
