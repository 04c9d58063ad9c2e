"""All named mutants."""

from tests.mutation.mends_of_data import OF_DATA
from tests.mutation.mends_of_runs import OF_RUNS
from tests.mutation.named import NAMED

TABLE = (*NAMED, *OF_DATA, *OF_RUNS)
