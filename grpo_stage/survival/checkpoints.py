"""Checkpoint folders: written whole or not at all, verified before they are used.

A save goes into a hidden folder beside its place and is renamed when every rank has written and the disk has it all.
The state file, written last, lists what a resume reads: the size of each file, and its hash where that is quick.

    .tmp-checkpoint-<step>   being written, or on its way out: of no value once its process is gone
    .old-checkpoint-<step>   what a save of the same step is about to replace
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from grpo_stage.distributed import all_gather


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's, whose handlers show it

STATE_FILE = "grpo_state.json"
"""In every checkpoint: the recipe, the position in the prompts, and the list of files."""
ROLLOUT_FILE = "grpo_rollout_{rank}.json"
"""In every checkpoint: what is left of the last rollout on that rank."""
TENSORS_FILE = "grpo_{name}.pt"
"""A part of the run's state that is tensors: with `sync_ref_model` the reference's weights that have moved."""
FINISHED_FILE = "grpo_finished.json"
"""In the folder of a run whose steps are done: which parts of its end are done, too."""
RESULTS, EVALUATION, MODEL_CARD = "results", "evaluation", "model card"
"""The parts of the end."""
MAX_HASHED_BYTES = 2**30
"""Larger files are known by their size alone: hashing them would hold up every start."""

_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY, _REPLACED = ".tmp-", ".old-"
# Not the tokenizer, the processor and the model card: no resume reads them, and callbacks and users rewrite them.
_READ_BY_A_RESUME = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json"),
    *("adapter_config.json", TRAINER_STATE_NAME, ROLLOUT_FILE.format(rank="*")),
)

Part = Callable[[str], object]
"""A function that writes files into the given folder."""


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; the ones before it are as they were."""


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved."""


def save(folder: Path, parts: Mapping[str, Part], state: Mapping[str, Any] | None, is_saver: bool) -> None:
    """Write a checkpoint that is either whole or not there. Called on all ranks.

    Args:
        folder: `<output_dir>/checkpoint-<step>`; one of that name is replaced.
        parts: what to write, in this order, under the names that an error lists.
        state: content of the state file, JSON-serializable; None for a checkpoint that cannot be resumed.
        is_saver: True on the rank that seals the folder; on several nodes without a common disk, on one rank of each.

    Raises:
        CheckpointSaveError: on all ranks, if any of them failed. Written files are removed.
    """
    staging = folder.with_name(_TEMPORARY + folder.name)
    seal = {"the list of files": lambda _: _seal(staging, folder, state)} if is_saver else {}
    for stage in (parts, seal):
        error, unsaved = _written(staging, stage)
        failures = [each for each in all_gather(None if error is None else f"{error!r}") if each is not None]
        if failures:
            if is_saver:
                remove_unfinished(str(folder.parent))
            raise CheckpointSaveError(_failure_message(folder, failures[0], unsaved or list(stage))) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that `save` was given, with the list of files under `files`.

    Raises:
        DamagedCheckpointError: if the state file is missing or has changed.
    """
    state, problem = _state(folder)
    if problem is not None:
        raise _damaged(folder, [problem])
    return state


def verify(folder: Path) -> None:
    """Compare a checkpoint with its list of files. Other files in the folder do not matter.

    Raises:
        DamagedCheckpointError: naming each file that is missing, cut or changed, and the checkpoint to use instead.
    """
    problems = _damage(folder)
    if problems:
        raise _damaged(folder, problems)


def newest_whole(output_dir: Path, before: int | None = None) -> Path | None:
    """The checkpoint of the highest step (below `before`) that `verify` accepts."""
    for step, folder in reversed(_checkpoints(output_dir)):
        if (before is None or step < before) and not _damage(folder):
            return folder
    return None


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints, among them the newest and the best; one that cannot be deleted is a warning.

    Checkpoints of later steps than the newest one are deleted first: a resume from an earlier checkpoint left them
    behind. Steps decide the order, since time stamps depend on the clock.
    """
    if not limit or limit < 0:
        return
    kept = {newest.absolute()} | ({Path(best).absolute()} if best else set())
    others = [folder.absolute() for _, folder in _checkpoints(newest.parent) if folder.absolute() not in kept]
    others.sort(key=lambda folder: step_of(folder) < step_of(newest))  # stable: by steps in each part
    for folder in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        if (problem := _remove(folder)) is not None:
            logger.warning(problem)


def warn_of_later_ones(resumed: Path) -> None:
    """Warn if a run resumes from a checkpoint and its folder holds later ones. Called on the saving rank."""
    later = [folder.name for step, folder in _checkpoints(resumed.parent) if step > step_of(resumed)]
    if later:
        logger.warning(
            f"Going on from {resumed}, with {', '.join(later)} of the same run beside it. They stay until this run "
            "saves the same steps, or until `save_total_limit` is reached, for which they are deleted first. Without "
            f"`resume_from_checkpoint` the run would go on from {later[-1]}: delete them if you do not want them."
        )


def remove_unfinished(output_dir: str) -> None:
    """Tidy up after a save that failed, or whose process was killed. Called on the saving rank."""
    for replaced in Path(output_dir).glob(f"{_REPLACED}checkpoint-*"):
        folder = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)
    for unfinished in Path(output_dir).glob(f"{_TEMPORARY}checkpoint-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def discard_earlier_run(output_dir: str) -> None:
    """Delete the checkpoints of an earlier run of this stage, for a run that starts afresh in its folder.

    Otherwise a resume would choose its checkpoints of higher steps in place of this run's, and its `FINISHED_FILE`
    would make this run look finished. Called on the saving rank.

    Raises:
        OSError: if one of them can neither be deleted nor renamed.
    """
    remove_unfinished(output_dir)
    mark_unfinished(output_dir)
    discarded = [folder for _, folder in _checkpoints(Path(output_dir)) if (folder / STATE_FILE).is_file()]
    for folder in discarded:
        if (problem := _remove(folder)) is not None:
            if folder.exists():
                raise OSError(
                    f"{problem} It would be taken for a checkpoint of this run; or choose another `output_dir`."
                )
            logger.warning(problem)
    if discarded:
        logger.warning(
            f"Starting afresh in {output_dir}: the checkpoints of the earlier run there are deleted "
            f"({', '.join(folder.name for folder in discarded)})."
        )


def put_aside(output_dir: Path, after: int, place: Path) -> None:
    """Move the checkpoints of later steps than `after` into the folder `place`. Called on the saving rank."""
    remove_unfinished(str(output_dir))
    for step, folder in _checkpoints(output_dir):
        if step > after:
            folder.rename(place / folder.name)


def is_over(folder: Path, output_dir: str, num_steps: int, evaluates_at_end: bool) -> bool:
    """Whether a checkpoint has all steps of its run, so that only the run's end is left. Called on all ranks.

    Args:
        folder: the checkpoint.
        output_dir: that of the run that resumes from it.
        num_steps: of that run; not below those of the checkpoint where its prompts are used up.
        evaluates_at_end: whether the end of the run includes an evaluation.

    Raises:
        ValueError: if nothing is left at all.
    """
    trainer_state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    step = trainer_state.global_step
    control = trainer_state.stateful_callbacks.get("TrainerControl", {})
    assert isinstance(control, dict)
    stops_early = step < trainer_state.max_steps and control.get("args", {}).get("should_training_stop", False)
    end = {RESULTS, MODEL_CARD} | ({EVALUATION} if evaluates_at_end else set())
    is_own = folder.resolve().parent == Path(output_dir).resolve()
    noted, steps = all_gather((_noted(output_dir), [each for each, _ in _checkpoints(Path(output_dir))]))[0]
    # At the end all but the best checkpoint may be deleted (`save_total_limit: 1`). If there are later checkpoints,
    # the user has chosen this one on purpose: the later steps are trained again.
    is_newest = is_own and step >= max(steps, default=0)
    has_ended = is_newest and noted["step"] is not None and noted["step"] >= num_steps and end <= {*noted["parts"]}
    if step < num_steps and not stops_early and not has_ended:
        return False
    if is_own and not has_ended and end - parts_done(output_dir, step):
        return True
    raise ValueError(
        f"The run in {folder} is finished: it is at step {max(step, noted['step'] or 0) if is_own else step} of "
        f"{num_steps}"
        f"{', where it stopped early' if stops_early else ''}. Train longer by raising "
        "`max_steps` or `num_train_epochs` (under a constant schedule), continue its adapter in another "
        "`output_dir` with `adapter_name_or_path`, or write `overwrite_output_dir: true` to start afresh."
    )


def parts_done(output_dir: str, step: int) -> frozenset[str]:
    """Which parts of the run's end are done, if its last step is `step`. Called on all ranks."""
    noted = all_gather(_noted(output_dir))[0]  # other nodes may not see the disk
    return frozenset(noted["parts"] if noted["step"] == step else ())


def mark_done(output_dir: str, step: int, part: str) -> None:
    """Add to `parts_done`. Called on the saving rank."""
    noted = _noted(output_dir)
    parts = [*(noted["parts"] if noted["step"] == step else ()), part]
    write_json(Path(output_dir, FINISHED_FILE), {"step": step, "parts": parts})


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def mark_unfinished(output_dir: str) -> None:
    """Empty `parts_done`, for a run that trains on. Called on the saving rank."""
    Path(output_dir, FINISHED_FILE).unlink(missing_ok=True)


def _noted(output_dir: str) -> dict[str, Any]:
    file = Path(output_dir, FINISHED_FILE)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"step": None, "parts": []}


def _written(staging: Path, parts: Mapping[str, Part]) -> tuple[Exception | None, list[str]]:
    """Write the parts. Returns the error that ended it, if any, and the names of the missing parts."""
    names = list(parts)
    for position, name in enumerate(names):
        try:
            staging.mkdir(parents=True, exist_ok=True)
            parts[name](str(staging))
        except Exception as error:  # a full disk is an OSError here, and another error in torch and safetensors
            return error, names[position:]
    return None, []


def _seal(staging: Path, folder: Path, state: Mapping[str, Any] | None) -> None:
    """Add the state file, and put the folder in its place once the disk has all of it."""
    if state is not None:
        paths = sorted({path for pattern in _READ_BY_A_RESUME for path in staging.rglob(pattern)})
        content = json.loads(
            json.dumps({**state, "files": {path.relative_to(staging).as_posix(): _entry(path) for path in paths}})
        )
        with open(staging / STATE_FILE, "w", encoding="utf-8") as file:
            json.dump(content | {"sha256": _digest(content)}, file)
    for path in staging.rglob("*"):
        _flush(path)
    _flush(staging)

    replaced = folder.with_name(_REPLACED + folder.name)
    if folder.exists():
        folder.rename(replaced)
    staging.rename(folder)
    _flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # `remove_unfinished` tries again


def _state(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The content of the state file, and what is wrong with the file."""
    file = folder / STATE_FILE
    if not file.is_file():
        return {}, f"{STATE_FILE} is missing"
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        return {}, f"{STATE_FILE} is not JSON ({error})"
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        return {}, f"{STATE_FILE} has changed since it was saved"
    return content, None


def _damage(folder: Path) -> list[str]:
    state, problem = _state(folder)
    if problem is not None:
        return [problem]
    problems = []
    for name, saved in state["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != saved["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes of {saved['size']}")
        elif _entry(path, is_hashed="sha256" in saved) != saved:
            problems.append(f"{name} has changed since it was saved")
    return problems


def _damaged(folder: Path, problems: list[str]) -> DamagedCheckpointError:
    name = _NAME.fullmatch(folder.name)
    previous = newest_whole(folder.parent, before=int(name[1])) if name else None
    if previous is not None:
        remedy = f"Write `resume_from_checkpoint: {previous}`, the newest whole one before it."
    else:
        remedy = (
            "No whole checkpoint is before it: write `overwrite_output_dir: true` to start afresh (and leave "
            "`resume_from_checkpoint` out), or bring the files back from a copy."
        )
    return DamagedCheckpointError(f"Cannot resume from {folder}: it is damaged. {'; '.join(problems)}. {remedy}")


def _failure_message(folder: Path, failure: str, unsaved: list[str]) -> str:
    last = newest_whole(folder.parent)
    good = f"The last good checkpoint is {last}" if last else "There is no earlier checkpoint to resume from"
    free = shutil.disk_usage(folder.parent).free / 1e9 if folder.parent.exists() else 0.0
    # Not "the same command": with `overwrite_output_dir: true` that starts afresh and deletes the checkpoints.
    go_on = f"go on with `resume_from_checkpoint: {last}`" if last else "start again"
    return (
        f"The checkpoint {folder} could not be saved: {failure}. Left to save were {', '.join(unsaved)}; what was "
        f"written is removed. {good}. Check the disk ({free:.2f} GB are free there) and the folder's permissions, "
        f"then {go_on}."
    )


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoint folders in `output_dir` with their steps, in the order of the steps."""
    found = [(_NAME.fullmatch(folder.name), folder) for folder in output_dir.glob("checkpoint-*") if folder.is_dir()]
    return sorted((int(name[1]), folder) for name, folder in found if name is not None)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its name; -1 where it has another name."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else -1


def _remove(folder: Path) -> str | None:
    """Delete a checkpoint so that a kill leaves no half of it under its name. Returns a problem, or None."""
    doomed = folder.with_name(_TEMPORARY + folder.name)
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        rest = f"What is left of it is {doomed}" if doomed.exists() else "All of it is still there"
        return (
            f"The checkpoint {folder} could not be deleted: {error}. {rest}. Delete it yourself, once no other "
            "program has a file of it open and you may write to it, or the disk fills up."
        )
    return None


def _entry(path: Path, is_hashed: bool | None = None) -> dict[str, Any]:
    size = path.stat().st_size
    if not (size <= MAX_HASHED_BYTES if is_hashed is None else is_hashed):
        return {"size": size}
    with open(path, "rb") as file:
        return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
