"""The command `halftone`: its help, its subcommands, and its errors for unknown words."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from halftone_trainer.__main__ import choose, find_scripts, main, summary
from pipelines.tools.cli import UserError
from pipelines.tools.resources import find_file, shipped_files
from tests.conftest import ROOT
from tests.support.runs import environment

SCRIPTS = find_scripts()


def halftone(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "halftone_trainer", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def output_of(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["halftone", *words])
    assert main() is None
    return capsys.readouterr().out


def test_help_lists_every_script_in_a_sentence(monkeypatch, capsys):
    text = output_of(monkeypatch, capsys, "--help")
    assert output_of(monkeypatch, capsys) == text
    names = {"train latent_diffusion", "sample", "caption", "analyze", "data make_posters", "evaluate"}
    assert names <= SCRIPTS.keys()
    for name, script in SCRIPTS.items():
        assert f"\n  {name} " in text, name
        assert len(summary(script).split()) > 2, script
    assert "Train a tokenizer on the captions of a dataset" in " ".join(text.split())
    of_a_group = output_of(monkeypatch, capsys, "train", "--help")
    assert "train encoder" in of_a_group
    assert "sample" not in of_a_group


def test_help_is_quick():
    seconds = []
    for _ in range(3):  # the fastest run counts, because other processes may use the machine
        started = time.perf_counter()
        assert halftone("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2.5


def test_a_subcommand_is_its_script_with_its_words():
    assert choose(["train", "encoder", "--seed", "1"], SCRIPTS) == ("train encoder", ["--seed", "1"])
    assert choose(["sample", "--prompt", "x"], SCRIPTS) == ("sample", ["--prompt", "x"])
    done = halftone("data", "make_posters", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: halftone data make_posters")
    done = halftone("data", "make_posters", "--num_poster", "3")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "did you mean 'num_posters'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "encoder"], "unknown command 'halftone trian'; did you mean 'train'"),
        (["train", "encodr"], "unknown command 'halftone train encodr'; did you mean 'encoder'"),
        (["train"], "is incomplete; add one of .*autoencoder"),
        (["data", "--num_posters", "3"], "is incomplete; add one of .*make_posters"),
        (["nothing_like_it"], "halftone --help lists all"),
    ],
)
def test_unknown_words_name_the_nearest(words, message):
    with pytest.raises(UserError, match=message):
        choose(words, SCRIPTS)


def test_an_unknown_word_is_status_2():
    done = halftone("sampel")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "did you mean 'sample'" in done.stderr


def test_paths_of_shipped_files(monkeypatch, capsys):
    listed = output_of(monkeypatch, capsys, "path").split()
    assert listed == shipped_files()
    assert {"configs/accelerate/cpu.yaml", "configs/briefs/swiss.yaml", "model_cards/base.md.jinja"} <= set(listed)
    for name in ("accelerate/multi_gpu", "accelerate/multi_gpu.yaml", "configs/accelerate/multi_gpu.yaml"):
        assert output_of(monkeypatch, capsys, "path", name).strip() == str(ROOT / "configs/accelerate/multi_gpu.yaml")
    preset = str(find_file("autoencoder/quickstart"))
    assert output_of(monkeypatch, capsys, "path", "autoencoder/quickstart").strip() == preset
