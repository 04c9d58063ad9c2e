"""FiTv2's training written a second time, from its published definitions, to compare the product with.

Nothing here imports ``fitv2_scale`` (tests/test_house.py sees to it), so no fault can be in both by import.
"""
