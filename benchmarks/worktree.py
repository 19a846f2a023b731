"""The working tree of another commit, with programs and compiled libraries to time it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from lsgm_fast import env, native


def git(root: Path, *arguments: str) -> str:
    """What a git command prints.

    Raises:
        ValueError: git is missing, this is no repository, or git says that the arguments are wrong.
    """
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"git cannot be run: {error}") from None
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments[:3])}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


# -- the other tree -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkout(ref: str, root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """A temporary git worktree of a commit: its folder and the commit's full hash; removed at the end.

    Raises:
        ValueError: ``root`` is in no git repository, or ``ref`` is no commit there.
    """
    try:
        sha = git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except ValueError:
        raise ValueError(
            f"--base {ref!r} is no commit of the repository at {root}: give a branch, a tag or a hash that "
            "`git log` knows"
        ) from None
    with tempfile.TemporaryDirectory(prefix="lsgm-fast-base-", ignore_cleanup_errors=True) as name:
        tree = Path(name) / "tree"
        try:
            git(root, "worktree", "add", "--detach", "--quiet", str(tree), sha)
            yield tree, sha
        finally:
            # Not `prune`, which forgets worktrees of others too, on a disk that is not mounted for instance.
            with contextlib.suppress(ValueError):  # it was stopped before it was added
                git(root, "worktree", "remove", "--force", str(tree))


def share_programs(root: Path, tree: Path) -> None:
    """Give ``tree`` the benchmark programs of ``root``, without results."""
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(root / "benchmarks", tree / "benchmarks", ignore=ignored)


def compiled_sources(root: Path) -> str:
    """A hash of what the compiled libraries are made from."""
    digest = hashlib.sha256()
    found = [root / "CMakeLists.txt", *(root / "csrc").rglob("*")]
    for path in sorted(path for path in found if path.is_file()):
        name = path.relative_to(root).as_posix()
        if not name.startswith("csrc/tests/"):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stale(root: Path) -> list[str]:
    """Operations whose compiled sources in ``root`` are newer than the libraries there and differ from theirs."""
    package = root / "lsgm_fast" / "_lib"
    built = (native.build_record(package) or {}).get("sources", {})
    libraries = list(package.glob("*.so"))
    if not libraries:
        return []
    when = min(path.stat().st_mtime for path in libraries)
    found = []
    for stem in native.operations(root):
        own = [path for part in (stem, "common") for path in (root / "csrc" / part).glob("*")]
        # The hash covers Triton's sources too, which need no build: only newer files of csrc/ make a library stale.
        newer = any(path.stat().st_mtime > when for path in own)
        if newer and built.get(stem) != native.hash_sources(root, stem):
            found.append(stem)
    return found


def provide_libraries(root: Path, tree: Path, report: Callable[[str], None]) -> str:
    """Put compiled libraries into ``tree``; says what was done.

    Raises:
        ValueError: the libraries of ``root`` are older than its sources, or those of ``tree`` could not be built.
    """
    if env.library_path() is not None:
        raise ValueError(f"{env.LIBRARY_PATH} is set, and both commits would run that library: unset it")
    package, other = root / "lsgm_fast", tree / "lsgm_fast"
    if not list((package / "_lib").glob("*.so")):
        return "no compiled library in the working tree, so none for the base either"
    command = [sys.executable, "setup.py", "build_native", "--inplace"]
    old = stale(root)
    if old:
        raise ValueError(
            f"the compiled library is older than its sources ({', '.join(old)}), and its timing would be that of the "
            f"old ones: build it first, in {root}: {' '.join(['python', *command[1:]])}"
        )
    if compiled_sources(root) == compiled_sources(tree):
        shutil.copytree(package / "_lib", other / "_lib", dirs_exist_ok=True)
        for module in package.glob("_C.*.so"):
            shutil.copy2(module, other / module.name)
        return "both run the same compiled library: csrc/ and CMakeLists.txt are the same"
    report("building the compiled library of the base, whose csrc/ differs")
    mode = str((native.build_record(package / "_lib") or {}).get("mode", "auto"))
    variables = os.environ | {"LSGM_FAST_BUILD": mode}
    status, said = run_group(command, tree, variables, None)
    if status:
        raise ValueError(f"the compiled library of the base could not be built: {said.strip()[-2000:]}")
    return f"the base has a compiled library of its own, built with LSGM_FAST_BUILD={mode}"


# -- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, with everything cleaned up."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_group(
    command: Sequence[str], folder: Path, variables: dict[str, str], timeout: float | None
) -> tuple[int, str]:
    """Exit status and output of a command; where it is cut short, its own children end with it.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout``.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, said
