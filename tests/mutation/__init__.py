"""Do the tests notice when the code is wrong? Small changes, drawn by a seed over all lines of all rooms, and named
ones that could ruin a run in silence; each is made in a copy of the tree, where the tests of its room then run.

    python -m tests.mutation --named                            # the named ones
    python -m tests.mutation --seed 0 --count 120 --part 1/4    # a quarter of 120 drawn ones
    python -m tests.mutation --report drawn.jsonl               # the table of what was run so far

Results are appended to a file (``--out``), one JSON object a mutant; what stands there is not run again.
"""
