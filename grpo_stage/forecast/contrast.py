"""How much of a completion's gradient says what is right, and how far prompts agree on it: measured before a run.

For prompt j with samples i, the gradient s_ij of log pi is regressed on the reward: s_ij = a_j + r_ij beta_j + noise.
What is needed is the mean of |beta_j|^2, the mean of beta_j . beta_l over pairs of prompts, and the noise's variance
tau, so that gradients are kept as random sketches of a few thousand numbers, whose scalar products are unbiased (count
sketch, Charikar et al. 2002).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


SKETCH_SIZE = 2**14
_SEED = 20260


def sketch(gradients: Iterable[torch.Tensor], size: int = SKETCH_SIZE) -> torch.Tensor:
    """[size] float64 on the CPU: each entry under a random sign, added up at its position modulo `size`.

    The signs are the same at every call with the same shapes.
    """
    total: torch.Tensor | None = None
    for position, gradient in enumerate(gradients):
        flat = gradient.detach().float().flatten()
        signs = torch.Generator(device=flat.device).manual_seed(_SEED + position)
        flat = flat * (torch.randint(0, 2, flat.shape, generator=signs, device=flat.device) * 2 - 1)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
        added = padded.view(-1, size).sum(dim=0).double().cpu()
        total = added if total is None else total + added
    assert total is not None, "a model that is trained has a trainable parameter"
    return total


def completion_sketch(
    model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int], temperature: float
) -> torch.Tensor:
    """The sketch of the gradient of the completion's log-probability in the trainable parameters.

    The model's gradients and training mode are left as they were.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()
    try:
        device = parameters[0].device
        token_ids = torch.tensor([[*prompt_ids, *completion_ids]], device=device)
        logits = model(input_ids=token_ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
        chosen = logprobs.gather(-1, token_ids[0, len(prompt_ids) :, None])
        gradients = torch.autograd.grad(chosen.sum(), parameters, allow_unused=True)
        return sketch(g if g is not None else torch.zeros_like(p) for p, g in zip(parameters, gradients, strict=True))
    finally:
        model.train(was_training)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrasts:
    """The regressions of M prompts, whose rewards are not all equal."""

    products: NDArray[np.float64]
    """[M, M], of the prompts' estimates of beta."""
    noise: NDArray[np.float64]
    """[M], estimates of tau."""
    spread: NDArray[np.float64]
    """[M], the sum of squares of a prompt's rewards about their mean: an estimate's noise is tau over it."""

    def draws(self, rng: np.random.Generator, num_draws: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(contrast, agreement) as `group_size.signal` takes them, [R] each: Bayesian bootstrap over the prompts."""
        count = len(self.spread)
        weights = (
            rng.dirichlet(np.ones(count), size=num_draws) * self.spread
        )  # an estimate with less noise counts more
        total = weights.sum(axis=1)
        noise = weights @ self.noise / total
        squares = np.diag(self.products)
        own = weights @ (squares - self.noise / self.spread) / total
        paired = np.einsum("ri,ij,rj->r", weights, self.products, weights) - weights**2 @ squares
        common = paired / (total**2 - np.sum(weights**2, axis=1))
        own = np.maximum(own, 0.0)
        agreement = np.divide(np.clip(common, 0.0, own), own, out=np.zeros(num_draws), where=own > 0)
        return own / noise, agreement


def contrasts(sketches: Sequence[Sequence[torch.Tensor]], rewards: Sequence[Sequence[float]]) -> Contrasts | None:
    """Regress each prompt's gradients on its rewards; None with fewer than two prompts that this is possible for.

    Args:
        sketches: of each prompt's completions.
        rewards: theirs.
    """
    betas, noise, spread = [], [], []
    for of_prompt, own in zip(sketches, rewards, strict=True):
        s, r = np.stack([one.numpy() for one in of_prompt]), np.asarray(own, dtype=float)
        r = r - r.mean()
        sum_of_squares = float(r @ r)
        if len(r) < 3 or sum_of_squares <= 1e-12:
            continue
        s = s - s.mean(axis=0)
        beta = r @ s / sum_of_squares
        residual = s - np.outer(r, beta)
        betas.append(beta)
        noise.append(float(np.sum(residual**2)) / (len(r) - 2))
        spread.append(sum_of_squares)
    if len(betas) < 2 or not any(noise):
        return None
    stacked = np.stack(betas)
    return Contrasts(products=stacked @ stacked.T, noise=np.asarray(noise), spread=np.asarray(spread))
