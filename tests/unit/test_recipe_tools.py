"""`grpo-stage recipe`: recipes of other systems become ours, and ours are shared without anything private."""

import hashlib
import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.host.parser import known_key_names
from grpo_stage.host.recipe_text import read_recipe
from grpo_stage.host.shared_recipe import export, read_shared, without_private
from grpo_stage.records.run_record import RUN_FILE, read_run_record, write_run_record
from grpo_stage.tools import cli
from grpo_stage.tools.porting import batch, swift, trl
from grpo_stage.tools.porting.files import port_file
from grpo_stage.tools.porting.own_check import refusal_of
from grpo_stage.tools.porting.port import Fate, Port
from grpo_stage.tools.recipe import differing


FOREIGN = Path(__file__).with_name("foreign_recipes")


def ported(name: str, trl_version: str = "0.24", devices: int = 1, source_devices: int | None = None) -> Port:
    return port_file(FOREIGN / name, known_key_names(), trl_version, source_devices, devices)[1]


def port_of_trl(known: Collection[str] = frozenset(), version: str = "0.24", **keys: Any) -> Port:
    return trl.port_trl(keys, known or known_key_names(), version, None, 1)


def fates(port: Port) -> Mapping[str, Fate]:
    return {line.key: line.fate for line in port.lines}


@pytest.mark.parametrize("path", sorted(FOREIGN.iterdir()), ids=lambda path: path.stem)
def test_every_key_has_a_fate_and_our_own_check_accepts_the_result(path: Path) -> None:
    port = ported(path.name)
    written = {key for key, value in port.source.items() if value is not None}
    assert written <= {line.key for line in port.lines}
    assert len([line.key for line in port.lines]) == len({line.key for line in port.lines})
    assert all(line.note for line in port.lines if line.fate is Fate.LEFT)
    assert refusal_of(port.recipe) is None


# Batches. Expected numbers are worked out by hand from what TRL and verl document.


@pytest.mark.parametrize(
    ("arguments", "prompts", "steps"),
    [
        # 16 x 4 completions, 16 a prompt: 4 prompts
        ({"per_device": 16, "accumulation": 4, "group_size": 16, "devices": 1, "our_devices": 1}, 4, 1),
        # the same on 8 devices there and on 4 here: 32 prompts, 8 each
        ({"per_device": 16, "accumulation": 4, "group_size": 16, "devices": 8, "our_devices": 4}, 8, 1),
        # a rollout of 16 micro-steps feeds 4 optimizer steps of 4
        (
            {"per_device": 8, "accumulation": 4, "group_size": 8, "devices": 1, "our_devices": 1}
            | {"micro_steps_per_generation": 16},
            4,
            4,
        ),
        # as many micro-steps, written as completions: 8 x 2 devices x 16
        (
            {"per_device": 8, "accumulation": 4, "group_size": 8, "devices": 2, "our_devices": 2}
            | {"generation_batch_size": 256},
            4,
            4,
        ),
        # two rollouts in one optimizer step: the same policy samples both
        (
            {"per_device": 8, "accumulation": 4, "group_size": 8, "devices": 1, "our_devices": 1}
            | {"micro_steps_per_generation": 2},
            4,
            1,
        ),
    ],
)
def test_completions_become_prompts(arguments: dict[str, int], prompts: int, steps: int) -> None:
    made = batch.of_completions(**arguments)
    assert made.is_exact
    assert made.keys == {
        "per_device_train_batch_size": prompts,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": steps,
    }


@pytest.mark.parametrize(
    "made",
    [
        batch.of_completions(16, 16, 7, 1, 1),  # 256 / 7
        batch.of_completions(16, 1, 8, 1, 4),  # 2 prompts on 4 devices
        batch.of_completions(8, 4, 8, 1, 1, micro_steps_per_generation=6),  # 1.5 steps
        batch.of_prompts(500, 128, 1),
    ],
)
def test_a_batch_that_cannot_be_the_same_says_so(made: batch.Batch) -> None:
    assert not made.is_exact
    assert "rounded" in made.note


def test_devices_of_the_file_count() -> None:
    port = ported("open_r1_demo.yaml")  # num_processes: 7, and 7 completions a prompt
    assert port.recipe["per_device_train_batch_size"] == 16 * 16
    assert not any(line.changes_learning for line in port.lines)
    assert ported("open_r1_demo.yaml", devices=8).recipe["per_device_train_batch_size"] == 32
    assert ported("swift.sh").recipe["per_device_train_batch_size"] == 4 * 4 * 4 // 8  # NPROC_PER_NODE=4


def test_rollouts_there_are_steps_times_epochs_here() -> None:
    recipe = ported("verl.yaml").recipe
    assert (recipe["per_device_train_batch_size"], recipe["steps_per_generation"]) == (256, 4)
    assert recipe["num_iterations"] == 2
    # 1024 / 256 steps x 2 epochs of a rollout
    assert (recipe["save_steps"], recipe["warmup_steps"]) == (20 * 8, 10 * 8)


# Names and defaults


def test_trl_keys_are_taken_under_our_names() -> None:
    port = ported("open_r1_code.yaml")
    recipe = port.recipe
    assert recipe["max_new_tokens"] == 8192
    assert (recipe["cutoff_len"], recipe["overlong_prompts"]) == (2000, "truncate")
    assert recipe["default_system"] == "Think, then answer."
    assert recipe["scale_rewards"] == "none"
    assert recipe["rollout_backend"] == "vllm"
    assert recipe["finetuning_type"] == "full"
    entry = recipe["dataset_dir"]["codeforces-verifiable"]
    assert entry == {
        "hf_hub_url": "open-r1/codeforces-verifiable",
        "split": "train",
        "columns": {"prompt": "prompt_c++17", "response": "solution"},
    }
    assert {"wandb_project", "callbacks", "benchmarks", "code_language"} <= {
        line.key for line in port.lines if line.fate is Fate.LEFT and not line.changes_learning
    }


def test_reward_functions_become_built_in_ones_or_are_left_with_their_weight() -> None:
    port = ported("open_r1_code.yaml")
    assert port.recipe["reward_funcs"] == "length,repetition,my_rewards:brevity"
    assert port.recipe["reward_weights"] == "0.5,0.25,0.1"
    assert port.recipe["reward_kwargs"] == {
        "length": {
            "min_value_wrong": 0.0,
            "max_value_wrong": -0.5,
            "min_value_correct": 0.5,
            "max_value_correct": 2.0,
        },
        "repetition": {"ngram_size": 4},
    }
    (line,) = [line for line in port.lines if line.key == "reward_funcs"]
    assert line.changes_learning
    assert "cf_code is left" in line.note


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.14", {"beta": 0.04, "temperature": 0.9, "loss_type": "grpo"}),
        ("0.17.0", {"beta": 0.04, "temperature": 0.9, "loss_type": "bnpo"}),
        ("0.18", {"beta": 0.04, "loss_type": "bnpo"}),
        ("0.19", {"loss_type": "bnpo"}),
        ("0.22", {}),
        ("0.24", {"rollout_correction": "token"}),
    ],
)
def test_defaults_of_a_version_of_trl_are_written_where_ours_differ(version: str, expected: dict[str, Any]) -> None:
    recipe = port_of_trl(version=version, use_vllm=True).recipe
    watched = ("beta", "temperature", "loss_type", "rollout_correction")
    assert {key: recipe[key] for key in watched if key in recipe} == expected
    assert recipe["learning_rate"] == 1e-6
    assert (recipe["max_new_tokens"], recipe["cutoff_len"]) == (256, 512)
    written = port_of_trl(version=version, beta=0.01, temperature=0.5, loss_type="dr_grpo", learning_rate=3e-6).recipe
    assert [written[key] for key in ("beta", "temperature", "loss_type", "learning_rate")] == [
        *(0.01, 0.5, "dr_grpo", 3e-6)
    ]


def test_the_defaults_are_those_of_the_installed_trl() -> None:
    """The host brings TRL 0.24."""
    found = find_spec("trl")
    assert found is not None
    source = Path(next(iter(found.submodule_search_locations or ())))
    text = (source / "trainer" / "grpo_config.py").read_text(encoding="utf-8")

    def default(name: str) -> Any:
        declared = text.split(f"\n    {name}: ", 1)[1].split("default=", 1)[1]
        return yaml.safe_load(declared.split(",\n", 1)[0])

    defaults = trl.defaults_of(trl.NEWEST)
    for name in ("beta", "temperature", "loss_type", "learning_rate", "num_generations"):
        assert float(default(name)) == defaults[name] if name != "loss_type" else default(name) == defaults[name], name
    assert default("max_completion_length") == defaults["max_completion_length"]
    assert default("max_prompt_length") == defaults["max_prompt_length"]
    assert default("vllm_importance_sampling_correction") is defaults["corrects"]


def test_a_version_of_trl_whose_defaults_are_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.14 to 0\.24 are known"):
        trl.defaults_of("1.16")
    with pytest.raises(ValueError, match="no version"):
        trl.defaults_of("newest")


@pytest.mark.parametrize(
    ("keys", "urls"),
    [
        ({"vllm_mode": "server"}, "http://localhost:8000"),
        ({"vllm_server_host": "0.0.0.0", "vllm_server_port": 8001}, "http://localhost:8001"),
        ({"vllm_mode": "server", "vllm_server_host": "a"}, "http://a:8000"),
        ({"vllm_server_base_url": "http://a:1"}, "http://a:1"),
        ({"vllm_mode": "server", "vllm_server_host": ["a", "b"], "vllm_server_port": [1, 2]}, "http://a:1,http://b:2"),
        ({"vllm_mode": "colocate", "vllm_server_host": "a"}, None),
        ({}, None),
    ],
)
def test_servers_of_trl(keys: dict[str, Any], urls: str | None) -> None:
    port = port_of_trl(use_vllm=True, **keys)
    assert port.recipe["rollout_backend"] == ("vllm" if urls is None else "vllm_server")
    assert urls is None or port.recipe["vllm_server_urls"] == urls


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"use_vllm": True}, 6),
        ({"use_vllm": True, "vllm_mode": "server"}, None),
        ({"use_vllm": False}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("system", ["TRL", "ms-swift"])
def test_an_engine_of_several_devices(system: str, keys: dict[str, Any], size: int | None) -> None:
    """Where servers or transformers sample there is no such key, and the stand-in for the model refuses no size."""
    source = {"reward_funcs": "accuracy", "vllm_tensor_parallel_size": 6, **keys}
    if system == "TRL":
        port = port_of_trl(model_name_or_path="a/b", dataset_name="a/c", **source)
    else:
        port = swift.port_swift({"model": "a/b", "dataset": "a/c", **source}, known_key_names(), None, 1)
    assert port.recipe.get("vllm_tensor_parallel") == size
    (line,) = (line for line in port.lines if line.key == "vllm_tensor_parallel_size")
    assert not line.changes_learning
    assert line.note or size
    assert refusal_of(port.recipe) is None


def test_lora_of_trl() -> None:
    port = port_of_trl(use_peft=True, lora_r=8, lora_target_modules="all-linear", lora_dropout=0.05, load_in_4bit=True)
    expected = {"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 32, "lora_target": "all"}
    assert expected.items() <= port.recipe.items()
    assert port.recipe["quantization_bit"] == 4
    assert fates(port)["lora_dropout"] is Fate.LEFT


def test_unknown_and_refused_keys_are_left_and_count_if_they_may_change_what_is_learned() -> None:
    port = port_of_trl(top_nonsense=3, label_smoothing_factor=0.1, hub_token="hf_abcdefghijk", streaming=False)
    left = {line.key: line for line in port.lines if line.fate is Fate.LEFT}
    assert left["top_nonsense"].changes_learning
    assert left["label_smoothing_factor"].changes_learning
    assert not left["streaming"].changes_learning  # without effect, as it is
    assert not {"top_nonsense", "label_smoothing_factor", "streaming"} & port.recipe.keys()


def test_easyr1() -> None:
    port = ported("easyr1.yaml")
    expected = {
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "beta": 0.01,
        "kl_estimator": "k3",
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.3,  # not written, and EasyR1's default
        "delta": 3.0,
        "num_generations": 5,
        "top_p": 0.99,
        "num_train_epochs": 15,
        "steps_per_generation": 4,
        "eval_steps": 20,
        "finetuning_type": "full",
    }
    assert expected.items() <= port.recipe.items()
    attention = [line.key for line in port.lines if line.changes_learning]
    assert attention == ["worker.reward.score_function"]


def test_verl() -> None:
    recipe = ported("verl.yaml").recipe
    expected = {"finetuning_type": "lora", "lora_rank": 64, "scale_rewards": "none", "epsilon_high": 0.2}
    assert expected.items() <= recipe.items()
    assert recipe["loss_aggregation"] == "seq_mean_token_sum_norm"


@pytest.mark.parametrize(
    ("algorithm", "beta", "marked"),
    [
        ({"use_kl_loss": True, "kl_penalty": "mse", "kl_coef": 0.02}, (0.02, "k2"), False),
        ({"use_kl_loss": True, "kl_penalty": "kl", "kl_coef": 0.02}, (0.02, "k3"), True),  # k1 in a loss is noise
        ({"kl_penalty": "low_var_kl", "kl_coef": 0.02}, (0.02, "k3"), True),  # off the reward there
        ({}, (1e-3, "k3"), True),  # the same, by default
        ({"disable_kl": True}, (0.0, None), False),
    ],
)
def test_kl_of_easyr1(algorithm: dict[str, Any], beta: Any, marked: bool, tmp_path: Path) -> None:
    source = yaml.safe_load((FOREIGN / "easyr1.yaml").read_text())
    source["algorithm"] = {"adv_estimator": "grpo"} | algorithm
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(source))
    _, port = port_file(tmp_path / "x.yaml", known_key_names(), "0.24", None, 1)
    assert (port.recipe["beta"], port.recipe.get("kl_estimator")) == beta
    assert any(line.changes_learning and "kl" in line.key for line in port.lines) == marked
    assert refusal_of(port.recipe) is None


def test_an_estimator_with_a_critic_is_not_taken_for_grpo_in_silence(tmp_path: Path) -> None:
    source = yaml.safe_load((FOREIGN / "verl.yaml").read_text())
    for algorithm in ({"adv_estimator": "gae"}, {}):
        source["algorithm"] = algorithm
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(source))
        _, port = port_file(tmp_path / "x.yaml", known_key_names(), "0.24", None, 1)
        assert "algorithm.adv_estimator" in [line.key for line in port.lines if line.changes_learning]


def test_swift() -> None:
    port = ported("swift.sh")
    expected = {
        "model_name_or_path": "Qwen/Qwen2.5-3B-Instruct",
        "default_system": "Think first.\nThen answer.",
        "beta": 0.04,  # not written, and ms-swift's default
        "loss_type": "grpo",
        "quantization_bit": 4,
        "max_new_tokens": 8192,
        "cutoff_len": 2048,
        "learning_rate": 1e-5,
        "scale_rewards": "none",
        "reward_funcs": "accuracy",
        "report_to": ["tensorboard", "swanlab"],
    }
    assert expected.items() <= port.recipe.items()
    assert port.recipe["dataset_dir"]["gsm8k"]["num_samples"] == 1000
    assert {"dataset", "reward_funcs", "external_plugins"} == {
        line.key for line in port.lines if line.changes_learning
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "marked"),
    [({"epsilon_high": 5.0}, 4.0, False), ({}, 4.0, True), ({"epsilon": 3.0}, 2.0, False)],
)
def test_the_bound_of_cispo_counts_from_one(theirs: dict[str, Any], ours: float, marked: bool) -> None:
    source = {"model": "a/b", "dataset": "a/c", "reward_funcs": "accuracy", "loss_type": "cispo", **theirs}
    port = swift.port_swift(source, known_key_names(), None, 1)
    assert port.recipe["epsilon_high"] == ours
    assert "epsilon" not in port.recipe
    assert [line.changes_learning for line in port.lines if line.key == "epsilon_high"] == [marked]


@pytest.mark.parametrize(("most", "ours"), [(10, 9), (1, 1), (0, None)])
def test_rollouts_of_verl_for_a_batch_count_the_first(most: int, ours: int | None, tmp_path: Path) -> None:
    groups = {"enable": True, "max_num_gen_batches": most}
    source = {"algorithm": {"adv_estimator": "grpo", "filter_groups": groups}, "data": {"train_files": "a/b"}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(source), encoding="utf-8")
    _, port = port_file(tmp_path / "x.yaml", known_key_names(), "0.24", None, 1)
    assert port.recipe.get("max_resample_times") == ours


def test_the_command_writes_a_recipe_an_account_and_an_exit_code(tmp_path: Path, capsys: Any) -> None:
    output, account = tmp_path / "ours.yaml", tmp_path / "account.json"
    arguments = ["recipe", "import", str(FOREIGN / "open_r1_demo.yaml"), "--output", str(output)]
    assert cli.main([*arguments, "--json", str(account), "--trl", "0.18"]) == 0
    recipe = read_recipe(str(output))
    assert recipe["template"] == "qwen"
    assert recipe["beta"] == 0.04
    assert "push_to_hub" not in recipe
    assert {"key", "fate", "ours", "note", "changes_learning", "value"} == set(
        json.loads(account.read_text())["keys"][0]
    )
    assert "computed per_device_train_batch_size" in capsys.readouterr().err
    assert cli.main(["recipe", "import", str(FOREIGN / "open_r1_code.yaml"), "--output", str(output)]) == 3
    assert cli.main(["recipe", "import", str(output)]) == 1  # ours already
    assert "LLaMA-Factory's already" in capsys.readouterr().err


# Sharing


SECRET = "hf_" + "a1B2c3D4e5F6g7H8i9"
CODE = "def brevity(completions):\n    return [-len(text) for text in completions]\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run, on a machine with a user's folders and tokens."""
    home = tmp_path / "home" / "me"
    folder = home / "saves" / "my-run"
    folder.mkdir(parents=True)
    model = home / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    (home / "my_rewards.py").write_text(CODE, encoding="utf-8")
    recipe = {
        "stage": "grpo",
        "do_train": True,
        "model_name_or_path": str(model),
        "hf_hub_token": SECRET,
        "dataset": "sums",
        "dataset_dir": str(home / "data"),
        "output_dir": str(folder),
        "cache_dir": str(home / "cache"),
        "reward_funcs": f"accuracy,{home / 'my_rewards.py'}:brevity",
        "reward_kwargs": {"brevity": {"word_list": str(home / "words.txt"), "api_key": "0123456789abc"}},
        "default_system": "Answer as <answer>1/2</answer>.",
        "learning_rate": 1e-5,
    }
    record = {
        "recipe": recipe,
        "folder": str(home),
        "versions": {"grpo-stage": "0.1"},
        "rows": 10,
        "datasets": {"sums": {"description": {"file_name": "sums.json"}, "files": {"sums.json": "sha256:ab"}}},
        "reward_code": [
            {
                "spec": f"{home / 'my_rewards.py'}:brevity",
                "file": str(home / "my_rewards.py"),
                "sha256": "0" * 64,
                "is_installed": False,
            }
        ],
    }
    record["reward_code"][0]["sha256"] = hashlib.sha256(CODE.encode()).hexdigest()
    (folder / RUN_FILE).write_text(json.dumps(record), encoding="utf-8")
    lines = [{"current_steps": step, "reward": reward} for step, reward in ((1, 0.1), (2, 0.7), (3, 0.6))]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_an_export_has_what_is_needed_and_nothing_private(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    notes = export(run, folder)
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*") if path.is_file()}
    assert set(files) == {"recipe.yaml", "provenance.json", "rewards/my_rewards.py", "data/dataset_info.json"}
    for name, text in files.items():
        for private in (SECRET, "0123456789abc", str(tmp_path), "/me/"):
            assert private not in text, (name, private)
    recipe = read_recipe(str(folder / "recipe.yaml"))
    assert recipe["model_name_or_path"] == "tiny"
    assert recipe["reward_funcs"] == ["accuracy", "rewards/my_rewards.py:brevity"]
    assert recipe["reward_kwargs"] == {"brevity": {"word_list": "words.txt", "api_key": "***"}}
    assert (recipe["output_dir"], recipe["dataset_dir"]) == ("saves/my-run", "data")
    assert recipe["default_system"] == "Answer as <answer>1/2</answer>."
    assert not {"cache_dir", "hf_hub_token"} & recipe.keys()
    provenance = json.loads(files["provenance.json"])
    assert provenance["results"] == {"reward": {"first": 0.1, "last": 0.6, "highest": 0.7}, "steps": 3}
    assert provenance["models"]["model_name_or_path: tiny"]["config.json"].startswith("sha256:44136fa355b3678a")
    assert provenance["datasets"] == {"sums": {"sums.json": "sha256:ab"}}
    assert any("reward_kwargs" in note for note in notes)
    assert any("sums.json" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/data/words.txt", "words.txt"),
        ("~/private/words.txt", "words.txt"),
        (r"C:\Users\me\words.txt", "words.txt"),
        ("see /srv/data/x.json and /srv/y/", "see x.json and folder"),
        (r"answer: \d+\.\d+/\w+", r"answer: \d+\.\d+/\w+"),
        ("<think>.*</think>", "<think>.*</think>"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("data/words.txt", "data/words.txt"),
        ("and/or 1/2/3", "and/or 1/2/3"),
    ],
)
def test_paths_are_taken_out_and_other_texts_are_not(text: str, kept: str) -> None:
    assert without_private({"default_system": text})[0]["default_system"] == kept


def test_changed_code_is_neither_exported_nor_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "shared"
    export(run, folder)
    code = folder / "rewards" / "my_rewards.py"
    code.write_text(CODE.replace("-len", "+len"), encoding="utf-8")
    assert cli.main(["recipe", "run", str(folder), "--trust-code"]) == 1
    assert "is not the file that was exported" in capsys.readouterr().err
    assert cli.main(["recipe", "show", str(folder)]) == 3
    code.unlink()
    assert cli.main(["recipe", "run", str(folder), "--trust-code"]) == 1
    assert "is missing" in capsys.readouterr().err

    own = run.parents[1] / "my_rewards.py"
    own.write_text(CODE + "# changed\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since"):
        export(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_code_with_a_secret_is_not_exported(run: Path, tmp_path: Path) -> None:
    own = run.parents[1] / "my_rewards.py"
    own.write_text(f'{CODE}KEY = "{SECRET}"\n', encoding="utf-8")
    record = json.loads((run / RUN_FILE).read_text())
    record["reward_code"][0]["sha256"] = hashlib.sha256(own.read_bytes()).hexdigest()
    (run / RUN_FILE).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="line 3, holds what looks like a secret"):
        export(run, tmp_path / "shared")


def test_code_runs_only_if_it_is_trusted_and_is_shown_first(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_stage.survival import stop

    started: list[list[str]] = []

    class Done:
        returncode = 7

    monkeypatch.setattr(stop, "run_and_pass_on", lambda command: started.append(command) or Done())
    folder = tmp_path / "shared"
    export(run, folder)
    assert cli.main(["recipe", "run", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "--trust-code" in shown.err
    assert "return [-len(text) for text in completions]" in shown.out
    assert started == []
    assert cli.main(["recipe", "run", str(folder), "learning_rate=2e-5", "--trust-code"]) == 7
    ((_, *command),) = started
    assert command[:3] == ["-m", "grpo_stage", "train"]
    assert command[-1] == "learning_rate=2e-5"
    assert f'dataset_dir="{(folder / "data").resolve()}"' in command
    assert any(f"{(folder / 'rewards' / 'my_rewards.py').resolve()}:brevity" in word for word in command)


def test_an_override_cannot_bring_code_unseen(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("stage: grpo\nreward_funcs: accuracy\n", encoding="utf-8")
    other = tmp_path / "other.py"
    other.write_text(CODE, encoding="utf-8")
    assert cli.main(["recipe", "run", str(file), f"reward_funcs={other}:brevity"]) == 1
    assert "--trust-code" in capsys.readouterr().err
    indirect = f"stage: grpo\nrun_name: {other}:brevity\nreward_funcs: ${{run_name}}\n"
    file.write_text(indirect, encoding="utf-8")
    assert cli.main(["recipe", "run", str(file)]) == 1
    shown = capsys.readouterr()
    assert "--trust-code" in shown.err
    assert "return [-len(text) for text in completions]" in shown.out
    file.write_text("stage: grpo\nreward_funcs: accuracy\n", encoding="utf-8")
    assert cli.main(["recipe", "run", str(file), "trust_remote_code=true", "model_name_or_path=a/b"]) == 1
    assert "--trust-code" in capsys.readouterr().err


def test_provenance_cannot_name_files_outside_of_its_folder(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    export(run, folder)
    provenance = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(provenance | {"reward_code": {"../home/x.py": "0"}}))
    with pytest.raises(ValueError, match="outside"):
        read_shared(folder).refuse_changed()
    (folder / "provenance.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        read_shared(folder)


def test_a_diff_names_what_differs_and_not_how_it_is_written(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "a")
    text = (tmp_path / "a" / "recipe.yaml").read_text()
    (tmp_path / "b.yaml").write_text(text.replace("1.0e-05", "0.00001") + "beta: 0.0\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text(text + "beta: 0.1\nseed: 7\n", encoding="utf-8")
    a, b, c = (read_shared(tmp_path / name) for name in ("a", "b.yaml", "c.yaml"))
    defaults = {"beta": 0.0, "seed": 42}
    assert differing(a, b, defaults) == []
    assert differing(a, c, defaults) == [("beta", 0.0, 0.1), ("seed", 42, 7)]


def test_a_key_that_the_stage_derives_has_no_default_in_a_diff(tmp_path: Path) -> None:
    """The host's default is none of a run's."""
    for name, keys in (("a", {}), ("b", {"vllm_gpu_util": 0.4, "beta": 0.1})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"stage": "grpo", **keys}), encoding="utf-8")
    assert (
        cli.main(["recipe", "diff", *(str(tmp_path / f"{x}.yaml") for x in "ab"), "--json", str(tmp_path / "d")]) == 3
    )
    found = {each["name"]: (each["first"], each["second"]) for each in json.loads((tmp_path / "d").read_text())}
    assert found == {"vllm_gpu_util": (None, 0.4), "beta": (0.0, 0.1)}


def test_a_record_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    write_run_record(str(tmp_path / "file" / "out"), {"recipe": {}})
    assert RUN_FILE in caplog.text
    write_run_record(str(tmp_path / "out"), {"recipe": {"seed": 1}})
    assert read_run_record(tmp_path / "out") == {"recipe": {"seed": 1}}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RUN_FILE]


def test_a_folder_without_a_run_is_explained(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["recipe", "export", str(tmp_path)]) == 1
    assert RUN_FILE in capsys.readouterr().err
