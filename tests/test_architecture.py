"""The house rules that import-linter cannot hold."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.sources import syntax_tree

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("turbodiff", "webui", "kernels")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
ALL = SOURCES + sorted((ROOT / "scripts").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES = 400, 60, 160
MAX_CALLED_ONCE, MAX_ANY, MAX_IMPORT_CHAIN = 0.30, 120, 14


def relative(path):
    return str(path.relative_to(ROOT))


def functions(path):
    tree = syntax_tree(path)
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_no_function_is_longer_than_a_screen(path):
    for function in functions(path):
        limit = MAX_KERNEL_LINES if is_kernel(function) else MAX_FUNCTION_LINES
        assert function.end_lineno - function.lineno < limit, f"{function.name} has more than {limit} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_module_level_mutable_state(path):
    for node in syntax_tree(path).body:
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = [ast.unparse(t) for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
            constant = all(name.strip("_").isupper() or name.startswith("__") for name in names)
            mutable = isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp)
            assert constant or not mutable, f"{names} is mutable and lower-case"
    assert not re.search(r"^\s*global ", path.read_text("utf-8"), re.M)


def places(pattern, paths):
    found = set()
    for path in paths:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if re.search(pattern, line.split("#")[0]):
                found.add(f"{relative(path)}:{number}")
    return found


def test_shape_arithmetic_has_one_home():
    others = [path for path in SOURCES if relative(path) != "turbodiff/spec/shapes.py" and "kernels" not in str(path)]
    assert not places(r"// ?8\b|\* ?4 ?\+ ?1\b|// ?4 ?\+ ?1\b", others)


def test_only_offload_moves_networks_and_frees_memory():
    others = [
        path for path in SOURCES if relative(path) != "turbodiff/runtime/offload.py" and "kernels" not in str(path)
    ]
    assert not places(r"\.cuda\(\)|empty_cache|\.to\((torch_)?device\)|\.to\(\"cuda", others)


def test_configs_hold_facts_and_no_code():
    assert not list((ROOT / "configs").rglob("*.py"))


def test_kernels_is_no_package():
    """`kernels` is also Hugging Face's library, which transformers and diffusers import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_triton_features_that_were_removed_are_not_used():
    assert not places(r"make_block_ptr|tl\.advance|triton\.autotune|@autotune", SOURCES)


@pytest.mark.parametrize(
    "module", ["turbodiff.spec.request", "turbodiff.plan.planner", "turbodiff.studio", "turbodiff.cli"]
)
def test_people_never_wait_for_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "package", sorted({path.parent for path in SOURCES if path.name == "__init__.py"}), ids=relative
)
def test_every_package_says_what_lives_there(package):
    assert ast.get_docstring(syntax_tree(package / "__init__.py"))


def test_constraints_are_bare_names_and_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines)


def test_every_package_of_the_card_is_declared():
    declared = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    for name in [
        "torch",
        "triton",
        "diffusers",
        "transformers",
        "gradio",
        "accelerate",
        "bitsandbytes",
        "sentencepiece",
        "imageio-ffmpeg",
        "nvidia-ml-py",
    ]:
        assert re.search(rf"(^| ){name}[><=;]", declared), name


def test_no_machine_path_or_registry_host_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    text_files = [ROOT / name for name in listed if Path(name).suffix in {".py", ".md", ".toml", ".txt", ".sh", ""}]
    pattern = re.compile(r"(?<![\w./-])/(work|root)/|https?://[a-z.]*(pypi|npmjs|debian)\.")
    for path in text_files:
        if path.is_file() and path.name != "test_architecture.py":
            assert not pattern.search(path.read_text("utf-8", errors="ignore")), path


def named_functions():
    """Every production function's name, and how often its name is used anywhere in the production code."""
    defined, used = Counter(), Counter()
    for path in SOURCES:
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                defined[node.name] += 1
            elif isinstance(node, ast.Name):
                used[node.id] += 1
            elif isinstance(node, ast.Attribute):
                used[node.attr] += 1
    return defined, used


def test_few_functions_are_called_exactly_once():
    """A function that is called once must earn its name: a story reads better whole than as a chain of relays."""
    defined, used = named_functions()
    once = [name for name in defined if defined[name] == 1 and used[name] == 1]
    assert len(once) / len(defined) <= MAX_CALLED_ONCE, f"{len(once)} of {len(defined)}"


def test_any_stands_only_where_a_library_forces_it():
    words = [re.sub(r"^.*import .*$", "", path.read_text("utf-8"), flags=re.M) for path in SOURCES]
    assert sum(len(re.findall(r"\bAny\b", text)) for text in words) <= MAX_ANY


def imported_modules(path, known):
    """The modules of ours that a file imports when it is itself imported."""
    found, todo = set(), list(syntax_tree(path).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += getattr(node, "body", [])
    return found & known


def test_no_import_chain_is_long():
    names = {relative(p).removeprefix("kernels/").removesuffix(".py").replace("/", "."): p for p in SOURCES}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    imports = {name: imported_modules(path, modules.keys()) for name, path in modules.items()}
    imports = {name: {o for o in found if not f"{name}.".startswith(f"{o}.")} for name, found in imports.items()}

    @cache
    def chain(name):
        return (name, *max((chain(other) for other in imports[name]), key=len, default=()))

    longest = max(map(chain, modules), key=len)
    assert len(longest) <= MAX_IMPORT_CHAIN, " > ".join(longest)


def test_no_two_test_modules_share_a_name():
    """pytest imports files of folders without __init__.py by their bare names, and two of one name end a whole run."""
    names = [
        path.name if not (path.parent / "__init__.py").exists() else relative(path)
        for path in (ROOT / "tests").rglob("test_*.py")
    ]
    assert not [name for name, count in Counter(names).items() if count > 1]
