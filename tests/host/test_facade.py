"""What the facade mirrors of the host, compared with the host itself."""

import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams.data_args import DataArguments
from llamafactory.train import tuner
from llamafactory.train.callbacks import LogCallback, PissaConvertCallback
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from grpo_stage.host import facade
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.sampling import stop_token_ids
from grpo_stage.plugin import launch


@pytest.mark.parametrize(
    ("finetuning", "training"),
    [
        ({}, {}),
        ({"early_stopping_steps": 2}, {}),
        ({"pissa_convert": True}, {"profile_modules": "model.layers.0"}),
        ({}, {"enable_torch_profiler": True}),
    ],
)
def test_callbacks_are_those_the_host_gives_every_stage(monkeypatch, finetuning, training):
    defaults = {
        "pissa_convert": False,
        "use_swanlab": False,
        "early_stopping_steps": None,
        "use_hyper_parallel": False,
        "use_megatron_bridge": False,
    }
    finetuning_args = SimpleNamespace(**{**defaults, "stage": "sft", "use_mca": False, **finetuning})
    training_args = SimpleNamespace(**{"enable_torch_profiler": False, "profile_modules": None, **training})
    arguments = RunArguments(None, None, training_args, finetuning_args, None, frozenset())
    given_to_stage = []
    monkeypatch.setattr(tuner, "get_train_args", lambda _: (None, None, training_args, finetuning_args, None))
    monkeypatch.setattr(tuner, "run_sft", lambda *args: given_to_stage.extend(args[-1]))
    tuner._training_function({"args": {"stage": "sft"}, "callbacks": []})

    ours = {facade.MetricsLogCallback: LogCallback, facade.PissaCallback: PissaConvertCallback}
    expected = [ours.get(type(callback), type(callback)) for callback in facade.stage_callbacks(arguments)]
    assert [type(callback) for callback in given_to_stage] == expected


def test_a_resumed_run_keeps_the_adapter_that_pissa_began_with(tmp_path):
    """The host would take the resumed adapter for the initial one, and convert to another policy."""

    class Policy(PeftModel):
        peft_config = {"default": SimpleNamespace(init_lora_weights="pissa")}  # noqa: RUF012

        def __init__(self):
            torch.nn.Module.__init__(self)

        def save_pretrained(self, folder, **kwargs):
            Path(folder).mkdir()

    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    callback = facade.PissaCallback()
    with pytest.raises(ValueError, match=r"`pissa_convert: true` .*pissa_init is not there"):
        callback.on_train_begin(args, SimpleNamespace(global_step=3), None, model=Policy())
    callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=Policy())
    assert (tmp_path / "pissa_init").is_dir()
    callback.on_train_begin(args, SimpleNamespace(global_step=3), None, model=Policy())  # would fail to make it again


@pytest.mark.parametrize("is_used", [False, True])
def test_a_run_owns_its_folder_before_anything_of_it_begins(tmp_path, monkeypatch, is_used):
    begun = []
    monkeypatch.setattr(launch.gc, "freeze", lambda: begun.append("imports stay"))
    monkeypatch.setattr(launch, "stage_callbacks", lambda _: begun.append("callbacks") or [])
    monkeypatch.setattr(
        launch, "run_grpo", lambda *given: begun.append((given[1](None), os.listdir(tmp_path / "out")))
    )
    monkeypatch.chdir(tmp_path)
    training = SimpleNamespace(output_dir="out", should_save=True)
    hold = (
        "import sys; from grpo_stage.survival.run_lock import owned\n"
        "with owned('out'): print(flush=True), sys.stdin.read()"
    )
    with contextlib.ExitStack() as others:
        if is_used:
            other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            others.callback(other.communicate)
            other.stdout.readline()
            others.enter_context(pytest.raises(ValueError, match=rf"is in use: process {other.pid} "))
        launch.run(SimpleNamespace(training=training), [])
    assert begun == ([] if is_used else ["imports stay", "callbacks", ([], ["_grpo_stage.lock"])])
    assert training.output_dir == str(tmp_path / "out"), "wherever a reward function changes to"


def test_the_boards_stop_while_the_model_is_loaded_is_left_to_the_stage(tmp_path, monkeypatch):
    """The host's callback takes SIGABRT for itself, and only notes it for the end of the next step."""
    monkeypatch.setenv("LLAMABOARD_ENABLED", "1")
    monkeypatch.setenv("LLAMABOARD_WORKDIR", str(tmp_path))
    before = signal.signal(signal.SIGABRT, ours := lambda *_: None)
    try:
        callback = facade.MetricsLogCallback()
        assert signal.getsignal(signal.SIGABRT) is ours
    finally:
        signal.signal(signal.SIGABRT, before)
        for logger in (logging.getLogger("llamafactory"), logging.getLogger("transformers")):
            logger.removeHandler(callback.logger_handler)


def test_a_resumed_run_keeps_its_log_where_the_folder_may_be_overwritten(tmp_path):
    log = tmp_path / "trainer_log.jsonl"
    lines = [json.dumps({"current_steps": step}) + "\n" for step in (1, 2, 3)]
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, overwrite_output_dir=True)
    for resumed_at, kept in ((2, lines[:2]), (0, [])):
        log.write_text("".join(lines))
        callback = facade.MetricsLogCallback()
        callback.on_init_end(args, None, None)
        callback.on_train_begin(args, SimpleNamespace(global_step=resumed_at, max_steps=3), None)
        callback.on_train_end(args, None, None)
        assert log.read_text() == "".join(kept)


@pytest.mark.parametrize("module", ["grpo_stage.workflow", "grpo_stage.host.datasets", "grpo_stage.host.advice"])
def test_messages_go_where_the_hosts_go(module):
    """To the console and to LLaMA Board, from INFO on."""
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    host_logger = logging.getLogger("llamafactory")
    host_logger.addHandler(handler)
    try:
        importlib.import_module(module).logger.info_rank0("a word to the user")
    finally:
        host_logger.removeHandler(handler)
    assert [record.getMessage() for record in seen] == ["a word to the user"]


def test_log_lines_hold_every_metric_and_the_hosts_keys_win(tmp_path):
    callback = facade.MetricsLogCallback()
    args = SimpleNamespace(should_save=True, output_dir=str(tmp_path), overwrite_output_dir=False)
    state = SimpleNamespace(global_step=0, max_steps=4, log_history=[], num_input_tokens_seen=0)
    callback.on_train_begin(args, state, None)
    for step in (1, 2):
        state.global_step = step
        state.log_history.append({"loss": 0.5, "kl": step / 10, "reward": 0.25, "percentage": -1, "step": step})
        callback.on_log(args, state, None)
    callback.on_train_end(args, state, None)
    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert [(line["current_steps"], line["kl"], line["percentage"]) for line in lines] == [
        (1, 0.1, 25.0),
        (2, 0.2, 50.0),
    ]
    assert all(line["reward"] == 0.25 and "step" not in line for line in lines)


def _log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def _begun(folder: Path, global_step: int, should_save: bool = True) -> tuple[facade.MetricsLogCallback, tuple]:
    args = SimpleNamespace(should_save=should_save, output_dir=str(folder), overwrite_output_dir=False)
    state = SimpleNamespace(global_step=global_step, max_steps=10, log_history=[], num_input_tokens_seen=0)
    callback = facade.MetricsLogCallback()
    callback.on_train_begin(args, state, None)
    return callback, (args, state, None)


@pytest.mark.parametrize(("resumed_from", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2, 2]), (3, [0, 1, 2, 2, 3])])
def test_a_resumed_run_cuts_the_log_at_its_step(tmp_path, resumed_from, kept):
    lines = [{"current_steps": 0, "eval_reward": 0.5}, *({"current_steps": i, "loss": 0.1} for i in (1, 2, 2, 3))]
    of_the_end = {"current_steps": 3, "train_loss": 0.1}  # which is to come again
    log = "".join(json.dumps(line) + "\n" for line in (*lines, of_the_end)) + '{"current_steps": 1, "lo'
    (tmp_path / "trainer_log.jsonl").write_text(log)
    _begun(tmp_path, resumed_from, should_save=False)
    assert (tmp_path / "trainer_log.jsonl").read_text() == log, "that is the saving rank's"
    callback, event = _begun(tmp_path, resumed_from)
    callback.on_train_end(*event)
    assert [line["current_steps"] for line in _log_lines(tmp_path)] == kept


def test_a_resumed_run_estimates_its_end_from_its_own_steps(tmp_path):
    callback, (args, state, control) = _begun(tmp_path, global_step=6)
    callback.start_time -= 200  # two steps, of 100 s each
    state.log_history.append({"loss": 0.5})
    state.global_step = 8
    callback.on_log(args, state, control)
    callback.on_train_end(args, state, control)
    (line,) = _log_lines(tmp_path)
    assert (line["current_steps"], line["total_steps"], line["percentage"]) == (8, 10, 80.0)
    assert line["remaining_time"] == "0:03:20"


@pytest.fixture
def gpt2_like_tokenizer():
    """One token for the unknown, the beginning and the end, as GPT-2 has it."""
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "<|im_end|>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<|endoftext|>")),
        **dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    )


@pytest.mark.parametrize(
    ("template", "configured", "expected"),
    [
        ("default", 0, (0,)),
        ("qwen", 0, (0, 3)),  # whose `<|im_end|>` becomes the tokenizer's EOS
        ("qwen", [1, 0], (0, 1, 3)),
        ("qwen", None, (3,)),
        ("qwen", 2, (2, 3)),
    ],
)
def test_every_end_token_ends_a_completion(gpt2_like_tokenizer, template, configured, expected):
    """Those of the generation config, of the template, and the tokenizer's."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    fixed = get_template_and_fix_tokenizer(gpt2_like_tokenizer, DataArguments(template=template))
    assert stop_token_ids(model, fixed, gpt2_like_tokenizer) == expected


@pytest.mark.parametrize(("words", "expected"), [(["c"], (1,)), (["c", "b"], (1, 2)), (["<|endoftext|>"], (0, 1))])
def test_a_stop_word_that_the_tokenizer_lacks_is_no_token(gpt2_like_tokenizer, words, expected):
    gpt2_like_tokenizer.eos_token = "a"
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert stop_token_ids(model, SimpleNamespace(stop_words=words), gpt2_like_tokenizer) == expected
