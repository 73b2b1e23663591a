"""Reading a profile: a YAML file, the size for the device, and what the user overrides.

A file that `extends` another profile, by its name or by the path of its file from there, is laid
over it: sections are joined key by key, values and lists replaced.
"""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from allo_lib.errors import AlloError, short
from allo_lib.profiles.config import SIZES, Profile, check_settings

# Among the overrides that notebooks get; no setting, as it changes no result.
KEY = "only_domains"
PROFILES = Path(__file__).parent
RATES = PROFILES / "rates"
_MISREAD = re.compile(r"[+-]?0[0-7_]+|.*:.*")  # octal and base 60 in YAML 1.1: 010 is 8, 1:30 is 90


def load_profile(name: str, overrides: dict | None = None, device: str | None = None) -> Profile:
    """Read a profile by name or path of a YAML file, apply `overrides`, check every value.

    `overrides` maps keys to values; a dotted key reaches into a section
    (`{"domains.miniature.epochs": 2}`). A profile with sizes has a section `sizes` whose entry for
    the device ("cpu", or "gpu" for any accelerator) is laid over the rest. `device` None means an
    accelerator when torch sees one and the profile has sizes, else the CPU. The key `only_domains`
    is no setting: it names the domains to work on (`part_of`).

    Raises:
        AlloError: unknown profile, unreadable YAML, unknown key, wrong type, or a value out of
            range.
    """
    path = _profile_path(name)
    raw = _values(path, device)
    if not isinstance(overrides or {}, dict):
        raise AlloError(f"overrides: expected a dict of keys and values, got {short(overrides)}")
    settings = dict(overrides or {})
    only = settings.pop(KEY, None)
    for key, value in settings.items():
        _set_dotted(raw, key, value)
    _resolve_tuned(raw, path)
    profile = check_settings(Profile, raw, where=path.name)
    return profile if only is None else part_of(profile, only)


def _profile_path(name: str, folder: Path = Path()) -> Path:
    known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if str(name) in known:
        return PROFILES / f"{name}.yaml"
    path = folder / str(name)
    with contextlib.suppress(OSError):  # a name too long for the file system
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    raise AlloError(
        f"no profile {short(str(name))}: expected one of {', '.join(known)}, or the path of a "
        "YAML file"
    )


class _Loader(yaml.SafeLoader):
    """Plain values of YAML, no objects; what it would quietly misread is an error.

    That is a key given twice, of which YAML keeps the last, and octal and base-60 numbers.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {short(key.value)} is given twice; give it once",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def _decimal(loader: _Loader, node):
    kind = node.tag.rpartition(":")[2]
    if _MISREAD.fullmatch(str(node.value)):
        raise yaml.MarkedYAMLError(
            problem=f"{short(node.value)} is octal or base 60 in YAML; write a decimal number, or "
            "a text in quotes",
            problem_mark=node.start_mark,
        )
    return getattr(loader, f"construct_yaml_{kind}")(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)


def parse_yaml(text: str):
    """The value of a YAML text: plain scalars, lists and dicts; nothing is ever constructed or run.

    Raises:
        AlloError: for everything else, in one line: where it is and what is wrong with it.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise AlloError("it is nested too deeply; expected a few levels") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # yaml lets through what Python says of a date without such a day or of a tag on a wrong
        # value.
        reason = " ".join(_reason(error).split())
        raise AlloError(reason if len(reason) <= 300 else f"{reason[:297]}...") from error


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    context = f"{error.context}: " if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"


def _read_yaml(path: Path) -> dict:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (AlloError, UnicodeDecodeError, OSError) as error:
        raise AlloError(f"{path.name} is not readable YAML ({error}): mend the file") from error
    if not isinstance(raw, dict):
        raise AlloError(f"{path.name} holds a {type(raw).__name__}: expected keys with values")
    return raw


def _values(path: Path, device: str | None, seen: tuple[Path, ...] = ()) -> dict:
    """What a profile's file says for a device, laid over what the profile says that it extends."""
    raw = _read_yaml(path)
    raw.setdefault("name", path.stem)
    sizes, base = raw.pop("sizes", None), raw.pop("extends", None)
    if sizes is not None:
        size = _size(device)
        if not isinstance(sizes, dict) or set(sizes) != set(SIZES):
            raise AlloError(f"{path.name}: `sizes` needs exactly the keys {', '.join(SIZES)}")
        if not isinstance(sizes[size] or {}, dict):
            given = short(sizes[size])
            raise AlloError(f"{path.name}: sizes.{size}: expected a section, got {given}")
        raw = _overlay(raw, sizes[size] or {}, path) | {"size": size}
    if base is None:
        return raw
    seen = (*seen, path.resolve())
    try:
        below = _profile_path(base, path.parent).resolve()
        if below in seen:
            raise AlloError(f"{short(base)} extends itself; name another profile")
    except AlloError as error:
        raise AlloError(f"{path.name}: extends: {error}") from error
    return _overlay(_values(below, device, seen) | {"description": ""}, raw, path)


def _resolve_tuned(raw: dict, path: Path) -> None:
    """Put the rates of `tuned: NAME` in place of the name."""
    domains = raw.get("domains")
    for name, domain in domains.items() if isinstance(domains, dict) else ():
        given = domain.get("tuned") if isinstance(domain, dict) else None
        if not isinstance(given, str):
            continue
        known = sorted(file.stem for file in RATES.glob("*.yaml"))
        if given not in known:
            raise AlloError(
                f"{path.name}: domains.{name}.tuned: got {short(given)}, expected one of "
                f"{', '.join(known) or 'none that are there'}"
            )
        rates = _read_yaml(RATES / f"{given}.yaml").get(str(name))
        if rates is None:
            raise AlloError(f"{given}.yaml has no rates of domain {short(str(name))}; tune it")
        domains[name] = domain | {"tuned": rates}


def _size(device: str | None) -> str:
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else "gpu"


def _overlay(base: dict, top: dict, path: Path) -> dict:
    merged = dict(base)
    try:
        for key, value in top.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = _overlay(merged[key], value, path) if both else value
    except RecursionError:
        raise AlloError(f"{path.name}: a section that holds itself; write it out") from None
    return merged


def _set_dotted(raw: dict, key: str, value) -> None:
    *sections, last = str(key).split(".")
    for section in sections:
        inner = raw.get(section, {})
        if not isinstance(inner, dict):
            raise AlloError(f"override {key!r}: {section!r} is a value, not a section")
        raw[section] = dict(inner)  # by an alias of YAML it may stand elsewhere too
        raw = raw[section]
    raw[last] = value


@dataclass(frozen=True)
class Part(Profile):
    """A profile with some of its domains only; `to_dict` and `hash` are those of the whole.

    So a study can be made in pieces that add up: on several machines, or in short sessions.
    """

    whole: Profile | None = None

    def to_dict(self) -> dict:
        """The settings of the whole profile."""
        return self.whole.to_dict()


def part_of(profile: Profile, domains: str | Sequence[str]) -> Profile:
    """The profile with `domains` only, in its own order; itself when these are all of it.

    Raises:
        AlloError: no domain, one that the profile does not have, or one named twice.
    """
    asked = [domains] if isinstance(domains, str) else list(domains)
    known = list(profile.domains)
    names = {str(name) for name in asked}
    if not asked or len(names) < len(asked) or not names <= set(known):
        given = ", ".join(map(str, asked)) or "none"
        raise AlloError(
            f"domains {given[:80]!r}: expected one or more of {', '.join(known)}, each once"
        )
    if set(asked) == set(known):
        return profile
    values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(Profile)}
    values["domains"] = {name: one for name, one in profile.domains.items() if name in asked}
    return Part(**values, whole=profile)
