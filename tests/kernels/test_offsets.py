"""Products of row numbers, row counts and strides are 64-bit in every Triton kernel: read from the sources.

tests/robustness/test_extreme_sizes.py runs some kernels on rows that are far apart in memory. This file runs no kernel.
It follows the source of each kernel from its arguments through calls and branches, and checks every product. A missing
cast to int64 at any single place is found.
"""

import ast
import copy
import functools
import re

import pytest
from repository import ROOT

FOLDER = ROOT / "kernels" / "triton"

# Kinds of values; where two meet in a sum or a branch, the later kind is kept. ROW: a 32-bit number that grows with the
# number of rows, or a stride: a 32-bit product with it may exceed 2^31. WIDE: a 64-bit number.
OTHER, ROW, WIDE, POINTER = range(4)
OF_ROWS = re.compile(r"stride|rows|length|parts")
# Arguments that do not grow with rows. Columns of one row are fewer than 2^31; `n` is only compared.
COLUMNS = {"n_cols", "first_col", "part_cols", "n"}
NUMBERS = {
    "beta",
    "bound",
    "decay",
    "entropy_coef",
    "gamma",
    "high",
    "ignore_index",
    "inner",
    "kl_coef",
    "label_smoothing",
    "low",
    "outer",
    "ref_inner",
    "ref_outer",
}
# 32-bit products of a row number that are themselves row numbers, and so at most the number of rows.
ROW_NUMBERS = {("merge_scores_kernel", "tl.program_id(0) * BLOCK"), ("merge_kl_kernel", "tl.program_id(0) * BLOCK")}
# Casts of addresses, not of numbers.
ADDRESSES = {"before_row"}


@functools.cache
def sources() -> dict[str, ast.FunctionDef]:
    """Every function that Triton compiles, by name; names are unique over files."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                assert node.name not in found, node.name
                found[node.name] = node
    return found


def argument(parameter: ast.arg) -> int:
    """The kind of the kernel argument with this name."""
    kind = "" if parameter.annotation is None else ast.unparse(parameter.annotation)
    if parameter.arg.endswith("_ptr"):
        return POINTER
    if kind == "tl.constexpr" or parameter.arg in COLUMNS | NUMBERS:
        return OTHER
    assert OF_ROWS.search(parameter.arg), f"{parameter.arg}: does it grow with the number of rows? Name it above"
    return WIDE if kind == "tl.int64" else ROW


def join(one, other):
    """The kind of a value that may be of either kind."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(map(join, one, other))
    return max((x for x in (one, other) if not isinstance(x, tuple)), default=OTHER)


class Reader:
    """Follows functions with the kinds of their arguments; `faults`: 32-bit products that grow with rows."""

    def __init__(self, functions: dict[str, ast.FunctionDef]) -> None:
        self.functions, self.faults, self.results = functions, set(), {}
        for name in functions:
            if name.endswith("_kernel"):
                self.call(name, [argument(parameter) for parameter in functions[name].args.args])

    def call(self, name: str, given: list):
        """The kind of the function's result for arguments of these kinds."""
        key = name, tuple(given)
        if key not in self.results:
            self.results[key] = OTHER
            names = [parameter.arg for parameter in self.functions[name].args.args]
            body = Body(self, name, dict(zip(names, given, strict=True)))
            body.run(self.functions[name].body)
            self.results[key] = body.result
        return self.results[key]


class Body:
    """One call of a function: the kinds of its variables and of its result."""

    def __init__(self, reader: Reader, name: str, variables: dict) -> None:
        self.reader, self.name, self.variables, self.result = reader, name, variables, OTHER

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=value):
                    self.assign(target, self.of(value))
                case ast.AugAssign(target=target, op=op, value=value):
                    self.assign(target, self.of(ast.BinOp(target, op, value)))
                case ast.If(test=test, body=body, orelse=other):
                    self.of(test)
                    before = dict(self.variables)
                    self.run(body)
                    after, self.variables = self.variables, before
                    self.run(other)
                    for name, kind in after.items():
                        self.variables[name] = join(kind, self.variables.get(name, kind))
                case ast.For(target=target, iter=over, body=body):
                    for _ in range(2):  # the second iteration reads what the first assigns
                        self.assign(target, self.of(over))
                        self.run(body)
                case ast.Return(value=value):
                    kind = self.of(value)
                    self.result = kind if self.result == OTHER else join(self.result, kind)
                case ast.Expr(value=value):
                    self.of(value)
                case _:
                    raise NotImplementedError(f"{self.name}: {ast.unparse(statement)}")

    def assign(self, target: ast.expr, kind) -> None:
        if isinstance(target, ast.Tuple):
            for i, part in enumerate(target.elts):
                self.assign(part, kind[i] if isinstance(kind, tuple) else kind)
        else:
            self.variables[target.id] = kind

    def of(self, node: ast.expr):
        """The kind of an expression; records the products in it."""
        match node:
            case ast.Name(id=name):
                return self.variables.get(name, OTHER)
            case ast.Tuple(elts=parts):
                return tuple(self.of(part) for part in parts)
            case ast.BinOp(left=left, op=op, right=right):
                kinds = self.of(left), self.of(right)
                if isinstance(op, ast.Mult) and max(kinds) == ROW:
                    self.reader.faults.add((self.name, ast.unparse(node)))
                return max(kinds)
            case ast.Call():
                return self.of_call(node)
            case ast.Subscript(value=value):
                kind = self.of(value)
                return kind if not isinstance(kind, tuple) else functools.reduce(join, kind)
            case ast.IfExp(test=test, body=body, orelse=other):
                self.of(test)
                return join(self.of(body), self.of(other))
            case ast.UnaryOp(operand=operand):
                return self.of(operand)
        for child in ast.iter_child_nodes(node):  # comparisons, attributes, constants
            if isinstance(child, ast.expr):
                self.of(child)
        return OTHER

    def of_call(self, node: ast.Call):
        called = ast.unparse(node.func)
        for given in node.args:  # functions that combine elements in scans
            if isinstance(given, ast.Name) and given.id in self.reader.functions:
                self.reader.call(given.id, [OTHER] * len(self.reader.functions[given.id].args.args))
        kinds = [self.of(given) for given in (*node.args, *(word.value for word in node.keywords))]
        if called in self.reader.functions:
            assert not node.keywords, f"{self.name}: {called} is called by keywords, which are not followed"
            return self.reader.call(called, kinds)
        if called in ("tl.program_id", "tl.num_programs"):
            return ROW if node.args[0].value == 0 else OTHER  # axis 1: the programs over the columns of one row
        if called == "tl.cast" or called.endswith(".to"):
            kind = kinds[0] if called == "tl.cast" else self.of(node.func.value)
            to = ast.unparse(node.args[-1])
            return WIDE if to == "tl.int64" else kind if to == "tl.int32" else OTHER
        if called in ("tl.where", "tl.minimum", "tl.maximum", "tl.range", "tl.multiple_of"):
            return functools.reduce(join, kinds[1:] if called == "tl.where" else kinds)
        if isinstance(node.func, ast.Attribute):
            self.of(node.func.value)
        return OTHER


def casts(functions: dict[str, ast.FunctionDef]) -> list[tuple[str, ast.Call]]:
    """Every cast to int64, with the function that contains it."""
    return [
        (name, node)
        for name, function in functions.items()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and re.search(r"(\.to\(|tl\.cast\(.*, )tl\.int64\)$", ast.unparse(node))
    ]


class Dropped(ast.NodeTransformer):
    """The source without the cast at this place."""

    def __init__(self, cast: ast.Call) -> None:
        self.place = cast.lineno, cast.col_offset, cast.end_col_offset

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if (node.lineno, node.col_offset, node.end_col_offset) != self.place:
            return self.generic_visit(node)
        return node.args[0] if ast.unparse(node.func) == "tl.cast" else node.func.value


def test_every_product_with_a_row_or_a_stride_has_64_bits():
    reader = Reader(sources())
    assert reader.faults == ROW_NUMBERS
    assert {name for name, _ in reader.results} == sources().keys()  # every function was visited


NUMBERED = [pytest.param(*cast, id=f"{cast[0]}-{cast[1].lineno}") for cast in casts(sources())]


@pytest.mark.parametrize("name, cast", NUMBERED)
def test_dropping_any_cast_is_found(name, cast):
    """Dropping any single cast is found; a cast whose loss is not found would be unnecessary."""
    changed = Dropped(cast).visit(copy.deepcopy(sources()[name]))
    assert ast.unparse(changed) != ast.unparse(sources()[name])
    found = Reader(sources() | {name: changed}).faults - ROW_NUMBERS
    assert bool(found) == (name not in ADDRESSES), ast.unparse(cast)


@pytest.mark.parametrize(
    "line, fault",
    [
        ("row = tl.program_id(0)\n    at = x_ptr + row * stride", True),
        ("row = tl.program_id(0)\n    at = x_ptr + row.to(tl.int64) * stride", False),
        ("at = x_ptr + (tl.program_id(0) * stride).to(tl.int64)", True),
        ("at = x_ptr + (tl.program_id(0) // n_rows % 8) * stride", True),
        ("at = x_ptr + tl.where(n_cols > 0, tl.program_id(0), 0)[None, :] * stride", True),
        ("at = x_ptr + 3 * n_rows", True),
        ("at = x_ptr + 3 * tl.cast(n_rows, tl.int64)", False),
        ("at = x_ptr + 3 * n_rows.to(tl.float32)", False),
        ("at = x_ptr + tl.program_id(1) * n_cols", False),
        (
            "row = tl.program_id(0).to(tl.int64)\n    row = row.to(tl.int64) * stride\n    at = x_ptr + row * n_cols",
            False,
        ),
        ("if n_cols > 1:\n        f = n_rows\n    else:\n        f = 1\n    at = x_ptr + 2 * f", True),
        ("for i in tl.range(0, n_rows, 8):\n        at = x_ptr + i * 2", True),
        ("f = 1\n    for i in tl.range(0, n_cols, 8):\n        at = x_ptr + f * 2\n        f = n_rows", True),
        ("a, b = n_cols, n_rows\n    b *= 2", True),
        ("a, b = helper(n_rows)\n    at = x_ptr + a * 2", True),
        ("a, b = helper(n_rows)\n    at = x_ptr + b * 2", False),
    ],
)
def test_which_products_are_too_narrow(line, fault):
    text = f"def some_kernel(x_ptr, n_rows, stride, n_cols):\n    {line}\ndef helper(a):\n    return a, 1"
    functions = {node.name: node for node in ast.parse(text).body}
    assert bool(Reader(functions).faults) == fault


def test_an_unclassified_argument_is_refused():
    (function,) = ast.parse("def some_kernel(x_ptr, many):\n    pass").body
    with pytest.raises(AssertionError, match="many: does it grow with the number of rows"):
        Reader({"some_kernel": function})
