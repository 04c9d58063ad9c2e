"""How the images of a step are divided among ranks and packs, in plain Python, an image at a time.

Multiway number partitioning: greedy LPT, then local search by swaps, moves and two-way splits. Ties are part of it: an
attempt that continues a run must divide a step as the one before it did.
"""

from itertools import accumulate

WORK, TOLERANCE, PARTNERS, SPLIT_LIMIT = 1 << 21, 10, 64, 10


def lpt(cost: list[int], images: list[int], groups: range) -> dict[int, int]:
    """The group of each of ``images``: the most expensive first, each to the cheapest group so far."""
    load, found = dict.fromkeys(groups, 0), {}
    for image in sorted(images, key=lambda image: (-cost[image], image)):
        found[image] = min(groups, key=lambda group: (load[group], group))
        load[found[image]] += cost[image]
    return found


def loads(cost: list[int], group: dict[int, int], groups: int) -> list[int]:
    load = [0] * groups
    for image, where in group.items():
        load[where] += cost[image]
    return load


def partition(cost: list[int], groups: int) -> list[int]:
    """The group of each image."""
    enough = sum(cost) // groups
    enough += enough >> TOLERANCE
    images = list(range(len(cost)))
    found = searched(cost, lpt(cost, images, range(groups)), groups, enough)
    each, more = divmod(len(cost), groups)
    if max(loads(cost, found, groups)) > enough and each and more:
        ascending = sorted(images, key=lambda image: (cost[image], image))
        cheap = (each + 1) * more
        other = lpt(cost, ascending[:cheap], range(more)) | lpt(cost, ascending[cheap:], range(more, groups))
        other = searched(cost, other, groups, enough)
        if max(loads(cost, other, groups)) < max(loads(cost, found, groups)):
            found = other
    return [found[image] for image in images]


def searched(cost: list[int], group: dict[int, int], groups: int, enough: int) -> dict[int, int]:
    """``group`` after all steps that make the most expensive group cheaper, or until it is cheap ``enough``."""
    group = dict(group)
    for _ in range(WORK // max(1, len(cost))):
        load = loads(cost, group, groups)
        worst = load.index(max(load))
        if load[worst] <= enough:
            break
        step = swap(cost, group, load, worst) or split(cost, group, load, worst)
        if not step:
            break
        group |= step
    return group


def swap(cost: list[int], group: dict[int, int], load: list[int], worst: int) -> dict[int, int]:
    """The images of the best swap or move and their groups; empty if none helps. Of equal swaps the first image of the
    most expensive group, then the first other one; a swap rather than a move."""
    mine = [image for image in range(len(cost)) if group[image] == worst]
    best, found, lightest = load[worst], {}, load.index(min(load))
    for image in mine:
        for other in range(len(cost)):
            gained = cost[image] - cost[other]
            after = max(load[worst] - gained, load[group[other]] + gained)
            if group[other] != worst and after < best:
                best, found = after, {image: group[other], other: worst}
    for image in mine:
        after = max(load[worst] - cost[image], load[lightest] + cost[image])
        if after < best:
            best, found = after, {image: lightest}
    return found


def split(cost: list[int], group: dict[int, int], load: list[int], worst: int) -> dict[int, int]:
    """The best of all splits of the most expensive group's images and of one of the cheapest groups'; empty if none
    helps, or if the groups are large."""
    members = [[image for image in range(len(cost)) if group[image] == g] for g in range(len(load))]
    if len(members[worst]) + max(len(images) for images in members) > SPLIT_LIMIT:
        return {}
    best, found = load[worst], {}
    for other in sorted(range(len(load)), key=lambda g: (load[g], g))[:PARTNERS]:
        pool = members[worst] + members[other]
        total, kept = sum(cost[image] for image in pool), [0]
        for image in pool:
            kept += [one + cost[image] for one in kept]  # the sum of each subset, in the order of their bits
        for subset, one in enumerate(kept):
            if other != worst and max(one, total - one) < best:
                best = max(one, total - one)
                found = {image: worst if subset >> bit & 1 else other for bit, image in enumerate(pool)}
    return found


def ranks_of(cost: list[int], nodes: list[int]) -> list[int]:
    """The rank of each image: a node has a range of the images, up to where the sum of costs is nearest its due."""
    before = [one * sum(nodes) for one in accumulate(cost, initial=0)]
    rank, first_rank, start = [], 0, 0
    for end_rank in accumulate(nodes):
        due = before[-1] // sum(nodes) * end_rank
        end = min(range(len(before)), key=lambda i: (abs(before[i] - due), i))
        rank += [first_rank + group for group in partition(cost[start:end], end_rank - first_rank)]
        first_rank, start = end_rank, end
    return rank


def packs_of(tokens: list[int], cost: list[int], nodes: list[int], shapes: list[tuple[int, int, int]]):
    """(index of the shape, packs of each rank), with the fewest packs that the last of ``shapes`` (tokens, slots,
    longest image) allows, and of the first shape that holds them."""
    rank = ranks_of(cost, nodes)
    mine = [[image for image in range(len(tokens)) if rank[image] == r] for r in range(sum(nodes))]
    count = max(1, max(-(-sum(tokens[image] for image in images) // shapes[-1][0]) for images in mine))
    while True:
        packs = []
        for images in mine:
            group = partition([tokens[image] for image in images], count)
            packs.append([[image for image, g in zip(images, group, strict=True) if g == k] for k in range(count)])
        flat = [pack for rank_packs in packs for pack in rank_packs]
        for index, (capacity, slots, longest) in enumerate(shapes):
            room = [capacity - sum(tokens[image] for image in pack) for pack in flat]
            if all(r >= 0 and len(p) - (-r // longest) <= slots for r, p in zip(room, flat, strict=True)):
                return index, packs
        count += 1
