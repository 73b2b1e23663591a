"""Reading a profile: a YAML file, the size for the device, and what the user overrides."""

import contextlib
import re
from pathlib import Path

import yaml

from allo_lib.errors import AlloError, short
from allo_lib.profiles.config import SIZES, Profile
from allo_lib.profiles.parts import KEY, part_of
from allo_lib.profiles.settings import checked

PROFILES = Path(__file__).parent
RATES = PROFILES / "rates"
_MISREAD = re.compile(r"[+-]?0[0-7_]+|.*:.*")  # octal and base 60 in YAML 1.1: 010 is 8, 1:30 is 90


def load_profile(name: str, overrides: dict | None = None, device: str | None = None) -> Profile:
    """Read a profile by name or path of a YAML file, apply `overrides`, check every value.

    `overrides` maps keys to values; a dotted key reaches into a section
    (`{"domains.miniature.epochs": 2}`). A profile with sizes has a section `sizes` whose entry for
    the device ("cpu", or "gpu" for any accelerator) is laid over the rest. `device` None means an
    accelerator when torch sees one and the profile has sizes, else the CPU. The key `only_domains`
    is no setting: it names the domains to work on (`parts`).

    Raises:
        AlloError: unknown profile, unreadable YAML, unknown key, wrong type, or a value out of
            range.
    """
    path = _profile_path(name)
    raw = _read_yaml(path)
    sizes = raw.pop("sizes", None)
    if sizes is not None:
        size = _size(device)
        if not isinstance(sizes, dict) or set(sizes) != set(SIZES):
            raise AlloError(f"{path.name}: `sizes` needs exactly the keys {', '.join(SIZES)}")
        if not isinstance(sizes[size] or {}, dict):
            given = short(sizes[size])
            raise AlloError(f"{path.name}: sizes.{size}: expected a section, got {given}")
        raw = _laid_over(raw, sizes[size] or {}, path)
        raw["size"] = size
    raw.setdefault("name", path.stem)
    if not isinstance(overrides or {}, dict):
        raise AlloError(f"overrides: expected a dict of keys and values, got {short(overrides)}")
    settings = dict(overrides or {})
    only = settings.pop(KEY, None)
    for key, value in settings.items():
        _set_dotted(raw, key, value)
    _resolve_tuned(raw, path)
    profile = checked(Profile, raw, where=path.name)
    return profile if only is None else part_of(profile, only)


def _profile_path(name: str) -> Path:
    known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if str(name) in known:
        return PROFILES / f"{name}.yaml"
    path = Path(str(name))
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


def _laid_over(raw: dict, top: dict, path: Path) -> dict:
    try:
        return _overlay(raw, top)
    except RecursionError:
        raise AlloError(f"{path.name}: sizes: a section that holds itself; write it out") from None


def _overlay(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _set_dotted(raw: dict, key: str, value) -> None:
    *sections, last = str(key).split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise AlloError(f"override {key!r}: {section!r} is a value, not a section")
    raw[last] = value
