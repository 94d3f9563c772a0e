"""Model cards of models whose captions, labels, names and settings come from others: no links, images or HTML in them,
and nothing of the machine that trained the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.publishing.test_model_card import RECORD, TEMPLATE_NAMES
from training.publishing.model_card import write_model_card
from training.publishing.public import (
    clean,
    fenced,
    folder_name,
    literal,
    public_settings,
    public_text,
    settings_elsewhere,
)

BEARER = "Bearer abcDEF0123456789abc"
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=https://evil.example/pixel.gif>",
    "</details><h1>Pwned</h1>",
    "![pixel](https://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "<javascript:alert(1)>",
    "[a]: https://evil.example",
    "![a][a] [a]",
    "https://evil.example/login and www.evil.example and ada@evil.example",
    "a `` b ` c ``` d",
    "`",
    "``` \n```\n<b>x</b>",
    "| a | b |\n|---|---|\n| [x](http://evil.example) |",
    "\n\n# heading\n\n<iframe src='x'></iframe>",
    "---\nlicense: mit\n---",
    "&lt;b&gt; &#60;b&#62; \\<b\\>",
    "\u202egnp.exe\u2066 \x00\x1b[31mred\x1b[0m \u200bzero",
    "{{ 7 * 7 }} {% raw %}",
    "1. [x](http://evil.example)",
    "$$\\href{javascript:alert(1)}{x}$$",
    "x" * 1_000_000,
]
PRIVATE = [
    "/home/grace/secret project/images",
    "/Users/grace/images",
    "~/grace/images",
    "~grace/images",
    "file:///home/grace/images",
    "C:\\Users\\grace\\images",
    "c:/Users/grace/images",
    "\\\\server-of-grace\\share\\images",
    "/mnt/server-of-grace/images",
    "../grace/images",
]


def rendered(markdown: str) -> list:
    """Return all tokens of a card as a reader of CommonMark with tables sees them, without the metadata."""
    body = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [part for token in tokens for part in [token, *(token.children or [])]]


def targets(markdown: str) -> list[str]:
    return [
        str(t.attrs.get("href") or t.attrs.get("src")) for t in rendered(markdown) if t.type in ("link_open", "image")
    ]


def html(markdown: str) -> list[str]:
    return [t.content.strip() for t in rendered(markdown) if t.type in ("html_block", "html_inline")]


def record_with(text: str) -> dict:
    """Return a record with `text` wherever text of others can be."""
    settings = {
        "train_data_dir": text,
        "run_name": text,
        "init_from": text,
        "base_model": text,
        "pretrained_text_encoder": text,
        "fusion_mode": text,
        "conditioning_image_column": [text, text],
        "validation_prompts": [text, f"a {text}"],
        "prepare": {text: text},
        "model": {text: text},
    }
    named = {"model_name": text, "dataset": text, "license": text, "prompts": [text, "a fox"]}
    evaluation = {
        **dict.fromkeys(("model", "dataset", "split", "verdict", "resolution", "num_images"), text),
        "extractor": dict.fromkeys(("name", "fingerprint", "resolution"), text),
        "sampling": {text: text},
        "metrics": {"kid": 0.5, text: text},
        "floor": {"kid": {"mean": text, "std": text}},
        "real": {text: text},
        "real_images": {text: text},
        "refused": {text: text},
        "copies": [{"space": text, "copies": text, "copy_rate": text}],
    }
    many = {"classes": [text, "b"], "mask_classes": [text], "metrics": {"val_loss": 0.5, text: text}}
    best = {"metric": text, "value": 0.5, "step": 3}
    return {**RECORD, **named, **many, "evaluation": evaluation, "best": best, "config": settings, "hub_model_id": None}


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_text_of_others_is_only_text_in_a_card(tmp_path, template, text):
    (tmp_path / "samples.png").write_bytes(b"")
    card = write_model_card(tmp_path, template, record_with(text)).read_text(encoding="utf-8")
    plain = write_model_card(tmp_path, template, record_with("a fox")).read_text(encoding="utf-8")
    assert targets(card) == ["samples.png"]
    assert html(card) == html(plain)
    headings = [token.type for token in rendered(card) if token.type == "heading_open"]
    assert headings == [token.type for token in rendered(plain) if token.type == "heading_open"]
    # GitHub and the Hub also make links of bare addresses, except in code.
    words = " ".join(token.content for token in rendered(card) if token.type == "text")
    assert "evil" not in words
    assert len(card) < 60_000
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata.keys() == yaml.safe_load(plain.split("---\n")[1]).keys()
    code = next(token.content for token in rendered(card) if token.type == "fence" and token.info == "python")
    compile(code, template, "exec")
    assert not set(card) & set("\x00\x1b\u202e\u2066\u200b")


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("path", PRIVATE)
def test_local_paths_and_names_of_users_are_not_in_a_card(tmp_path, template, path):
    card = write_model_card(tmp_path, template, record_with(path)).read_text(encoding="utf-8")
    assert "grace" not in card
    assert "images (local files that are not on the Hub)" in card


@pytest.mark.parametrize("path", [path for path in PRIVATE if " " not in path])
def test_local_paths_within_a_text_are_cut_to_their_last_part(path):
    assert public_text(f"trained on {path}, then ({path})") == "trained on images, then (images)"
    assert public_settings({"notes": [f"see {path}"], "where": {"a": path}}) == {
        "notes": ["see images"],
        "where": {"a": "images"},
    }


@pytest.mark.parametrize(
    "text",
    ["a red and/or blue fox", "data/posters_64", "w/o text", "1/2 or 3/4", "ada/posters", "https://huggingface.co/a/b",
     "runs/own/vae", "a: b", "1:100,0.1:200,0.01", "~ 5 foxes", "the bearer of good news"],
)  # fmt: skip
def test_other_texts_stay_as_they_are(text):
    assert public_text(text) == text
    assert public_settings({"a": text}) == {"a": text}


@pytest.mark.parametrize(
    "home", ["/home/grace", "/home/grace/", "/Users/grace", "C:\\Users\\grace", "~", "~grace", "/root"]
)
def test_a_home_folder_is_not_shown_by_the_name_of_its_user(home):
    assert folder_name(home) == "home folder"
    assert "grace" not in str(public_settings({"train_data_dir": home}))
    assert folder_name(str(Path.home())) == "home folder"


def test_secrets_in_texts_are_masked(tmp_path):
    secrets = [BEARER, "https://grace:hunter2@host/x", "ghp_" + "a1" * 18, "sk-" + "b2" * 20, "AKIA" + "ABCD" * 4]
    for secret in secrets:
        card = write_model_card(tmp_path, "latent_diffusion.md.jinja", record_with(f"use {secret} now")).read_text()
        assert secret.removeprefix("Bearer ").removeprefix("https://").split("@")[0] not in card
        assert "***" in card


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_shown_as_it_is_or_as_code(text):
    shown = literal(text)
    assert "\n" not in shown
    tokens = rendered(f"x {shown} y")
    assert {token.type for token in tokens} <= {"paragraph_open", "paragraph_close", "inline", "text", "code_inline"}
    content = "".join(token.content for token in tokens if token.type in ("text", "code_inline"))
    assert "".join(content.split()) == "".join(f"x {clean(text)} y".split())


@given(st.text(alphabet="`~\n a<>", max_size=60))
@settings(max_examples=300, deadline=None)
def test_a_code_block_contains_its_whole_text(text):
    tokens = rendered(fenced(text, "yaml") + "\n\nend")
    assert tokens[0].type == "fence"
    assert tokens[0].content == f"{text}\n"
    assert tokens[-2].content == "end"


def test_settings_for_another_machine_leave_out_what_is_on_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    here = {"train_data_dir": "data", "vae": "/home/grace/vae", "output_dir": "runs/a", "prepare": {"a": "b"}}
    same = {"seed": 3, "dataset_name": "ada/posters", "hub_model_id": None, "model": {"layers": [1, 2]}, "license": ""}
    assert settings_elsewhere({**here, **same, "hub_token": "x", "prompts": ["a fox at C:\\x\\y"]}) == same
    assert json.dumps(same)
