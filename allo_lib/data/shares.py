"""How many rows each data set of a domain gives to each split, when some have few.

Training rows are dealt out once for a whole domain, so that no row is in two splits: what a `mix`
demands comes first; then development and pairs, which every data set should have; and last the
supervised rows, of which there are the most. A data set that has less than an equal share gives
what it has, and the others give more.
"""

from allo_lib.errors import AlloError
from allo_lib.profiles.config import Domain

ORDER = ("sft", "pairs", "dev")  # of the rows in a seed's order of a training file


def spread(count: int, room: dict[str, int]) -> dict[str, int] | None:
    """`count` in equal shares, none above its room; None if all rooms together are too small."""
    if count > sum(room.values()):
        return None
    found, left = {}, count
    for position, name in enumerate(sorted(room, key=room.get)):
        found[name] = min(room[name], round(left / (len(room) - position)))
        left -= found[name]
    # Rounding up may have left the last ones short by one.
    for name in found:
        more = min(left, room[name] - found[name])
        found[name], left = found[name] + more, left - more
    return {name: found[name] for name in room}


def by_mix(count: int, names, mix: tuple[float, ...]) -> dict[str, int]:
    """`count` in the shares of `mix`, which add up to one."""
    ends, share = [0], 0.0
    for part in mix[:-1]:
        share += part
        ends.append(round(count * share))
    ends.append(count)
    parts = zip(ends, ends[1:], strict=False)
    return {name: end - start for name, (start, end) in zip(names, parts, strict=True)}


def plan(domain: Domain, sizes: dict[str, int]) -> dict[str, dict[str, int]]:
    """Training rows of each data set in "sft", "pairs" and "dev".

    sizes: rows of each data set's training file.

    Raises:
        AlloError: more rows are asked for than there are; the first data set short of them is told.
    """
    phases = [phase for phase in (domain.pretrain, domain.sft) if phase.examples]
    mixed = [by_mix(phase.examples, sizes, phase.mix) for phase in phases if phase.mix]
    fixed = {name: max((parts[name] for parts in mixed), default=0) for name in sizes}
    free = max((phase.examples for phase in phases if not phase.mix), default=0)
    counts = {"dev": domain.dev, "pairs": domain.pairs.questions, "sft": free}
    left, found = {name: sizes[name] - fixed[name] for name in sizes}, {}
    for split, count in counts.items():
        # Phases share their rows: those of a mix serve one without a mix too.
        room = {n: left[n] + fixed[n] for n in left} if split == "sft" else left
        parts = spread(count, room) if min(room.values()) >= 0 else None
        if parts is None:
            wishes = {name: _even(counts[name], sizes) for name in ORDER}
            wishes["sft"] = {n: max(fixed[n], wishes["sft"][n]) for n in sizes}
            raise too_few("train", sizes, wishes)
        found[split] = parts
        left = {name: left[name] - parts[name] for name in left}
    found["sft"] = {name: max(fixed[name], found["sft"][name]) for name in sizes}
    return {split: found[split] for split in ORDER}


def _even(count: int, names) -> dict[str, int]:
    """Equal shares rounded up, of which one at least cannot be met where `spread` fails."""
    return dict.fromkeys(names, -(-count // len(names)))


def of_test(count: int, sizes: dict[str, int]) -> dict[str, int]:
    """Test questions of each data set; AlloError if there are too few."""
    parts = spread(count, sizes)
    if parts is None:
        raise too_few("test", sizes, {"test": _even(count, sizes)})
    return parts


def too_few(file: str, sizes: dict[str, int], wishes: dict[str, dict[str, int]]) -> AlloError:
    """Names the first split and data set whose rows end behind its file's."""
    start = dict.fromkeys(sizes, 0)
    for split, parts in wishes.items():
        for name, rows in sizes.items():
            end = start[name] + parts[name]
            if end > rows:
                return AlloError(
                    f"{name}/{file} has {rows} rows, but {split} needs rows {start[name]} to "
                    f"{end}: lower the counts of the profile"
                )
        start = {name: start[name] + parts[name] for name in sizes}
    raise AssertionError(f"no data set lacks rows: {sizes}, {wishes}")
