"""The host's symbols that the stage is built on, and the check that they exist and are called as expected."""

import importlib
import inspect
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from grpo_stage._autoload import without_collection


SUPPORTED_HOST = ">=0.9.5,<0.9.7"


class UnsupportedHostError(RuntimeError):
    """The stage cannot run on this host, or not in this mode."""


@dataclass(frozen=True, slots=True)
class HostSymbol:
    """One name of the host, and how we call it."""

    module: str
    name: str
    parameters: tuple[str, ...] | None = None
    """Names of the leading parameters; further ones need a default. None: the symbol is not a callable."""

    def defect(self) -> str | None:
        """What is wrong with the symbol in the installed host, or None."""
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.module} cannot be imported ({error})"
        if not hasattr(module, self.name):
            return f"{self.module}.{self.name} is missing"
        if self.parameters is None:
            return None
        found = list(inspect.signature(getattr(module, self.name)).parameters.values())
        names, added = tuple(p.name for p in found[: len(self.parameters)]), found[len(self.parameters) :]
        optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if names == self.parameters and all(p.default is not p.empty or p.kind in optional for p in added):
            return None
        expected, actual = ", ".join(self.parameters), ", ".join(p.name for p in found)
        return f"{self.module}.{self.name} takes ({actual}) where ({expected}) is expected"


CONTRACT: tuple[HostSymbol, ...] = (
    HostSymbol("llamafactory.hparams.parser", "_TRAIN_ARGS"),
    HostSymbol("llamafactory.hparams.parser", "_INFER_ARGS"),
    HostSymbol("llamafactory.hparams.parser", "get_train_args", ("args",)),
    HostSymbol("llamafactory.train.tuner", "_training_function", ("config",)),
    HostSymbol("llamafactory.train.tuner", "_ray_training_function", ("ray_args", "config")),
    HostSymbol("llamafactory.train.tuner", "get_placement_group", ("num_workers",)),
    HostSymbol("llamafactory.train.tuner", "read_args", ("args",)),
    HostSymbol("llamafactory.train.tuner", "run_exp", ("args", "callbacks")),
    HostSymbol("llamafactory.data", "get_template_and_fix_tokenizer", ("tokenizer", "data_args")),
    HostSymbol(
        "llamafactory.data",
        "get_dataset",
        ("template", "model_args", "data_args", "training_args", "stage", "tokenizer", "processor"),
    ),
    HostSymbol("llamafactory.data.loader", "split_dataset", ("dataset", "eval_dataset", "data_args", "seed")),
    HostSymbol("llamafactory.data.template", "Template"),
    HostSymbol("llamafactory.data.template", "TEMPLATES"),
    HostSymbol("llamafactory.data.tool_utils", "TOOLS"),
    HostSymbol("llamafactory.data.converter", "DATASET_CONVERTERS"),
    HostSymbol("llamafactory.data.converter", "get_dataset_converter", ("name", "dataset_attr", "data_args")),
    HostSymbol(
        "llamafactory.data.loader",
        "_get_dataset_processor",
        ("data_args", "stage", "template", "tokenizer", "processor", "do_generate"),
    ),
    HostSymbol(
        "llamafactory.data.processor",
        "UnsupervisedDatasetProcessor",
        ("template", "tokenizer", "processor", "data_args"),
    ),
    HostSymbol("llamafactory.model", "load_config", ("model_args",)),
    HostSymbol("llamafactory.model", "load_tokenizer", ("model_args",)),
    HostSymbol("llamafactory.model", "load_model", ("tokenizer", "model_args", "finetuning_args", "is_trainable")),
    HostSymbol("llamafactory.model", "load_valuehead_params", ("path_or_repo_id", "model_args")),
    HostSymbol(
        "llamafactory.model.adapter",
        "init_adapter",
        ("config", "model", "model_args", "finetuning_args", "is_trainable"),
    ),
    HostSymbol("llamafactory.model.model_utils.checkpointing", "prepare_model_for_training", ("model", "model_args")),
    HostSymbol("llamafactory.train.trainer_utils", "create_ref_model", ("model_args", "finetuning_args")),
    HostSymbol("llamafactory.train.trainer_utils", "create_reward_model", ("model", "model_args", "finetuning_args")),
    HostSymbol(
        "llamafactory.train.trainer_utils", "create_custom_optimizer", ("model", "training_args", "finetuning_args")
    ),
    HostSymbol(
        "llamafactory.train.trainer_utils",
        "create_custom_scheduler",
        ("training_args", "num_training_steps", "optimizer"),
    ),
    HostSymbol(
        "llamafactory.train.trainer_utils",
        "create_modelcard_and_push",
        ("trainer", "model_args", "data_args", "training_args", "finetuning_args"),
    ),
    HostSymbol("llamafactory.train.trainer_utils", "get_swanlab_callback", ("finetuning_args",)),
    HostSymbol("llamafactory.train.callbacks", "LogCallback", ()),
    HostSymbol("llamafactory.train.callbacks", "PissaConvertCallback", ()),
    HostSymbol(
        "llamafactory.train.callbacks",
        "ReporterCallback",
        ("model_args", "data_args", "finetuning_args", "generating_args"),
    ),
    HostSymbol("llamafactory.train.callbacks", "SaveProcessorCallback", ("processor",)),
    HostSymbol("llamafactory.train.callbacks", "TorchProfilerCallback", ("training_args",)),
    HostSymbol("llamafactory.train.callbacks", "ModuleProfilerCallback", ("profile_modules",)),
    HostSymbol("llamafactory.extras.ploting", "plot_loss", ("save_dictionary", "keys")),
    HostSymbol("llamafactory.extras.logging", "get_logger", ("name",)),
    HostSymbol("llamafactory.extras.constants", "TRAINER_LOG"),
    HostSymbol("llamafactory.extras.constants", "IMAGE_PLACEHOLDER"),
    HostSymbol(
        "llamafactory.data.mm_plugin", "BasePlugin", ("image_token", "video_token", "audio_token", "expand_mm_tokens")
    ),
)


def installed_version() -> str:
    """The version of the host that is imported, which may be a checkout without metadata."""
    return str(importlib.import_module("llamafactory").__version__)


def is_supported_version() -> bool:
    """Whether the stage was made for the installed version of the host."""
    return SpecifierSet(SUPPORTED_HOST).contains(installed_version(), prereleases=True)


def check_contract() -> None:
    """Make sure that the host is the one the stage was made for.

    Raises:
        UnsupportedHostError: if its version is out of range or a symbol is missing or changed; all are named.
    """
    found = without_collection(lambda: [symbol.defect() for symbol in CONTRACT])
    defects = list(dict.fromkeys(defect for defect in found if defect is not None))
    if not defects and is_supported_version():
        return
    version = installed_version()
    changed = "".join(f"\n  - {defect}" for defect in defects)
    raise UnsupportedHostError(
        f"`stage: grpo` cannot run on this LLaMA-Factory: {version} is installed, {SUPPORTED_HOST} is supported."
        + (f" What the stage builds on has changed there:{changed}\n" if changed else " ")
        + f'Install a supported one with `pip install "llamafactory{SUPPORTED_HOST}"`, or a release of grpo-stage '
        f"made for llamafactory {version}. Other stages are not affected."
    )
