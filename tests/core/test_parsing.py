"""Parsing flags and YAML files into a config: flags override files, and errors suggest the nearest known name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from training import train_autoencoder, train_latent_diffusion
from training.core.options import Options, option
from training.core.parsing import known_names, parse_config
from training.core.scripts import script_module, stage_names
from training.engine.run_config import RunConfig


@dataclass
class Model:
    """A model."""

    block_out_channels: list[int] = field(default_factory=lambda: [8, 16])
    """Channels"""
    dropout: float = 0.0
    """Share, with 95 % confidence"""


@dataclass
class Config(RunConfig):
    """Flags."""

    output_dir: str = option("runs/x", on_resume="free")
    """Folder"""
    model: Model = field(default_factory=Model)
    """The model"""
    names: list[str] = option(["a", "b"])
    """Names"""
    share: str = option("50%")
    """Share"""
    extra: dict[str, list[float]] = option({})
    """Numbers"""


@dataclass
class Plain(Options):
    """Flags of a command without lists."""

    count: int = 1
    """Count"""


def parse(*words: str) -> Config:
    return parse_config(Config, list(words))


def yaml_file(tmp_path, text: str | bytes) -> str:
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(tmp_path / "c.yaml")


def test_files_are_utf8_also_with_the_byte_order_mark_and_line_ends_of_windows(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("share: café → 海报\nnames:\n- ü\n", encoding="utf-8-sig", newline="\r\n")
    config = parse("--config", str(file))
    assert (config.share, config.names) == ("café → 海报", ["ü"])
    file.write_text("# 海报\n", encoding="gbk")
    with pytest.raises(UserError, match="own.yaml is not UTF-8 .*; save it as UTF-8"):
        parse("--config", str(file))


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    path = yaml_file(tmp_path, "seed: 3\nlearning_rate: 1.0e-3\nmodel:\n  dropout: 0.5\n")
    config = parse("--config", path, "--seed", "4", "--model.block_out_channels", "[4,8,12]")
    assert (config.seed, config.learning_rate, config.train_batch_size) == (4, 1e-3, 16)
    assert config.model == Model([4, 8, 12], 0.5)


def test_numbers_in_common_notations(tmp_path):
    """YAML reads 1e-3 as a string; as a learning rate it must still be a number."""
    assert parse("--config", yaml_file(tmp_path, "learning_rate: 1e-3\n")).learning_rate == 1e-3
    assert parse("--learning_rate", "1e-3").learning_rate == 1e-3
    assert parse("--names", "[]").names == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean 'learning_rate'"),
        (["--model.droput", "1"], "unknown flag --model.droput; did you mean 'model.dropout'"),
        (["--seed", "one"], "--seed"),
        (["--train_batch_size", "0"], "--train_batch_size is 0; it must be at least 1"),
        (["--weight_decay", ".nan"], "--weight_decay is nan; it must be a finite number"),
        (["--max_grad_norm", ".nan"], "--max_grad_norm is nan; it must be a finite number"),
        (["--learning_rate", ".inf"], "--learning_rate is inf; it must be a finite number"),
        (["--lr_power=-.inf"], "--lr_power is -inf; it must be a finite number"),
        (["--weight_decay", "1e300"], "--weight_decay is 1e+300; it must be at most 1e+38"),
        (["--seed", "9" * 30], "it must be at most 9223372036854775807"),
        (["--train_batch_size", "1e3"], "--train_batch_size: expected a whole number, and got 1000.0"),
        (["--learning_rate", "true"], "--learning_rate: expected a number, and got True"),
        (["--use_ema", "2"], "--use_ema: expected true or false, and got 2"),
        (["--max_grad_norm", "-1"], "--max_grad_norm is -1.0; it must be at least 0"),
        (["--extra", "{shares: [0.5, .nan]}"], "--extra is nan; it must be a finite number"),
        (["--config", str(ROOT)], "is a folder; name a file in it"),
        (["--optimizer", "adam8"], "did you mean 'adam'"),
        (["--mixed_precision", "fp8"], "mixed_precision"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_in_flags(words, message):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' in the YAML file; did you mean 'learning_rate'?"),
        ("model:\n  droput: 1", "unknown key 'model.droput' in the YAML file; did you mean 'model.dropout'?"),
        ("seed: [1]", "--seed"),
        ("seed: 1: 2", "line 1: mapping values are not allowed"),
        ("seed: 1\nuse_ema: true\nseed: 2", "line 3: 'seed' is given twice"),
        ("model:\n  dropout: 0\n  dropout: 0.1", "line 3: 'dropout' is given twice"),
        ("- seed\n- 1", "it does not consist of named settings"),
        ("seed", "it does not consist of named settings"),
        ("1: 2", "it does not consist of named settings"),
        ("", "it is empty"),
        ("seed:\t1\n\tuse_ema: true", "there is a tab; use spaces"),
        ("seed: [1", "line 1: expected"),
        ("seed: 1\n---\nseed: 2", "line 2: "),
        ("\0seed: 1", "special characters are not allowed"),
        ("seed: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("names: &n [*n]", "its values refer to themselves"),
        ("seed: " + 5000 * "[", "recursion"),
        ("seed: 2026-02-31", "day"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse("--config", yaml_file(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_values_of_yaml_may_be_repeated_by_name(tmp_path):
    assert parse("--config", yaml_file(tmp_path, "names: &n [x]\nmodel:\n  dropout: 0.5\n")).names == ["x"]
    text = "model:\n  block_out_channels: &c [4, 8]\nfreeze_parameters: &f [a]\nnames: *f\n"
    assert parse("--config", yaml_file(tmp_path, text)).names == ["a"]


def test_without_arguments_the_preset_is_used(tmp_path):
    preset = yaml_file(tmp_path, "seed: 9\n")
    assert parse_config(Config, [], preset=preset).seed == 9
    assert parse_config(Config, ["--train_batch_size", "2"], preset=preset).seed == 0


def test_a_preset_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = yaml.safe_load((ROOT / "configs/experiments/autoencoder/quickstart.yaml").read_text())["max_train_steps"]
    for name in ("autoencoder/quickstart", "configs/experiments/autoencoder/quickstart.yaml"):
        for words in (["--config", name], [f"--config={name}"]):
            assert parse_config(train_autoencoder.Config, words).max_train_steps == expected
    with pytest.raises(UserError, match="no file 'autoencoder/quickstrt'.*did you mean 'autoencoder/quickstart'"):
        parse("--config", "autoencoder/quickstrt")
    with pytest.raises(UserError, match="--config"):
        parse("--config")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--names", "[a,b]"], ["a", "b"]),
        (["--names", "a,b"], ["a", "b"]),
        (["--names=a"], ["a"]),
        (["--names", "none"], []),
        (["--names=None"], []),
    ],
)
def test_a_list_needs_no_brackets(words, names):
    assert parse(*words).names == names
    assert parse("--model.block_out_channels", "4,12").model.block_out_channels == [4, 12]


def test_a_list_that_may_be_unset_needs_no_brackets():
    def prompts(*words: str) -> list[str] | None:
        source = ["--train_data_dir", "images", "--vae", "vae", "--tokenizer", "tokenizer"]
        return parse_config(train_latent_diffusion.Config, [*source, *words]).preview_prompts

    assert prompts("--preview_prompts", "a red circle,a star") == ["a red circle", "a star"]
    assert prompts("--preview_prompts", "none") is None
    assert prompts("--preview_prompts=null") is None


def test_a_flag_replaces_the_other_source_of_the_file(tmp_path):
    file = yaml_file(tmp_path, "dataset_name: posters\nvae: v\n")
    config = parse_config(train_autoencoder.Config, ["--config", yaml_file(tmp_path, "dataset_name: posters\n"),
                                                    "--train_data_dir", "mine"])  # fmt: skip
    assert (config.dataset_name, config.train_data_dir) == (None, "mine")
    with pytest.raises(UserError, match="both dataset_name"):
        parse_config(train_latent_diffusion.Config, ["--config", file, "--dataset_name", "a", "--train_data_dir", "b"])
    with pytest.raises(UserError, match="both dataset_name"):  # in the file, it is not known which one is meant
        parse_config(
            train_autoencoder.Config, ["--config", yaml_file(tmp_path, "dataset_name: a\ntrain_data_dir: b\n")]
        )


def test_a_value_without_a_flag_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "my images").mkdir()
    (tmp_path / "rows.parquet").touch()
    for word, meant in (
        ("mine", "did you mean --train_data_dir mine"),
        ("my images", "did you mean --train_data_dir 'my images'"),
        ("rows.parquet", "did you mean --dataset_name rows.parquet"),
        ("run.yaml", "did you mean --config run.yaml"),
        ("nothing", "values are given as --NAME VALUE"),
    ):
        with pytest.raises(UserError, match=f"'{word}' has no flag before it; {meant}"):
            parse_config(train_autoencoder.Config, [word])
    with pytest.raises(UserError, match="'mine' has no flag before it; values are given"):
        parse("mine")


def help_of(capsys, config_class: type = Config, word: str = "--help_all", **arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse_config(config_class, [word], **arguments)
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_help_has_every_flag_with_its_description(capsys):
    output = " ".join(help_of(capsys).split())
    for name in known_names(Config):
        assert f"--{name}" in output, name
    assert "Batch size per process (of one micro-batch)" in output


def test_help_ends_each_description_with_the_default(capsys):
    output = " ".join(help_of(capsys).split())
    for text in (
        "(of one micro-batch) (default: 16)",
        "Peak learning rate (default: 0.0001)",
        "Maximum gradient norm for gradient clipping; 0 disables it (default: 1)",
        "validation, previews and the pipeline use it (default: true)",
        "Names (default: [a,b])",
        "Channels (default: [8,16])",
        "Share (default: 50%)",
        "Share, with 95 % confidence (default: 0",
        "Folder (default: runs/x)",
    ):
        assert text in output
    for unset in (
        "if unset, the name of the run folder",
        "e.g. '[unet.down_blocks.*]'",
        "100 if unset. Not used with constant and piecewise_constant",
    ):
        assert unset in output
        assert not output.split(unset)[1].lstrip().startswith("(default")
    assert "(default: )" not in output
    assert "(default: None)" not in output
    assert "==SUPPRESS==" not in output


def test_help_explains_files_lists_and_booleans(capsys):
    output = " ".join(help_of(capsys, description="A command.", preset="configs/experiments/stage/tiny.yaml").split())
    assert "A command. Lists are written as a,b (an empty one: none)" in output
    assert "A boolean flag without a value means true. --print_config shows all settings." in output
    assert "or names of presets; later ones override earlier ones, and flags override both" in output
    assert "Without any arguments, stage/tiny is used" in output
    assert "YAML file with the --model.* options below, without this prefix" in output
    assert "preset" not in " ".join(help_of(capsys, Plain).split())
    assert "Lists" not in help_of(capsys, Plain)


STAGES = [script_module(name) for name in stage_names()]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_the_help_of_a_training_script_is_short_and_names_the_rest(capsys, monkeypatch, stage):
    monkeypatch.setenv("COLUMNS", "120")
    short = help_of(capsys, stage.Config, "--help", description=stage.__doc__, preset=stage.PRESET)
    everything = help_of(capsys, stage.Config, "--help_all", description=stage.__doc__, preset=stage.PRESET)
    assert len(short.splitlines()) <= 60
    rate = f"(default: {stage.Config.learning_rate:g})"
    for name in ("--dataset_name", "--train_data_dir", "--output_dir", "--max_train_steps", rate):
        assert name in short
    titles = re.findall(r"^([A-Z][a-z ]+):$", everything, re.MULTILINE)
    assert titles == ["Essentials", "Data", "Length", "Saving and measuring", "Trackers", "Hub", "Advanced"]
    count = len(re.findall(r"^  -", everything, re.MULTILINE))
    assert f"--help_all lists all {count} options: Data, Length, Saving and measuring, Trackers" in short


def test_a_file_of_a_group_has_its_options_without_the_prefix(tmp_path):
    assert parse("--model", yaml_file(tmp_path, "dropout: 0.25\n")).model == Model([8, 16], 0.25)
    assert parse("--names+", "c").names == ["a", "b", "c"]
    assert parse("--dry_run").dry_run is True


@pytest.mark.parametrize("config_class", [Config, train_autoencoder.Config])
def test_no_description_ends_with_a_full_stop(capsys, config_class):
    words = " ".join(re.split(r"\n[\w*.-]+:\n", help_of(capsys, config_class), maxsplit=1)[1].split())
    assert re.findall(r"[^ ]*[^.]\.(?: \(default: [^ ]*\))?(?= --| [A-Z][^ ]* --|$)", words) == []


def test_a_config_written_and_read_again_is_the_same(tmp_path):
    import yaml

    config = parse("--seed", "5", "--model.dropout", "0.25")
    again = parse("--config", yaml_file(tmp_path, yaml.safe_dump(config.to_dict())))
    assert again.to_dict() == config.to_dict()


# --- several files, and files with a base ----------------------------------------------------------------------------


def files(tmp_path, **texts: str) -> dict[str, str]:
    """Write files, by their names without .yaml, in which __ is a folder, and return their paths."""
    paths = {}
    for name, text in texts.items():
        path = tmp_path / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        paths[name] = str(path)
    return paths


A = "seed: 1\nlearning_rate: 1.0e-3\nmodel: {dropout: 0.5, block_out_channels: [4]}\nnames: [x]\nprepare: {a: b.py}\n"
B = "seed: 2\nmodel:\n  block_out_channels: [8, 8]\nprepare: {c: d.py}\n"


@pytest.mark.parametrize("form", ["--config A --config B", "--config A B", "--config=A --config=B", "base", "list"])
def test_later_files_override_earlier_ones(tmp_path, form):
    paths = files(tmp_path, A=A, B=B, base=f"base: A.yaml\n{B}", list="base: [A.yaml, B.yaml]\n")
    typed = form if "--" in form else f"--config {form}"
    words = [re.sub(r"\b(A|B|base|list)$", lambda name: paths[name[1]], word) for word in typed.split()]
    config = parse(*words, "--train_batch_size", "3")
    assert (config.seed, config.learning_rate, config.train_batch_size, config.names) == (2, 1e-3, 3, ["x"])
    assert config.model == Model([8, 8], 0.5)
    assert config.prepare == {"c": "d.py"}  # a single value, as in a flag
    assert parse(*words, "--seed", "9").seed == 9


def test_the_nearest_file_wins_and_bases_are_relative_to_the_file_that_names_them(tmp_path):
    paths = files(
        tmp_path,
        common__root="seed: 1\nlearning_rate: 1.0e-3\nshare: root\n",
        common__left="base: root.yaml\nseed: 2\nshare: left\n",
        common__right="base: [root.yaml]\nshare: right\n",
        mine="share: mine\nbase: [common/left.yaml, common/right.yaml]\n",
        other="base: common/left.yaml\n",
        last="base: [common/right.yaml, common/left.yaml]\n",
    )
    assert (parse("--config", paths["mine"]).share, parse("--config", paths["mine"]).learning_rate) == ("mine", 1e-3)
    assert (parse("--config", paths["other"]).share, parse("--config", paths["other"]).seed) == ("left", 2)
    assert parse("--config", paths["mine"]).seed == 1  # of right's base, which comes after left
    assert parse("--config", paths["last"]).seed == 2


def test_a_base_may_be_a_preset_and_the_saved_config_has_none(tmp_path):
    paths = files(tmp_path, mine="base: autoencoder/emoji_64\nlearning_rate: 0.125\n")
    config = parse_config(train_autoencoder.Config, ["--config", paths["mine"]])
    preset = parse_config(train_autoencoder.Config, ["--config", "autoencoder/emoji_64"])
    assert {**preset.to_dict(), "learning_rate": 0.125} == config.to_dict()
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert "base" not in config.to_dict()
    assert parse_config(train_autoencoder.Config, ["--config", str(tmp_path / "saved.yaml")]) == config


def test_a_file_replaces_the_other_source_of_its_base(tmp_path):
    paths = files(tmp_path, A="dataset_name: posters\n", B="base: A.yaml\ntrain_data_dir: mine\n")
    for words in (["--config", paths["B"]], ["--config", paths["A"], paths["B"]]):
        config = parse_config(train_autoencoder.Config, words)
        assert (config.dataset_name, config.train_data_dir) == (None, "mine")
    config = parse_config(train_autoencoder.Config, ["--config", paths["B"], paths["A"]])
    assert (config.dataset_name, config.train_data_dir) == ("posters", None)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"A": "base: B.yaml\n", "B": "base: A.yaml\n"},
            r"A.yaml is a base of itself \(.*A.yaml → .*B.yaml → .*A.yaml\)",
        ),
        ({"A": "base: A.yaml\n"}, "A.yaml is a base of itself"),
        (
            {"A": "base: C.yaml\n"},
            "`base` in .*A.yaml names C.yaml, but neither the file .*/C.yaml' nor a preset of this name",
        ),
        ({"A": "base: autoencoder/emoji_65\n"}, "nor a preset of this name exists; write the path relative to A.yaml"),
        ({"A": "base: {x: 1}\n"}, "`base` in .*A.yaml is {'x': 1}; give the name of a file, or a list"),
        ({"A": "base: [3]\n"}, r"`base` in .*A.yaml is \[3\]; give"),
        ({"A": "base: B.yaml\n", "B": "learning_rat: 1\n"}, "unknown key 'learning_rat'.*did you mean 'learning_rate'"),
        ({"A": "base: B.yaml\n", "B": "seed: [\n"}, "B.yaml cannot be used"),
        ({"A": "base: B.yaml\n", "B": "hub_token: hf_abcdefghij\n"}, "hub_token in .*B.yaml is not accepted"),
        ({"A": "base: B.yaml\n", "B": "seed: fast\n"}, "--seed.*fast"),
    ],
)
def test_bases_that_cannot_be_used(tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        parse("--config", files(tmp_path, **texts)["A"])


def test_a_missing_second_file_and_other_words_after_files(tmp_path):
    paths = files(tmp_path, A=A)
    with pytest.raises(UserError, match="found no file .*nowhere.yaml"):
        parse("--config", paths["A"], "nowhere.yaml")
    with pytest.raises(UserError, match="'more' has no flag before it"):
        parse("--config", paths["A"], "more")
    with pytest.raises(UserError, match="'b.yaml' has no flag before it; did you mean --config b.yaml"):
        parse("--config", paths["A"], "--seed", "3", "b.yaml")


def test_a_base_belongs_to_configs_and_not_to_files_of_a_group(tmp_path):
    paths = files(tmp_path, group="dropout: 0.5\n", mine="base: group.yaml\n")
    assert parse("--model", paths["group"]).model.dropout == 0.5
    with pytest.raises(UserError, match="base"):
        parse("--model", paths["mine"])
