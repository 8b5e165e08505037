"""`ref_model` must speak the policy's tokens."""

import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def test_a_reference_of_another_vocabulary_is_refused(recipe, run_exp, tiny_model_dir, tmp_path):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).unlink()
    vocabulary = {"<unk>": 0, "a": 1, " the": 2, "Ġthe": 3}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "<unk>"))).save_pretrained(other)
    with pytest.raises(ValueError, match=r"ref_model: .*another vocabulary"):
        run_exp(recipe(ref_model=str(other), beta=0.1))
