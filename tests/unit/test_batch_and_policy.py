"""Micro-batches and log-probabilities against a plain pass over each sequence alone."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_stage.algorithm.averages import StepTotals
from grpo_stage.rollout.queue import RolloutQueue
from grpo_stage.types import Completion, FinishReason, Prompt, Sample, Step
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import PaddedLayout, SharedPromptLayout, count_totals
from grpo_stage.update.dropout import disable_dropout
from grpo_stage.update.logprobs import Forward
from grpo_stage.update.reference import InitialWeightsReference


VOCAB = 61
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_samples(lengths: list[list[int]], prompt_lengths: list[int], mask_truncated: bool = False) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())

    samples = []
    for index, (group_lengths, prompt_length) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        prompt = Prompt(index=index, token_ids=ids(prompt_length), messages=(), reference=None)
        for i, length in enumerate(group_lengths):
            completion = Completion(
                token_ids=ids(length),
                sampling_logprobs=tuple(-0.1 * t for t in range(length)),
                finish_reason=FinishReason.LENGTH if length == 9 else FinishReason.STOP,
                text=f"completion {index}",
            )
            samples.append(
                Sample(
                    prompt=prompt,
                    completion=completion,
                    policy_version=3,
                    rewards=(float(i), None),
                    total_reward=1 / 3 + i,
                    advantage=i - 0.7,
                    loss_mask=(0 if mask_truncated and length == 9 else 1,) * length,
                )
            )
    return samples


LENGTHS = [[3, 9, 1], [5, 2, 9]], [4, 11]
SAMPLES = make_samples(*LENGTHS)
MASKED = make_samples(*LENGTHS, mask_truncated=True)
LAYOUT = PaddedLayout(pad_token_id=0, device=CPU)
LAYOUTS = [LAYOUT, SharedPromptLayout(pad_token_id=0, device=CPU)]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)


def split(max_tokens: int, loss_type: str = "dapo", mask_truncated: bool = False, layout=LAYOUT):
    """Each micro-batch with the positions of its samples."""
    samples = MASKED if mask_truncated else SAMPLES
    totals = count_totals(samples, 9)
    return [
        (positions, layout.samples([samples[position] for position in positions], totals, loss_type))
        for positions in layout.split(samples, max_tokens)
    ]


def logprobs_of(model, batch, temperature=1.0, layout=LAYOUT):
    with attention_of(model, batch.inputs.shared_prompts):
        return Forward(layout).statistics(model, batch, temperature)


@pytest.mark.parametrize("max_tokens", [1, 30, 60, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@layouts
def test_logprobs_and_entropy_equal_those_of_each_sequence_alone(model, max_tokens, temperature, layout):
    seen = []
    for positions, batch in split(max_tokens, layout=layout):
        with torch.no_grad():
            logprobs, entropy, _ = logprobs_of(model, batch, temperature, layout)
        for position, values, entropies in zip(positions, logprobs, entropy, strict=True):
            prompt, completion = SAMPLES[position].prompt, SAMPLES[position].completion
            sequence = torch.tensor([prompt.token_ids + completion.token_ids])
            with torch.no_grad():
                logits = model(sequence).logits[0].double() / temperature
            for t, token in enumerate(completion.token_ids):
                distribution = torch.log_softmax(logits[len(prompt.token_ids) + t - 1], dim=-1)
                assert values[t].item() == pytest.approx(distribution[token].item(), abs=2e-5)
                assert entropies[t].item() == pytest.approx(
                    -(distribution.exp() * distribution).sum().item(), abs=2e-5
                )
            assert (values[len(completion.token_ids) :] == 0).all()
            assert (entropies[len(completion.token_ids) :] == 0).all()
            seen.append(position)
    assert sorted(seen) == list(range(6)), "every completion exactly once"


@pytest.mark.parametrize("max_tokens", [1, 15, 30])
@layouts
def test_the_budget_holds_for_all_but_single_completions(max_tokens, layout):
    batches = split(max_tokens, layout=layout)
    assert len(batches) > 1
    for positions, batch in batches:
        size = batch.inputs.input_ids.numel()
        assert layout.num_tokens([SAMPLES[position] for position in positions]) == size
        assert size <= max_tokens or len(positions) == 1


@layouts
def test_each_sequence_counts_all_its_tokens_but_the_one_that_predicts_no_other(layout):
    counts = layout.tokens(SAMPLES).inputs.counts
    lengths = [len(each.prompt.token_ids) + len(each.completion.token_ids) for each in SAMPLES]
    assert counts.sum().item() == sum(length - 1 for length in lengths)
    assert layout.dummy().inputs.counts.tolist() == [[0.0] * layout.dummy().inputs.input_ids.numel()]


def test_on_a_cpu_prompts_stay_apart_once_that_costs_no_time():
    samples = make_samples([[60, 60], [60, 60], [60, 60]], [200, 201, 202])
    assert [len(chunk) for chunk in LAYOUTS[1].split(samples, 10_000)] == [2, 2, 2]
    on_a_card = SharedPromptLayout(0, torch.device("cuda"))
    assert [len(chunk) for chunk in on_a_card.split(samples, 10_000)] == [6]


def test_completions_of_a_prompt_stay_together_and_share_its_tokens():
    (_, batch), *others = split(42, layout=LAYOUTS[1])
    assert not others
    assert batch.inputs.input_ids.numel() == (4 + 2 + 8 + 0) + (11 + 4 + 1 + 8), "no last token goes in"
    assert [split(27, layout=LAYOUTS[1])[i][0] for i in (0, 1)] == [[5, 3, 4], [1, 0, 2]]


@pytest.mark.parametrize(("loss_type", "expected"), [("grpo", 1.0), ("dapo", 1.0)])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_weights_of_a_step_sum_to_one_whatever_the_split(loss_type, expected, mask_truncated):
    for max_tokens in (1, 40, 10_000):
        total = sum(batch.loss_weights.sum().item() for _, batch in split(max_tokens, loss_type, mask_truncated))
        assert total == pytest.approx(expected, abs=1e-6)


def test_truncated_completions_have_no_weight_and_count_in_no_denominator_but_the_constant():
    assert count_totals(MASKED, 9) == StepTotals(
        num_completions=4, num_tokens=11, max_completion_length=9, num_left_out=2
    )
    assert count_totals(SAMPLES, 9) == StepTotals(num_completions=6, num_tokens=29, max_completion_length=9)
    for positions, batch in split(10_000, "dr_grpo", mask_truncated=True):
        for position, weights in zip(positions, batch.loss_weights, strict=True):
            length = [3, 9, 1, 5, 2, 9][position]
            expected = [1 / (6 * 9)] * length if length < 9 else []
            assert weights.tolist() == pytest.approx(expected + [0.0] * (9 - len(expected)))


@layouts
def test_a_dummy_adds_nothing_to_the_gradient(model, layout):
    batch = layout.dummy()
    (batch.loss_weights * logprobs_of(model, batch, 1.0, layout).logprobs).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert all(g is not None and (g == 0).all() for g in gradients), "every parameter takes part, with zero gradient"


def test_initial_weights_reference_is_the_start_and_gives_the_policy_back(model):
    _, batch = split(10_000)[0]
    with torch.no_grad():
        before = logprobs_of(model, batch).logprobs
        reference = InitialWeightsReference(model)
        saved = {name: p.clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.add_(0.05)
        trained = logprobs_of(model, batch).logprobs
        with reference.activate(model) as ref:
            inside = logprobs_of(ref, batch).logprobs
        after = logprobs_of(model, batch).logprobs
        for name, p in model.named_parameters():
            p.copy_(saved[name])
    assert torch.equal(inside, before)
    assert torch.equal(after, trained)
    assert not torch.allclose(before, trained, atol=1e-2)


def test_disable_dropout_reaches_modules_and_attention():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.5,
    )  # fmt: skip
    noisy = LlamaForCausalLM(config).train()
    noisy.model.extra = torch.nn.Dropout(0.5)
    ids = torch.arange(12).unsqueeze(0)
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits), "the model is noisy to begin with"
    disable_dropout(noisy)
    assert torch.equal(noisy(ids).logits, noisy(ids).logits)
    assert noisy.model.extra.p == 0.0


def test_the_state_of_a_queue_survives_json_exactly():
    samples = tuple(
        dataclasses.replace(sample, old_logprobs=torch.rand(len(sample.completion.token_ids))) for sample in SAMPLES
    )
    prompts = [SAMPLES[0].prompt, SAMPLES[3].prompt]
    queue = RolloutQueue(prompts)
    queue.append(Step(samples=samples, logprob_temperature=0.7))
    queue.append(Step(samples=(), logprob_temperature=1.0))
    restored = RolloutQueue(prompts)
    restored.load_state_dict(json.loads(json.dumps(queue.state_dict())))
    assert len(restored) == 2
    first = restored.first()
    assert first.logprob_temperature == 0.7
    for ours, theirs in zip(first.samples, samples, strict=True):
        assert torch.equal(ours.old_logprobs, theirs.old_logprobs)
        for field in dataclasses.fields(Sample):
            if field.name != "old_logprobs":
                assert getattr(ours, field.name) == getattr(theirs, field.name)
    restored.drop_first()
    assert restored.first().samples == ()
