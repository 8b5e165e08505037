"""docs/memory.png out of what `memory_plan.py` measured: `memory_picture.py MEMORY.jsonl MODEL docs/memory.png`."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


MIB = 2**20
PARTS = {
    "weights of the policy": "#4477aa",
    "weights of the critic": "#ee6677",
    "optimizer of the policy": "#66ccee",
    "optimizer of the critic": "#ffaabb",
    "gradients, activations, temporary copies": "#ccbb44",
}


def parts_of(line: dict, of_grpo: dict) -> list[float]:
    """MiB of each of PARTS at the peak of a measured run."""
    counted = line["parts"]
    weights = sum(counted[name] for name in ("weights, frozen", "weights, trained", "adapters"))
    critic = counted.get("critic", 0)
    of_policy = of_grpo["parts"]["optimizer"]
    of_critic = counted["optimizer"] - of_policy
    rest = line["peak"] - weights - critic - of_policy - of_critic
    return [size / MIB for size in (weights, critic, of_policy, of_critic, rest)]


def main() -> None:
    source, model, target = sys.argv[1:]
    lines = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    own = {(line["tuning"], line["name"]): line for line in lines if line["model"] == model}
    names = [(tuning, method) for tuning in ("full", "lora") for method in ("GRPO", "PPO")]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for position, (tuning, method) in enumerate(names):
        line, base = own[tuning, method], 0.0
        for (part, color), size in zip(PARTS.items(), parts_of(line, own[tuning, "GRPO"]), strict=True):
            axes.bar(position, size, bottom=base, color=color, width=0.6, label=part if position == 0 else None)
            base += size
        label = f"{base:.0f} MiB"
        if method == "PPO":
            label += f"\nGRPO: {100 * (1 - own[tuning, 'GRPO']['peak'] / line['peak']):.0f} % less"
        axes.annotate(label, (position, base), ha="center", va="bottom", xytext=(0, 3), textcoords="offset points")
    axes.set_xticks(
        range(len(names)), [f"{method}, {'LoRA' if tuning == 'lora' else tuning}" for tuning, method in names]
    )
    axes.set_ylabel("MiB, process left out")
    axes.set_title(f"Peak memory of a step, {model}, float32 on a CPU, critic a model of its own")
    axes.set_ylim(0, 1.25 * max(line["peak"] for line in own.values()) / MIB)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
