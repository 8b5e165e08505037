"""Draw docs/cold_start.png: the curves of GRPO alone and of GRPO after supervised fine-tuning.

llamafactory-cli train yaml_examples/cold_start_1_sft.yaml
llamafactory-cli train yaml_examples/cold_start_2_grpo.yaml
llamafactory-cli train yaml_examples/cold_start_2_grpo.yaml adapter_name_or_path=null output_dir=saves/cold_start/alone
python benchmarks/cold_start_curves.py saves/cold_start/alone saves/cold_start/grpo docs/cold_start.png
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from grpo_stage.records.run_files import MetricCurves


PANELS = (
    ("rewards/regex/mean", "completions in the frame"),
    ("reward", "right sums in the frame (the reward)"),
    ("frac_reward_zero_std", "groups without a signal"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("alone", type=Path, help="output folder of GRPO from the model itself")
    parser.add_argument("both", type=Path, help="output folder of GRPO from the adapter of the fine-tuning")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()

    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.2), sharey=True, layout="constrained")
    for folder, label, color in ((args.alone, "GRPO alone", "#c0504d"), (args.both, "SFT, then GRPO", "#1f6fb4")):
        curves = MetricCurves(folder)
        curves.update()
        for axis, (name, title) in zip(axes, PANELS, strict=True):
            points = curves.matching([name])[name]
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=color, label=label, linewidth=1.8)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step")
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.25)
            print(f"{label}: {name}: first {values[0]:.3f}, last five {sum(values[-5:]) / len(values[-5:]):.3f}")
    axes[0].legend(frameon=False, loc="center right")
    figure.savefig(args.picture, dpi=130)


if __name__ == "__main__":
    main()
