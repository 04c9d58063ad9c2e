"""Each mend of a fault in what is read and written (sources, datasets, configs, foreign files), taken out again."""

from tests.mutation.named import Named

OF_DATA: tuple[Named, ...] = ()
