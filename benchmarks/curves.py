"""Draw metrics of runs side by side: a panel for each metric, a line for each run.

python benchmarks/curves.py docs/cold_start.png --run "GRPO alone=saves/cold_start/alone" \
    --run "SFT, then GRPO=saves/cold_start/grpo" --panel "rewards/regex/mean=completions in the frame" \
    --panel "reward=right sums in the frame (the reward)" --panel "frac_reward_zero_std=groups without a signal"
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from grpo_stage.records.run_files import MetricCurves


COLORS = ("#c0504d", "#1f6fb4", "#2e8b57", "#8064a2")
LAST = 5


def named(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} has no `=`")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--run", type=named, action="append", required=True, metavar="LABEL=FOLDER")
    parser.add_argument("--panel", type=named, action="append", required=True, metavar="METRIC=TITLE")
    args = parser.parse_args()

    figure, axes = plt.subplots(1, len(args.panel), figsize=(3.7 * len(args.panel), 3.2), squeeze=False)
    figure.set_layout_engine("constrained")
    for (label, folder), color in zip(args.run, COLORS, strict=False):
        curves = MetricCurves(Path(folder))
        curves.update()
        for axis, (name, title) in zip(axes[0], args.panel, strict=True):
            steps, values = zip(*curves.matching([name])[name], strict=True)
            axis.plot(steps, values, color=color, label=label, linewidth=1.8)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(-0.03, max(1.03, axis.get_ylim()[1]))
            axis.grid(alpha=0.25)
            mean = sum(values[-LAST:]) / len(values[-LAST:])
            print(f"{label}: {name}: first {values[0]:.3f}, last {LAST} {mean:.3f}, {len(values)} steps")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(args.picture, dpi=130)


if __name__ == "__main__":
    main()
