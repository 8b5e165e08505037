"""The gradients of one step under every objective, by as many processes as torchrun starts: argv names the file."""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_stage.distributed import leave_process_group
from grpo_stage.update.reference import InitialWeightsReference


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.unit.trainer_on_fakes import collect, gradient_of, make_trainer


NUM_PROMPTS = 4
# What takes statistics over the step or the generation goes along with each loss.
TOGETHER: dict[str, Any] = {
    "beta": 0.1,
    "mask_truncated_completions": True,
    "top_entropy_quantile": 0.5,
    "rollout_correction": "token",
    "advantage_estimator": "reinforce_plus_plus_baseline",
}
OF_COMPLETIONS: dict[str, Any] = {"top_entropy_quantile": 1.0, "rollout_correction": "sequence"}
OBJECTIVES: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"} | OF_COMPLETIONS,
    {"loss_type": "dapo", "importance_sampling_level": "sequence_token"},
    {"loss_type": "cispo", "epsilon_high": 1.0},
    {"loss_type": "sapo"},
    {"loss_type": "gspo"} | OF_COMPLETIONS,
    {"loss_type": "gspo_token"},
    {"loss_type": "gmpo"} | OF_COMPLETIONS,
    {"advantage_estimator": "gdpo"},
    {"advantage_estimator": "reinforce_plus_plus"},
    {"advantage_estimator": "rloo", "scale_rewards": "batch"},
    {"kl_in_reward": True, "kl_estimator": "k1"},
    {"covariance_control": "kl_cov", "covariance_frac": 0.2},
    {"covariance_control": "clip_cov", "covariance_frac": 0.2, "clip_cov_min": -1.0, "clip_cov_max": 9.0},
    {"entropy_coef": 0.1},
    {"advantage_estimator": "remax"},
    {"advantage_estimator": "optimal_token_baseline", "rollout_correction": "none"},
    {"loss_type": "vespo", "rollout_correction": "none"},
    {"loss_type": "dro", "dro_beta": 0.1, "loss_aggregation": "token_sum"},
    {"rollout_correction_normalize": True},
    {"router_aux_loss_coef": 0.5},
    {"rollout_rejection": "geometric", "rollout_rejection_max": 1.5, "rollout_rejection_min": 0.2},
]


class Experts(nn.Module):
    """An output layer for each prompt, of which a rank reaches those of its own prompts, and one that none reaches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(model.lm_head) for _ in range(NUM_PROMPTS + 1))
        model.register_forward_pre_hook(self._note_prompts, with_kwargs=True)
        model.lm_head = self

    def _note_prompts(self, module: nn.Module, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        starts = kwargs["attention_mask"].argmax(dim=1, keepdim=True)
        self.prompts = (kwargs["input_ids"].gather(1, starts) - 1).flatten().tolist()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.heads[prompt](row) for prompt, row in zip(self.prompts, hidden, strict=True)])


def trainer_of(num_ranks: int, **options: Any) -> Any:
    """Its prompts are the same however many ranks share them."""
    with tempfile.TemporaryDirectory() as folder:
        return make_trainer(
            Path(folder),
            num_prompts=NUM_PROMPTS,
            training={"per_device_train_batch_size": NUM_PROMPTS // num_ranks},
            **options,
        )


def gradients_of_experts(num_ranks: int) -> list[torch.Tensor | None]:
    """On each rank the whole gradient of each output layer."""
    # An output layer that looks at the rows of its input needs them whole, each with its prompt.
    trainer = trainer_of(num_ranks, disable_prompt_sharing=True, disable_logit_chunking=True)
    experts = Experts(trainer.model)
    trainer.learner.learn(trainer.model, collect(trainer)[0], 0)
    return [head.weight.grad for head in experts.heads]


def gradients(num_ranks: int) -> list[torch.Tensor]:
    """On each rank the whole gradient, of the same completions however many ranks share them."""
    result = []
    for options in OBJECTIVES:
        trainer = trainer_of(num_ranks, num_iterations=2, reference=InitialWeightsReference, **{**TOGETHER, **options})
        data = collect(trainer)[1]
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        result.append(gradient_of(trainer, data))
    return result


if __name__ == "__main__":
    of_all = gradients(num_ranks=2), gradients_of_experts(num_ranks=2)
    if torch.distributed.get_rank() == 0:
        torch.save(of_all, sys.argv[1])
    leave_process_group()
