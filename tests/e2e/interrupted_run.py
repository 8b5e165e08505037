"""`llamafactory-cli train` that is struck at a point: `interrupted_run.py SIGNAL POINT STEP recipe.yaml`.

In the place of a signal's name, `ERROR` raises an exception.
"""

import os
import signal
import sys
from typing import Any

from grpo_stage.survival import checkpoints
from grpo_stage.trainer import GRPOTrainer


WEAPON, POINT, STEP = sys.argv[1], sys.argv[2], int(sys.argv[3])


def strike() -> None:
    """Where there are several ranks, on the last alone."""
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        print(f"striking at {POINT} of step {STEP}", flush=True)
        if WEAPON == "ERROR":
            raise LookupError("struck by the test")
        os.kill(os.getpid(), signal.Signals[WEAPON])


class InterruptedTrainer(GRPOTrainer):
    """The trainer, with a strike before, in or after the optimizer step that follows `STEP` finished ones."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls = 0
        self.sampling = kwargs["sampling"]
        sampler, gradient = self.collector._sampler, self.learner.gradient
        self.generate, sampler.generate = sampler.generate, self._generate
        self.score, sampler.rewards.score = sampler.rewards.score, self._score
        self.learn, self.learner.learn = self.learner.learn, self._learn
        self.gather, gradient._gather = gradient._gather, self._gather

    @property
    def is_due(self) -> bool:
        return self.state.global_step == STEP

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if POINT == "between" and self.is_due:
            assert self.collector.queue, "a rollout is waiting for its next use"
            strike()
        return super().training_step(*args, **kwargs)

    def _generate(self, prompts: Any, sampling: Any, step: int, version: int) -> Any:
        engine = self.collector._sampler.engine
        on_step = engine.on_step
        place = "rollout" if sampling is self.sampling else "evaluation"
        if checkpoints.parts_done(self.args.output_dir, self.state.global_step):
            place = "final evaluation"

        def count() -> None:
            self.calls += 1
            if place == POINT and self.is_due and self.calls > 3:
                self.calls = -1000
                strike()
            on_step()

        self.calls, engine.on_step = 0, count
        try:
            return self.generate(prompts, sampling, step, version)
        finally:
            engine.on_step = on_step

    def _score(self, groups: Any) -> Any:
        if POINT == "reward" and self.is_due:
            strike()
        return self.score(groups)

    def _learn(self, *args: Any) -> Any:
        self.calls = 0
        return self.learn(*args)

    def _gather(self, value: Any) -> Any:
        """Before the first micro-batch, and behind each but the last."""
        self.calls += 1
        if POINT == "update" and self.is_due and self.calls == 2:
            strike()
        return self.gather(value)

    def _save_rank_state(self, folder: str) -> None:
        if POINT == "save" and self.is_due:
            with open(os.path.join(folder, "grpo_rollout_0.json"), "w") as file:
                file.write('{"steps": [')
            strike()
        super()._save_rank_state(folder)


if __name__ == "__main__":
    from grpo_stage import workflow

    workflow.GRPOTrainer = InterruptedTrainer  # type: ignore[misc]
    from llamafactory.cli import main

    sys.argv = ["llamafactory-cli", "train", *sys.argv[4:]]
    main()
