"""Atomic writing of files: complete after a success, unchanged after an error."""

from __future__ import annotations

import json

import pytest

from training.core.files import replacing, write_atomically, write_json


def test_texts_are_utf_8_and_bytes_are_kept(tmp_path):
    write_atomically(tmp_path / "a.txt", "größer ✓")
    assert (tmp_path / "a.txt").read_bytes() == "größer ✓".encode()
    write_atomically(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    write_json(tmp_path / "c.json", {"b": 1, "a": [2]})
    assert json.loads((tmp_path / "c.json").read_text()) == {"b": 1, "a": [2]}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    write_atomically(path, "old")

    def fails(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_the_new_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["new.txt"]
