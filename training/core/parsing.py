"""Parsing a command line and a YAML file into a validated dataclass, with jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import jsonargparse
import yaml

from pipelines.tools.cli import TOKEN_ADVICE, UserError, nearest, refuse_hub_token
from pipelines.tools.files import read_text
from pipelines.tools.private import expand_home
from pipelines.tools.resources import PRESETS, find_file
from training.core.help import HELP_ALL, alternatives, help_text
from training.core.options import Options
from training.core.settings import BASE, read_settings, settings_chain

Config = TypeVar("Config", bound=Options)


def parse_config(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    preset: str = "",
    complete: Callable[[Config, frozenset[str]], None] | None = None,
) -> Config:
    """Parse `--config run.yaml` and flags, which override the file, into a validated `config_class`.

    Of several files, later ones override earlier ones. A file may name others, with whose settings it begins, under the
    key `base` (see `settings_chain`).

    Args:
        config_class: a dataclass of options. The docstring under a field is its help text; the fields of a group are
            `--model.field`.
        argv: the arguments after the program's name; None uses the arguments of this process.
        description: shown by `--help` and `--help_all`.
        preset: path of the preset to use if `argv` is empty.
        complete: sets what is not given, before the config is validated. It is called with the config and the names of
            the given options, unless a YAML file is given.

    Raises:
        UserError: an unknown flag or key (the message suggests the nearest known one), a value of the wrong type, a
            missing file, a file that is not UTF-8, a token in the arguments or in the file, or an error from the
            class's own `validate()`.
    """
    words = list(sys.argv[1:] if argv is None else argv) or (["--config", preset] if preset else [])
    refuse_hub_token(words)
    parser = _parser(config_class, description, preset)
    if any(word in ("-h", "--help", HELP_ALL) for word in words):
        print(help_text(parser, config_class, everything=HELP_ALL in words), end="")
        sys.exit(0)
    _refuse_unknown_flags(words, parser)
    words = list(_with_each_config(_with_brackets(words, parser)))
    printed = "--print_config" in words
    words = [word for word in words if word != "--print_config"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=DeprecationWarning)
            given = frozenset(parser.parse_args(words, defaults=False).keys())
            values = parser.instantiate(parser.parse_args(words))
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError) as error:
        known = known_names(config_class)
        raise UserError(_of_another_script(words, known) or _explain(str(error), known)) from None
    except RecursionError:
        raise UserError("the settings are nested too deeply; is there a YAML alias that contains itself?") from None
    for name in _replaced(words, config_class):
        setattr(values, name, None)
    config = config_class(**{f.name: getattr(values, f.name) for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]
    _expand_home(config)
    if complete is not None and "config" not in given:
        complete(config, given)
    config.validate()
    if printed and getattr(config, "dry_run", None) is not True:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    completed: Any = config
    completed.prints_config = printed
    return completed


def _expand_home(config: Options) -> None:
    """Replace `~/` at the beginning of each value by the home folder, in groups of options as well."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Options):
            _expand_home(value)
        else:
            setattr(config, field.name, expand_home(value))


def known_names(config_class: type, prefix: str = "") -> list[str]:
    """Return the name of every flag of `config_class` without its dashes; nested names contain dots."""
    names = []
    for field in dataclasses.fields(config_class):
        names.append(prefix + field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            names.extend(known_names(type(default), f"{prefix}{field.name}."))
    return names


# Options of earlier versions, which the config.yaml of an old run contains, and what is given now in their place. In a
# file they are dropped: none of them has an effect there.
_FORMER = {"auto_settings": "--recipe auto or --recipe none"}


class _ConfigFile(jsonargparse.ActionConfigFile):
    """`--config`: a YAML file, or the name of a preset that comes with the code. Its bases are applied before it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        for path, settings in settings_chain(find_file(values)):
            for name in settings:
                for replaced in set(parser.replaces.get(name, ())) - settings.keys():
                    cfg[replaced] = None  # an earlier file says the same in another way
            parser.config_files.add(str(path))
            super().__call__(parser, cfg, str(path), option_string)


def without_hub_token(settings: dict[str, Any], file: Any) -> dict[str, Any]:
    """Return the settings of a YAML file without `hub_token`, which the config.yaml of an old run may contain.

    Raises:
        UserError: `hub_token` is neither empty nor masked with asterisks; the message does not repeat it.
    """
    token = settings.get("hub_token")
    if token and "*" not in str(token):
        raise UserError(
            f"hub_token in {file} is not accepted, because config files are copied and shared; {TOKEN_ADVICE}"
        )
    return {name: value for name, value in settings.items() if name not in ("hub_token", *_FORMER)}


class _Parser(jsonargparse.ArgumentParser):
    """Reads `--config` files as UTF-8 and without tokens; jsonargparse reads them in the encoding of the locale."""

    replaces: Mapping[str, Sequence[str]] = {}
    """Options whose value in an earlier file is dropped, by the option that says the same in another way"""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.config_files: set[str] = set()

    def parse_path(self, path: Any, *arguments: Any, **options: Any) -> jsonargparse.Namespace:
        settings, text = read_settings(path), read_text(path)
        based = BASE in settings and str(path) in self.config_files
        if based or {"hub_token", *_FORMER} & {*settings}:
            kept = {name: value for name, value in settings.items() if not (based and name == BASE)}
            text = yaml.safe_dump(without_hub_token(kept, path))
        return self.parse_string(text, path, *arguments, **options)


def _resolve_annotations(config_class: type) -> None:
    """Replace the annotations of all fields by types.

    Annotations are strings. jsonargparse resolves the names in an inherited field's annotation in the subclass's
    module only, and not in the module that defines the field.
    """
    hints = get_type_hints(config_class)
    initializer: Any = config_class.__dict__["__init__"]
    initializer.__annotations__.update({f.name: hints[f.name] for f in dataclasses.fields(config_class)})


def _parser(config_class: type, description: str | None, preset: str) -> jsonargparse.ArgumentParser:
    _resolve_annotations(config_class)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        exit_on_error=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(config_class)
    parser.replaces = {field.name: field.metadata.get("replaces", ()) for field in fields}
    parser.add_argument("--config", action=_ConfigFile, help=_config_help(preset))
    parser.add_class_arguments(config_class, as_group=False)
    groups = {action.dest.rpartition(".")[0] for action in parser._actions}
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--dry_run` alone is `--dry_run true`
            action.nargs, action.const = "?", True
        action.help = _help_of(action, is_group=action.dest in groups)
    parser.description = "\n\n".join(filter(None, [(description or "").strip(), _notation(parser)]))
    return parser


def _notation(parser: jsonargparse.ArgumentParser) -> str:
    """Return the sentences of the description on how values are written; only those that apply to this command."""
    sentences = ["--print_config shows all settings."]
    if any(action.const is True for action in parser._actions):
        sentences.insert(0, "A boolean flag without a value means true.")
    if any(option.endswith("+") for action in parser._actions for option in action.option_strings):
        sentences.insert(0, "Lists are written as a,b (an empty one: none); --NAME+ VALUE appends VALUE to the list.")
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def _config_help(preset: str) -> str:
    if not preset:
        return "YAML files with any of these options; later ones override earlier ones, and flags override both"
    name = preset.removeprefix(f"{PRESETS}/").removesuffix(".yaml")
    return (
        f"YAML files with any of these options, or names of presets; later ones override earlier ones, and flags "
        f"override both. Without any arguments, {name} is used"
    )


def _help_of(action: argparse.Action, *, is_group: bool) -> str | None:
    """Return the help text of an option, followed by its default unless that means that the option is unset."""
    if is_group:
        return f"YAML file with the --{action.dest}.* options below, without this prefix"
    if action.dest == "print_config":
        return (
            "Print all settings as YAML, with the given flags applied, and exit; --print_config=skip_default leaves "
            "out those with their default value"
        )
    default = written(action.default)
    if action.help is None or action.default == argparse.SUPPRESS:
        return action.help
    text = action.help if default in ("", "[]", "{}") else f"{action.help} (default: {default})"
    return text.replace("%", "%%")  # argparse formats help texts with the operator %


def written(value: Any) -> str:
    """Return a value as it is written on the command line, without quotes; an empty string for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _refuse_unknown_flags(words: Sequence[str], parser: jsonargparse.ArgumentParser) -> None:
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    for word in words:
        if not word.startswith("--") or word == "--":
            continue
        name = word[2:].split("=", 1)[0]
        inside_dict = any(name.startswith(k + ".") for k in known if "." in k or k in ("extra",))
        if name in _FORMER and name not in known:
            raise UserError(f"--{name} is a flag of earlier versions; use {_FORMER[name]} instead")
        if name not in known and not inside_dict:
            raise UserError(f"unknown flag --{name}{nearest(name, known)} (--help_all lists them all)")


def _with_brackets(words: Sequence[str], parser: jsonargparse.ArgumentParser) -> Iterator[str]:
    """Yield the words with lists in brackets: `--names a,b` means `--names '[a,b]'`, and `--names none` is empty.

    The value `none` of an option that may be unset unsets it. Options that take a text as well as a list are left out.
    """
    lists: dict[str, str] = {}
    for action in parser._actions:
        kinds = alternatives(action)
        if all(get_origin(kind) is list or kind is type(None) for kind in kinds):
            empty = "null" if type(None) in kinds else "[]"
            lists |= {option: empty for option in action.option_strings if not option.endswith("+")}
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        if flag in lists and not word.startswith(("-", "[")):
            yield _in_brackets(word, lists[flag])
        elif equals and name in lists and not value.startswith("["):
            yield f"{name}={_in_brackets(value, lists[name])}"
        else:
            yield word
        flag = word


def _with_each_config(words: Iterable[str]) -> Iterator[str]:
    """Yield the words with a flag before each file: `--config a.yaml b.yaml` is `--config a.yaml --config b.yaml`."""
    in_files, flag = False, ""
    for word in words:
        if in_files and flag != "--config" and not word.startswith("-") and _names_config(word):
            yield "--config"
        elif flag != "--config":
            in_files = word.partition("=")[0] == "--config"
        yield word
        flag = word


def _names_config(word: str) -> bool:
    if Path(word).suffix in (".yaml", ".yml"):
        return True  # if it does not exist, the message says so
    with suppress(UserError):
        return find_file(word).suffix in (".yaml", ".yml")
    return False


def _in_brackets(text: str, empty: str) -> str:
    return empty if text.lower() in ("none", "null") else f"[{text}]"


def _replaced(words: Sequence[str], config_class: type[Options]) -> set[str]:
    """Return the options whose value is dropped because a flag says the same in another way."""
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    fields = [field for field in dataclasses.fields(config_class) if field.name in given]
    return {name for field in fields for name in field.metadata.get("replaces", ())} - given


def _of_another_script(words: Sequence[str], known: list[str]) -> str | None:
    """Return the message for a `--config` file that belongs to another script; None if there is none."""
    from training.core.scripts import file_of_another_script

    pairs = zip(words, [*words[1:], ""], strict=True)
    files = [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--config"]
    with suppress(UserError):  # a file that cannot be read: the parser has said why
        return next(filter(None, (file_of_another_script(file, known) for file in files if file)), None)
    return None


def _explain_bare(words: str, known: Sequence[str]) -> str:
    """Return the message for arguments without a flag: one with spaces if there is such a file, or else the first."""
    word = words if Path(words).expanduser().exists() else words.split()[0]
    path = Path(word).expanduser()
    flag = "config" if path.suffix in (".yaml", ".yml") else "train_data_dir" if path.is_dir() else "dataset_name"
    is_meant = flag == "config" or (flag in known and path.exists())
    meant = f"; did you mean --{flag} {shlex.quote(word)}?" if is_meant else ""
    return f"'{word}' has no flag before it{meant or '; values are given as --NAME VALUE (--help lists the names)'}"


def _explain_type(expected: re.Match[str]) -> str:
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    return f"expected {kinds.get(expected[1], expected[1])}, and got {expected[2]}"


def _explain(message: str, known: Sequence[str]) -> str:
    """Return jsonargparse's message as one line; for an unknown YAML key, suggest the nearest known one."""
    text = " ".join(message.split())
    bare = re.search(r"unrecognized arguments: (.+)", text)
    if bare:
        return _explain_bare(bare[1], known)
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", text)
    if group:
        name = f"{group[1]}.{group[2]}"
        return f"unknown key '{name}' in the YAML file{nearest(name, known)}"
    option = re.search(r"Option '([^']+)' is not accepted", text)
    if option:
        return f"unknown key '{option[1]}' in the YAML file{nearest(option[1], known)}"
    text = re.sub(r"Expected an? <class '(\w+)'>\. Got value: (.*)", _explain_type, text)
    value = re.search(r'Parser key "([^"]+)": (.*)', text)
    if value and "Unable to load config" in value[2]:
        inside = next((name for name in known if name.startswith(f"{value[1]}.")), f"{value[1]}.NAME")
        return f"--{value[1]} is a group of options, not a single option; use one of the group, such as --{inside}"
    if value:
        return f"--{value[1]}: {value[2]}"
    return text
