"""The plugin gets into the host at every interpreter start, changes what its table says, and takes it back."""

import gc
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_stage import __main__ as explicit_route
from grpo_stage import _autoload
from grpo_stage.host.configuration_file import read_command_line, stage_of
from grpo_stage.plugin import contract, registration
from grpo_stage.plugin.contract import CONTRACT, SUPPORTED_HOST, HostSymbol, UnsupportedHostError, check_contract


ROOT = Path(__file__).parents[2]
CLI = Path(sys.executable).with_name("llamafactory-cli")
HOST_MODULES = sorted(_autoload.WATCHED)


def run(*command: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PATH": f"{CLI.parent}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_python(code: str, *options: str, **environment: str) -> str:
    done = run(sys.executable, *options, "-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_yaml(folder: Path, **arguments: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(json.dumps(arguments))
    return path


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The host's module of that name, with our rows; what a test patches is put back between taking them away and
    applying them again."""
    monkeypatch.setenv("USE_MCA", "0")
    module = importlib.import_module("llamafactory.train.tuner")
    registration.install()
    yield module
    registration.uninstall()
    monkeypatch.undo()
    registration.install()


@pytest.fixture
def trained_elsewhere(tuner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configurations that the host's own `_training_function` was called with, which now does nothing else."""
    calls: list[dict[str, Any]] = []
    registration.uninstall()
    monkeypatch.setattr(tuner, "_training_function", lambda config: calls.append(config))
    registration.install()
    return calls


class TestInterpreterStart:
    def test_the_pth_reaches_children_and_their_children(self) -> None:
        child = "import sys; print('grpo_stage._autoload' in sys.modules, type(sys.meta_path[0]).__name__)"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
        assert run_python(parent) == "True PostImportFinder"

    def test_switched_off(self) -> None:
        code = "import sys; print([f for f in sys.meta_path if type(f).__name__ == 'PostImportFinder'])"
        assert run_python(code, GRPO_STAGE_DISABLE="1") == "[]"

    def test_costs_less_than_two_milliseconds(self) -> None:
        def cost_us() -> int:
            report = run(sys.executable, "-X", "importtime", "-c", "").stderr
            lines = [line for line in report.splitlines() if line.endswith("grpo_stage._autoload")]
            assert len(lines) == 1, report
            return int(lines[0].split("|")[1])

        assert min(cost_us() for _ in range(5)) < 2000

    def test_loads_nothing_but_itself(self) -> None:
        code = (
            f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
            "import grpo_stage._autoload; print(sorted(set(sys.modules) - before))"
        )
        assert run_python(code, "-S") == "['grpo_stage', 'grpo_stage._autoload']"

    def test_the_hosts_version_command_loads_nothing_more(self) -> None:
        code = (
            "import json, sys; sys.argv = ['llamafactory-cli', 'version']; from llamafactory.cli import main; main();"
            "print(json.dumps(sorted(sys.modules)))"
        )
        loaded, bare = (
            set(json.loads(run_python(code, GRPO_STAGE_DISABLE=off).splitlines()[-1])) for off in ("0", "1")
        )
        assert loaded == bare
        assert {name for name in loaded if name.startswith("grpo_stage")} == {"grpo_stage", "grpo_stage._autoload"}

    def test_a_module_that_cannot_be_changed_cannot_be_imported(self) -> None:
        code = (
            "import grpo_stage.plugin.registration as r\n"
            "def fail(module): raise RuntimeError(f'no row for {module.__name__}')\n"
            "r.on_import = fail\n"
            "try: import llamafactory.v1.launcher\n"
            "except RuntimeError as error: print(error)"
        )
        assert run_python(code) == "no row for llamafactory.v1.launcher"

    def test_no_garbage_is_collected_while_the_host_is_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def execute(module: ModuleType) -> None:
            states.append(gc.isenabled())
            raise ImportError

        states: list[bool] = []
        loader = SimpleNamespace(exec_module=execute)
        _autoload._notify_after_execution(loader)
        with pytest.raises(ImportError):
            loader.exec_module(ModuleType("broken"))
        contract_seen = SimpleNamespace(defect=lambda: states.append(gc.isenabled()))
        monkeypatch.setattr(contract, "CONTRACT", (contract_seen,))
        check_contract()
        assert (states, gc.isenabled()) == ([False, False], True)


class TestRows:
    def test_the_rows_are_for_the_watched_modules(self) -> None:
        assert {row.module for row in registration.ROWS} == _autoload.WATCHED
        assert all(row.why for row in registration.ROWS)

    def test_each_row_finds_its_place_in_this_host(self) -> None:
        for row in registration.ROWS:
            assert hasattr(importlib.import_module(row.module), row.attribute), row

    def test_install_and_uninstall_give_everything_back(
        self, tuner: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modules = [importlib.import_module(name) for name in HOST_MODULES]
        monkeypatch.setenv("USE_MCA", "1")

        def contents() -> dict[tuple[str, str], tuple[int, list[int]]]:
            """Identities: a wrapt wrapper equals what it wraps."""
            return {
                (module.__name__, name): (
                    id(value),
                    [id(item) for item in value] if isinstance(value, list | dict) else [],
                )
                for module in modules
                for name, value in vars(module).items()
            }

        registration.uninstall()
        bare = contents()
        registration.install()
        changed = contents()
        registration.install()
        assert contents() == changed, "a second install changes something"
        registration.uninstall()
        assert contents() == bare
        rows = {(row.module, row.attribute) for row in registration.ROWS}
        changed_in_place = {bare[key][0] for key in rows if bare[key][0] == changed[key][0]}
        differing = {key for key in bare if changed[key] != bare[key]}
        assert {key for key in differing if key in rows or bare[key][0] not in changed_in_place} == rows

    def test_uninstall_does_not_undo_what_others_did(self, tuner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = tuner._training_function
        with monkeypatch.context() as patch:
            patch.setattr(tuner, "run_exp", lambda: None)
            with pytest.raises(RuntimeError, match=r"tuner\.run_exp was changed again"):
                registration.uninstall()
        assert tuner._training_function is ours, "a refused uninstall takes nothing away"

    def test_a_reloaded_module_is_changed_again(self) -> None:
        code = (
            "import importlib, llamafactory.v1.launcher as m\n"
            "first = m.launch; importlib.reload(m); again = m.launch\n"
            "print(again is not first, hasattr(again, '__wrapped__'), hasattr(again.__wrapped__, '__wrapped__'))"
        )
        assert run_python(code) == "True True False"

    def test_modules_keep_their_loader_and_source(self, tuner: ModuleType) -> None:
        assert tuner.__spec__ is not None
        assert type(tuner.__spec__.loader) is SourceFileLoader
        assert inspect.getsource(tuner.run_exp).startswith("def run_exp(")


class TestHost:
    def test_the_supported_range_is_the_one_that_is_installed_with_us(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert f"llamafactory{SUPPORTED_HOST}" in project["dependencies"]

    def test_this_host_is_as_expected(self, tuner: ModuleType) -> None:
        check_contract()

    @pytest.mark.parametrize("version", ["0.9.6.dev0", "0.9.6"])
    def test_within_the_range_the_contract_decides(
        self, version: str, tuner: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llamafactory.__version__", version)
        check_contract()
        monkeypatch.delattr("llamafactory.train.trainer_utils.create_ref_model")
        with pytest.raises(UnsupportedHostError, match=r"create_ref_model is missing"):
            tuner.run_exp({"stage": "grpo"})

    @pytest.mark.parametrize("version", ["0.9.4", "0.9.7.dev0", "0.10.0"])
    def test_another_version_is_refused_and_left_alone(
        self,
        version: str,
        tuner: ModuleType,
        trained_elsewhere: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        parser = importlib.import_module("llamafactory.hparams.parser")
        registration.uninstall()
        bare = (list(parser._TRAIN_ARGS), parser.json, tuner._training_function)
        monkeypatch.setattr("llamafactory.__version__", version)
        registration.install()

        assert (parser._TRAIN_ARGS, parser.json, tuner._training_function) == bare
        with pytest.raises(UnsupportedHostError) as refused:
            tuner.run_exp({"stage": "grpo"})
        assert f"{version} is installed, {SUPPORTED_HOST} is supported" in str(refused.value)
        assert f'pip install "llamafactory{SUPPORTED_HOST}"' in str(refused.value)
        tuner.run_exp({"stage": "sft"})
        assert trained_elsewhere == [{"args": {"stage": "sft"}, "callbacks": []}]

    def test_all_that_changed_is_named_at_once(
        self, tuner: ModuleType, trained_elsewhere: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr("llamafactory.train.trainer_utils.create_ref_model")
        monkeypatch.setattr("llamafactory.extras.ploting.plot_loss", lambda folder: None)
        monkeypatch.setitem(sys.modules, "llamafactory.data.converter", None)

        with pytest.raises(UnsupportedHostError) as refused:
            tuner.run_exp({"stage": "grpo"})
        message = str(refused.value)
        assert "llamafactory.train.trainer_utils.create_ref_model is missing" in message
        assert "plot_loss takes (folder) where (save_dictionary, keys) is expected" in message
        assert "llamafactory.data.converter cannot be imported" in message
        assert message.count("\n  - ") == 3
        assert f"{contract.installed_version()} is installed, {SUPPORTED_HOST} is supported" in message
        tuner.run_exp({"stage": "dpo"})
        assert [call["args"] for call in trained_elsewhere] == [{"stage": "dpo"}]

    @pytest.mark.parametrize(
        ("function", "is_defect"),
        [
            (lambda args: None, False),
            (lambda args, more=None: None, False),
            (lambda args, **kwargs: None, False),
            (lambda args, more: None, True),
            (lambda first, args: None, True),
            (lambda arguments: None, True),
            (lambda: None, True),
        ],
    )
    def test_what_counts_as_changed(
        self, function: Any, is_defect: bool, tuner: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llamafactory.hparams.parser.get_train_args", function)
        symbol = HostSymbol("llamafactory.hparams.parser", "get_train_args", ("args",))
        assert symbol in CONTRACT
        assert (symbol.defect() is not None) == is_defect


class TestModes:
    def test_refused_before_anything_is_started(self, tmp_path: Path) -> None:
        done = run(CLI, "train", write_yaml(tmp_path, stage="grpo"), USE_V1="1")
        assert done.returncode == 1
        assert "UnsupportedHostError" in done.stderr
        assert "cannot run with USE_V1=1" in done.stderr
        assert "v1 trainers" in done.stderr
        assert "Unset USE_V1" in done.stderr
        assert f"supported is {SUPPORTED_HOST}" in done.stderr
        assert "torchrun" not in done.stderr

    @pytest.mark.parametrize(
        ("switch", "named"), [("USE_MCA", "Megatron-Core"), ("USE_MEGATRON_BRIDGE", "Megatron Bridge")]
    )
    def test_megatron_is_refused_before_torchrun(
        self, switch: str, named: str, tuner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registration.uninstall()
        monkeypatch.setenv(switch, "1")
        registration.install()
        launcher = importlib.import_module("llamafactory.launcher")
        monkeypatch.setattr(launcher.subprocess, "run", lambda *_, **__: pytest.fail("torchrun was started"))
        monkeypatch.setenv("FORCE_TORCHRUN", "0")  # the host sets it
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", str(write_yaml(tmp_path, stage="grpo"))])
        with pytest.raises(UnsupportedHostError, match=rf"cannot run with {switch}=1.*{named}.*Unset {switch}"):
            launcher.launch()
        assert "mcore_adapter" not in sys.modules

    @pytest.mark.parametrize("name", ["llamafactory.launcher", "llamafactory.v1.launcher"])
    def test_other_stages_are_launched_as_before(
        self, name: str, tuner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registration.uninstall()
        monkeypatch.setenv("USE_MCA", "1")
        monkeypatch.setenv("FORCE_TORCHRUN", "1")
        registration.install()
        launcher = importlib.import_module(name)
        assert hasattr(launcher.launch, "__wrapped__")
        commands: list[Any] = []
        monkeypatch.setattr(
            launcher.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
        )
        for stage in ("sft", "grpo"):
            monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", str(write_yaml(tmp_path, stage=stage))])
            with pytest.raises(SystemExit if stage == "sft" else UnsupportedHostError):
                launcher.launch()
        assert len(commands) == 1
        assert commands[0][0] == "torchrun"

    def test_arguments_reach_torchrun_whole(
        self, tuner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The host joins them with spaces and splits the whole at spaces."""
        registration.uninstall()
        monkeypatch.setenv("FORCE_TORCHRUN", "1")
        commands: list[list[str]] = []
        launcher = importlib.import_module("llamafactory.launcher")
        monkeypatch.setattr(
            launcher.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
        )
        monkeypatch.setattr(
            registration,
            "run_and_pass_on",
            lambda command, env: commands.append(command) or SimpleNamespace(returncode=0),
        )
        arguments = ["--default_system", "Think  first,\nthen 'answer'.", "--output_dir", "my runs/a b", "--seed", "7"]
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train"])
        registration.install()
        for stage in ("grpo", "sft"):
            monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", "--stage", stage, *arguments])
            with pytest.raises(SystemExit):
                launcher.launch()
        ours, hosts = commands
        script = ours.index(launcher.__file__)
        assert ours[script + 1 :] == ["--stage", "grpo", *arguments]
        assert [word for word in ours[:script] if not word.isdigit()] == [w for w in hosts[:script] if not w.isdigit()]
        assert "Think" in hosts

    @pytest.mark.parametrize("switch", registration.MEGATRON)
    def test_megatron_is_refused_in_process(
        self, switch: str, tuner: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(switch, "1")
        with pytest.raises(UnsupportedHostError, match=f"{switch}=1"):
            tuner.run_exp({"stage": "grpo"})


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "stage"),
        [
            ({"stage": "grpo"}, "grpo"),
            ({"do_train": True}, None),
            (["--stage", "grpo", "--do_train"], "grpo"),
            (["--do_train", "--stage=grpo"], "grpo"),
            (["--stage", "grpo", "--stage", "sft"], "sft"),
            (["--output_dir", "grpo"], None),
            (["--stage"], None),
            ([], None),
        ],
    )
    def test_the_stage_is_read_from_raw_arguments(self, arguments: Any, stage: str | None) -> None:
        assert stage_of(arguments) == stage

    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
    def test_the_command_line_is_read_as_the_host_reads_it(
        self, suffix: str, tuner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / f"run{suffix}"
        path.write_text(json.dumps({"stage": "sft", "beta": 0.04, "dataset": ["a", "b"]}))
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(path), "stage=grpo", "learning_rate=1e-6"])
        expected = {"stage": "grpo", "beta": 0.04, "dataset": ["a", "b"], "learning_rate": 1e-6}
        assert read_command_line(sys.argv[1:]) == expected
        assert tuner.read_args() == expected

    def test_json_is_what_the_host_itself_cannot_read(
        self, tuner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Goes once the host is mended: then the row goes too."""
        path = tmp_path / "run.json"
        path.write_text("{}")
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(path)])
        registration.uninstall()
        with pytest.raises(AttributeError, match="read"):
            tuner.read_args()

    def test_help_lists_our_keys(self, tuner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            tuner.run_exp(["-h"])
        assert left.value.code == 0
        shown = flat(capsys.readouterr().out)
        assert re.search(r"--num_generations \S+, --num-generations \S+ Completions sampled for each prompt", shown)
        assert re.search(r"--stage \{[a-z,]*\bgrpo\b[a-z,]*\}", shown)

    @pytest.mark.parametrize(
        "arguments", [{"stage": "sft", "num_generations": 4}, ["--stage", "dpo", "--num_generations", "4"]]
    )
    def test_a_key_of_ours_is_refused_in_other_stages(
        self, arguments: Any, tuner: ModuleType, trained_elsewhere: list[dict[str, Any]]
    ) -> None:
        with pytest.raises(ValueError, match="num_generations"):
            tuner.run_exp(arguments)
        assert trained_elsewhere == []


class TestDispatch:
    @pytest.fixture
    def runs(self, tuner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
        """What `launch.run` was called with, in place of a run; the arguments are handed through unparsed."""
        calls: list[tuple[Any, Any]] = []
        monkeypatch.setattr("grpo_stage.host.parser.parse", lambda raw: ("parsed", raw))
        monkeypatch.setattr(
            "grpo_stage.plugin.launch.run", lambda arguments, callbacks: calls.append((arguments, callbacks))
        )
        return calls

    @pytest.fixture
    def process_group(self, tmp_path: Path) -> Iterator[Any]:
        dist = importlib.import_module("torch.distributed")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield dist
        if dist.is_initialized():
            dist.destroy_process_group()

    def test_the_stage_runs_once_and_leaves_the_process_group(
        self,
        tuner: ModuleType,
        trained_elsewhere: list[dict[str, Any]],
        runs: list[tuple[Any, Any]],
        process_group: Any,
    ) -> None:
        raw, callback = {"stage": "grpo", "num_generations": 4}, object()
        tuner.run_exp(raw, [callback])
        assert runs == [(("parsed", raw), [callback])]
        assert trained_elsewhere == []
        assert not process_group.is_initialized()

    def test_what_takes_the_group_at_its_import_is_there_before_it(
        self, tuner: ModuleType, runs: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        monkeypatch.setattr("grpo_stage.distributed.import_before_the_group", lambda: order.append("imports"))
        monkeypatch.setattr("grpo_stage.host.parser.parse", lambda raw: order.append("the group"))
        tuner.run_exp({"stage": "grpo"}, [])
        assert order == ["imports", "the group"]

    def test_other_stages_are_handed_on_untouched(
        self, tuner: ModuleType, trained_elsewhere: list[dict[str, Any]], runs: list[tuple[Any, Any]]
    ) -> None:
        config = {"args": {"stage": "sft", "beta_of_nobody": 1}, "callbacks": []}
        tuner._training_function(config)
        assert trained_elsewhere == [config]
        assert trained_elsewhere[0] is config
        assert runs == []


class TestProcesses:
    def test_the_explicit_route_needs_no_hook(self, tmp_path: Path) -> None:
        path = write_yaml(tmp_path, stage="grpo", num_generations=1, model_name_or_path="none", output_dir="none")
        done = run(sys.executable, "-m", "grpo_stage", "train", path, GRPO_STAGE_DISABLE="1")
        assert done.returncode == 1
        assert re.search(r"ValueError: .*num_generations", done.stderr)

    def test_the_explicit_route_opens_the_way_for_children(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRPO_STAGE_DISABLE", "1")
        seen: list[bool] = []
        monkeypatch.setattr(registration, "run_cli", lambda: seen.append("GRPO_STAGE_DISABLE" in os.environ))
        explicit_route.main()
        assert seen == [False]

    def test_sft_losses_are_the_same_with_and_without_the_plugin(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        rows = [{"instruction": f"What is {n} + {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(12)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))

        def log(name: str, **environment: str) -> list[dict[str, Any]]:
            path = write_yaml(
                tmp_path,
                stage="sft",
                do_train=True,
                model_name_or_path=str(tiny_model_dir),
                finetuning_type="lora",
                dataset="rows",
                dataset_dir=str(tmp_path),
                template="smollm2",
                cutoff_len=64,
                output_dir=str(tmp_path / name),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=1,
                learning_rate=1e-2,
                max_steps=3,
                logging_steps=1,
                use_cpu=True,
                dataloader_pin_memory=False,
                report_to="none",
            )
            done = run(CLI, "train", path, **environment)
            assert done.returncode == 0, done.stderr
            lines = (tmp_path / name / "trainer_log.jsonl").read_text().splitlines()
            return [record for record in map(json.loads, lines) if "loss" in record]

        with_plugin, without = log("with"), log("without", GRPO_STAGE_DISABLE="1")
        losses = [record["loss"] for record in with_plugin]
        assert len(set(losses)) == 3, "the runs must learn something for the comparison to mean anything"
        assert losses == [record["loss"] for record in without]
        assert [record["lr"] for record in with_plugin] == [record["lr"] for record in without]
