"""Do the fast tests hold the policies? Breaks the code in a thousand small ways, one at a time, and counts who notices.

mutmut makes the mutants and runs the tests. It wants the package at the top of a folder, so each group is laid out in
one of its own below build/, where results are also kept: of code that has not changed since nothing is run again.

Survivors that no test could notice are listed in equivalent.txt, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutation"
EQUIVALENT = Path(__file__).parent / "equivalent.txt"
PACKAGE = "finetune_operator"
SURVIVED, NO_TESTS = 0, 33
"""How mutmut writes that down."""
SEPARATOR = "ǁ"
"""What mutmut puts between the names of a class and its method."""
WANTED = 0.95
"""Share of the mutants that must be noticed, of those that could be."""

PROFILE = """
from hypothesis import settings

settings.register_profile("mutation", max_examples=25, derandomize=True, deadline=None, database=None)
"""
"""Fewer examples than usual: a broken policy is mostly noticed by the first, and there are thousands of mutants."""


@dataclass(frozen=True)
class Group:
    """Modules, and the tests that alone have to notice when they are broken."""

    modules: Sequence[str]
    """Patterns below the package."""
    tests: Sequence[str]
    """Paths below tests/."""
    needed: Sequence[str] = ()
    """Further paths below tests/ that those import."""
    left_out: Sequence[str] = ()
    """Of the tests, files that prove bounds for everything a spec may say, which takes seconds for each mutant."""


GROUPS = {
    "policy": Group(["policy/*.py"], ["operator/policy", "contract/test_last_words.py"], ["operator/desired", "api"]),
    "desired": Group(
        ["desired/*.py"],
        ["operator/desired"],
        ["operator/policy", "api", "cluster/api.py", "cluster/hostile.py"],
        ["operator/desired/test_every_edge.py", "operator/desired/test_no_way_out.py"],
    ),
    "queue": Group(["queue.py"], ["operator/test_queue.py"], ["operator/jumping_loop.py"]),
}


@dataclass(frozen=True)
class Mutant:
    """One change, told by what it does: its number changes with every edit of the function."""

    function: str
    """module:name, or module:class.name."""
    before: str
    after: str

    def __str__(self) -> str:
        removed = "".join(f"-{line}\n" for line in self.before.splitlines())
        added = "".join(f"+{line}\n" for line in self.after.splitlines())
        return f"@ {self.function}\n{removed}{added}"


@dataclass
class Result:
    """What became of a group's mutants."""

    noticed: int = 0
    equivalent: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of those that could be noticed, the part that was."""
        possible = self.noticed + len(self.survivors)
        return self.noticed / possible if possible else 1.0


def main() -> int:
    """Run the groups that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}; default: all")
    parser.add_argument("--children", type=int, default=2, help="mutants at the same time; default: 2")
    parser.add_argument("--only", default="", metavar="PATTERN", help="mutants of that name, as in *.retry.*")
    options = parser.parse_args()
    unknown = [name for name in options.groups if name not in GROUPS]
    if unknown:
        parser.error(f"there is no group {unknown[0]}: choose from {', '.join(GROUPS)}")
    known, enough = equivalents(), True
    for name in options.groups or GROUPS:
        folder = lay_out(name, GROUPS[name])
        run(folder, "run", "--max-children", str(options.children), *([options.only] if options.only else []))
        result = collect(folder, known)
        for survivor in result.survivors:
            print(survivor)
        print(
            f"{name}: {result.share:.1%} of the mutants were noticed; {len(result.survivors)} survived, "
            f"{result.equivalent} more are equivalent."
        )
        enough = enough and result.share >= WANTED
    return 0 if enough else 1


def lay_out(name: str, group: Group) -> Path:
    """The group's folder, with the present code."""
    folder = BUILD / name
    for place in (folder / PACKAGE, folder / "tests"):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(ROOT / "operator" / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*group.tests, *group.needed):
        source, target = ROOT / "tests" / path, folder / "tests" / path
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    # What was copied for the mutants before: mutmut only adds to it.
    shutil.rmtree(folder / "mutants" / "tests", ignore_errors=True)
    modules = [f"{PACKAGE}/{pattern}" for pattern in group.modules]
    tests = [f"tests/{path}" for path in group.tests]
    ignored = " ".join(f"--ignore=tests/{path}" for path in group.left_out)
    (folder / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npythonpath = ["."]\n'
        'addopts = "--strict-markers --import-mode=importlib --hypothesis-profile=mutation -p no:cacheprovider '
        f'{ignored}"\n'
        f'[tool.mutmut]\nsource_paths = ["{PACKAGE}"]\nonly_mutate = {modules}\n'
        f'also_copy = ["{PACKAGE}", "conftest.py"]\n'
        f"pytest_add_cli_args_test_selection = {tests}\nuse_git_change_detection = false\n"
    )
    (folder / "conftest.py").write_text(PROFILE)
    forget_survivors(folder / "mutants")
    return folder


def forget_survivors(mutants: Path) -> None:
    """Have those run again that survived: the tests may have become better since, which mutmut does not look at."""
    for path in mutants.rglob("*.py.meta"):
        found = json.loads(path.read_text())
        codes = found["exit_code_by_key"]
        found["exit_code_by_key"] = {
            name: None if code in (SURVIVED, NO_TESTS) else code for name, code in codes.items()
        }
        path.write_text(json.dumps(found))


def run(folder: Path, *arguments: str) -> str:
    """Run mutmut in a group's folder; what it says, which a run shows at once as well."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    packages = [str(ROOT / name) for name in ("crds", "trainer", "cli")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")])}
    shown = None if arguments[0] == "run" else subprocess.PIPE
    done = subprocess.run(command, cwd=folder, env=environment, stdout=shown, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mutmut {arguments[0]} ended with {done.returncode} in {folder}: see above.")
    return done.stdout or ""


def collect(folder: Path, known: set[Mutant]) -> Result:
    """What became of the mutants of a group."""
    result = Result()
    for line in run(folder, "results", "--all", "true").splitlines():
        name, _, state = line.strip().partition(": ")
        if not state or state == "not checked":
            continue
        if state not in ("survived", "no tests"):
            result.noticed += 1
            continue
        mutant = read_diff(name, run(folder, "show", name))
        if mutant in known:
            result.equivalent += 1
        else:
            result.survivors.append(mutant)
    return result


def read_diff(name: str, diff: str) -> Mutant:
    """A mutant as mutmut shows it."""
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    removed = "\n".join(line[1:].strip() for line in lines if line.startswith("-"))
    added = "\n".join(line[1:].strip() for line in lines if line.startswith("+"))
    module, _, mangled = name.partition("__mutmut_")[0].rpartition(".")
    # x_function, or xǁClassǁmethod.
    function = ".".join(mangled.split(SEPARATOR)[1:]) if SEPARATOR in mangled else mangled.removeprefix("x_")
    return Mutant(f"{module}:{function}", removed, added)


def equivalents() -> set[Mutant]:
    """Those of the list."""
    return set(read_list(EQUIVALENT.read_text()))


def read_list(text: str) -> Iterator[Mutant]:
    """The mutants in the list: a block each, apart by empty lines. Lines that begin with # say why.

    Raises:
        ValueError: a block gives no reason, or is none.
    """
    for block in filter(None, (part.strip() for part in text.split("\n\n"))):
        lines = block.splitlines()
        if all(line.startswith("#") for line in lines):
            continue
        function = next((line[2:] for line in lines if line.startswith("@ ")), "")
        removed = "\n".join(line[1:] for line in lines if line.startswith("-"))
        added = "\n".join(line[1:] for line in lines if line.startswith("+"))
        if not function or not (removed or added) or not lines[0].startswith("# "):
            raise ValueError(
                f"{EQUIVALENT.name}: a block needs a reason (#), a function (@) and a change (- +):\n{block}"
            )
        yield Mutant(function, removed, added)


if __name__ == "__main__":
    sys.exit(main())
