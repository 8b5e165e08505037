"""Recipes of verl and of EasyR1 (nested YAML). Both count prompts of a rollout and of an optimizer step."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from grpo_stage.algorithm.catalog import ESTIMATORS
from grpo_stage.tools.porting import batch, rewards
from grpo_stage.tools.porting.port import IN_REWARD, Entry, Fate, Port


_WITHOUT_EFFECT = (
    *("fsdp", "offload", "micro_batch", "tensor_parallel", "tensor_model_parallel", "ulysses", "padding", "logger"),
    *("use_torch_compile", "project_name", "nnodes", "n_gpus_per_node", "val_", "dynamic_b", "chunked_prefill"),
    *("ref.", "critic", "max_num_batched_tokens", "limit_images", "pixels", "load_checkpoint", "log_prob_", "use_shm"),
    *("reward_type", "strategy", "load_format", "resume", "dtype", "image_key", "layered_summon", "free_cache_engine"),
    *("hybrid_engine", "max_token_len", "ray_", "save_freq", "experiment_name"),
)
"""Parts of the names of keys for sharding, memory, logging and evaluation."""
_KL_ESTIMATORS = MappingProxyType({"mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"})
"""Of KL terms in the loss. The gradient of `kl` (k1) there is noise around 0, and this stage refuses it."""
_ESTIMATORS = MappingProxyType({"grpo_passk": "passk"})
_SAME_ESTIMATORS = ("grpo", "gdpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "opo")
_AVERAGES = MappingProxyType(
    {
        "token": "token_mean",
        "token-mean": "token_mean",
        "token-sum": "token_sum",
        "seq": "seq_mean_token_mean",
        "seq-mean-token-mean": "seq_mean_token_mean",
        "seq-mean-token-sum": "seq_mean_token_sum",
        "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
    }
)
_LOSSES = ("gspo", "gspo_token", "cispo", "sapo", "gpg", "dppo_tv", "dppo_kl")
_CLIPPED = ("grpo", "dapo", "gspo", "gspo_token")
"""Losses of ours that take a dual clip (`delta`)."""


def flattened(source: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in source.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def port_verl(source: Mapping[str, Any], known: Collection[str], devices: int) -> Port:
    """A file of verl's or EasyR1's, flattened, as a recipe of ours."""
    is_easyr1 = "data.rollout_batch_size" in source or any(key.startswith("worker.") for key in source)
    return (_EasyR1 if is_easyr1 else _Verl)(source, known, devices).port


class _Nested:
    """What the two have in common; a subclass names where things are."""

    actor = rollout = model = ""
    rollout_prompts = step_prompts = lr = ""
    defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, source: Mapping[str, Any], known: Collection[str], devices: int) -> None:
        self.port = Port(source, known, lambda key: any(part in key for part in _WITHOUT_EFFECT))
        self.devices = devices
        self._dataset()
        self._batch()
        self._objective()
        self._resampling()
        self._rewards()
        self._defaults()
        self.port.finish(self.table())

    def table(self) -> dict[str, Entry]:
        actor, rollout = self.actor, self.rollout
        return {
            "data.max_prompt_length": Entry("cutoff_len"),
            "data.max_response_length": Entry("max_new_tokens"),
            "data.shuffle": Entry("disable_shuffling", lambda value: not value),
            "data.seed": Entry("seed"),
            "data.filter_overlong_prompts": Entry("overlong_prompts", lambda value: "drop" if value else "truncate"),
            f"{actor}.max_grad_norm": Entry("max_grad_norm"),
            f"{actor}.grad_clip": Entry("max_grad_norm"),
            f"{actor}.ppo_epochs": Entry("num_iterations"),
            f"{actor}.entropy_coeff": Entry("entropy_coef"),
            f"{self.lr}.lr": Entry("learning_rate"),
            f"{self.lr}.weight_decay": Entry("weight_decay"),
            f"{self.lr}.lr_warmup_ratio": Entry("warmup_ratio"),
            f"{self.lr}.lr_warmup_steps_ratio": Entry("warmup_ratio"),
            f"{self.lr}.lr_scheduler_type": Entry("lr_scheduler_type"),
            f"{self.lr}.warmup_style": Entry("lr_scheduler_type"),
            f"{self.model}.trust_remote_code": Entry("trust_remote_code"),
            f"{self.model}.enable_gradient_checkpointing": Entry(
                "disable_gradient_checkpointing", lambda value: not value
            ),
            f"{self.model}.freeze_vision_tower": Entry("freeze_vision_tower"),
            f"{rollout}.n": Entry("num_generations"),
            f"{rollout}.temperature": Entry("temperature"),
            f"{rollout}.top_p": Entry("top_p"),
            f"{rollout}.top_k": Entry("top_k", lambda value: max(0, int(value))),
            f"{rollout}.gpu_memory_utilization": Entry("vllm_gpu_util"),
            f"{rollout}.enforce_eager": Entry("vllm_enforce_eager"),
            f"{rollout}.name": Entry(
                "rollout_backend", lambda value: "vllm" if value == "vllm" else "hf", "vllm is the engine for GPUs"
            ),
            "trainer.total_epochs": Entry("num_train_epochs"),
            "trainer.total_episodes": Entry("num_train_epochs", note="EasyR1's name for epochs"),
            "trainer.save_limit": Entry("save_total_limit", lambda value: value if value > 0 else None),
            "trainer.save_checkpoint_path": Entry("output_dir"),
            "trainer.default_local_dir": Entry("output_dir"),
            "trainer.experiment_name": Entry("run_name"),
            "algorithm.online_filtering": Entry("dynamic_sampling"),
            "algorithm.filter_key": Entry(
                note="`filter_metric` is the name of a reward function", changes_learning=True
            ),
            "algorithm.filter_groups.enable": Entry("dynamic_sampling"),
            "algorithm.filter_groups.metric": Entry(
                note="`filter_metric` is the name of a reward function", changes_learning=True
            ),
            "algorithm.gamma": Entry(note="discounts belong to PPO with a critic"),
            "algorithm.lam": Entry(note="discounts belong to PPO with a critic"),
            "data.format_prompt": Entry(
                note="it is a jinja file around the question: write its text as `default_system`, or into the data",
                changes_learning=True,
            ),
            "data.format_prompt_path": Entry(
                note="it is a file around the question: write its text as `default_system`, or into the data",
                changes_learning=True,
            ),
            "data.system_prompt": Entry("default_system"),
        }

    def _dataset(self) -> None:
        port = self.port
        info: dict[str, Any] = {}
        ours: dict[str, Any] = {}
        if port.get("trainer.val_freq", port.get("trainer.test_freq", -1)) <= 0:
            port.leave("data.val_files", "there is no evaluation during the run", False)
        prompt, answer = port.get("data.prompt_key", "prompt"), port.get("data.answer_key", self.defaults["answer"])
        for key, target in (("data.train_files", "dataset"), ("data.val_files", "eval_dataset")):
            if not port.is_open(key):
                continue
            value = port.get(key)
            place = value if isinstance(value, str) else value[0]
            if (isinstance(value, list) and len(value) > 1) or str(place).endswith((".parquet", ".json", ".jsonl")):
                port.leave(
                    key,
                    f"files of this machine: describe them in a dataset_info.json, and name them as `{target}`",
                    True,
                )
                continue
            hub, _, split = str(place).partition("@")
            name = f"{hub.rpartition('/')[2]}-{split or 'train'}"
            info[name] = {"hf_hub_url": hub, "split": split or "train"}
            info[name]["columns"] = {"prompt": prompt, "response": answer}
            ours[target] = name
        if info:
            port.put(
                "data.train_files data.val_files",
                {**ours, "dataset_dir": info},
                note="`dataset_dir` holds what a dataset_info.json would",
            )
        port.put("data.prompt_key data.answer_key", {}, Fate.RENAMED, "columns in the dataset's description")

    def _batch(self) -> None:
        port = self.port
        rollout = int(port.get(self.rollout_prompts, self.defaults["rollout"]))
        step = int(port.get(self.step_prompts, self.defaults["step"]))
        made = batch.of_prompts(rollout, step, self.devices)
        keys = f"{self.rollout_prompts} {self.step_prompts}"
        if any(map(port.has, keys.split())):
            port.put(keys, made.keys, Fate.COMPUTED, made.note, not made.is_exact)
        else:
            port.default(self.rollout_prompts, made.keys, made.note)
        self.uses = made.steps_per_generation * int(port.get(f"{self.actor}.ppo_epochs", 1))
        self._steps(self.uses)

    def _steps(self, of_rollout: int) -> None:
        """Keys that count rollouts there and optimizer steps here."""
        port, note = self.port, f"a step there is a rollout, which feeds {of_rollout} optimizer steps here"
        frequency = port.get("trainer.val_freq", port.get("trainer.test_freq", -1))
        if "eval_dataset" in port.recipe and frequency > 0:
            ours = {"eval_strategy": "steps", "eval_steps": frequency * of_rollout}
            port.put("trainer.val_freq trainer.test_freq", ours, note=note)
        if (saves := port.get("trainer.save_freq", -1)) > 0:
            port.put("trainer.save_freq", {"save_strategy": "steps", "save_steps": saves * of_rollout}, note=note)
        for key in ("trainer.max_steps", "trainer.total_training_steps"):
            if port.has(key):
                port.put(key, {"max_steps": int(port.get(key)) * of_rollout}, note=note)
        if int(port.get(f"{self.lr}.lr_warmup_steps", 0)) > 0:
            ours = {"warmup_steps": int(port.get(f"{self.lr}.lr_warmup_steps")) * of_rollout}
            port.put(f"{self.lr}.lr_warmup_steps", ours, note=note)
        port.leave(f"{self.lr}.lr_warmup_steps", "it has no effect below 1", False)

    def _resampling(self) -> None:
        """The most rollouts for a batch; ours counts those after the first."""
        filters = any(map(self.port.get, ("algorithm.filter_groups.enable", "algorithm.online_filtering")))
        for key in ("algorithm.filter_groups.max_num_gen_batches", "trainer.max_try_make_batch"):
            if (most := int(self.port.get(key, 0))) > 0:
                ours = {"max_resample_times": max(1, most - 1)}
                self.port.put(key, ours, note="the first rollout is counted there", changes_learning=most == 1)
            if filters:
                self.port.leave(key, "no limit there; `max_resample_times` is one here", True)
            self.port.leave(key, "it has no effect without a filter of groups", False)

    def _objective(self) -> None:
        port, actor = self.port, self.actor
        estimator = port.get("algorithm.adv_estimator", self.defaults["estimator"])
        ours = _ESTIMATORS.get(estimator, estimator)
        is_known = estimator in _ESTIMATORS or estimator in _SAME_ESTIMATORS
        if is_known:
            fate = Fate.COMPUTED if port.has("algorithm.adv_estimator") else Fate.DEFAULT
            port.put("algorithm.adv_estimator", {"advantage_estimator": ours}, fate)
        else:
            note = f"this stage has no `{estimator}`, and takes its own default, `grpo`"
            fate = Fate.LEFT if port.has("algorithm.adv_estimator") else Fate.DEFAULT
            port.put("algorithm.adv_estimator", {}, fate, note, True)
        divides = "algorithm.norm_adv_by_std_in_grpo"
        if is_known and "group" not in ESTIMATORS[ours].scales:
            port.leave(divides, f"it has no effect with `{estimator}`", False)
        elif port.get(divides, True) is False:
            port.put(divides, {"scale_rewards": "none"})
        elif ours == "passk":
            fate = Fate.COMPUTED if port.has(divides) else Fate.DEFAULT
            port.put(divides, {"scale_rewards": "group"}, fate, "it is divided there as well")
        else:
            port.put(divides, {}, Fate.TAKEN, "what `scale_rewards: auto` does")
        self._loss()
        self._kl()
        for theirs, key in (("clip_ratio_low", "epsilon"), ("clip_ratio_high", "epsilon_high")):
            name = f"{actor}.{theirs}"
            value = port.get(name, port.get(f"{actor}.clip_ratio", self.defaults[theirs]))
            if port.recipe["loss_type"] in _CLIPPED or (port.recipe["loss_type"] == "cispo" and key == "epsilon_high"):
                if port.has(name) or port.has(f"{actor}.clip_ratio"):
                    port.put(f"{name} {actor}.clip_ratio", {key: value}, Fate.RENAMED)
                else:
                    port.default(name, {key: value}, "the default there")
            else:
                port.leave(name, "the loss has no such bound", False)

    def _loss(self) -> None:
        port, actor = self.port, self.actor
        kind_key = f"{actor}.loss_type" if port.has(f"{actor}.loss_type") else f"{actor}.policy_loss.loss_mode"
        kind = port.get(kind_key, "default")
        average_key = f"{actor}.loss_avg_mode" if port.has(f"{actor}.loss_avg_mode") else f"{actor}.loss_agg_mode"
        average = _AVERAGES.get(port.get(average_key, "token-mean"), "token_mean")
        if kind in ("default", "vanilla"):
            loss = "grpo" if average == "seq_mean_token_mean" else "dapo"
        elif kind == "gpg" and self.uses > 1:
            port.leave(
                kind_key, "it has no ratio, and would be wrong where a rollout is trained on several times", True
            )
            loss = "dapo"
        elif kind in ("dppo_tv", "dppo_kl") and not self._samples_neutrally():
            port.leave(kind_key, "it needs `top_p: 1.0` and `top_k: 0`: engine and trainer are compared", True)
            loss = "dapo"
        elif kind in _LOSSES:
            loss = kind
        else:
            port.leave(kind_key, "this stage has no such loss", True)
            loss = "dapo"
        own = {"dapo": "token_mean", "grpo": "seq_mean_token_mean"}.get(loss)
        ours: dict[str, Any] = {"loss_type": loss}
        if own is not None and average != own:
            ours["loss_aggregation"] = average
        port.recipe |= ours
        port.put(f"{kind_key} {average_key}", ours)
        dual = next((key for key in (f"{actor}.clip_ratio_dual", f"{actor}.clip_ratio_c") if port.has(key)), None)
        if loss not in _CLIPPED:
            port.leave(dual or "", "the loss has no such bound", False)
        elif dual is not None:
            port.put(dual, {"delta": float(port.get(dual))}, Fate.RENAMED)
        else:
            port.default(f"{actor}.clip_ratio_dual", {"delta": 3.0}, "the default there: dual clip is always on")

    def _samples_neutrally(self) -> bool:
        top_p, top_k = (self.port.get(f"{self.rollout}.{name}") for name in ("top_p", "top_k"))
        return top_p in (None, 1.0) and (top_k is None or top_k <= 0)

    def _kl(self) -> None:
        raise NotImplementedError

    def _estimated(self, keys: str, coefficient: float, estimator: str, in_reward: bool) -> None:
        """Write the KL term of the loss; a key that is not in the file counts as its system's default."""
        ours = _KL_ESTIMATORS.get(estimator.rstrip("+"))
        if in_reward:
            note = IN_REWARD
        elif ours is None:
            note = f"`{estimator}` is not here: `k3` is taken, which DeepSeekMath has"
        else:
            note = f"the estimator `{estimator}`"
        fate = Fate.COMPUTED if any(map(self.port.has, keys.split())) else Fate.DEFAULT
        present = [key for key in keys.split() if self.port.has(key)] or keys.split()[-1:]
        values = {"beta": coefficient, "kl_estimator": ours or "k3"}
        self.port.put(" ".join(present), values, fate, note, in_reward or ours is None)

    def _rewards(self) -> None:
        places = ("worker.reward.reward_function", "worker.reward.score_function", "worker.reward.compute_score")
        for place in (*places, "custom_reward_function.path", "reward.custom_reward_function.path"):
            self.port.leave(
                place,
                "its function takes other arguments and returns a mapping: write one of ours around it "
                "(docs/rewards.md), or take `accuracy` and `format`",
                True,
            )
        if not self.port.has("reward_funcs"):
            rewards.port_rewards(self.port, ["accuracy"], None, rewards.VERL, lambda name: None)

    def _defaults(self) -> None:
        port = self.port
        given: dict[str, dict[str, Any]] = {
            f"{self.lr}.lr": {"learning_rate": 1.0e-6},
            f"{self.lr}.weight_decay": {"weight_decay": 1.0e-2},
            "data.max_prompt_length": {"cutoff_len": 512},
            "data.max_response_length": {"max_new_tokens": 512},
            "trainer.total_epochs": {"num_train_epochs": self.defaults["epochs"]},
        }
        if port.has("trainer.total_episodes"):
            del given["trainer.total_epochs"]
        for key, default in given.items():
            port.default(key, default, "the default there")
        if not port.has(f"{self.lr}.lr_scheduler_type") and not port.has(f"{self.lr}.warmup_style"):
            port.default(
                f"{self.lr}.lr_scheduler_type", {"lr_scheduler_type": "constant_with_warmup"}, "constant there"
            )
        path = next((key for key in (f"{self.model}.model_path", f"{self.model}.path") if port.has(key)), None)
        if path is not None:
            port.put(path, {"model_name_or_path": port.get(path)}, Fate.RENAMED)
        rank = port.get(f"{self.model}.lora.rank", port.get(f"{self.model}.lora_rank", 0))
        prefix = f"{self.model}.lora." if port.has(f"{self.model}.lora.rank") else f"{self.model}.lora_"
        if rank:
            target = port.get(f"{prefix}target_modules", port.get(f"{self.model}.target_modules", "all-linear"))
            text = target if isinstance(target, str) else ",".join(target)
            port.put(
                f"{prefix}rank {prefix}alpha {prefix}target_modules {self.model}.target_modules",
                {
                    "finetuning_type": "lora",
                    "lora_rank": rank,
                    "lora_alpha": port.get(f"{prefix}alpha", 16),
                    "lora_target": "all" if text == "all-linear" else text,
                },
            )
        else:
            port.put(f"{prefix}rank", {"finetuning_type": "full"}, Fate.DEFAULT, "all weights are trained there")
        port.recipe["bf16"] = True
        if not any(map(port.has, ("trainer.save_checkpoint_path", "trainer.default_local_dir"))):
            port.default("trainer.save_checkpoint_path", {"output_dir": "saves/imported"}, "a run needs a folder")


class _EasyR1(_Nested):
    actor, rollout, model = "worker.actor", "worker.rollout", "worker.actor.model"
    rollout_prompts, step_prompts = "data.rollout_batch_size", "worker.actor.global_batch_size"
    lr = "worker.actor.optim"
    defaults = MappingProxyType(
        {
            **{"rollout": 512, "step": 256, "answer": "answer", "estimator": "grpo", "epochs": 15},
            **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.3},
        }
    )

    def _kl(self) -> None:
        port = self.port
        keys = "algorithm.disable_kl algorithm.use_kl_loss algorithm.kl_penalty algorithm.kl_coef"
        if port.get("algorithm.disable_kl", False):
            port.put(keys, {"beta": 0.0})
            return
        in_reward = not port.get("algorithm.use_kl_loss", False)
        coefficient, penalty = port.get("algorithm.kl_coef", 1.0e-3), port.get("algorithm.kl_penalty", "kl")
        self._estimated(keys, coefficient, penalty, in_reward)


class _Verl(_Nested):
    actor, rollout, model = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
    rollout_prompts, step_prompts = "data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size"
    lr = "actor_rollout_ref.actor.optim"
    defaults = MappingProxyType(
        {
            **{"rollout": 1024, "step": 256, "answer": "reward_model", "estimator": "gae", "epochs": 30},
            **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        }
    )

    def _kl(self) -> None:
        port, actor = self.port, self.actor
        loss_keys = f"{actor}.use_kl_loss {actor}.kl_loss_coef {actor}.kl_loss_type"
        in_reward = bool(port.get("algorithm.use_kl_in_reward", False))
        if port.get(f"{actor}.use_kl_loss", False):
            kind = port.get(f"{actor}.kl_loss_type", "low_var_kl")
            self._estimated(loss_keys, port.get(f"{actor}.kl_loss_coef", 1.0e-3), kind, False)
        elif in_reward:
            self._estimated("algorithm.use_kl_in_reward", port.get("algorithm.kl_ctrl.kl_coef", 1.0e-3), "kl", True)
        else:
            port.put(loss_keys, {"beta": 0.0})
        port.leave("algorithm.use_kl_in_reward algorithm.kl_ctrl.kl_coef algorithm.kl_ctrl.type", "it is off", False)
