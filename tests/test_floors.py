"""The floors of docs/architecture.md: imports run downward or sideways within a floor, never up."""

import ast
import builtins
from pathlib import Path

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.op import REGISTRY

PACKAGE = Path(tg.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: The floor of every room: a file or folder directly inside the package.
FLOORS = {
    "backend": 0,
    "windows": 0,
    "kernels": 0,  # beside the floors: it knows raw arrays and floor 0
    "op": 1,
    "rule": 1,
    "autograd": 1,
    "grad_mode": 1,
    "tape": 1,
    "step_watch": 1,
    "domain": 1,
    "ops": 2,
    "tensor": 3,
    "functional": 3,
    "batch_renormalization": 3,
    "conv_block": 3,
    "layer_normalization": 3,
    "normalization": 3,
    "normalization_checks": 3,
    "creation": 3,
    "capture": 3,
    "nn": 4,
    "optim": 4,
    "data": 4,
    "testing": 4,
    "distributed": 4,
    "": 5,  # tinygrad_bn/__init__.py
}
NUMPY_ROOMS = ("backend", "data", "testing", "kernels.cpu")
CUPY_ROOMS = ("backend", "kernels.cuda")
#: Attributes that name no op although an op has the same name: arrays and array modules have them.
ARRAYS_HAVE = {name for name in REGISTRY if hasattr(np.ndarray, name) or hasattr(np, name)}


def dotted(path):
    """Return the dotted name of a module inside the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree, module="", is_package=False):
    """Yield the full dotted name of all that a module imports when it runs."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["tinygrad_bn", *module.split(".")]
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            inner = base.partition(".")[2]
            for alias in node.names:
                full = f"{inner}.{alias.name}" if inner else alias.name
                found = base.split(".")[0] == "tinygrad_bn" and is_module(full)
                yield f"tinygrad_bn.{full}" if found else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def runtime_nodes(tree):
    """Yield all nodes of a tree but those under `if TYPE_CHECKING:`."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack += node.orelse
        else:
            stack += ast.iter_child_nodes(node)


def violations(module, tree, is_package=False):
    """Yield, in words, what is wrong with the imports of a module."""
    room = module.split(".")[0]
    for name in imports(tree, module, is_package):
        top, _, inner = name.partition(".")
        target = inner.split(".")[0]
        if top == "numpy" and not within(module, NUMPY_ROOMS):
            yield f"{module} imports numpy"
        if top == "cupy" and not within(module, CUPY_ROOMS):
            yield f"{module} imports cupy"
        if top != "tinygrad_bn" or target == room:
            continue
        if FLOORS[target] > FLOORS[room]:
            yield f"{module} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[target]})"
        if target == "kernels" and room != "":
            yield f"{module} imports {name}: ops name kernels by module path, as text"


def within(module, rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def ops_named(tree):
    """Yield the names of registered ops that a module's code names (docstrings aside)."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and isinstance(node.body[0], ast.Expr)
    }
    # A name that is assigned here, or Python's own, is no op; an op would have to be imported.
    own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in REGISTRY and id(node) not in docstrings:
            yield node.value
        elif (
            isinstance(node, ast.Name) and node.id in REGISTRY.keys() - own - vars(builtins).keys()
        ):
            yield node.id
        elif isinstance(node, ast.alias) and node.name.split(".")[-1] in REGISTRY:
            yield node.name
        elif isinstance(node, ast.Attribute) and node.attr in REGISTRY.keys() - ARRAYS_HAVE:
            yield node.attr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: dotted(path) or "tinygrad_bn")
def test_imports_run_downward(path):
    module = dotted(path)
    assert module.split(".")[0] in FLOORS, f"say in FLOORS on which floor {module} is"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(violations(module, tree, path.name == "__init__.py")) == []


@pytest.mark.parametrize("room", ["op", "rule", "autograd", "domain"])
def test_floor_one_names_no_op(room):
    tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
    assert list(ops_named(tree)) == []


def test_every_floor_was_found():
    assert {"backend.arrays", "op", "ops.elementwise", "tensor", "data.loader", ""} <= {
        dotted(path) for path in MODULES
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("autograd", "from tinygrad_bn.tensor import Tensor"),
        ("autograd", "import tinygrad_bn"),
        ("autograd", "from tinygrad_bn import Tensor"),
        ("autograd", "def f():\n    from tinygrad_bn import ops"),
        ("backend.arrays", "from tinygrad_bn.op import op"),
        ("backend.arrays", "from ..op import op"),
        ("ops.loss", "from tinygrad_bn import functional"),
        ("tensor", "import importlib\nimportlib.import_module('tinygrad_bn.nn')"),
        ("kernels.cpu.numpy_batch_norm", "from tinygrad_bn.domain import Domain"),
        ("ops.batch_norm", "from tinygrad_bn.kernels.cpu import numpy_batch_norm"),
        ("ops.loss", "import numpy as np"),
        ("nn.linear", "from numpy.typing import ArrayLike"),
        ("kernels.cuda.batch_norm", "import numpy"),
        ("testing.checkers", "import cupy"),
    ],
)
def test_a_forbidden_import_is_caught(module, source):
    assert len(list(violations(module, ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("autograd", "if TYPE_CHECKING:\n    from tinygrad_bn.op import Op"),
        ("op", "from tinygrad_bn.rule import Rule"),
        ("nn.linear", "from tinygrad_bn import functional as F"),
        ("ops.loss", "from .elementwise import exp"),
        ("kernels.cuda.batch_norm", "import cupy\nfrom tinygrad_bn.backend import array_module"),
        ("kernels.cpu.numpy_batch_norm", "import numpy\nfrom tinygrad_bn.kernels.cpu import tile"),
    ],
)
def test_an_allowed_import_is_not_caught(module, source):
    assert list(violations(module, ast.parse(source))) == []


@pytest.mark.parametrize(
    "source",
    ["multiply(g, x)", "REGISTRY['add']", "op.name == 'reshape'", "ops.relu", "import ops.getitem"],
)
def test_naming_an_op_is_caught(source):
    assert len(list(ops_named(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    ["g.sum()", "max(3, 4)", "xp.ones_like(g)", "stack = []; stack", "def f(): 'add'"],
)
def test_arrays_methods_and_builtins_are_not_taken_for_ops(source):
    assert list(ops_named(ast.parse(source))) == []
