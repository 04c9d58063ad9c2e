"""All named mutants."""

from tests.mutation.mends_of_data import OF_DATA
from tests.mutation.mends_of_families import OF_FAMILIES
from tests.mutation.mends_of_ranks import OF_RANKS
from tests.mutation.mends_of_runs import OF_RUNS
from tests.mutation.mends_of_sources import OF_SOURCES
from tests.mutation.mends_of_tokens import OF_TOKENS
from tests.mutation.named import NAMED
from tests.mutation.of_sampling import OF_SAMPLING
from tests.mutation.of_suites import OF_SUITES

TABLE = (*NAMED, *OF_SAMPLING, *OF_SUITES, *OF_SOURCES, *OF_DATA, *OF_RUNS, *OF_FAMILIES, *OF_RANKS, *OF_TOKENS)
