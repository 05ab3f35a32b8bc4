"""The rules of the house, checked from the source: what may import what, names, docstrings, lengths, the README."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_diffusion"
SOURCES = sorted(PACKAGE.rglob("*.py"))
WRITTEN = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "train_scripts").rglob("*.py"))]

#: rooms by level, lowest first. A room imports only from lower levels: rooms of one level never know each other
LEVELS = (
    ("errors", "drafts", "recomputing", "sizes"),
    ("registry", "layers", "packing", "products"),
    ("adapter", "branches", "dropping", "pairs"),
    ("lora", "quantize", "gates", "sheet"),
    ("methods", "formats", "families", "targets", "data"),  # no mathematics, no spellings, no files: none knows another
    ("attachment", "beginning", "pipelines", "clock", "tokens", "fusing", "library", "resident", "composing"),
    ("dial", "fitting"),
    ("stacked", "leaving"),
    ("banks",),
    ("seating",),
    ("stack", "training"),
    ("generating", "inspection", "merging"),
    ("quickstart", "axes"),
    ("cli",),
    ("__main__",),
)

#: package -> the only files that may import it ("" stands for all; a folder for everything in it)
ONLY_IN = {
    "bitsandbytes": ("quantize/layers.py",),
    "peft": (),
    "lycoris": (),
    "pickle": (),
    "typer": ("cli/",),
    "rich": ("cli/", "inspection/coverage.py"),  # a report prints itself as a table
}

#: room -> what its files never import
NEVER = {
    "formats": ("torch.nn", "diffusers", "transformers"),
    "methods": ("diffusers", "transformers", "safetensors"),
    "errors": ("torch",),
    "registry": ("torch",),
}
WITHOUT_TORCH = ("data/buckets.py", "data/captions.py", "data/examples.py", "data/pictures.py", "data/prepare.py")

#: files that may be longer than 300 lines, and why
LONG: dict[str, str] = {
    "lora_diffusion/formats/container.py": "every check on an untrusted header, in the order they must run"
}
LONGEST = 300
FORBIDDEN_WORDS = ("util", "helper", "manager", "_v2", "misc", "common")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports anywhere, `from a import b` as "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _level(room: str) -> int:
    found = [number for number, rooms in enumerate(LEVELS) if room in rooms]
    assert found, f"the room {room!r} is new: put it into LEVELS"
    return found[0]


@pytest.mark.parametrize("path", SOURCES, ids=_inside)
def test_imports_go_down_only(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # exports from everywhere, lazily
    rooms = {name.split(".")[1] for name in _imports(_tree(path)) if _is_in(name, "lora_diffusion") and "." in name}
    rooms -= {_room(path), "__version__"}
    upward = sorted(room for room in rooms if _level(room) >= _level(_room(path)))
    assert not upward, f"{_inside(path)} imports {upward}, which are not below it"


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_reached_from_its_room_alone(package: str) -> None:
    users = [_inside(path) for path in SOURCES if any(_is_in(name, package) for name in _imports(_tree(path)))]
    assert not [user for user in users if not user.startswith(ONLY_IN[package] or ("nowhere",))]


def test_rooms_leave_alone_what_is_not_theirs() -> None:
    for path in SOURCES:
        banned = (*NEVER.get(_room(path), ()), *(("torch",) if _inside(path) in WITHOUT_TORCH else ()))
        found = [name for name in _imports(_tree(path)) if any(_is_in(name, package) for package in banned)]
        assert not found, f"{_inside(path)} imports {found}"


def test_every_room_is_on_one_level_only() -> None:
    rooms = [room for level in LEVELS for room in level]
    assert len(set(rooms)) == len(rooms)


@pytest.mark.parametrize("module", ["lora_diffusion", "lora_diffusion.cli"])
def test_importing_the_package_or_its_command_line_loads_no_torch(module: str) -> None:
    if module.endswith("cli") and not (PACKAGE / "cli").exists():
        pytest.skip("there is no command line yet")
    heavy = ("torch", "diffusers", "transformers", "bitsandbytes", "PIL", "numpy")
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_public_names_are_sorted_importable_and_declared_to_type_checkers() -> None:
    package = import_module("lora_diffusion")
    assert list(package.__all__) == sorted(set(package.__all__))
    assert all(getattr(package, name) is not None for name in package.__all__)
    blocks = [node for node in _tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    declared = {alias.asname for block in blocks for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert declared == set(package.__all__)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("path", [p for p in SOURCES if "__all__ = [" in p.read_text()], ids=_inside)
def test_all_is_complete_and_true(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [public for public in module.__all__ if not hasattr(module, public)]
    if path.name != "__init__.py":
        defined = {node.name for node in _tree(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert {name for name in defined if not name.startswith("_")} <= set(module.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=_inside)
def test_every_module_class_and_public_function_says_what_it_is(path: Path) -> None:
    tree = _tree(path)
    silent = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            silent += [] if ast.get_docstring(node) else [node.name]
            silent += [f"{node.name}.{name}" for name in _silent_methods(node)]
    assert not silent, f"{_inside(path)}: {silent} have no docstring"


def _silent_methods(node: ast.AST) -> list[str]:
    inherited = ("forward", "backward", "extra_repr", "setup_context")
    if not isinstance(node, ast.ClassDef):
        return []
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    return [part.name for part in methods if part.name not in inherited and not ast.get_docstring(part)]


def test_files_fit_into_three_hundred_lines() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in WRITTEN}
    too_long = {name: length for name, length in lengths.items() if length > LONGEST and name not in LONG}
    assert not too_long
    assert not [name for name in LONG if lengths.get(name, 0) <= LONGEST], "no longer long: take it off the list"


def test_most_functions_fit_on_a_screen() -> None:
    lengths = sorted(_lines(node) for path in SOURCES for node in ast.walk(_tree(path)) if _is_function(node))
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(len(lengths) * 0.95)] <= 25


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _lines(node: ast.AST) -> int:
    """Lines of a function without its signature and docstring."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return (node.end_lineno or 0) - first.lineno + 1


def test_no_file_is_called_after_nothing_in_particular() -> None:
    assert not [path for path in WRITTEN if any(word in path.stem.lower() for word in FORBIDDEN_WORDS)]


def test_nothing_is_unpickled() -> None:
    for path in (*SOURCES, *sorted((ROOT / "train_scripts").rglob("*.py"))):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True runs what it reads"


def _readme_blocks() -> list[str]:
    """Python blocks of the README, but those after a line `<!-- not run: reason -->`."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    found = re.findall(r"(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [code for marked, code in found if not marked]


@pytest.mark.skipif(not _readme_blocks(), reason="the README has no Python yet")
@pytest.mark.skipif(not (ROOT / "samples/base/model_index.json").exists(), reason="the base model is not here yet")
def test_the_readme_runs(tmp_path: Path) -> None:
    """All blocks, in order, as one script in an empty folder beside the shipped samples."""
    if (ROOT / "samples").exists():
        (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "readme.py").write_text("\n".join(_readme_blocks()))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "readme.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    errors = import_module("lora_diffusion.errors")
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    real = [name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__base__ is not Exception]
    assert sorted(drawn) == sorted(
        name for name in real if issubclass(getattr(errors, name), errors.LoraDiffusionError)
    )
