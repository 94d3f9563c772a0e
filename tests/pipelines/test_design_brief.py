"""Design briefs: accepted and refused values, their tensors, and their encoder.

Shapes: B briefs, L fields (tokens), D token width, E global width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_scripts.posters.brief import CHARACTERS
from pipelines.common.design_brief import (
    FIELDS,
    NUMBERS,
    READABLE_DISTANCE,
    STYLE_MOODS,
    DesignBrief,
    brief_tensors,
    parse_color,
)
from pipelines.common.poster_domain import (
    COLORS,
    COUNTS,
    GRAMMAR,
    MAX_PALETTE_COLORS,
    STYLES,
    color_distance,
    rgb_color,
)
from pipelines.models.design_brief_encoder import DesignBriefEncoder, fourier_features

WHOLE = {
    "style": "swiss",
    "energy": 0.5,
    "formality": 0.25,
    "warmth": 1,
    "palette": ["cream", "#d33", "#10A0fF"],
    "text_blocks": 2,
    "pictures": 0,
    **{name: i / 10 for i, name in enumerate(GRAMMAR)},
}


def tiny_encoder(**options) -> DesignBriefEncoder:
    torch.manual_seed(0)
    return DesignBriefEncoder(token_width=8, global_width=6, **options)


def test_every_number_of_the_grammar_is_a_field():
    assert set(GRAMMAR) <= set(FIELDS)
    assert set(COUNTS) <= set(FIELDS)
    assert set(WHOLE) == set(FIELDS)


def test_values_are_stored_in_one_form():
    brief = DesignBrief.from_mapping(WHOLE)
    assert brief.palette == ("#f6ecd6", "#dd3333", "#10a0ff")
    assert brief.warmth == 1.0
    assert brief.density == pytest.approx(0.5)
    assert DesignBrief.from_mapping(brief.to_dict()) == brief
    assert DesignBrief(style="Art Deco").style == DesignBrief(style="art-deco").style == "art_deco"
    assert DesignBrief(palette=" red, #FFF").palette == ("#d0202a", "#ffffff")


def test_open_fields_stay_open():
    assert DesignBrief().to_dict() == {}
    assert DesignBrief.from_mapping({"style": None, "pictures": 2}).to_dict() == {"pictures": 2}


def test_a_row_of_a_dataset_has_more_columns_and_may_lack_the_grammar():
    row = {"style": "pop", "energy": np.float32(0.9), "pictures": np.int64(1), "title": "WOW!", "image": b""}
    assert DesignBrief.from_row(row).to_dict() == {"style": "pop", "energy": 0.9, "pictures": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"style": "swis"}, "style must be one of swiss, .*, but is 'swis'; did you mean 'swiss'?"),
        ({"style": 3}, "style must be one of .*, but is 3"),
        (
            {"palette": ["blu"]},
            "palette: 'blu' is not a colour; did you mean 'blue'.*'#rgb', '#rrggbb' or one of cream",
        ),
        ({"palette": "#12"}, "palette: '#12' is not a colour"),
        ({"palette": "#gggggg"}, "palette: '#gggggg' is not a colour"),
        ({"palette": [None]}, "palette: None is not a colour"),
        ({"palette": []}, r"palette must be 1 to 5 colours, but is \[\]"),
        ({"palette": ["red"] * 6}, "palette must be 1 to 5 colours, but is"),
        ({"palette": 7}, "palette must be 1 to 5 colours, but is 7"),
        ({"energy": 1.5}, r"energy must be a number in \[0, 1\], but is 1.5"),
        ({"warmth": -0.1}, r"warmth must be a number in \[0, 1\], but is -0.1"),
        ({"balance": float("nan")}, r"balance must be a number in \[0, 1\], but is nan"),
        ({"formality": True}, r"formality must be a number in \[0, 1\], but is True"),
        ({"image_share": "much"}, r"image_share must be a number in \[0, 1\], but is 'much'"),
        ({"pictures": 4}, "pictures must be a whole number from 0 to 3, but is 4"),
        ({"text_blocks": 1.5}, "text_blocks must be a whole number from 0 to 3, but is 1.5"),
        ({"energie": 0.5}, "a brief has no field 'energie'; did you mean 'energy'.*its fields are style, energy"),
    ],
)
def test_errors_name_the_field_its_value_and_the_allowed_values(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        DesignBrief.from_mapping(fields)
    assert "\n" not in str(caught.value)


def test_colours():
    assert parse_color("#d33") == parse_color("#DD3333") == (221, 51, 51)
    assert all(parse_color(name) == rgb for name, rgb in COLORS.items())


def test_a_brief_is_read_from_and_written_to_a_file(tmp_path):
    path = tmp_path / "brief.yaml"
    path.write_text("style: swiss\npalette: ['#d33', cream]\npictures: 2\nenergy: 0.8\n")
    brief = DesignBrief.from_yaml(path)
    assert brief == DesignBrief(style="swiss", palette=("#dd3333", "cream"), pictures=2, energy=0.8)
    path.write_text(brief.to_yaml())
    assert DesignBrief.from_yaml(path) == brief


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("style: swis", "brief.yaml: style must be one of"),
        ("palette: #d33", "palette is empty; colours are written in quotes"),
        ("palette: [#d33]", "is not valid YAML: .* colours are written in quotes"),
        ("swiss", "must hold lines such as `style: swiss`, but holds 'swiss'"),
        ("", "but holds None"),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path, text, message):
    path = tmp_path / "brief.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DesignBrief.from_yaml(path)
    with pytest.raises(ValueError, match="none.yaml cannot be read: No such file"):
        DesignBrief.from_yaml(tmp_path / "none.yaml")


def test_random_briefs_are_complete_and_their_fields_suit_each_other():
    briefs = [DesignBrief.random(seed) for seed in range(200)]
    assert DesignBrief.random(3) == briefs[3]
    assert {brief.style for brief in briefs} == set(STYLES)
    assert {brief.pictures for brief in briefs} == {0, 1, 2, 3}
    for brief in briefs:
        assert set(brief.to_dict()) == set(FIELDS) - set(GRAMMAR)
        ground, *others = (np.array(rgb_color(color)) for color in brief.palette)
        assert 3 <= len(brief.palette) <= 4
        assert len(set(brief.palette)) == len(brief.palette)
        assert all(color_distance(ground, other) >= READABLE_DISTANCE for other in others)
        assert abs(brief.energy - STYLE_MOODS[brief.style][0]) <= 0.06


def test_moods_are_those_of_the_generated_posters():
    assert {name: (c.energy, c.formality) for name, c in CHARACTERS.items()} == STYLE_MOODS


def test_a_brief_is_described_in_one_line():
    assert DesignBrief().describe() == "no brief"
    brief = DesignBrief(style="art_deco", palette=("#f6ecd6", "#d33"), pictures=1, text_blocks=2, energy=0.5)
    assert brief.describe() == "art deco, cream red, 2 texts, 1 picture"
    assert DesignBrief(energy=0.5, rhythm=0.25).describe() == "energy 0.5, rhythm 0.25"


# --- tensors


def test_tensors_and_masks():
    tensors = brief_tensors([DesignBrief.from_mapping(WHOLE), DesignBrief(), DesignBrief(pictures=0)])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "style": (3, 1), "numbers": (3, 11), "counts": (3, 2), "palette": (3, 5, 3),
        "style_present": (3, 1), "numbers_present": (3, 11), "counts_present": (3, 2), "palette_present": (3, 5),
    }  # fmt: skip
    assert tensors["style"][0] == STYLES.index("swiss")
    assert tensors["numbers"][0].tolist() == pytest.approx([WHOLE[name] for name in NUMBERS])
    assert tensors["counts"][0].tolist() == [2, 0]
    assert tensors["palette"][0, 1].tolist() == pytest.approx([221 / 255, 51 / 255, 51 / 255])
    assert tensors["palette_present"][0].tolist() == [True, True, True, False, False]
    masks = [tensor for name, tensor in tensors.items() if name.endswith("present")]
    assert not any(mask[1].any() for mask in masks)
    assert [mask[2].sum().item() for mask in masks] == [0, 0, 1, 0]
    assert not any(tensor[1].any() for tensor in tensors.values())


# --- the encoder


def test_the_encoders_defaults_are_those_of_the_domain():
    config = DesignBriefEncoder().config
    assert config.num_styles == len(STYLES)
    assert config.num_numbers == len(NUMBERS)
    assert tuple(config.max_counts) == (3, 3)
    assert config.palette_colors == MAX_PALETTE_COLORS


def test_fourier_features_by_hand():
    features = fourier_features(torch.tensor([[0.0, 0.5]]), 2)
    assert features.shape == (1, 2, 5)
    assert torch.allclose(features[0], torch.tensor([[0.0, 0, 0, 1, 1], [0.5, 1, 0, 0, -1]]), atol=1e-6)


def test_tokens_and_global_vector():
    encoder = tiny_encoder()
    tokens, whole = encoder(**brief_tensors([DesignBrief.from_mapping(WHOLE), DesignBrief()]))
    assert tokens.shape == (2, encoder.num_tokens, 8) == (2, 19, 8)
    assert whole.shape == (2, 6)


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_its_own_tokens_and_the_global_vector(field):
    encoder = tiny_encoder().eval()
    without = {name: value for name, value in WHOLE.items() if name != field}
    briefs = [DesignBrief.from_mapping(values) for values in (WHOLE, without)]
    tokens, whole = encoder(**brief_tensors(briefs))
    changed = ((tokens[0] - tokens[1]).abs() > 1e-4).any(-1).nonzero().flatten().tolist()
    first = {"style": [0], "text_blocks": [12], "pictures": [13], "palette": [14, 15, 16]}
    assert changed == first.get(field, [1 + NUMBERS.index(field)] if field in NUMBERS else [])
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)


@pytest.mark.parametrize(("field", "other"), [("style", "pop"), ("energy", 0.6), ("pictures", 1), ("palette", "red")])
def test_different_values_give_different_tokens(field, other):
    tokens, whole = tiny_encoder()(
        **brief_tensors([DesignBrief(**{field: WHOLE[field]}), DesignBrief(**{field: other})])
    )
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)


def test_an_open_brief_gives_the_null_tokens_whatever_the_masked_values_are():
    encoder = tiny_encoder()
    tensors = brief_tensors([DesignBrief.from_mapping(WHOLE)])
    hidden = {k: torch.zeros_like(v) if k.endswith("present") else v for k, v in tensors.items()}
    for one, other in zip(encoder(**hidden), encoder(**brief_tensors([DesignBrief()])), strict=True):
        assert torch.equal(one, other)


def test_every_parameter_gets_a_gradient_from_the_global_vector():
    encoder = tiny_encoder()
    _, whole = encoder(**brief_tensors([DesignBrief.from_mapping(WHOLE), DesignBrief()]))
    whole.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_half_precision_and_saving(tmp_path):
    encoder = tiny_encoder().eval()
    tensors = brief_tensors([DesignBrief.from_mapping(WHOLE)])
    tokens, _ = encoder(**tensors)
    encoder.save_pretrained(tmp_path)
    again, _ = DesignBriefEncoder.from_pretrained(tmp_path)(**tensors)
    assert torch.allclose(tokens, again, atol=1e-6)
    half, whole = encoder.to(torch.bfloat16)(**tensors)
    assert half.dtype == whole.dtype == torch.bfloat16
    assert torch.allclose(half.float(), tokens, atol=0.1)
