"""Small faults, as operators on the syntax tree: what a slip of the hand or of the mind makes of a formula.

A mutant is named by the function it is in, the operator, and the expression before and after. That name holds while
other lines move and change, so the list of equivalent mutants (equivalent.txt) is keyed by it.
"""

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one fault."""

    name: str
    line: int
    source: str


COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OPPOSITES = [
    ("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("cummin", "cummax"), ("any", "all"), ("sum", "mean"),
    ("nansum", "nanmean"), ("exp", "expm1"), ("lowest", "highest"),
]  # fmt: skip
OPPOSITE = dict(OPPOSITES) | {right: left for left, right in OPPOSITES}
COMMUTATIVE = {"min", "max", "torch.minimum", "torch.maximum"}
# What only turns one kind of number or container into another.
CONVERSIONS = {"float", "bool", "dict", "list", "tuple", "double", "to", "tolist", "cpu", "items"}
WITH_GRADIENT = re.compile(r"(policy_)?logprobs|log_ratios?|ratios|entropy|kl|micro_loss")
# Nothing is computed in these: text for people, types, and what is asserted of ourselves.
SKIPPED = (ast.Import, ast.ImportFrom, ast.Assert)
TEXT = re.compile(r"logger\.|warnings\.|raise ")


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's source, in the order of its lines."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    for scope, holder, key in _places(tree, ""):
        node = _get(holder, key)
        for operator, new, what in _variants(node, scope):
            name = f"{scope or 'module'}: {operator}: {what or f'{_text(node)} -> {_text(new)}'}"
            seen[name] += 1
            _put(holder, key, new)
            broken = ast.unparse(ast.fix_missing_locations(tree))
            _put(holder, key, node)
            yield Mutant(name if seen[name] == 1 else f"{name} #{seen[name]}", getattr(node, "lineno", 0), broken)


def _get(holder: ast.AST | list[ast.AST], key: str | int) -> ast.AST:
    return holder[key] if isinstance(holder, list) else getattr(holder, key)  # type: ignore[index, arg-type]


def _put(holder: ast.AST | list[ast.AST], key: str | int, node: ast.AST) -> None:
    if isinstance(holder, list):
        holder[key] = node  # type: ignore[index]
    else:
        setattr(holder, key, node)  # type: ignore[arg-type]


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def _places(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.AST | list[ast.AST], str | int]]:
    """Where a node stands that may be replaced, with the function that it is in."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}".strip(".")
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "ops", "op", "ctx", "type_comment"):
            continue
        if isinstance(node, ast.AnnAssign) and field == "target":
            continue
        for holder, key, child in (
            [(value, i, child) for i, child in enumerate(value)] if isinstance(value, list) else [(node, field, value)]
        ):
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED) or _is_text(child):
                continue
            yield scope, holder, key
            if not isinstance(child, ast.Raise):
                yield from _places(child, scope)


def _is_text(node: ast.AST) -> bool:
    """A docstring, a message to people, or `strict` of a zip, which asserts."""
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or bool(TEXT.match(ast.unparse(node)))
    return False


def _variants(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Operator, what it makes of a node, and the fault in words if the two texts would not be short."""
    yield from _of_values(node)
    match node:
        case ast.Compare(ops=[op]):
            for other in COMPARISONS[type(op)]:
                yield "compare", ast.Compare(node.left, [other()], node.comparators), ""
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            yield "arithmetic", ast.BinOp(left, ARITHMETIC[type(op)](), right), ""
            yield "drop operand", left, ""
            yield "drop operand", right, ""
            for new_left, new_right in ((_detached(left), right), (left, _detached(right))):
                if new_left is not None and new_right is not None:
                    yield "no gradient", ast.BinOp(new_left, op, new_right), ""
        case ast.BoolOp(op=op, values=values):
            yield "logic", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values), ""
            for i in range(len(values)):
                kept = values[:i] + values[i + 1 :]
                yield "drop operand", kept[0] if len(kept) == 1 else ast.BoolOp(op, kept), ""
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "choice", body, ""
            yield "choice", orelse, ""
            yield "choice", ast.IfExp(test, orelse, body), ""
        case ast.Call():
            yield from _of_call(node)
        case ast.comprehension(ifs=[_, *_]):
            yield "no filter", ast.comprehension(node.target, node.iter, [], node.is_async), ""
        case ast.JoinedStr(values=values):
            for i, value in enumerate(values):
                if isinstance(value, ast.FormattedValue):
                    yield "drop from text", ast.JoinedStr(values[:i] + values[i + 1 :]), ""
        case ast.Dict(keys=keys, values=values):
            for i in range(len(values) - 1):
                swapped = [*values[:i], values[i + 1], values[i], *values[i + 2 :]]
                what = f"{_text(keys[i])} <-> {_text(keys[i + 1])}" if keys[i] and keys[i + 1] else ""
                yield "swap entries", ast.Dict(keys, swapped), what
        case ast.If(test=test, body=body, orelse=orelse):
            for value in (True, False):
                yield "condition", ast.If(ast.Constant(value), body, orelse), f"if {_text(test)} -> if {value}"
        case ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break() | ast.Expr():
            what = _text(node)
            yield "drop statement", ast.Pass(), what.split("(")[0] if isinstance(node, ast.Raise) else what
        case ast.Assign(targets=[target], value=value) if _reads(value) & _reads(target):
            yield "drop statement", ast.Pass(), _text(node)
        case ast.Assign(targets=[ast.Attribute()]) if not scope.endswith("__init__"):
            yield "drop statement", ast.Pass(), _text(node)


def _detached(node: ast.AST) -> ast.Call | None:
    if isinstance(node, ast.Name) and WITH_GRADIENT.fullmatch(node.id):
        return ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])
    return None


def _reads(node: ast.AST) -> set[str]:
    return {ast.unparse(each) for each in ast.walk(node) if isinstance(each, ast.Name | ast.Attribute)} - {"self"}


def _of_values(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    match node:
        case ast.Constant(value=bool()):
            yield "constant", ast.Constant(not node.value), ""
        case ast.Constant(value=int() | float()):
            yield "constant", ast.Constant(node.value + 1), ""
            if node.value != 0:
                yield "constant", ast.Constant(node.value - 1 if node.value == int(node.value) else 2 * node.value), ""
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub()):
            yield "sign", node.operand, ""
        case ast.Attribute(attr=name) | ast.Name(id=name) if name in OPPOSITE and isinstance(node.ctx, ast.Load):
            new = copy.copy(node)
            setattr(new, "attr" if isinstance(node, ast.Attribute) else "id", OPPOSITE[name])
            yield "opposite", new, ""


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    called, arguments, keywords = _text(node.func), node.args, node.keywords
    name = called.split(".")[-1]
    for i, argument in enumerate(arguments):
        if not name.endswith(("_like", "_as")) and (detached := _detached(argument)) is not None:
            new = [*arguments[:i], detached, *arguments[i + 1 :]]
            yield "no gradient", ast.Call(node.func, new, keywords), f"{called}({_text(argument)})"
    for i in range(len(arguments) - 1 if called not in COMMUTATIVE else 0):
        swapped = [*arguments[:i], arguments[i + 1], arguments[i], *arguments[i + 2 :]]
        yield "swap arguments", ast.Call(node.func, swapped, keywords), (
            f"{called}({_text(arguments[i])} <-> {_text(arguments[i + 1])})"
        )  # fmt: skip
    for i, keyword in enumerate(keywords):
        if keyword.arg in (None, "strict"):
            continue
        if keyword.arg in OPPOSITE:
            other = ast.keyword(OPPOSITE[keyword.arg], keyword.value)
            yield "opposite", ast.Call(node.func, arguments, [*keywords[:i], other, *keywords[i + 1 :]]), (
                f"{called}({_text(keyword)})"
            )  # fmt: skip
        if keyword.arg not in ("dtype", "device"):
            rest = keywords[:i] + keywords[i + 1 :]
            yield "drop argument", ast.Call(node.func, arguments, rest), f"{called}({_text(keyword)})"
        if i + 1 < len(keywords) and keywords[i + 1].arg not in (None, "strict"):
            following = keywords[i + 1]
            swapped_pair = [ast.keyword(keyword.arg, following.value), ast.keyword(following.arg, keyword.value)]
            yield "swap arguments", ast.Call(node.func, arguments, keywords[:i] + swapped_pair + keywords[i + 2 :]), (
                f"{called}({_text(keyword)} <-> {_text(following)})"
            )  # fmt: skip
    if name in CONVERSIONS:
        return
    if isinstance(node.func, ast.Attribute) and called.split(".")[0] not in ("torch", "math", "self"):
        yield "no call", node.func.value, f"{_text(node)} -> {_text(node.func.value)}"
    elif len(arguments) == 1 and not keywords and not isinstance(arguments[0], ast.Starred | ast.GeneratorExp):
        yield "no call", arguments[0], ""
