"""What a run that was killed again and again has to show."""

import re
from pathlib import Path

from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import DONE, train
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks
from tests.support.run_history import audited, losses, trained


def check_storm(run: str, tiny, ranks: int) -> None:
    """It holds the bits of an undisturbed run. Each attempt continued from the newest commit there was, and at least
    80 % of the steps that were taken count: a restart costs the time that it takes, and little of the rest is repeated.
    """
    log = Run.open(run).log
    kept = log.commits()[-1].fields["step"]
    for claim in (entry for entry in log.entries() if entry.kind == "CLAIM"):
        newest = max((e.fields["step"] for e in log.entries() if e.kind == "COMMIT" and e.n < claim.n), default=0)
        assert audited(run, claim.attempt)[:1] in ([], [newest])  # none: it was killed before it took a step
    numbers = [int(p.name) for p in Path(run, "attempts").iterdir() if re.fullmatch(r"\d+", p.name)]
    taken = sum(len(audited(run, number)) for number in numbers)
    print(f"{kept} steps count of {taken} that {len(numbers)} attempts have taken: {kept / taken:.1%}")
    undisturbed = tiny("undisturbed", train__steps=kept, checkpoint__every_steps=100_000)
    assert run_ranks(ranks, train, undisturbed, timeout=3000) == [DONE] * ranks
    assert commit_bytes(run) == commit_bytes(undisturbed.run)
    assert trained(run) == trained(undisturbed.run) and losses(run) == losses(undisturbed.run)
    assert kept >= 0.8 * taken
