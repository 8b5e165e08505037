"""Recipes to share, and recipes of other systems.

    export RUN      a run's recipe as a folder to share: versions, hashes, results, its reward code; nothing private
    show RECIPE     what a recipe is, where it comes from, which code it would run, and whether files are as exported
    run RECIPE      run it; a recipe that brings code needs `--trust-code`, and shows the code first
    diff A B        the keys, versions and hashes in which two recipes or runs differ
    import FILE     a recipe of TRL, Open-R1, verl, EasyR1 or ms-swift as one of ours, with an account of every key

RECIPE, A and B are a YAML file, a folder that `export` wrote, or the output folder of a run.

Exit code 3: a file is not as exported (show), there is a difference (diff), or something that changes what is learned
was left out and the result has to be looked at (import).

Example: grpo-stage recipe import config_demo.yaml --trl 0.18 --output grpo.yaml
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_stage.tools.recipe_file import ATTENTION, add_json_argument, quiet_host, write_json


if TYPE_CHECKING:
    from grpo_stage.host.shared_recipe import SharedRecipe
    from grpo_stage.tools.porting.port import Line


NAME = "recipe"
HELP = "share a run's recipe, run one from elsewhere, compare two, import one of another system"

SHOWN_CHARACTERS = 60
MAX_SHOWN_LINES = 400
"""Of a file of reward code; a longer one is to be read in an editor."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    export = commands.add_parser("export", help="a run's recipe as a folder to share")
    export.add_argument("run_folder", type=Path, metavar="RUN", help="the `output_dir` of a run")
    export.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder (default: RUN's name + `-recipe`)")
    export.set_defaults(do=_export)

    show = commands.add_parser("show", help="what a recipe is, and which code it would run")
    show.add_argument("recipe", type=Path, metavar="RECIPE")
    add_json_argument(show)
    show.set_defaults(do=_show)

    run_it = commands.add_parser("run", help="run a recipe; its code is shown first")
    run_it.add_argument("recipe", type=Path, metavar="RECIPE")
    run_it.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace those of the recipe")
    run_it.add_argument("--trust-code", action="store_true", help="run the code that the recipe brings or names")
    run_it.set_defaults(do=_run)

    diff = commands.add_parser("diff", help="in what two recipes or runs differ")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    add_json_argument(diff)
    diff.set_defaults(do=_diff)

    importing = commands.add_parser("import", help="a recipe of another system as one of ours")
    importing.add_argument("file", type=Path, metavar="FILE", help="a YAML file, or a script with `swift rlhf ...`")
    importing.add_argument("--output", type=Path, metavar="FILE", help="where ours is written (default: stdout)")
    importing.add_argument("--trl", default="0.24", metavar="VERSION", help="whose defaults count (default: 0.24)")
    importing.add_argument("--source-devices", type=int, metavar="N", help="devices that train there")
    importing.add_argument("--devices", type=int, default=1, metavar="N", help="devices that train here (default: 1)")
    add_json_argument(importing)
    importing.set_defaults(do=_import)


def run(args: argparse.Namespace) -> int | None:
    return args.do(args)


def _export(args: argparse.Namespace) -> None:
    with quiet_host():
        from grpo_stage.host.shared_recipe import export

        folder = args.output or Path(f"{args.run_folder.resolve().name}-recipe")
        notes = export(args.run_folder, folder)
    print(f"{folder}: " + ", ".join(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))))
    for note in notes:
        print(f"  {note}")


def _show(args: argparse.Namespace) -> int:
    with quiet_host():
        from grpo_stage.host.provenance import versions
        from grpo_stage.host.recipe_code import code_names
        from grpo_stage.host.shared_recipe import read_shared

        shared = read_shared(args.recipe)
        code = code_names(shared.recipe)
        installed = versions()
    try:
        shared.refuse_changed()
        problem = None
    except ValueError as error:
        problem = str(error)
    result = {
        "recipe": dict(shared.recipe),
        "provenance": dict(shared.provenance),
        "code": code,
        "problem": problem,
        "installed": installed,
    }
    write_json(args.json, result)
    if str(args.json) != "-":
        _print_shared(shared, code, installed, problem)
    return ATTENTION if problem else 0


def _print_shared(
    shared: "SharedRecipe", code: Sequence[str], installed: Mapping[str, str], problem: str | None
) -> None:
    for key, value in shared.recipe.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    provenance = shared.provenance
    print(f"\nCode that it would run: {', '.join(code) or 'none'}")
    for name, digest in shared.code.items():
        print(f"  {name}, sha256 {digest[:12]}")
    for title in ("models", "datasets"):
        for name, files in provenance.get(title, {}).items():
            shown = ", ".join(f"{file} {digest[:19]}" for file, digest in files.items()) or "no hash"
            print(f"{title[:-1]} {name}: {shown}")
    for name, number in provenance.get("versions", {}).items():
        here = installed.get(name, "not installed")
        print(f"{name} {number}" + ("" if here == number else f" (here: {here})"))
    for name, value in provenance.get("results", {}).items():
        print(f"result {name}: {json.dumps(value)}")
    if problem:
        print(f"\n{problem}")


def _run(args: argparse.Namespace) -> int:
    from grpo_stage.survival.stop import run_and_pass_on

    with quiet_host():
        from grpo_stage.host.configuration_file import STAGE, check_overrides, read_configuration
        from grpo_stage.host.parser import typed
        from grpo_stage.host.recipe_code import code_names, code_of, own_files
        from grpo_stage.host.shared_recipe import RECIPE, read_shared
        from grpo_stage.plugin.registration import install

        install()
        shared = read_shared(args.recipe)
        if shared.recipe.get("stage") != STAGE:
            raise ValueError(f"{args.recipe} is no recipe of `stage: {STAGE}`.")
        file = args.recipe / RECIPE if args.recipe.is_dir() else args.recipe
        if not file.is_file():
            raise ValueError(f"{args.recipe} is the folder of a run: export it first (`grpo-stage recipe export`).")
        check_overrides(args.overrides)
        shared.refuse_changed()
        placed = [f"{key}={json.dumps(value)}" for key, value in shared.placed().items()]
        words = [str(file), *placed, *args.overrides]
        values = typed(read_configuration(words[0], words[1:]))  # a name may stand in another key: `${run_name}`
        code = code_of(values, code_names(values), Path.cwd())
        files = own_files(values, Path.cwd())
    for shown in code.values():
        print(f"It runs {shown}")
    _print_sources(files)
    if code and not args.trust_code:
        raise ValueError(
            "A recipe from elsewhere runs no code unless you say so: read what is shown above, and add "
            "`--trust-code` to the command."
        )
    sys.stdout.flush()
    return run_and_pass_on([sys.executable, "-m", "grpo_stage", "train", *words]).returncode


def _print_sources(files: Sequence[Path]) -> None:
    for file in files:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"\n--- {file}")
        # Control characters could hide lines in a terminal.
        for line in lines[:MAX_SHOWN_LINES]:
            print("".join(c if c.isprintable() or c == "\t" else "?" for c in line))
        if len(lines) > MAX_SHOWN_LINES:
            print(f"... {len(lines) - MAX_SHOWN_LINES} more lines: read the file itself")
        print(f"--- end of {file}\n")


def _diff(args: argparse.Namespace) -> int:
    with quiet_host():
        from grpo_stage.host.parser import DERIVED_KEYS, effective_defaults
        from grpo_stage.host.shared_recipe import read_shared
        from grpo_stage.plugin.registration import install

        install()
        sides = [read_shared(path) for path in (args.first, args.second)]
        differences = differing(sides[0], sides[1], effective_defaults() | dict.fromkeys(DERIVED_KEYS))
    write_json(args.json, [{"name": name, "first": a, "second": b} for name, a, b in differences])
    if str(args.json) != "-":
        for name, first, second in differences:
            print(f"{name}: {_shown(first)} | {_shown(second)}")
        if not differences:
            print("They do not differ.")
    return ATTENTION if differences else 0


def differing(
    first: "SharedRecipe", second: "SharedRecipe", defaults: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """What differs: the name and both values. A key that is not written has its default."""
    found = []
    for key in dict.fromkeys([*first.recipe, *second.recipe]):
        default = getattr(defaults.get(key), "value", defaults.get(key))
        pair = first.recipe.get(key, default), second.recipe.get(key, default)
        if _plain(pair[0]) != _plain(pair[1]):
            found.append((key, *pair))
    for part in ("versions", "models", "datasets", "reward_code"):
        of_first, of_second = first.provenance.get(part, {}), second.provenance.get(part, {})
        if of_first and of_second:
            names = dict.fromkeys([*of_first, *of_second])
            found += [
                (f"{part}: {name}", of_first.get(name), of_second.get(name))
                for name in names
                if of_first.get(name) != of_second.get(name)
            ]
    return found


def _plain(value: Any) -> Any:
    """Values that mean the same in one form: lists and comma-separated text, numbers and their text."""
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if isinstance(value, str):
        value = ",".join(part.strip() for part in value.split(","))
        try:
            return float(value)
        except ValueError:
            return value
    return value if isinstance(value, bool) or not isinstance(value, int) else float(value)


def _import(args: argparse.Namespace) -> int:
    for name in ("devices", "source_devices"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"`--{name.replace('_', '-')} {number}` must be at least 1.")
    with quiet_host():
        from grpo_stage.host.known_models import template_of
        from grpo_stage.host.parser import known_key_names
        from grpo_stage.host.recipe_sections import recipe_text
        from grpo_stage.plugin.registration import install
        from grpo_stage.tools.porting.files import port_file
        from grpo_stage.tools.porting.own_check import refusal_of
        from grpo_stage.tools.porting.port import Fate

        install()
        system, port = port_file(args.file, known_key_names(), args.trl, args.source_devices, args.devices)
        template = template_of(str(port.recipe.get("model_name_or_path")))
        if template and "template" not in port.recipe:
            note = "LLaMA-Factory's template for the model; without it, that of the tokenizer"
            port.put("template", {"template": template}, Fate.DEFAULT, note)
        refusal = refusal_of(port.recipe)
        text = recipe_text(port.recipe, f"# From a recipe of {system}, by grpo-stage recipe import.")
    needs_person = refusal is not None or any(line.changes_learning for line in port.lines)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    elif str(args.json) != "-":
        print(text)
    account = [line.as_dict() for line in port.lines]
    write_json(args.json, {"system": system, "recipe": port.recipe, "keys": account, "refusal": refusal})
    if str(args.json) != "-":
        _print_account(system, port.lines, refusal)
    return ATTENTION if needs_person else 0


def _print_account(system: str, lines: "Sequence[Line]", refusal: str | None) -> None:
    print(f"A recipe of {system}. `!` marks what changes what is learned: look at it.\n", file=sys.stderr)
    before: tuple[Any, str] = ({}, "")
    for line in sorted(lines, key=lambda line: (not line.changes_learning, line.fate == "left", line.fate)):
        ours = ", ".join(f"{key}: {_shown(value)}" for key, value in line.ours.items())
        same = bool(line.ours) and (line.ours, line.note) == before
        before = line.ours, line.note
        told = "as above" if same else ours + (f" ({line.note})" if line.note and ours else line.note)
        mark = "!" if line.changes_learning else " "
        value = "" if line.fate == "default" else f" {_shown(line.value)}"
        print(f"{mark} {line.fate:<8} {line.key}{value} -> {told or 'nothing'}", file=sys.stderr)
    if refusal is not None:
        print(f"\nThis stage's own check refuses the result: {refusal}", file=sys.stderr)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
