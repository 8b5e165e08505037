"""What a recipe alone cannot do: run code that is not a reward function, and leave secrets in files and messages."""

import hashlib
import io
import json
import os
import py_compile
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from grpo_stage.arguments import GRPOArguments
from grpo_stage.records.redaction import MASK, errors_masked, mask, mask_text, secrets_in
from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.rewards.user_code import describe
from grpo_stage.rollout.engines import vllm_options
from grpo_stage.rollout.engines.vllm_options import (
    CODE_OPTIONS,
    COMPILATION_OPTIONS,
    HARMLESS_OPTIONS,
    OWNED_OPTIONS,
    OWNED_OPTIONS_ON_CPU,
    known_options,
    refuse_options,
)
from grpo_stage.survival.resumable import _without_token
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


LIBRARY = Path(os.__file__).resolve().parent
MARKER = "attacked"
COMMAND = f"touch {MARKER}"
SCORE = "def score(completions): return [1.0] * len(completions)\n"
MARK = f"open({MARKER!r}, 'w').close()\n"

FILES = {
    "own.py": SCORE + "import functools, os, subprocess\nfrom os import environ, system\n"
    "from subprocess import getoutput, Popen, run\n"
    "from helper import helped, judge\nfrom acme_rewards import shown\nalias = os.system\n"
    "shell = functools.partial(subprocess.run, shell=True)\n"
    "@functools.lru_cache\ndef cached(): return 1.0\n"
    "def scaled(completions, scale): return [scale] * len(completions)\nhalf = functools.partial(scaled, scale=0.5)\n"
    "def naked(function):\n    def inner(completions): return function(completions)\n    return inner\n"
    "def decorated(function):\n    @functools.wraps(function)\n    def inner(**batch): return function(**batch)\n"
    "    return inner\n"
    "wrapped, unwrapped = decorated(score), naked(score)\n"
    "from acme_rewards.tools import timed, Base\nby_package = timed(score)\n"
    "class Judge(Base):\n    def score(self, completions): return [1.0] * len(completions)\n"
    "object = Judge()\nmethod = Judge().score\n"
    "async def later(completions): return [1.0] * len(completions)\n"
    "def from_columns(level): return [1.0] * len(level)\n",
    "helper.py": "def helped(completions): return [1.0] * len(completions)\n"
    "class Judge:\n    def __call__(self, completions): return [1.0] * len(completions)\njudge = Judge()\n",
    "os.py": SCORE,
    "with space/a file.py": SCORE,
    "module_here.py": SCORE + "from subprocess import getoutput\nfrom helper import helped\n",
    "package_here/__init__.py": "from .inner import score\nfrom subprocess import getoutput\nimport os\n",
    "package_here/inner.py": SCORE,
    "namespace_here/inner.py": SCORE,
    "lib/python9.9/os.py": SCORE,
    "lib/python9.9/encodings/__init__.py": "",
    "lib/python9.9/other/helper.py": SCORE,
    "lib/python9.9/site-packages/mine.py": SCORE,
    "site-packages/acme_rewards/__init__.py": "from acme_rewards.core import shown\n",
    "site-packages/acme_rewards/core.py": "def shown(completions): return [1.0] * len(completions)\n"
    "def anything(**batch): return [1.0] * len(batch['completions'])\n",
    "site-packages/acme_rewards/tools.py": "import os\nfrom subprocess import getoutput\n"
    "def execute(command): return [float(os.system(command))]\n"
    "def execute_with(command, **options): return [float(os.system(command))]\n"
    "def nothing(): return [float(os.system('touch attacked'))]\n"
    "def timed(function):\n    def inner(completions): return function(completions)\n    return inner\n"
    "class Base:\n    def __call__(self, completions): return [1.0] * len(completions)\n",
    "site-packages/acme_marks.py": MARK + SCORE,
    "site-packages/acme_rewards/__main__.py": MARK + SCORE,
    "site-packages/idlelib_like/__init__.py": "",
}

# What is named -> what the refusal says.
ATTACKS: dict[str, str] = {
    "os:system": "the module 'os' is of Python's standard library",
    "posix:system": "the module 'posix' is of Python's standard library",
    "subprocess:getoutput": "the module 'subprocess' is of Python's standard library",
    "subprocess:run": "the module 'subprocess' is of",
    "subprocess:Popen": "the module 'subprocess' is of",
    "timeit:timeit": "the module 'timeit' is of",
    "builtins:exec": "the module 'builtins' is of",
    "builtins:eval": "the module 'builtins' is of",
    "importlib:import_module": "the module 'importlib' is of",
    "importlib.util:find_spec": "the module 'importlib.util' is of",
    "os.path:exists": "the module 'os.path' is of",
    "shutil:rmtree": "the module 'shutil' is of",
    "runpy:run_path": "the module 'runpy' is of",
    "ctypes:CDLL": "the module 'ctypes' is of",
    "this:anything": "the module 'this' is of",
    "antigravity:anything": "the module 'antigravity' is of",
    "idlelib.idle:anything": "the module 'idlelib.idle' is of",
    "test.support.script_helper:run_python_until_end": "standard library|there is no module",
    "__main__:anything": "the module '__main__' is a program",
    "numpy.f2py.__main__:main": "the module 'numpy.f2py.__main__' is a program",
    "acme_rewards.__main__:score": "the module 'acme_rewards.__main__' is a program",
    "site-packages/acme_rewards/__main__.py:score": "__main__.py is a program",
    " os : system ": "is of Python's standard library|there is no module",
    "..os:system": "there is no module '..os'",
    "own.os:system": "there is no module 'own.os'",
    "package_here.os:system": "there is no module 'package_here.os'",
    f"{LIBRARY}/os.py:popen": "belongs to Python's standard library",
    f"{LIBRARY}/subprocess.py:getoutput": "belongs to Python's standard library",
    f"{LIBRARY}/../{LIBRARY.name}/subprocess.py:getoutput": "belongs to Python's standard library",
    f"{os.path.relpath('/', '/a')}{LIBRARY}/subprocess.py:getoutput": "Python's standard library|there is no file",
    f"/proc/self/root{LIBRARY}/subprocess.py:getoutput": "Python's standard library|there is no file",
    "linked.py:getoutput": "belongs to Python's standard library",
    "linked_library/subprocess.py:getoutput": "belongs to Python's standard library",
    "lib/python9.9/os.py:score": "belongs to Python's standard library",
    "lib/python9.9/other/helper.py:score": "belongs to Python's standard library",
    "grpo_stage.rewards.user_modules.{library}.subprocess:getoutput": "there is no module",
    "archive.zip/os.py:system": "there is no file",
    "own.py:system": "compiled code (`posix.system`)",
    "own.py:alias": "compiled code (`posix.system`)",
    "own.py:run": "it is `subprocess.run` of Python's standard library",
    "own.py:getoutput": "it is `subprocess.getoutput` of Python's standard library",
    "own.py:Popen": "it is `subprocess.Popen` of Python's standard library",
    "own.py:shell": "it is `subprocess.run` of Python's standard library",
    "own.py:helped": "'helped' is only imported there*helper.py:helped`",
    "own.py:judge": "'judge' is only imported there*helper.py:judge`",
    "own.py:shown": "'shown' is only imported there*acme_rewards.core:shown`",
    "module_here:getoutput": "it is `subprocess.getoutput` of Python's standard library",
    "module_here:helped": "'helped' is only imported there",
    "package_here:getoutput": "it is `subprocess.getoutput` of Python's standard library",
    "package_here/__init__.py:getoutput": "it is `subprocess.getoutput` of Python's standard library",
    "acme_rewards.tools:getoutput": "it is `subprocess.getoutput` of Python's standard library",
    "acme_rewards.tools:execute": "takes neither `completions` nor `completion_ids`",
    "acme_rewards.tools:execute_with": "takes neither `completions` nor `completion_ids`",
    "site-packages/acme_rewards/tools.py:execute": "takes neither `completions` nor `completion_ids`",
    "torch.utils.collect_env:run": "takes neither `completions` nor `completion_ids`",
    "acme_rewards.core:anything": "takes neither `completions` nor `completion_ids`",
    "fontTools.misc.loggingTools:configLogger": "takes neither `completions` nor `completion_ids`",
    "acme_rewards.tools:nothing": "takes neither `completions` nor `completion_ids`",
    "grpo_stage.rewards.loading:load_rewards": "takes neither `completions` nor `completion_ids`",
    "own.py:environ": "is of type _Environ: it must be a function",
    "numpy._core._multiarray_umath:dot": "is compiled code, and no Python file",
}

LEGITIMATE = (
    *("own.py:score", "own.py:half", "own.py:wrapped", "own.py:unwrapped", "own.py:by_package"),
    *("own.py:object", "own.py:method", "own.py:later", "own.py:from_columns", "./own.py:score", "os.py:score"),
    *("helper.py:helped", "helper.py:judge", "with space/a file.py:score", "alias.py:score", " own.py:score "),
    *("module_here:score", "package_here:score", "package_here.inner:score", "package_here/__init__.py:score"),
    *("package_here/inner.py:score", "namespace_here.inner:score", "acme_rewards:shown", "acme_rewards.core:shown"),
    "lib/python9.9/site-packages/mine.py:score",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a user's files, and a folder of installed packages."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "linked.py").symlink_to(LIBRARY / "subprocess.py")
    (tmp_path / "linked_library").symlink_to(LIBRARY)
    (tmp_path / "alias.py").symlink_to(tmp_path / "own.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    _forget_modules()
    yield tmp_path
    _forget_modules()


def _forget_modules() -> None:
    """Those that this test or an earlier one imported under a name of `FILES`."""
    tops = {path.removeprefix("site-packages/").split("/")[0].removesuffix(".py") for path in FILES}
    for name in list(sys.modules):
        if name.split(".")[0] in tops - {"os"}:
            del sys.modules[name]


def load(spec: str, settings: dict[str, Any] | None = None, announce: Callable[[str], object] = print) -> Any:
    kwargs = {spec.rpartition(":")[2].strip(): settings} if settings else None
    weights = [0.0, 1.0]
    return load_rewards([spec, "overlong"], weights, kwargs, max_new_tokens=10, timeout_s=20.0, announce=announce)


@pytest.mark.parametrize("spec", ATTACKS)
def test_an_attack_is_refused_before_anything_runs(spec: str, folder: Path) -> None:
    said = ATTACKS[spec]
    library = str(LIBRARY).replace("/", "_2f").replace(".", "_2e")
    loaded = set(sys.modules)
    for settings in ({"command": COMMAND}, {"cmd": COMMAND}, {"args": COMMAND, "shell": True}, None):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the message is compared below
            load(spec.replace("{library}", library), settings)
        text = str(refusal.value)
        assert any(all(part in text for part in words.split("*")) for words in said.split("|")), text
        assert any(
            remedy in text
            for remedy in ("path/file.py:function", "Name it where", "working directory", "must be a function")
        )
    assert not (folder / MARKER).exists()
    assert {"this", "antigravity", "idlelib.idle", "acme_marks"}.isdisjoint(set(sys.modules) - loaded)


@pytest.mark.parametrize("spec", LEGITIMATE)
def test_what_is_a_reward_function_stays_one(spec: str, folder: Path) -> None:
    prompt = Prompt(index=0, token_ids=(1,), messages=(), reference="7", columns={"level": 1})
    completion = Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text="7")
    suite = load(spec)
    try:
        scores = suite.score([RolloutGroup(prompt=prompt, completions=(completion,), policy_version=0)])
    finally:
        suite.close()
    assert scores[0][0][0] in (1.0, 0.5)


def test_what_will_run_is_said_before_it_runs(folder: Path) -> None:
    said: list[tuple[str, bool]] = []
    load("acme_marks:score", announce=lambda text: said.append((text, (folder / MARKER).exists())))
    file = folder / "site-packages" / "acme_marks.py"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert said == [(f"Reward code that will run: function `score` of {file}, sha256 {digest[:12]}.", False)]
    assert (folder / MARKER).exists()


def test_what_will_run_can_be_described_without_running_it(folder: Path) -> None:
    specs = ["accuracy", "reward_model", "acme_marks:score", "package_here.inner:score", "own.py:score"]
    found = describe(specs, folder)
    assert [(code.spec, code.file.relative_to(folder).as_posix()) for code in found] == [
        ("acme_marks:score", "site-packages/acme_marks.py"),
        ("package_here.inner:score", "package_here/inner.py"),
        ("own.py:score", "own.py"),
    ]
    assert not (folder / MARKER).exists()
    assert {"acme_marks", "package_here"}.isdisjoint(sys.modules)


def test_a_files_source_runs_and_not_what_is_cached_beside_it(folder: Path) -> None:
    (folder / "evil.py").write_text(MARK + SCORE)
    cached = folder / "__pycache__" / f"plain.{sys.implementation.cache_tag}.pyc"
    py_compile.compile("evil.py", cfile=str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (folder / "plain.py").write_text(SCORE)
    load("plain.py:score")
    assert not (folder / MARKER).exists()


def test_the_code_of_a_function_is_that_of_the_file_which_defines_it(folder: Path) -> None:
    suite = load("package_here:score")
    assert suite.code["score"] == hashlib.sha256((folder / "package_here" / "inner.py").read_bytes()).hexdigest()
    assert suite.code["overlong"].startswith("grpo-stage ")


# vLLM's options


def test_every_option_of_vllm_is_decided() -> None:
    tables = [set(OWNED_OPTIONS), set(CODE_OPTIONS), set(HARMLESS_OPTIONS), {"compilation_config"}]
    assert sum(map(len, tables)) == len(set().union(*tables)), "one table each"
    assert set().union(*tables) == known_options()
    assert set(OWNED_OPTIONS_ON_CPU) <= HARMLESS_OPTIONS


def test_an_option_of_a_later_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "known_options", lambda: {"sampler_cls"})
    with pytest.raises(ValueError, match=r"`sampler_cls` cannot be set.*does not know whether it names code"):
        refuse_options({"sampler_cls": "evil.Sampler"}, on_cpu=True)


@pytest.mark.parametrize(
    "options",
    [
        {"worker_extension_cls": "evil.Extension"},
        {"worker_cls": "evil.Worker"},
        {"scheduler_cls": "evil.Scheduler"},
        {"logits_processors": ["evil:Processor"]},
        {"distributed_executor_backend": "evil.Executor"},
        {"kv_transfer_config": {"kv_connector": "E", "kv_connector_module_path": "evil", "kv_role": "kv_both"}},
        {"ec_transfer_config": {"ec_connector_module_path": "evil"}},
        {"reasoning_parser_plugin": "evil.py"},
        {"structured_outputs_config": {"reasoning_parser_plugin": "evil.py"}},
        {"io_processor_plugin": "evil"},
        {"speculative_config": {"method": "custom_class", "model": "evil.Proposer"}},
        {"pooler_config": {"activation": "evil"}},
        {"load_format": "evil"},
        {"model_loader_extra_config": {"module": "evil"}},
        {"hf_overrides": {"auto_map": {"AutoModel": "evil.Model"}}},
        {"trust_remote_code": True},
        {"tokenizer": "evil"},
        {"compilation_config": {"backend": "evil.backend"}},
        {"compilation_config": {"inductor_passes": {"post_grad_custom_post_pass": "evil.f"}}},
        {"compilation_config": {"inductor_compile_config": {"cpp.cxx": ["evil"]}}},
        {"compilation_config": {"cache_dir": "evil"}},
        {"compilation_config": '{"backend": "evil.backend"}'},
        {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "zmq"}},
        {"otlp_traces_endpoint": "http://evil"},
    ],
)
def test_an_option_of_vllm_that_names_code_is_refused(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=f"`{key}` .*`vllm_config`.*(Leave it out|Write a level)"):
        refuse_options(options, on_cpu=False)


def test_other_options_of_vllm_are_taken() -> None:
    compilation = dict.fromkeys(COMPILATION_OPTIONS)
    refuse_options({"max_num_seqs": 8, "compilation_config": 3, "attention_backend": "FLASH_ATTN"}, on_cpu=True)
    refuse_options({"compilation_config": compilation, "enable_chunked_prefill": True}, on_cpu=False)


# Secrets

SECRETS = {
    "api_key": "abc",
    "apiKey": "topsecret",
    "X-Api-Key": "plainwordthatislong",
    "OPENAI_API_KEY": "plain",
    "key": "0a1b2c3d4e5f",
    "token": "Zk3hunter2Qx9",
    "judge_token": "Xy8d-12ab-k3",
    "password": 123456,
    "db_password_2": "quiet",
    "client_secret": "quiet",
    "webhook_url": "https://host/T0/B1",
    "credentials": ["user", {"deep": "value"}],
    "Authorization": "Bearer abcdef123",
    "auth": "user:pa55W0rd1",
    "any": "sk-proj-abc123def456",
    "hub": "hf_abcdefghijklmnop",
    "git": "ghp_abcdefghij0123",
    "aws": "AKIAIOSFODNN7EXAMPLE",
}
NO_SECRETS = {
    "key": "answer",
    "keys": ["final_answer", "score"],
    "stop_token": "<|im_end|>",
    "eos_tokens": ["</s>", "[EOS]"],
    "add_tokens": "<a1>,<b2>",
    "new_special_tokens": ["Foo1", "Bar2"],
    "max_tokens": 512,
    "tokens": "1024",
    "author": "Jo3",
    "keyword": "Hub2",
    "api_key_env": "JUDGE_KEY",
    "api_key": "${oc.env:JUDGE_KEY}",
    "token": "HF_TOKEN",
    "use_auth": True,
    "url": "https://host:8000/v1?page=2",
    "pattern": r"\d+ token: [a-z]+",
    "monkey": "banana",
    "answer_key": "Answer",
    "primary_key": "ID",
    "sort_key": "finalAnswer2Text",
    "group_key": "gsm8k_final_answer_v2",
    "end_token": "Final Answer:",
    "image_key": "recommendation",
    "public_key": "/home/me/keys/a1b2c3d4e5f6",
    "path": "/data/sk-model-v2/ckpt",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_masked_at_any_depth(name: str) -> None:
    value = SECRETS[name]
    for wrapped in ({name: value}, {"f": {name: value}}, [{"headers": [{name: value}]}]):
        text = json.dumps(mask(wrapped))
        assert MASK in text
        assert all(part not in text for part in secrets_in(wrapped))
        assert secrets_in(wrapped)


def test_what_is_no_secret_stays() -> None:
    assert mask(NO_SECRETS) == NO_SECRETS
    assert secrets_in(NO_SECRETS) == set()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgres://user:pa55@host/db", f"postgres://user:{MASK}@host/db"),
        ("https://host/v1?token=abc&page=2", f"https://host/v1?token={MASK}&page=2"),
        ("https://host/?a=1&api_key=x1y2", f"https://host/?a=1&api_key={MASK}"),
        ('{"api_key": "top secret", "n": 1', f'{{"api_key": "{MASK}", "n": 1'),
        ("key sk-abcdef0123 is wrong", f"key {MASK} is wrong"),
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {MASK}"),
        ("{'Authorization': 'Basic abcdefgh'}", f"{{'Authorization': '{MASK}'}}"),
        ("Authorization: Basic abcdefgh", f"Authorization: Basic {MASK}"),
        ("sent Bearer abcdefgh01234567", f"sent Bearer {MASK}"),
    ],
)
def test_secrets_in_a_text(text: str, masked: str) -> None:
    assert mask_text(text) == masked
    for prose in ("Token indices sequence length", "Basic arithmetic: 1 + 1", "Bearer of good news"):
        assert mask_text(prose) == prose
    assert mask_text("scikit sk-learn, the token: 7, https://host/a@b?x=1") == (
        "scikit sk-learn, the token: 7, https://host/a@b?x=1"
    )


@pytest.mark.parametrize("is_object", [True, False])
def test_no_error_says_a_secret(folder: Path, is_object: bool) -> None:
    """Neither the error of the run nor what it comes from, which Python prints as well."""
    (folder / "asks.py").write_text(
        "def ask(completions, api_key, url):\n    raise RuntimeError(f'{url} does not know {api_key!r}')\n"
        "class Ask:\n    def __call__(self, completions, api_key, url): ask(completions, api_key, url)\n"
        "object = Ask()\n"
    )
    settings = {"api_key": "my own secret", "url": "https://me:pa55@host"}
    name = "object" if is_object else "ask"
    suite = load(f"asks.py:{name}", settings)
    prompt = Prompt(index=0, token_ids=(1,), messages=(), reference="7")
    completion = Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text="7")
    try:
        with pytest.raises(RewardError) as failure, errors_masked({"reward_kwargs": {name: settings}}):
            suite.score([RolloutGroup(prompt=prompt, completions=(completion,), policy_version=0)])
    finally:
        suite.close()
    error: BaseException | None = failure.value
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    assert MASK in texts[0]
    assert [text for text in texts if "my own secret" in text or "pa55" in text] == []


def test_a_mask_is_no_value() -> None:
    with pytest.raises(
        ValueError, match=r"reward_kwargs\['scaled'\] has `\*\*\*` where a secret.*environment variable"
    ):
        GRPOArguments(reward_funcs="own.py:scaled", reward_kwargs={"scaled": {"scale": MASK}}).validate()


def test_saved_arguments_hold_no_token(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True)
    vars(arguments)["__reduce_ex__"] = partial(_without_token, arguments)
    file = io.BytesIO()
    torch.save(arguments, file)
    assert b"hf_secret" not in file.getvalue()
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert saved.to_dict() == arguments.to_dict() | {"hub_token": "<HUB_TOKEN>"}
    assert saved.hub_token is None
    assert arguments.hub_token == "hf_secret"
