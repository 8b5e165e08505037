"""Prompts with images from dataset to gradient, against plain forward passes of the whole sequence."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText

from grpo_stage.algorithm.conditions import refuse_broken
from grpo_stage.host import images as images_of_host
from grpo_stage.host.image_files import refuse_changed
from grpo_stage.host.inputs import load_inputs
from grpo_stage.host.parser import parse
from grpo_stage.rollout.engines.hf import HFEngine
from grpo_stage.types import Completion, FinishReason, Prompt, SamplingSettings
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import PaddedLayout, Row, SharedPromptLayout, rows_of
from grpo_stage.update.exactness import settle
from grpo_stage.update.logprobs import Forward
from grpo_stage.update.strategies.replicated import ReplicatedParameters
from tests.image_models import FAMILIES, save


CPU = torch.device("cpu")
TEMPLATES = list(FAMILIES)
TEXT = "How many squares?"


def draw(path: Path, size: tuple[int, int], *squares: tuple[int, int]) -> str:
    image = Image.new("RGB", size, "black")
    for x, y in squares:
        ImageDraw.Draw(image).rectangle((x, y, x + 9, y + 9), fill="white")
    image.save(path)
    return path.name


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of one size, another of another size, two images in a prompt, and a prompt without any."""
    folder = tmp_path_factory.mktemp("images")
    one = draw(folder / "one.png", (56, 56), (5, 5))
    two = draw(folder / "two.png", (56, 56), (5, 5), (30, 30))
    wide = draw(folder / "wide.png", (112, 56), (5, 5), (70, 30))
    rows = [
        {"instruction": f"<image>{TEXT}", "output": "1", "images": [one]},
        {"instruction": f"<image>{TEXT}", "output": "2", "images": [two]},
        {"instruction": f"Look: <image> and <image>. {TEXT}", "output": "4", "images": [wide, two]},
        {"instruction": "What is 1 + 1?", "output": "2", "images": []},
    ]
    write(folder, "squares", rows)
    return folder


def write(folder: Path, name: str, rows: list[dict[str, Any]], **columns: str) -> None:
    (folder / f"{name}.json").write_text(json.dumps(rows))
    info = folder / "dataset_info.json"
    known = json.loads(info.read_text()) if info.exists() else {}
    columns = {"prompt": "instruction", "response": "output", "images": "images", **columns}
    info.write_text(json.dumps(known | {name: {"file_name": f"{name}.json", "columns": columns}}))


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def get(template: str) -> Path:
        return folder / template if (folder / template).exists() else save(template, folder / template)

    return get


def make_arguments(model: Path, template: str, data_dir: Path, **keys: Any) -> Any:
    recipe = {
        "stage": "grpo", "do_train": True, "model_name_or_path": str(model), "finetuning_type": "full",
        "template": template, "dataset": "squares", "dataset_dir": str(data_dir), "cutoff_len": 256,
        "reward_funcs": "accuracy", "rollout_backend": "hf", "num_generations": 4, "max_new_tokens": 8,
        "output_dir": str(data_dir / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
    }  # fmt: skip
    return parse(recipe | keys)


class Run:
    """A model and what a run reads for it."""

    def __init__(self, template: str, model: Path, data_dir: Path) -> None:
        self.template = template
        self.inputs = load_inputs(make_arguments(model, template, data_dir))
        self.prompts: list[Prompt] = self.inputs.prompts.train
        self.images: Any = self.inputs.images
        self.model: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)

    def sampling(self, **changes: Any) -> SamplingSettings:
        given = {"num_generations": 3, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
        stops = (self.inputs.tokenizer.eos_token_id, self.images.placeholder)
        return SamplingSettings(**{**given, "stop_token_ids": stops, **changes})

    def plain(self, row: Any) -> torch.Tensor:
        """[T] log-probabilities, by the model's own ways to place images and to count: one sequence, no cache."""
        prompt, completion = row.prompt, row.completion
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids[:-1]]])
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images:
            plugin = self.inputs.template.mm_plugin
            files = [image.path for image in prompt.images]
            pixels = plugin.get_mm_inputs(files, [], [], [len(files)], [0], [0], ids.tolist(), self.inputs.processor)
            pixels.pop("token_type_ids", None)
            arguments |= dict(pixels)
        types = (ids == self.images.placeholder).long()
        key = {"qwen2_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}.get(self.template)
        arguments |= {key: types} if key else {}
        logits = self.model(**arguments).logits[0, len(prompt.token_ids) - 1 :]
        return logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def runs(model_dirs: Any, data_dir: Path) -> Callable[[str], Run]:
    made: dict[str, Run] = {}

    def get(template: str) -> Run:
        if template not in made:
            made[template] = Run(template, model_dirs(template), data_dir)
        return made[template]

    return get


def completion(*token_ids: int) -> Completion:
    return Completion(
        token_ids=token_ids, sampling_logprobs=(0.0,) * len(token_ids), finish_reason=FinishReason.STOP, text=""
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_sampled_and_what_is_learned_from_are_the_plain_models(runs: Any, template: str) -> None:
    """The engine's log-probabilities and the update's, in both layouts: of prompts of one text and different images,
    of different lengths, and without images, all in one batch."""
    run = runs(template)
    engine = HFEngine(run.inputs.tokenizer, images=run.images)
    engine.sync(run.model, 0)
    groups = engine.generate(run.prompts, run.sampling(), step=1)
    rows = rows_of(groups)
    with torch.no_grad():
        expected = [run.plain(row) for row in rows]
    for row, own in zip(rows, expected, strict=True):
        assert torch.allclose(torch.tensor(row.completion.sampling_logprobs), own, atol=2e-5)
    for scored, own in zip(engine.score(groups), expected, strict=True):
        assert torch.allclose(scored, own, atol=2e-5)
    other = Row(run.prompts[1], rows[0].completion)
    assert other.prompt.token_ids == rows[0].prompt.token_ids
    with torch.no_grad():
        assert (run.plain(other) - expected[0]).abs().max() > 1e-3, "the images of this model do not matter"
    alone = engine.generate(run.prompts[1:2], run.sampling(num_generations=1), step=1)[0].completions[0]
    assert alone.token_ids == groups[1].completions[0].token_ids

    forward = Forward(SharedPromptLayout(0, CPU, run.images))
    plain = PaddedLayout(0, CPU, run.images)
    settle(forward, plain, run.model, run.prompts, torch.no_grad, ReplicatedParameters(None))  # type: ignore[arg-type]
    # Tokens of an image of Gemma 3's see those behind them: no stream of several sequences does that.
    assert isinstance(forward.layout, PaddedLayout if template == "gemma3" else SharedPromptLayout)
    for layout in {forward.layout, plain}:
        batch = layout.tokens(rows)
        with torch.no_grad(), attention_of(run.model, batch.inputs.shared_prompts):
            found = Forward(layout).statistics(run.model, batch, 1.0).logprobs
        for row, own in zip(found, expected, strict=True):
            assert torch.allclose(row[: len(own)], own, atol=2e-5)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_gradient_is_the_plain_models_however_sequences_are_placed(runs: Any, template: str) -> None:
    """Of what reads images, too; a sampled token that stands for an image ends a completion and has no image."""
    run = runs(template)
    model, stop = run.model.train(), run.images.placeholder
    rows = [
        Row(prompt, each)
        for prompt in run.prompts
        for each in (completion(20, 21, 22, stop), completion(23), completion(30, 31, 32, 33, 34, 35))
    ]
    weights = torch.linspace(-1, 1, sum(len(row.completion.token_ids) for row in rows))

    def gradient(logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad((torch.cat(list(logprobs)) * weights).sum(), trained, allow_unused=True)
        return torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(trained, found, strict=True)]
        )

    expected = gradient([run.plain(row) for row in rows])
    layouts: list[Any] = [PaddedLayout(2, CPU, run.images)]
    if template != "gemma3":
        layouts.append(SharedPromptLayout(2, CPU, run.images))
    for layout in layouts:
        batch = layout.tokens(rows)
        with attention_of(model, batch.inputs.shared_prompts):
            found = Forward(layout).statistics(model, batch, 1.0).logprobs
            own = gradient([row[: len(each.completion.token_ids)] for row, each in zip(found, rows, strict=True)])
        assert (own - expected).norm() / expected.norm() < 1e-4
    model.eval()


def refused(model: Path, template: str, data_dir: Path, **keys: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        load_inputs(make_arguments(model, template, data_dir, **keys))
    return str(error.value)


BAD_ROWS = {
    "missing": ({"images": ["nowhere.png"]}, ["there is no file nowhere.png", "`media_dir`", "remove the row"]),
    "broken": ({"images": ["broken.png"]}, ["broken.png cannot be read", "Mend it"]),
    "too_few": ({"images": []}, ["1 times `<image>` and its row 0 images"]),
    "too_many": ({"images": ["one.png", "two.png"]}, ["1 times `<image>` and its row 2 images"]),
    "tools": ({"images": ["one.png"], "tools": '[{"name": "f"}]'}, ["tells of tools", "Leave `tools`"]),
    "number": ({"images": [3]}, ["an image is a path"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_does_not_fit_is_refused_before_a_model_is_loaded(
    model_dirs: Any, data_dir: Path, name: str
) -> None:
    changes, words = BAD_ROWS[name]
    (data_dir / "broken.png").write_bytes((data_dir / "one.png").read_bytes()[:60])
    columns = {"tools": "tools"} if "tools" in changes else {}
    write(data_dir, name, [{"instruction": f"<image>{TEXT}", "output": "1", **changes}], **columns)
    message = refused(model_dirs("qwen2_vl"), "qwen2_vl", data_dir, dataset=name)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("template", "keys", "words"),
    [
        ("llama3", {}, ["`template: llama3` knows none", "`qwen2_vl`"]),
        ("llava", {}, ["no image processor", "Name a vision-language model"]),
        ("qwen2_vl", {"cutoff_len": 30}, ["No training prompt is left", "3 of 4 training prompts with images"]),
    ],
)
def test_what_takes_no_images_is_refused(
    model_dirs: Any, data_dir: Path, tiny_model_dir: Path, template: str, keys: dict[str, Any], words: list[str]
) -> None:
    model = tiny_model_dir if template != "qwen2_vl" else model_dirs(template)
    message = refused(model, template, data_dir, **keys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"has_tools": True}, "`tools` or `environment`"),
        ({"rollout_backend": "vllm_server"}, "`rollout_backend: vllm_server`"),
        ({"rollout_backend": "vllm"}, None),
        ({"rollout_backend": "vllm", "freeze_vision_tower": False}, "the language part alone.*`vllm_lora: merged`"),
        ({"rollout_backend": "vllm", "freeze_vision_tower": False, "vllm_lora": "merged"}, None),
        ({"rollout_backend": "vllm", "freeze_vision_tower": False, "finetuning_type": "full"}, None),
        ({"rollout_backend": "hf", "freeze_vision_tower": False}, None),
        ({"rollout_ahead": 1}, "`rollout_ahead: 1`"),
        ({"structured_outputs": {"regex": "[0-9]"}}, "`structured_outputs`"),
        ({"reward_model": "r"}, "`reward_model: r`.*text alone"),
        ({"ref_model": "r"}, "`ref_model: r`.*qwen2 and that of the model qwen2_vl"),
        ({"ref_model": "r", "ref_model_type": "qwen2_vl"}, None),
        ({"distribution": "FSDP2"}, r"FSDP2.*\(DDP\)"),
        ({"distribution": "ZeRO-3"}, r"ZeRO-3.*\(DDP\)"),
    ],
)
def test_options_that_images_are_not_possible_with(changes: dict[str, Any], words: str | None) -> None:
    values = {
        "has_tools": False, "rollout_backend": "hf", "reward_model": None, "ref_model": None,
        "distribution": "replicated", "model_type": "qwen2_vl", "ref_model_type": "qwen2",
        "rollout_ahead": 0, "structured_outputs": None, "finetuning_type": "lora", "vllm_lora": "native",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
    }  # fmt: skip
    with contextlib.nullcontext() if words is None else pytest.raises(ValueError, match=words):
        refuse_broken(images_of_host._RULES, SimpleNamespace(**values | changes))


class FakeEncoder:
    """A family whose inputs for a batch are what a test says."""

    tokenizer = SimpleNamespace(convert_ids_to_tokens=str)

    def __init__(self, inputs: Callable[[list[tuple[int, int]]], dict[str, Any]]) -> None:
        self.inputs = lambda images, token_ids: inputs([image[0].size for image in images])

    def token_ids(self, messages: Any, images: Any) -> list[int]:
        return [1, 7, 7, 2]


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        (lambda sizes: {"pixels": torch.zeros(len(sizes), max(sizes)[0])}, "depends on the other images"),
        (lambda sizes: {"pixels": torch.full((len(sizes), 3), len(sizes))}, "not image by image"),
        (lambda sizes: {"pixels": [0]}, "no tensor"),
        (lambda sizes: {"token_type_ids": [[0, 0, 1, 1]] * len(sizes)}, "in another way"),
        (lambda sizes: {"mm_token_type_ids": torch.zeros(len(sizes), 4)}, "not image by image"),
        (lambda sizes: {"token_type_ids": [[0, 1, 1, 0]] * len(sizes)}, None),
        (lambda sizes: {"pixels": torch.tensor([[float(size[0])] for size in sizes])}, None),
    ],
)
def test_a_family_whose_images_are_not_read_one_by_one_is_refused(inputs: Any, problem: str | None) -> None:
    arguments = SimpleNamespace(model=SimpleNamespace(model_name_or_path="m"), data=SimpleNamespace(template="t"))
    if problem is None:
        takes_types = images_of_host._check_family(arguments, FakeEncoder(inputs), 7)  # type: ignore[arg-type]
        assert takes_types == ("token_type_ids" in inputs([(1, 1)]))
        return
    with pytest.raises(ValueError, match=problem):
        images_of_host._check_family(arguments, FakeEncoder(inputs), 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`template: t` does not fit"):
        images_of_host._check_family(arguments, FakeEncoder(inputs), 9)  # type: ignore[arg-type]


def test_images_that_a_dataset_holds_itself_are_the_same_to_the_model(
    runs: Any, model_dirs: Any, data_dir: Path, tmp_path: Path
) -> None:
    """As `datasets` decodes a column of images; and no file of a prompt may change behind a cache."""
    run = runs("qwen2_vl")
    rows = {"instruction": [f"<image>{TEXT}"] * 2, "output": ["1", "2"], "images": [[str(data_dir / "one.png")]] * 2}
    features = Features({"instruction": Value("string"), "output": Value("string"), "images": [ImageFeature()]})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "held.parquet"))
    columns = {"prompt": "instruction", "response": "output", "images": "images"}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"squares": {"file_name": "held.parquet", "columns": columns}})
    )
    held = load_inputs(make_arguments(model_dirs("qwen2_vl"), "qwen2_vl", tmp_path)).prompts.train[0]
    assert held.images[0].data is not None
    assert held.token_ids == run.prompts[0].token_ids
    expected, found = (run.images.arguments([prompt]) for prompt in (run.prompts[0], held))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    file = run.prompts[0].images[0]
    refuse_changed(run.prompts)
    for num_bytes, path in ((file.num_bytes + 1, file.path), (file.num_bytes, f"{file.path}.gone")):
        changed = dataclasses.replace(file, num_bytes=num_bytes, path=path)
        with pytest.raises(ValueError, match="`overwrite_cache: true`"):
            refuse_changed([dataclasses.replace(run.prompts[0], images=(changed,))])
