"""One network for several families: what would train another network than its name says."""

from tests.mutation.named import Named

MODEL, FAMILY = "fitv2_scale/model", "tests/fitv2_scale/model/test_family.py"
NETWORK = "tests/fitv2_scale/model/test_network.py"
LAYOUTS, UNIT = "fitv2_scale/checkpoint/public_layouts.py", "tests/fitv2_scale"
OF_LAYOUTS = f"{UNIT}/checkpoint/test_public_layouts.py"
BOXES = "tests/fitv2_scale/parallel/test_boxes.py"

SCALING, NAMES = "fitv2_scale/planning/scaling", "tests/fitv2_scale/config/test_families.py"
COMPARED = "tests/fitv2_scale/planning/scaling/test_compare_families.py"

OF_FAMILIES = (
    Named(
        "family: the table has the row first", f"{MODEL}/sincos.py",
        "torch.cat((column_TE, row_TE), -1)", "torch.cat((row_TE, column_TE), -1)", (FAMILY,),
    ),
    Named(
        "family: the table is not added", f"{MODEL}/network.py",
        "x_TD + places.added_TD.to(x_TD.dtype)", "x_TD", (FAMILY,),
    ),
    Named(
        "family: exact GELU instead of DiT's", f"{MODEL}/block.py",
        'F.gelu(self.fc1(x_TD), approximate="tanh")', "F.gelu(self.fc1(x_TD))", (FAMILY,),
    ),
    Named(
        "family: FiT's SwiGLU as narrow as FiTv2's", "fitv2_scale/config/model.py",
        'if self.mlp == "swiglu" else', 'if self.mlp != "gelu" else', (FAMILY,),
    ),
    Named(
        "family: q and k are turned without RoPE", f"{MODEL}/positions.py",
        '"none": _none,', '"none": _rope,', (FAMILY,),
    ),
    Named(
        "family: EI resizes with aligned corners", f"{MODEL}/sincos.py",
        "((position_T2 + 0.5) * stretch_T2 - 0.5)", "(position_T2 * stretch_T2)", (FAMILY,),
    ),
    Named(
        "family: PI leaves small images as they are", f"{MODEL}/sincos.py",
        "is_pi_T1, position_T2 * stretch_T2,", "is_pi_T1, position_T2 * stretch_T2.clamp(max=1),", (FAMILY,),
    ),
    Named(
        "family: each slot has the mode of the first", f"{MODEL}/sincos.py",
        "(mode_I == number)[packing.image_T, None]", "(mode_I[:1] == number)[0 * packing.image_T, None]", (FAMILY,),
    ),
    Named(
        "family: GELU's first product is on every rank of a tensor group", f"{MODEL}/counts.py",
        'd, config.mlp_hidden, "rows")', 'd, config.mlp_hidden, "rows" if len(into_mlp) > 1 else "whole")',
        ("tests/fitv2_scale/parallel/test_families.py::test_a_table_of_sines_and_gelu",),
    ),
    Named(
        "family: no numbers for the variance", f"{MODEL}/network.py",
        "config.outputs * config.token_channels", "config.token_channels", (FAMILY,),
    ),
    Named(
        "public: final rows stay in DiT's order", LAYOUTS,
        "_ROWS = Values(lambda shape, model: shape, _channels_first, _pixels_first)",
        "_ROWS = Values(lambda shape, model: shape, lambda rows, model: rows, lambda rows, model: rows)",
        (f"{OF_LAYOUTS}::test_imported_weights_compute_what_dit_does",),
    ),
    Named(
        "public: final rows go the wrong way at both ends", LAYOUTS,
        "_ROWS = Values(lambda shape, model: shape, _channels_first, _pixels_first)",
        "_ROWS = Values(lambda shape, model: shape, _pixels_first, _channels_first)",
        (f"{OF_LAYOUTS}::test_rows_and_patches_as_numbers",),
    ),
    Named(
        "public: another table of positions is dropped", LAYOUTS,
        "if not off <= _ROUNDING:",
        "if False:",
        (f"{OF_LAYOUTS}::test_what_is_no_public_file_is_named",),
    ),
    Named(
        "public: one block's embedder counts for all", LAYOUTS,
        "if not torch.equal(_bits(tensors[other].read()), _bits(whole)):",
        "if False:",
        (f"{OF_LAYOUTS}::test_what_is_no_public_file_is_named",),
    ),
    Named(
        "public: a file's other tensors are passed over", "fitv2_scale/checkpoint/weights.py",
        "    if missing or left_over:",
        "    if missing:",
        (f"{OF_LAYOUTS}::test_new_tensors_may_be_there_or_not",),
    ),
    Named(
        "public: labels of other classes with the table of a run", "fitv2_scale/identity.py",
        "if fork or not config.has_new_classes:",
        "if fork or not config.init_new:",
        (f"{UNIT}/checkpoint/test_init_new.py::test_without_the_key_it_is_named",),
    ),
    Named(
        "public: new tensors of a run's weights are loaded all the same", "fitv2_scale/checkpoint/init_from.py",
        "if name.startswith(kind) and name.removeprefix(kind) not in new",
        "if name.startswith(kind)",
        (f"{UNIT}/checkpoint/test_init_new.py::test_another_table_of_classes_is_drawn_and_the_rest_is_kept",),
    ),
    Named(
        "curves: losses of two objectives in one table", f"{SCALING}/compare_families.py",
        "if curve.objective == objective and len(", "if len(", (COMPARED,),
    ),
    Named(
        "curves: the ratio of the baseline to the family", f"{SCALING}/compare_families.py",
        "value = of / to", "value = to / of", (COMPARED,),
    ),
    Named(
        "curves: a run that has not reached the target is at its last step", f"{SCALING}/compare_families.py",
        "if any(step is None for step, _ in steps):\n        return found\n",
        "steps = [(step or r.points.steps[-1], b) for r, (step, b) in zip(repeats, steps, strict=True)]\n", (COMPARED,),
    ),
    Named(
        "curves: a network of another objective has the family's name", "fitv2_scale/config/families.py",
        'found = {"objective": objective} | model.model_dump()',
        'found = {"objective": "flow"} | model.model_dump()', (NAMES,),
    ),
)  # fmt: skip
