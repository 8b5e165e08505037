"""How far two bf16 passes through one model differ, by depth, vocabulary and entropy: what the canary lives with.

    python benchmarks/precision_noise.py [--device cuda]

Random Llamas of width 512. One pass as the trainer's (autocast, a padded batch, sdpa attention), one as an engine's
(bf16 throughout, one sequence at a time, plain attention). The entropy is set by the scale of the output layer. Prints
the mean and largest absolute difference of the log-probabilities of sampled tokens, in nats.
"""

import argparse
import json
from itertools import product

import torch
from transformers import LlamaConfig, LlamaForCausalLM


TOKENS, ROWS = 64, 16


def random_llama(layers: int, vocabulary: int, attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
        attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


@torch.no_grad()
def difference(layers: int, vocabulary: int, scale: float, device: str) -> dict[str, float]:
    trainer, engine = (random_llama(layers, vocabulary, kind).to(device) for kind in ("sdpa", "eager"))
    for model in (trainer, engine):
        model.lm_head.weight.mul_(scale)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, vocabulary, (ROWS, TOKENS), generator=generator).to(device)
    logits = trainer(input_ids=ids).logits[:, :-1].float()
    # The likely tokens at their own rate, as if sampled: what a sampled token's error weighs.
    probabilities = logits.softmax(-1)
    sampled = torch.multinomial(probabilities.flatten(0, 1), 1).view(ROWS, TOKENS - 1, 1)
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1).mean().item()
    left = torch.nn.functional.pad(ids, (7, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (7, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        padded = trainer(input_ids=left, attention_mask=mask, position_ids=positions).logits[:, 7:-1].float()
    ours = padded.log_softmax(-1).gather(-1, sampled)
    theirs = torch.cat([engine(input_ids=row[None]).logits[:, :-1].float() for row in ids])
    gap = (ours - theirs.log_softmax(-1).gather(-1, sampled)).abs()
    return {"entropy": round(entropy, 2), "mean": round(gap.mean().item(), 4), "max": round(gap.max().item(), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    cases = [(2, 32768), (8, 32768), (32, 32768), (80, 32768), (8, 1024), (8, 151936)]
    for (layers, vocabulary), scale in product(cases, (1.0, 10.0, 30.0)):
        row = {"layers": layers, "vocabulary": vocabulary, "scale": scale}
        print(json.dumps(row | difference(layers, vocabulary, scale, options.device)), flush=True)


if __name__ == "__main__":
    main()
