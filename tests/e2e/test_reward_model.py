"""Reward models that the host's `stage: rm` trains, as rewards of GRPO runs."""

import json
import logging
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_stage.host import reward_models, sampling
from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.models import server
from grpo_stage.rewards.models.adapter_on_policy import _add_lora
from grpo_stage.rewards.models.server import RewardServerError, ServerScorer
from grpo_stage.rollout.sampler import Sampler
from grpo_stage.types import FinishReason

from .conftest import completions, trainer_log


ENDING = "<|im_end|>\n"
"""What `stage: rm` puts behind an answer in the template `smollm2`."""


class ModelLoadedError(Exception):
    """A run came as far as to load the policy."""


@pytest.fixture(scope="module")
def reward_adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with a value head: what `stage: rm` of the host makes of pairs in which the shorter one is
    preferred."""
    from llamafactory.train.tuner import run_exp

    folder = tmp_path_factory.mktemp("rm")
    rows = [
        {"question": f"What is {i} + {i}?", "chosen": f"{2 * i}", "rejected": f"I do not know what {i} + {i} is."}
        for i in range(16)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    columns = {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    run_exp(
        {
            "stage": "rm",
            "do_train": True,
            "model_name_or_path": str(tiny_model_dir),
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_target": "q_proj,v_proj,down_proj",
            "template": "smollm2",
            "dataset": "pairs",
            "dataset_dir": str(folder),
            "cutoff_len": 64,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "max_steps": 12,
            "logging_steps": 4,
            "save_strategy": "no",
            "output_dir": str(folder / "adapter"),
            "use_cpu": True,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }
    )
    log = [json.loads(line) for line in (folder / "adapter" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.8 * losses[0], "it has learned something"
    return folder / "adapter"


@pytest.fixture(scope="module")
def direct_score(tiny_model_dir: Path, reward_adapter: Path) -> Callable[[str], float]:
    """The score of a text by PEFT and the value head alone: one sequence at a time, nothing padded."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), reward_adapter).eval()
    head = load_file(reward_adapter / "value_head.safetensors")

    @torch.no_grad()
    def score(token_ids: tuple[int, ...]) -> float:
        hidden = model.base_model.model.model(torch.tensor([token_ids])).last_hidden_state[0, -1]
        return (head["v_head.summary.weight"] @ hidden + head["v_head.summary.bias"]).item()

    return score


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> list[tuple[tuple[int, ...], float]]:
    """What a run's reward model should read of each completion, and the score it gave; many completions end early."""
    seen: list[tuple[tuple[int, ...], float]] = []
    score = reward_models.ModelReward.__call__
    ending = tuple(AutoTokenizer.from_pretrained(tiny_model_dir).encode(ENDING, add_special_tokens=False))
    assert len(ending) == 2

    def watched(self: Any, groups: Any) -> Any:
        scores = score(self, groups)
        for group, values in zip(groups, scores, strict=True):
            for completion, value in zip(group.completions, values, strict=True):
                is_whole = completion.finish_reason is FinishReason.STOP
                answer = completion.token_ids[:-1] + ending if is_whole else completion.token_ids
                seen.append((group.prompt.token_ids + answer, value))
        return scores

    monkeypatch.setattr(reward_models.ModelReward, "__call__", watched)
    monkeypatch.setattr(sampling, "stop_token_ids", lambda *_: tuple(range(0, 2048, 8)))
    return seen


@pytest.fixture
def before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_stage.host import facade

    def loaded(*args: Any) -> None:
        raise ModelLoadedError

    monkeypatch.setattr(facade, "load_model", loaded)


def keys_of(kind: str, tiny_model_dir: Path, reward_adapter: Path) -> dict[str, Any]:
    if kind == "lora":
        return {"reward_model": str(reward_adapter)}
    return {
        "reward_model": str(tiny_model_dir),
        "reward_model_type": "full",
        "reward_model_adapters": str(reward_adapter),
    }


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_model_alone_scores_as_a_forward_pass_does(
    recipe, run_exp, tiny_model_dir, reward_adapter, direct_score, scored, kind
):
    arguments = recipe(
        reward_funcs=None,
        log_completions=True,
        learning_rate=2e-2,
        max_tokens_per_micro_batch=70,  # a few completions in a batch
        eval_dataset="tens,thousand",
        eval_strategy="steps",
        eval_steps=2,
        **keys_of(kind, tiny_model_dir, reward_adapter),
    )
    run_exp(arguments)
    assert len(scored) == 2 * 2 * 4 + 2 * 4 * 4, "two steps, and an evaluation after them and at the end"
    assert len({len(token_ids) for token_ids, _ in scored}) > 1
    ends = {token_ids[-1] for token_ids, _ in scored}
    assert len(ends) > 1, "some were cut"
    assert AutoTokenizer.from_pretrained(tiny_model_dir).encode("\n")[0] in ends, "and some ended"
    for token_ids, score in scored:
        assert score == pytest.approx(direct_score(token_ids), abs=1e-5)
    lines = completions(arguments["output_dir"])
    assert [line["reward"] for line in lines] == [score for _, score in scored[: len(lines)]]
    log = trainer_log(arguments["output_dir"])
    assert [line["rewards/reward_model/mean"] == line["reward"] for line in log if "loss" in line] == [True, True]
    assert any("eval_rewards/reward_model/mean@4" in line for line in log)
    assert not any("reward_model/pass@" in name or "reward_model/maj@" in name for line in log for name in line)


def test_an_adapter_leaves_the_policy_and_what_is_saved_as_if_the_scores_came_from_elsewhere(
    recipe, run_exp, tiny_model_dir, reward_adapter, tmp_path
):
    settings = {
        "reward_funcs": "reward_model,format",
        "reward_weights": "1,0.5",
        "max_steps": 4,
        "num_iterations": 2,
        "beta": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "log_completions": True,
    }
    runs = {}
    for kind in ("lora", "full"):
        keys = keys_of(kind, tiny_model_dir, reward_adapter)
        runs[kind] = recipe(output_dir=str(tmp_path / kind), **settings, **keys)
        run_exp(runs[kind])
    assert completions(runs["lora"]["output_dir"])[0]["rewards"].keys() == {"reward_model", "format"}
    for name in ("", "checkpoint-2", "checkpoint-4"):
        lora, full = (Path(runs[kind]["output_dir"], name) for kind in runs)
        assert sorted(p.name for p in lora.iterdir()) == sorted(p.name for p in full.iterdir())
        weights = [load_file(folder / "adapter_model.safetensors") for folder in (lora, full)]
        assert weights[0].keys() == weights[1].keys()
        for key, tensor in weights[0].items():
            assert torch.allclose(tensor, weights[1][key], atol=1e-5), key
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (lora, full)]
        assert configs[0]["r"] == configs[1]["r"] == 4

    resumed = dict(runs["lora"], output_dir=str(tmp_path / "resumed"))
    resumed["resume_from_checkpoint"] = str(Path(runs["lora"]["output_dir"], "checkpoint-2"))
    run_exp(resumed)
    weights = [load_file(Path(run["output_dir"], "adapter_model.safetensors")) for run in (resumed, runs["lora"])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_while_it_scores_and_after_a_failure_the_policy_is_what_it_was(recipe, run_exp, reward_adapter, monkeypatch):
    """Parameters, what of them is trained, modes and outputs."""
    checked, policies = [], []
    sync, score = Sampler.sync, Sampler.score

    def states(model: Any) -> tuple[Any, ...]:
        parameters = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
        modes = [module.training for module in model.modules()]
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6, 7]])).logits
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        own = [hook for hook in hooks if isinstance(hook, partial) and hook.func is _add_lora]
        return parameters, modes, logits, own  # transformers leaves inert ones of its own where it collects states

    def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
        for name, (parameter, requires_grad) in one[0].items():
            assert torch.equal(parameter, other[0][name][0]), name
            assert requires_grad == other[0][name][1], name
        assert one[1] == other[1], "training or evaluation mode"
        assert torch.equal(one[2], other[2]), "logits"
        assert one[3] == other[3] == [], "hooks"

    def synced(self: Sampler, policy: Any, version: int) -> None:
        policies.append(policy)
        sync(self, policy, version)

    def watched(self: Sampler, groups: Any, progress: Any) -> Any:
        model = policies[-1]
        before = states(model)
        scores = score(self, groups, progress)
        assert_same(before, states(model))

        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        handle = model.base_model.model.lm_head.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            score(self, groups, progress)
        handle.remove()
        assert_same(before, states(model))
        checked.append(len(groups))
        return scores

    monkeypatch.setattr(Sampler, "sync", synced)
    monkeypatch.setattr(Sampler, "score", watched)
    run_exp(recipe(reward_funcs=None, reward_model=str(reward_adapter), learning_rate=2e-2))
    assert checked == [2, 2]


@pytest.mark.parametrize("base", ["quantized", "continued"])
def test_an_adapter_is_put_on_the_base_of_any_policy_of_the_same_base(
    recipe, run_exp, reward_adapter, direct_score, scored, tmp_path, base
):
    if base == "quantized":
        run_exp(recipe(reward_funcs=None, reward_model=str(reward_adapter), quantization_bit=4, max_steps=1))
        assert all(score == pytest.approx(direct_score(token_ids), abs=0.5) for token_ids, score in scored)
    else:
        first = recipe(output_dir=str(tmp_path / "first"), learning_rate=2e-2, max_steps=2)
        run_exp(first)
        run_exp(
            recipe(
                reward_funcs=None,
                reward_model=str(reward_adapter),
                adapter_name_or_path=first["output_dir"],
                max_steps=1,
            )
        )
        assert all(score == pytest.approx(direct_score(token_ids), abs=1e-5) for token_ids, score in scored)
    assert len(scored) == 8


def test_a_reward_server_gets_the_text_with_its_special_tokens(
    recipe, run_exp, tiny_model_dir, reward_server_here, scored
):
    server = reward_server_here
    run_exp(recipe(reward_funcs=None, reward_model=server.url, reward_model_type="api", max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    expected = {tokenizer.decode(token_ids, skip_special_tokens=False): score for token_ids, score in scored}
    assert len(scored) == 8
    assert set(server.texts[1:]) == set(expected), "after the question whether it is there"
    assert all("<|im_start|>user" in text for text in expected)
    assert any(text.endswith(ENDING) for text in expected)
    assert all(score == len(text) for text, score in expected.items())
    longest = max(len(token_ids) for token_ids, _ in scored)
    assert all(request["max_length"] > longest for request in server.requests[1:]), "nothing is cut"


def test_a_reward_server_that_is_not_there_or_fails_stops_the_run(recipe, run_exp, reward_server_here, monkeypatch):
    from grpo_stage.host import facade

    server = reward_server_here
    api = {"reward_funcs": None, "reward_model_type": "api"}
    with monkeypatch.context() as patch:
        patch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
        for url in ("http://127.0.0.1:9/v1/score/evaluation", server.url):
            server.answer = {"detail": "no such route"}
            with pytest.raises(ValueError, match=rf"reward_model: {url}` .*no reward server that answers.*api"):
                run_exp(recipe(reward_model=url, **api))
    server.answer = None
    score = Sampler.score

    def later(self: Sampler, groups: Any, progress: Any) -> Any:
        server.answer = {"scores": [1.0]}
        return score(self, groups, progress)

    monkeypatch.setattr(Sampler, "score", later)
    with pytest.raises(RewardError, match=r"'reward_model': .* answered with 1 scores for \d+ texts\nprompt: What is"):
        run_exp(recipe(reward_model=server.url, **api))


def test_a_server_that_restarts_is_asked_again(recipe, run_exp, reward_server_here, monkeypatch, scored):
    monkeypatch.setattr(server, "RETRY_WAITS_S", (0.01, 0.01))
    score = Sampler.score

    def later(self: Sampler, groups: Any, progress: Any) -> Any:
        reward_server_here.failures = [502, 503]
        return score(self, groups, progress)

    monkeypatch.setattr(Sampler, "score", later)
    run_exp(recipe(reward_funcs=None, reward_model=reward_server_here.url, reward_model_type="api", max_steps=1))
    assert len(scored) == 8
    assert reward_server_here.failures == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"scores": 4}, "no list of finite scores: {"),
        ({"scores": [1.0, None]}, "no list of finite scores"),
        ({"scores": [[1.0], [2.0]]}, "no list of finite scores"),
        ({"scores": [1.0, float("nan")]}, "no list of finite scores"),
        ({"scores": [True, 1.0]}, "no list of finite scores"),
        ({"detail": "no such model"}, "no such model"),
        ([1.0, 2.0], "status 200"),
        ({"scores": [1.0]}, "1 scores for 2 texts"),
    ],
)
def test_only_a_finite_score_for_each_text_is_an_answer(reward_server_here, tiny_model_dir, answer, said):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    reward_server_here.answer = answer
    with pytest.raises(RewardServerError) as error:
        ServerScorer(reward_server_here.url, tokenizer, 10.0)([(5,), (6,)])
    assert said in str(error.value)
    reward_server_here.answer = {"scores": [1, 2.5]}
    assert ServerScorer(reward_server_here.url, tokenizer, 10.0)([(5,), (6,)]) == [1.0, 2.5]


def test_a_failing_server_is_quoted(reward_server_here, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(server, "RETRY_WAITS_S", (0.01,))
    scorer = ServerScorer(reward_server_here.url, AutoTokenizer.from_pretrained(tiny_model_dir), 10.0)
    reward_server_here.failures = [500, 502]
    with pytest.raises(RewardServerError, match=r"answered with status 502: (?s:.*)one moment"):
        scorer([(5,)])
    assert reward_server_here.failures == [], "it was asked twice"
    reward_server_here.failures = [404]
    with pytest.raises(RewardServerError, match="answered with status 404"):
        scorer([(5,)])
    assert scorer([(5,)]) == [pytest.approx(1.0, abs=20)], "a mistake of the user's is not asked again"


def test_a_server_that_does_not_answer_in_time_is_not_waited_for(tiny_model_dir):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/score/evaluation"
        scorer = ServerScorer(url, AutoTokenizer.from_pretrained(tiny_model_dir), 0.2)
        with pytest.raises(RewardServerError, match=r"did not answer within 0.2 s \(`reward_timeout`\)"):
            scorer([(5,)])


@pytest.mark.usefixtures("before_the_model")
def test_what_is_no_reward_model_is_refused_before_a_model_is_loaded(
    recipe, run_exp, tiny_model_dir, reward_adapter, tmp_path
):
    full = {"reward_funcs": None, "reward_model": str(tiny_model_dir), "reward_model_type": "full"}
    with pytest.raises(ValueError, match=rf"`reward_model: {tiny_model_dir}` has no value head"):
        run_exp(recipe(**full))
    headless = tmp_path / "headless"
    headless.mkdir()
    (headless / "adapter_config.json").write_text((reward_adapter / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=rf"`reward_model: {headless}` has no value head"):
        run_exp(recipe(reward_funcs=None, reward_model=str(headless)))


@pytest.mark.usefixtures("before_the_model")
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    ("names", "size"), [("score.weight score.bias", 64), ("v_head.summary.weight", 64), (None, 32), (None, 64)]
)
def test_a_value_head_that_would_be_dropped_is_refused(
    recipe, run_exp, tiny_model_dir, reward_adapter, tmp_path, kind, names, size
):
    """The host loads what it knows of the file, and leaves the rest of the head random."""
    folder = shutil.copytree(reward_adapter, tmp_path / "rm")
    names = names.split() if names else ["v_head.summary.weight", "v_head.summary.bias"]
    head = dict(zip(names, (torch.zeros(1, size), torch.zeros(1)), strict=False))
    save_file(head, folder / "value_head.safetensors")
    arguments = recipe(reward_funcs=None, **keys_of(kind, tiny_model_dir, folder))
    if (len(names), names[0], size) == (2, "v_head.summary.weight", 64):
        with pytest.raises(ModelLoadedError):
            run_exp(arguments)
        return
    with pytest.raises(ValueError, match=rf"reward_model.*: {folder}` has a value head that does not fit.*stage: rm"):
        run_exp(arguments)


@pytest.mark.usefixtures("before_the_model")
def test_an_adapter_that_was_trained_on_another_model_is_refused(
    recipe, run_exp, tiny_model_dir, reward_adapter, tmp_path, caplog
):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    own = {"reward_funcs": None, "model_name_or_path": str(other)}
    with pytest.raises(ValueError, match="another model than the policy") as error:
        run_exp(recipe(**own, reward_model=str(reward_adapter)))
    for part in (f"`reward_model: {reward_adapter}`", f"`base_model_name_or_path: {tiny_model_dir}`", str(other)):
        assert part in str(error.value)
    assert "reward_model_type: full" in str(error.value)

    link = tmp_path / "link"
    link.symlink_to(tiny_model_dir)
    with pytest.raises(ModelLoadedError):
        run_exp(recipe(reward_funcs=None, model_name_or_path=str(link), reward_model=str(reward_adapter)))

    # The way out that the message gives where both are one model.
    moved = shutil.copytree(reward_adapter, tmp_path / "moved")
    file = moved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ModelLoadedError):
        run_exp(recipe(**own, reward_model=str(moved)))

    with caplog.at_level(logging.WARNING), pytest.raises(ModelLoadedError):
        run_exp(recipe(reward_funcs=None, **keys_of("full", other, reward_adapter)))
    assert f"was trained on {tiny_model_dir}" in caplog.text


def test_a_policy_from_scratch_leaves_the_reward_model_its_weights(
    recipe, run_exp, tiny_model_dir, reward_adapter, direct_score, scored
):
    keys = keys_of("full", tiny_model_dir, reward_adapter)
    run_exp(recipe(reward_funcs=None, train_from_scratch=True, max_steps=1, **keys))
    assert len(scored) == 8
    assert all(score == pytest.approx(direct_score(token_ids), abs=1e-5) for token_ids, score in scored)


def test_new_tokens_need_a_reward_model_that_has_them(
    recipe, run_exp, tiny_model_dir, reward_adapter, scored, tmp_path, monkeypatch
):
    from grpo_stage.host import facade

    arguments = recipe(
        reward_funcs=None, add_tokens="<a>,<b>", max_steps=1, **keys_of("full", tiny_model_dir, reward_adapter)
    )
    with monkeypatch.context() as patch:
        patch.setattr(facade, "load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(
            ValueError, match=r"`reward_model: .*another vocabulary.*2 of another id or none.*'<[ab]>'"
        ):
            run_exp(arguments)

    extended = tmp_path / "extended"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<a>", "<b>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)  # as the host does with the policy
    model.save_pretrained(extended)
    tokenizer.save_pretrained(extended)
    shutil.copy(reward_adapter / "value_head.safetensors", extended)
    del arguments["reward_model_adapters"]
    run_exp(arguments | {"reward_model": str(extended)})
    assert len(scored) == 8
