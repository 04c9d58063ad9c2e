"""Each mend of a fault of training, checkpoints, tracking and clusters, taken out again."""

from tests.mutation.named import Named

OF_RUNS: tuple[Named, ...] = ()
