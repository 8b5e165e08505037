"""Runs from a recipe to saved weights, with transformers' generate."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_stage import workflow

from .conftest import completions, trainer_log


def test_lora_run_logs_plots_and_saves_an_adapter_that_the_host_chats_with_and_exports(
    recipe, run_exp, toy_reward, tmp_path
):
    arguments = recipe(log_completions=True, plot_loss=True, beta=0.05, reward_funcs=[toy_reward, "accuracy"])
    run_exp(arguments)
    output_dir = Path(arguments["output_dir"])

    log = [line for line in trainer_log(output_dir) if "loss" in line]
    assert [line["current_steps"] for line in log] == [1, 2]
    for line in log:
        assert line["total_steps"] == 2
        assert {"reward", "reward_std", "rewards/liked/mean", "rewards/accuracy/mean", "entropy", "kl", "lr"} <= (
            line.keys()
        )
        assert line["sampling/sampling_logp_difference/mean"] < 1e-4
    assert len(completions(output_dir)) == 2 * 2 * 4
    for name in ("loss", "reward", "completions_mean_length", "entropy", "kl"):
        assert (output_dir / f"training_{name}.png").stat().st_size > 1000
    adapter = load_file(output_dir / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in adapter.items())

    from llamafactory.chat import ChatModel
    from llamafactory.train.tuner import export_model

    infer = {key: arguments[key] for key in ("model_name_or_path", "template", "finetuning_type")}
    infer["adapter_name_or_path"] = str(output_dir)
    chat = ChatModel({**infer, "max_new_tokens": 4})
    assert chat.chat([{"role": "user", "content": "What is 1 + 1?"}])[0].response_length > 0
    export_model({**infer, "export_dir": str(tmp_path / "exported"), "export_device": "cpu"})
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "tuning",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"quantization_bit": 4},
        {"use_dora": True},
        {"disable_gradient_checkpointing": False},
        {"additional_target": "embed_tokens"},
        {"loraplus_lr_ratio": 4.0},
    ],
    ids=lambda tuning: next(iter(tuning.items())),
)
def test_every_tuning_method_moves_its_weights_and_keeps_the_canary_quiet(recipe, run_exp, tuning):
    arguments = recipe(beta=0.05, num_iterations=2, max_steps=3, **tuning)
    run_exp(arguments)
    lines = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert len(lines) == 3
    assert all(line["grad_norm"] > 0 for line in lines)
    assert lines[0]["sampling/sampling_logp_difference/mean"] < 1e-3
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5), "the reference is the policy as it starts"
    assert lines[1]["kl"] > 0


def test_continued_adapter_is_held_to_where_it_started_not_to_the_base(recipe, run_exp, tmp_path):
    first = recipe(output_dir=str(tmp_path / "first"), learning_rate=2e-2, max_steps=3)
    run_exp(first)
    second = recipe(adapter_name_or_path=first["output_dir"], beta=0.1, max_steps=2)
    run_exp(second)
    lines = [line for line in trainer_log(second["output_dir"]) if "loss" in line]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)

    # Had it been held to the base, this would have been the distance:
    to_base = recipe(
        output_dir=str(tmp_path / "base"),
        adapter_name_or_path=first["output_dir"],
        beta=0.1,
        ref_model=first["model_name_or_path"],
        max_steps=1,
    )
    run_exp(to_base)
    assert trainer_log(to_base["output_dir"])[0]["kl"] > 1e-3


def test_a_rewarded_behavior_is_learned(recipe, run_exp, decided_model_dir):
    """Half of the tokens are liked at first, most of them after 14 steps."""
    arguments = recipe(
        model_name_or_path=str(decided_model_dir),
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        num_generations=8,
        max_steps=14,
    )
    run_exp(arguments)
    rewards = [line["rewards/liked/mean"] for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert sum(rewards[:2]) / 2 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.85


def test_resume_replays_the_lost_steps_exactly(recipe, run_exp, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "num_iterations": 2,
        "log_completions": True,
    }
    whole = recipe(output_dir=str(tmp_path / "whole"), **settings)
    run_exp(whole)
    killed = recipe(output_dir=str(tmp_path / "killed"), **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    run_exp(killed)

    expected = [line for line in completions(whole["output_dir"]) if line["step"] > 2]
    assert completions(killed["output_dir"]) == expected
    shutil.rmtree(tmp_path / "killed")
    never_written = shutil.ignore_patterns("checkpoint-[46]", "grpo_finished.json")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=never_written)
    run_exp(killed)
    assert completions(killed["output_dir"]) == completions(whole["output_dir"]), "replayed steps do not stand twice"
    for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "killed" / "adapter_model.safetensors")[name])


def test_a_checkpoint_of_another_recipe_or_stage_is_refused(recipe, run_exp, tmp_path, monkeypatch):
    arguments = recipe(save_strategy="steps", save_steps=1, max_steps=1)
    run_exp(arguments)
    monkeypatch.setattr("grpo_stage.host.facade.load_model", lambda *_: pytest.fail("before a model is loaded"))
    with pytest.raises(ValueError, match=r"another recipe.*`learning_rate`"):
        run_exp({**arguments, "learning_rate": 5e-4})
    with pytest.raises(ValueError, match=r"is finished: it is at step 1 of 1"):
        run_exp(arguments)
    state_file = Path(arguments["output_dir"]) / "checkpoint-1" / "grpo_state.json"
    state_file.unlink()
    with pytest.raises(ValueError, match="not a checkpoint of `stage: grpo`"):
        run_exp(arguments)


def test_a_run_leaves_no_secret_and_is_not_resumed_with_other_code_or_rows(
    recipe, run_exp, tmp_path, dataset_dir, monkeypatch
):
    secret, renewed = "my-own-5ecret", "a-new-0ne"
    function, data = tmp_path / "judged.py", tmp_path / "data"
    source = "def judged(completions, api_key):\n    return [float(len(text)) for text in completions]\n"
    function.write_text(source)
    shutil.copytree(dataset_dir, data)
    arguments = recipe(
        reward_funcs=f"{function}:judged",
        reward_kwargs={"judged": {"api_key": secret}},
        hub_token=secret,
        dataset_dir=str(data),
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
        num_train_epochs=1,
        log_completions=True,
    )
    run_exp(arguments)
    files = [path for path in Path(arguments["output_dir"]).rglob("*") if path.is_file()]
    assert {"training_args.bin", "grpo_state.json"} <= {path.name for path in files}
    assert [path.name for path in files if secret.encode() in path.read_bytes()] == []

    arguments |= {"max_steps": 2, "reward_kwargs": {"judged": {"api_key": renewed}}}
    with monkeypatch.context() as patch:
        patch.setattr(workflow.facade, "load_model", None)
        function.write_text(f"{source}# edited\n")
        with pytest.raises(ValueError, match=r"Cannot resume: .*reward function `judged` has changed.*"):
            run_exp(arguments)
        function.write_text(source)
        rows = json.loads((data / "sums.json").read_text())
        rows[3]["answer"] = "another"
        (data / "sums.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=r"the dataset has other rows.* row 4\).*`resume_with_changes: true`"):
            run_exp(arguments)
    run_exp(arguments | {"resume_with_changes": True})
    assert [line["step"] for line in completions(arguments["output_dir"])][-1] == 2


def test_evaluation_gives_the_mean_reward_and_leaves_training_alone(recipe, run_exp, tmp_path):
    plain = recipe(output_dir=str(tmp_path / "plain"), val_size=3, log_completions=True, do_eval=True)
    run_exp(plain)
    evaluated = recipe(
        output_dir=str(tmp_path / "evaluated"), val_size=3, log_completions=True, eval_strategy="steps", eval_steps=1
    )
    run_exp(evaluated)
    rewards = [line["eval_reward"] for line in trainer_log(evaluated["output_dir"]) if "eval_reward" in line]
    assert len(rewards) == 2
    assert all(0 < reward < 1 for reward in rewards)
    assert completions(evaluated["output_dir"]) == completions(plain["output_dir"])


def test_a_dataset_without_references_is_refused_before_the_model_is_loaded(recipe, run_exp, dataset_dir, monkeypatch):
    rows = [{"question": "Write a poem."}]
    (dataset_dir / "bare.json").write_text(json.dumps(rows))
    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    info["bare"] = {"file_name": "bare.json", "columns": {"prompt": "question"}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))

    from grpo_stage.host import facade

    monkeypatch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="needs a reference answer"):
        run_exp(recipe(dataset="bare", reward_funcs="accuracy"))


def test_a_failing_reward_function_stops_the_run_and_says_where(recipe, run_exp, tmp_path):
    function = tmp_path / "broken.py"
    function.write_text("def broken(completions):\n    return [1 / 0 for _ in completions]\n")
    with pytest.raises(RuntimeError, match=r"(?s)broken.*ZeroDivisionError"):
        run_exp(recipe(reward_funcs=f"{function}:broken"))
