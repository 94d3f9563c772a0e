"""What can be tested here of Windows: missing modules, functions and signals, new processes, encodings and paths."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest

from tests.support.as_on_windows import FUNCTIONS, MODULES, SIGNALS
from tests.support.runs import ROOT, assert_same_state, environment
from training.engine.prepare import is_named

PACKAGES = ("pipelines", "training", "data_scripts", "halftone_trainer")
MISSING = {
    "os": {*FUNCTIONS, "fork", "forkpty", "setpgid", "getpgid", "getuid", "uname", "statvfs", "wait", "nice", "chown"},
    "signal": {*SIGNALS, "pthread_kill", "alarm", "setitimer", "pause", "sigwait"},
}
# Functions that are not reached on Windows although their lines do not say so, and why.
EXCEPTIONS = {
    ("training/engine/threads.py", "place_worker_threads"): "returns early unless the cores are known",
    ("training/engine/threads.py", "main_thread_on_its_core"): "returns early unless the cores are known",
    ("training/engine/loading.py", "start_worker"): "the list of cores is empty",
}
WINDOWS = str(ROOT / "tests/support/as_on_windows.py")
FLAGS = ("--train_batch_size", "4", "--num_samples", "16", "--num_train_epochs", "1", "--cpu_threads", "1",
         "--preview_epochs", "0", "--report_to", "none", "--dataloader_num_workers", "2")  # fmt: skip


class _Finder(ast.NodeVisitor):
    """Collects the uses of what Windows lacks that are not in an `if hasattr(…)` or a `try` with ImportError."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._function, self._guards = "", [""]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = before

    def _visit_guarded(self, test: ast.expr, *parts: list[ast.stmt] | ast.expr) -> None:
        self.visit(test)
        self._guards.append(ast.unparse(test))
        for part in parts:
            for node in part if isinstance(part, list) else [part]:
                self.visit(node)
        self._guards.pop()

    def visit_If(self, node: ast.If) -> None:
        self._visit_guarded(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._visit_guarded(node.test, node.body, node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        handled = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
        self._guards.append("sys.platform" if "ImportError" in handled else "")
        self.generic_visit(node)
        self._guards.pop()

    def visit_With(self, node: ast.With) -> None:
        suppressed = " ".join(ast.unparse(item.context_expr) for item in node.items)
        self._guards.append("sys.platform" if "suppress" in suppressed and "ImportError" in suppressed else "")
        self.generic_visit(node)
        self._guards.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name in MODULES:
                self._note(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if node.module in MODULES or alias.name in MISSING.get(node.module or "", ()):
                self._note(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.attr in MISSING.get(node.value.id, ()):
            self._note(f"{node.value.id}.{node.attr}", node.attr)
        self.generic_visit(node)

    def _note(self, what: str, name: str = "") -> None:
        guarded = any("sys.platform" in guard or (name and f"'{name}'" in guard) for guard in self._guards)
        if not guarded:
            self.found.append((self._function, what))


def unguarded(source: str) -> list[tuple[str, str]]:
    finder = _Finder()
    finder.visit(ast.parse(source))
    return finder.found


def own_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (ROOT / package).rglob("*.py")


def test_nothing_that_windows_lacks_is_used_without_a_check():
    found = {
        (file.relative_to(ROOT).as_posix(), function): what
        for file in own_files()
        # The benchmarks measure Linux and macOS only.
        if file.parent != ROOT / "training/benchmarks"
        for function, what in unguarded(file.read_text(encoding="utf-8"))
    }
    assert {place: what for place, what in found.items() if place not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) <= set(found), "an exception is no longer needed"


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import fcntl", 1),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", 0),
        ("import os\nos.killpg(1, 2)", 1),
        ("import os\nif hasattr(os, 'killpg'):\n    os.killpg(1, 2)", 0),
        ("import signal\nx = signal.SIGHUP if hasattr(signal, 'SIGHUP') else None", 0),
        ("import signal\nx = signal.SIGHUP if hasattr(signal, 'SIGTERM') else None", 1),
        ("from signal import SIGKILL", 1),
    ],
)
def test_the_search_finds_what_it_should(source, uses):
    assert len(unguarded(source)) == uses


def test_paths_in_files_have_forward_slashes():
    """`str(path.relative_to(folder))` has backslashes on Windows; in a manifest it would name nothing elsewhere."""
    assert [str(file) for file in own_files() if "str(path.relative_to" in file.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("data\\posters", "data/posters", True),
        ("data\\posters", "data/posters/train", True),
        ("DATA/posters", "data/posters", True),
        ("data\\posters\\train", "data/posters", False),
        ("data/posters", "data/posters_64", False),
        (".", "data/posters", False),
        ("", "data/posters", False),
    ],
)
def test_an_input_is_recognized_by_a_path_of_windows(name, path, expected):
    assert is_named(path, name, PureWindowsPath) == expected


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=environment(PYTHONPATH=str(ROOT), **variables), cwd=ROOT,
        capture_output=True, encoding="utf-8", errors="replace", timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_trains_resumes_and_stops_without_what_windows_lacks(tmp_path):
    usual, new = tmp_path / "usual", tmp_path / "new"
    assert run("tests/support/toy.py", "--output_dir", str(usual), *FLAGS).returncode == 0
    flags = ("tests.support.toy", "--output_dir", str(new), *FLAGS)
    stopped = run(WINDOWS, *flags, "--signal_step", "2")
    assert stopped.returncode == 75, stopped.stderr
    assert "everything is saved" in stopped.stdout
    done = run(WINDOWS, *flags)
    assert done.returncode == 0, done.stderr
    assert_same_state(new, usual)


@pytest.mark.long
def test_data_reach_the_workers_of_every_kind_of_dataset(tmp_path):
    """Images, captions with a tokenizer, and cached latents, in new processes."""
    data, tokens, vae, cache = (str(tmp_path / name) for name in ("data", "tokens", "vae", "cache"))
    small = ("--report_to", "none", "--cpu_threads", "1", "--resolution", "64", "--train_batch_size", "4",
             "--max_train_steps", "1", "--dataloader_num_workers", "1", "--dataset_name", data,
             "--validation_epochs", "0", "--preview_epochs", "0")  # fmt: skip
    unet = ("--model.block_out_channels", "[16,32]", "--model.norm_num_groups", "8", "--model.attention_head_dim", "8",
            "--model.layers_per_block", "1", "--text_encoder.hidden_size", "16",
            "--text_encoder.num_attention_heads", "2", "--text_encoder.num_hidden_layers", "1")  # fmt: skip
    coder = ("--model.block_out_channels", "[16,16]", "--model.norm_num_groups", "8")
    for words in (
        ("data_scripts.make_posters", "--output_dir", data, "--num_posters", "20", "--num_workers", "2"),
        ("data_scripts.train_tokenizer", "--dataset_name", data, "--output_dir", tokens),
        ("training.train_autoencoder", "--output_dir", vae, *coder, *small),
        ("data_scripts.precompute_latents", "--vae", vae, "--dataset_name", data, "--output_dir", cache,
         "--resolution", "64", "--dataloader_num_workers", "1", "--cpu_threads", "1"),
        ("training.train_latent_diffusion", "--output_dir", str(tmp_path / "images"), "--tokenizer", tokens,
         "--vae", vae, *unet, *small),
        ("training.train_latent_diffusion", "--output_dir", str(tmp_path / "latents"), "--tokenizer", tokens,
         "--vae", vae, "--latent_cache", cache, *unet, *small),
    ):  # fmt: skip
        done = run(WINDOWS, *words)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "cp949", "cp932"])
def test_messages_in_the_encodings_of_windows(tmp_path, encoding):
    (tmp_path / "海.yaml").write_text("# 海 ×\nsee: 1\n", encoding="utf-8")
    variables = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = run("tests/support/toy.py", "--config", str(tmp_path / "海.yaml"), **variables)
    assert done.returncode == 2
    assert "unknown key 'see'" in done.stderr
    assert "Traceback" not in done.stderr
