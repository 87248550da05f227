"""The shape of the package: layer order, no cycles, no star imports, no swallowed exceptions.

Each check is a function from sources to a list of problems. It runs over `fxckpt/`, where the list
must be empty, and over small bad sources, where it must not be.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace

import pytest

import fxckpt

# Lowest first: a module imports only modules that stand before it. A new module finds its place
# here.
LAYERS = (
    "errors",
    "locks",
    "installation",
    "ops",
    "contents",
    "objects",
    "tree",
    "description",
    "meter",
    "modes",
    "reads",
    "state",
    "holders",
    "arguments",
    "escapes",
    "invisible",
    "spread",
    "levels",
    "places",
    "joint",
    "symbols",
    "codegen",
    "values",
    "shapes",
    "recorder",
    "checkpoints",
    "tape",
    "keeping",
    "capture",
    "described",
    "opaque",
    "traced",
    "quantities",
    "account",
    "collapse",
    "render",
    "markup",
    "page",
    "plotting",
    "kernels",
    "rates",
    "cost",
    "regions",
    "attention",
    "feedforward",
    "selectors",
    "segments",
    "predicates",
    "policies",
    "sides",
    "slices",
    "lean",
    "tasks",
    "schedule",
    "nests",
    "reinplace",
    "workspace",
    "ledger",
    "delivery",
    "replay",
    "memory",
    "usual",
    "variables",
    "pieces",
    "quick",
    "highs",
    "solve",
    "columns",
    "logic",
    "waiting",
    "moment",
    "running",
    "living",
    "exact",
    "problems",
    "pool",
    "moves",
    "search",
    "plans",
    "frontiers",
    "planner",
    "budgets",
    "composition",
    "split",
    "first_run",
    "inductor",
    "layouts",
    "derivatives",
    "decompositions",
    "pure",
    "transforms",
    "programs",
    "again",
    "runtime",
    "menu",
    "steps",
    "foreseen",
    "timeline",
    "signature",
    "budgeting",
    "watched",
    "likeness",
    "watch",
    "kin",
    "captures",
    "parts",
    "unit",
    "blocks",
    "composed",
    "module",
    "planning",
    "verification",
    "functional",
    "backend",
    "saved",
    "accounting",
    "report",
    "explaining",
    "targets",
    "options",
    "cli",
    "__main__",
    "__init__",
    "integrations.__init__",
    "integrations.rewriting",
    "integrations.transformers",
    "integrations.lightning",
)

PACKAGE = "fxckpt"
ROOT = Path(__file__).parents[1]

ImportStatement = ast.Import | ast.ImportFrom


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The text of every module of the package, by its name without the package's."""
    folder = ROOT / PACKAGE
    found = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }
    assert "__init__" in found
    return found


# --- imports ------------------------------------------------------------------------------------


def imported(statement: ImportStatement, modules: Iterable[str]) -> Iterator[str]:
    """Modules of this package that one statement imports; a name defined in it is `__init__`."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        base = resolve_name("." * statement.level + (statement.module or ""), PACKAGE)
        names = [f"{base}.{alias.name}" for alias in statement.names]
    for name in names:
        package, *rest = name.split(".")
        if package == PACKAGE:
            paths = [".".join(rest[:end]) for end in range(len(rest), 0, -1)]
            known = (m for path in paths for m in (path, f"{path}.__init__") if m in modules)
            yield next(known, "__init__")


def statements(tree: ast.AST) -> Iterator[ImportStatement]:
    """Every import statement, inside functions and `if TYPE_CHECKING` too."""
    return (node for node in ast.walk(tree) if isinstance(node, ImportStatement))


def eager_statements(node: ast.AST) -> Iterator[ImportStatement]:
    """The import statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ImportStatement):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from eager_statements(child)


def layer_violations(sources: Mapping[str, str], layers: tuple[str, ...] = LAYERS) -> list[str]:
    """Modules without a layer, and imports of the same layer or a higher one."""
    problems = [f"{name}: stands in no layer" for name in sources if name not in layers]
    known = set(layers) | set(sources)
    for name in sources.keys() & set(layers):
        below = layers[: layers.index(name)]
        for statement in statements(ast.parse(sources[name])):
            problems += [
                f"{name}:{statement.lineno}: imports {target}, which does not stand below it"
                for target in imported(statement, known)
                if target not in below
            ]
    return problems


def import_cycles(sources: Mapping[str, str]) -> list[str]:
    """The first cycle among imports that run at import time, if there is one."""
    graph = {
        name: {
            target
            for statement in eager_statements(ast.parse(source))
            for target in imported(statement, sources)
        }
        for name, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def test_imports_follow_the_layers(sources: dict[str, str]) -> None:
    assert len(set(LAYERS)) == len(LAYERS)
    assert layer_violations(sources) == []


def test_no_import_cycles(sources: dict[str, str]) -> None:
    assert import_cycles(sources) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from . import split",
        "from .split import x",
        "from fxckpt import split",
        "from fxckpt.split import x",
        "import fxckpt.split",
        "import torch, fxckpt.split as s",
        "from . import errors, split",
        "from .joint import x",  # itself
        "import fxckpt",  # the whole package, which stands highest
        "from . import __version__",
        "from fxckpt import rewrite",
        "def f():\n    from .split import x",
        "if TYPE_CHECKING:\n    from .split import x",
    ],
)
def test_layer_check_notices(statement: str) -> None:
    assert len(layer_violations({"joint": statement})) == 1


def test_layer_check_accepts() -> None:
    joint = "import torch, operator\nfrom torch.split import x\nfrom . import errors, ops\n"
    joint += "from .ops import y\nfrom fxckpt.errors import z\nimport fxckptother.split"
    package = "from . import joint\nfrom .errors import FxckptError\n__all__ = ['joint']"
    assert layer_violations({"errors": "", "joint": joint, "__init__": package}) == []


@pytest.mark.parametrize("name", ["newcomer", "sub.__init__", "sub.joint"])
def test_layer_check_notices_a_module_without_a_layer(name: str) -> None:
    assert layer_violations({"errors": "", name: ""}) == [f"{name}: stands in no layer"]


def test_cycle_check_notices() -> None:
    assert import_cycles({"a": "from . import b", "b": "from .c import x", "c": "import fxckpt.a"})
    assert import_cycles({"a": "try:\n    from . import a\nexcept ImportError:\n    raise"})


def test_cycle_check_accepts() -> None:
    lazy = "def f():\n    from . import a\nif TYPE_CHECKING:\n    from .a import x"
    assert import_cycles({"a": "from . import b, c", "b": lazy, "c": "from .b import x"}) == []


# --- forbidden constructs -----------------------------------------------------------------------


def star_imports(source: str) -> list[str]:
    """The `from x import *` statements."""
    return [
        f"line {statement.lineno}: star import"
        for statement in statements(ast.parse(source))
        if any(alias.name == "*" for alias in statement.names)
    ]


def swallowed_exceptions(source: str) -> list[str]:
    """Bare `except:`, and everything caught only to be ignored."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                problems.append(f"line {node.lineno}: bare except")
            elif _is_catch_all(node.type) and all(map(_does_nothing, node.body)):
                problems.append(f"line {node.lineno}: every exception is ignored")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            if any(map(_is_catch_all, node.args)):
                problems.append(f"line {node.lineno}: every exception is suppressed")
    return problems


def _is_catch_all(caught: ast.expr) -> bool:
    options = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    names = {ast.unparse(option).removeprefix("builtins.") for option in options}
    return not names.isdisjoint({"Exception", "BaseException"})


def _does_nothing(statement: ast.stmt) -> bool:
    """`pass`, `...`, `continue` or a string."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass | ast.Continue)


def logic_in_init(source: str) -> list[str]:
    """What a module of re-exports must not hold: all but docstring, imports and two constants."""
    body = ast.parse(source).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in body
        if not (isinstance(node, ImportStatement) or _is_metadata(node))
    ]


def _is_metadata(node: ast.stmt) -> bool:
    """A literal assigned to `__all__` or `__version__`."""
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1):
        return False
    if ast.unparse(node.targets[0]) not in ("__all__", "__version__"):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("check", [star_imports, swallowed_exceptions])
def test_sources_are_free_of(check, sources: dict[str, str]) -> None:
    problems = {name: check(source) for name, source in sources.items()}
    assert {name: found for name, found in problems.items() if found} == {}


def test_init_holds_no_logic(sources: dict[str, str]) -> None:
    assert logic_in_init(sources["__init__"]) == []


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (star_imports, "from os import *"),
        (star_imports, "def f():\n    if x:\n        from .ops import *"),
        (swallowed_exceptions, "try:\n    f()\nexcept:\n    raise"),
        (swallowed_exceptions, "try:\n    f()\nexcept Exception:\n    pass"),
        (swallowed_exceptions, "try:\n    f()\nexcept Exception as e:\n    '''why'''\n    ..."),
        (swallowed_exceptions, "for x in y:\n  try:\n    f()\n  except Exception:\n    continue"),
        (swallowed_exceptions, "try:\n    f()\nexcept (OSError, BaseException):\n    pass"),
        (swallowed_exceptions, "try:\n    f()\nexcept builtins.Exception:\n    pass"),
        (swallowed_exceptions, "with contextlib.suppress(Exception):\n    f()"),
        (logic_in_init, "'''doc'''\nimport os\nos.environ['X'] = '1'"),
        (logic_in_init, "def f(): pass"),
        (logic_in_init, "if x:\n    import y"),
        (logic_in_init, "cache = {}"),
        (logic_in_init, "__all__ = dir()"),
        (logic_in_init, "__all__ = []\n__all__ += ['f']"),
    ],
)
def test_forbidden_construct_is_noticed(check, bad: str) -> None:
    assert len(check(bad)) == 1


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (star_imports, "from os import path\nx = a * b"),
        (swallowed_exceptions, "try:\n    f()\nexcept KeyError:\n    pass"),
        (swallowed_exceptions, "try:\n    f()\nexcept Exception as e:\n    raise X from e"),
        (swallowed_exceptions, "with contextlib.suppress(KeyError):\n    f()"),
        (logic_in_init, "'''doc'''\nfrom .ops import f\n__all__ = ['f']\n__version__ = '1'"),
    ],
)
def test_permitted_construct_is_accepted(check, good: str) -> None:
    assert check(good) == []


# --- public names -------------------------------------------------------------------------------


def undocumented(namespace: object, names: Iterable[str]) -> list[str]:
    """Names that are missing, or whose own docstring does not open with a line of text."""
    problems = []
    for name in names:
        if name.startswith("__"):
            continue
        value = getattr(namespace, name, None)
        text = value.__doc__ if value is not None else None
        generated = inspect.isclass(value) and (text or "").startswith(f"{name}(")  # by dataclass
        if generated or not (text or "").split("\n")[0].strip():
            problems.append(name)
    return problems


def test_public_names_are_documented() -> None:
    assert fxckpt.__all__
    assert len(set(fxckpt.__all__)) == len(fxckpt.__all__)
    assert undocumented(fxckpt, fxckpt.__all__) == []


def test_documentation_check_notices() -> None:
    def silent() -> None: ...

    def late() -> None:
        """

        The first line is empty."""

    def spoken() -> None:
        """Has a first line."""

    class Silent(Exception): ...

    class Generated:
        """Generated(x: int)"""

    space = SimpleNamespace(
        silent=silent, late=late, spoken=spoken, Silent=Silent, Generated=Generated
    )
    names = ["silent", "late", "spoken", "Silent", "Generated", "absent", "__version__"]
    assert undocumented(space, names) == ["silent", "late", "Silent", "Generated", "absent"]


# --- packaging ----------------------------------------------------------------------------------


def unpinned(wanted: Iterable[str], pins: str) -> list[str]:
    """Requirements that the text of a requirements file does not pin to one version."""
    pinned = {_project(line) for line in pins.splitlines() if re.match(r"[\w.-]+==[\w.]+$", line)}
    return [requirement for requirement in wanted if _project(requirement) not in pinned]


def _project(requirement: str) -> str:
    """The normalised name in `Some_Name[extra]>=1`."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_pinned(pyproject: dict) -> None:
    project = pyproject["project"]
    wanted = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    pins = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    # The Makefile installs torch before all else, and lets the caller choose which.
    assert unpinned(wanted, pins) == ["torch>=2.11"]


def test_pin_check_notices() -> None:
    pins = "# a comment\nNumPy==2.0\npytest-xdist==3.8.0\nscipy>=1\n"
    assert unpinned(["numpy", "pytest_xdist>=3", "scipy", "a"], pins) == ["scipy", "a"]


def test_package_states_its_version_and_types(pyproject: dict) -> None:
    assert fxckpt.__version__ == pyproject["project"]["version"]
    assert (ROOT / PACKAGE / "py.typed").is_file()
