"""What the facade mirrors of the host, compared with the host itself."""

import importlib
import json
import logging
from types import SimpleNamespace

import pytest
from llamafactory.train import tuner
from llamafactory.train.callbacks import LogCallback

from grpo_stage.host import facade
from grpo_stage.host.parser import RunArguments
from grpo_stage.workflow import stop_token_ids


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
    }
    finetuning_args = SimpleNamespace(**{**defaults, "stage": "sft", "use_mca": False, **finetuning})
    training_args = SimpleNamespace(**{"enable_torch_profiler": False, "profile_modules": None, **training})
    arguments = RunArguments(None, None, training_args, finetuning_args, None, frozenset())
    given_to_stage = []
    monkeypatch.setattr(tuner, "get_train_args", lambda _: (None, None, training_args, finetuning_args, None))
    monkeypatch.setattr(tuner, "run_sft", lambda *args: given_to_stage.extend(args[-1]))
    tuner._training_function({"args": {"stage": "sft"}, "callbacks": []})

    expected = [
        LogCallback if type(c) is facade.MetricsLogCallback else type(c) for c in facade.stage_callbacks(arguments)
    ]
    assert [type(callback) for callback in given_to_stage] == expected


@pytest.mark.parametrize("module", ["grpo_stage.workflow", "grpo_stage.host.datasets", "grpo_stage.host.checks"])
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


@pytest.mark.parametrize(
    ("configured", "template_stops", "expected"),
    [(2, [2], (2,)), ([7, 9], [2, 9], (2, 7, 9)), (None, [2, None], (2,)), (5, [2, 0], (2, 5))],
)
def test_every_end_token_ends_a_completion(configured, template_stops, expected):
    """Those of the generation config, of the template, and the tokenizer's; an unknown stop word is no token."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    template = SimpleNamespace(get_stop_token_ids=lambda _: template_stops)
    tokenizer = SimpleNamespace(eos_token_id=2, unk_token_id=0)
    assert stop_token_ids(model, template, tokenizer) == expected
