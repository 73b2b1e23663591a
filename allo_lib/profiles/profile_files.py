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
from allo_lib.profiles.config import Profile, check_settings

# Among the overrides that notebooks get; no setting, as it changes no result.
KEY = "only_domains"
PROFILES = Path(__file__).parent
RATES = PROFILES / "rates"


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
    path = _path_of(name)
    settings = _values(path, device)
    if not isinstance(overrides or {}, dict):
        raise AlloError(f"overrides: expected a dict of keys and values, got {short(overrides)}")
    overrides = dict(overrides or {})
    only = overrides.pop(KEY, None)
    if "size" in overrides and "size" in settings:  # else it would name those of the other device
        raise AlloError(f"{path.name}: size: the device chooses among its `sizes`; leave it out")
    for key, value in overrides.items():
        for section in reversed(str(key).split(".")):
            value = {section: value}
        settings = _overlay(settings, value)
    _fill_in_rates(settings, path)
    profile = check_settings(Profile, settings, where=path.name)
    return profile if only is None else part_of(profile, only)


def _path_of(name: str, folder: Path = Path()) -> Path:
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if str(name) in known:
        return PROFILES / f"{name}.yaml"
    path = folder / str(name)
    with contextlib.suppress(OSError, ValueError):  # no name for the file system
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    raise AlloError(
        f"no profile {short(str(name))}: expected one of {', '.join(known)}, or the path of a "
        "YAML file"
    )


# Octal and base-60 numbers of YAML 1.1: 0100 would be 64, and 2:08 would be 128.
_MISREAD = re.compile(r"[-+]?0[0-7_]+|.*:.*")


class _Loader(yaml.SafeLoader):
    """Plain values of YAML, never objects; what it would quietly misread is an error: a key given
    twice, of which it keeps the last, and octal and base-60 numbers."""

    def construct_object(self, node, deep=False):
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and _MISREAD.fullmatch(node.value):
            problem = (
                f"{short(node.value)} is octal or base 60 in YAML; write a decimal number, or a "
                "text in quotes"
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_object(node, deep)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            problem = f"the key {short(twice)} is given twice; give it once"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str):
    """The value of a YAML text: plain scalars, lists and dicts; nothing is ever constructed or run.

    Raises:
        AlloError: for everything else, in one line: where it is and what is wrong with it.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except RecursionError as error:
        raise AlloError("it is nested too deeply; expected a few levels") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # yaml lets through what Python says of an impossible date, or of a tag on a wrong value.
        raise AlloError(" ".join(str(error).split())[:300]) from error


def _read(path: Path) -> dict:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (AlloError, UnicodeDecodeError, OSError) as error:
        raise AlloError(f"{path.name} is not readable YAML ({error}): fix the file") from error
    if not isinstance(values, dict):
        raise AlloError(f"{path.name} holds a {type(values).__name__}: expected keys with values")
    return values


def _values(path: Path, device: str | None, above: tuple[Path, ...] = ()) -> dict:
    """What a profile's file says for a device, laid over what the profile says that it extends."""
    values = {"name": path.stem} | _read(path)
    sizes, base = values.pop("sizes", None), values.pop("extends", None)
    if sizes is not None:
        size = _size(device)
        if not isinstance(sizes, dict) or set(sizes) != {"cpu", "gpu"}:
            raise AlloError(f"{path.name}: `sizes` needs exactly the keys cpu, gpu")
        if not isinstance(sizes[size] or {}, dict):
            raise AlloError(f"{path.name}: sizes.{size}: expected keys, got {short(sizes[size])}")
        values = _overlay(values, sizes[size] or {}) | {"size": size}
    if base is None:
        return values
    if path.resolve() in above:
        raise AlloError(f"{path.name}: extends itself; name another profile")
    below = _values(_path_of(base, path.parent), device, (*above, path.resolve()))
    return _overlay(below | {"description": ""}, values)


def _size(device: str | None) -> str:
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else "gpu"


def _overlay(base: dict, top: dict) -> dict:
    """`base` with the values of `top`; sections that both have are joined in the same way."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _fill_in_rates(settings: dict, path: Path) -> None:
    """Put the rates of `profiles/rates/NAME.yaml` in place of `tuned: NAME` of a domain."""
    domains = settings.get("domains")
    for domain, values in domains.items() if isinstance(domains, dict) else ():
        name = values.get("tuned") if isinstance(values, dict) else None
        if not isinstance(name, str):
            continue
        known = sorted(file.stem for file in RATES.glob("*.yaml"))
        rates = _read(RATES / f"{name}.yaml").get(str(domain)) if name in known else None
        if rates is None:
            raise AlloError(
                f"{path.name}: domains.{domain}.tuned: got {short(name)}, expected one of "
                f"{', '.join(known) or 'none that are there'}, with rates of this domain"
            )
        domains[domain] = values | {"tuned": rates, "tuning": name}


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
    names = [str(name) for name in (domains if isinstance(domains, list | tuple) else [domains])]
    if not names or len(set(names)) < len(names) or not set(names) <= set(profile.domains):
        raise AlloError(
            f"domains {short(', '.join(names) or 'none')}: expected one or more of "
            f"{', '.join(profile.domains)}, each once"
        )
    if len(names) == len(profile.domains):
        return profile
    values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(Profile)}
    values["domains"] = {name: one for name, one in profile.domains.items() if name in names}
    return Part(**values, whole=profile)
