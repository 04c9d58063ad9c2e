"""Each mend of a fault in what is read of configs, names, weights and records, and in what they are known by, taken out
again. Names begin with the fault's id."""

from tests.mutation.named import Named

EVALUATE, OF_EVALUATE = "fitv2_scale/evaluate", "tests/fitv2_scale/evaluate"
REDACT, DESTINATION = "fitv2_scale/run/redact.py", "fitv2_scale/tracking/destination.py"
FOLDER, DATA, YAML = f"{EVALUATE}/sampling/png_folder.py", "fitv2_scale/data.py", "fitv2_scale/config/yaml_text.py"
REFERENCE, JOBS = f"{EVALUATE}/reference_statistics.py", f"{EVALUATE}/evaluate.py"
WEIGHTS, RUNS = "fitv2_scale/checkpoint/weights.py", "fitv2_scale/identity.py"
WEIGHTS_FILE = "fitv2_scale/checkpoint/weights_file.py"
LOAD, OF_RUN = "tests/fitv2_scale/config/test_load.py", "tests/fitv2_scale/run/test_run.py"
OF_DESTINATION, OF_DATA_PY = "tests/fitv2_scale/tracking/test_destination.py", "tests/fitv2_scale/test_data.py"
FINISHED = "tests/fitv2_scale/train/test_finished.py"
OF_WEIGHTS, IDENTITY = "tests/fitv2_scale/checkpoint/test_weights.py", "tests/fitv2_scale/test_identity.py"
KNOWN, PICTURES = f"{OF_EVALUATE}/test_identity.py", f"{OF_EVALUATE}/sampling/test_png_folder.py"
FID, STATISTICS = f"{OF_EVALUATE}/test_fid.py", f"{OF_EVALUATE}/test_reference_statistics.py"
SUBSTITUTES = "tests/data_sharding/stream/test_substitutes.py"

OF_DATA = (
    Named(
        "B38: infinity is a number of a config", "fitv2_scale/config/section.py",
        "allow_inf_nan=False",
        "allow_inf_nan=True",
        (f"{LOAD}::test_no_number_is_infinite",),
    ),
    Named(
        "B40: of a section given twice the last counts", YAML,
        "if name in lines:",
        "if False:",
        (f"{LOAD}::test_a_key_given_twice_is_refused",),
    ),
    Named(
        "B40: and in a suite", f"{EVALUATE}/suites.py",
        "tree = parse_mapping(read_text(name), name, _File)",
        'tree = __import__("yaml").safe_load(read_text(name))',
        (f"{OF_EVALUATE}/test_suites.py",),
    ),
    Named(
        "K6: an override of a section resets its other keys", "fitv2_scale/config/load.py",
        "    if not isinstance(value, dict):",
        "    if True:",
        (f"{LOAD}::test_an_override_of_a_section_keeps_its_other_keys",),
    ),
    Named(
        "K6: of two overrides of a key the last counts", "fitv2_scale/config/load.py",
        "if leaf in given:",
        "if False:",
        (f"{LOAD}::test_a_key_in_two_overrides_is_refused",),
    ),
    Named(
        "B41: YAML types texts", YAML,
        "return None if NoneType in kinds and str not in kinds and text in _NULLS else text",
        "return yaml.safe_load(text)",
        (f"{LOAD}::test_a_text_in_a_file_is_as_written",),
    ),
    Named(
        "B41: 0123 is 83", YAML,
        'raise UserError(f"{where}: {text} begins with a zero, which some read as octal: leave it out")',
        "return int(text, 8)",
        (f"{LOAD}::test_what_is_no_value_is_refused",),
    ),
    Named(
        "B43: a part of a path is a secret", REDACT,
        r'(?<![\w.\-/])',
        r'(?<![\w.\-])',
        (f"{OF_RUN}::test_paths_are_no_secrets",),
    ),
    Named(
        "B43: and the name of a folder that holds a space", REDACT,
        "HIDDEN if _is_secret(str(k), v) else _redact_under(k, v)",
        "HIDDEN if _is_secret(str(k), v) else redact(v)",
        (f"{OF_RUN}::test_paths_are_no_secrets",),
    ),
    Named(
        "B44: MLflow's file lies elsewhere than its name says", DESTINATION,
        'quoted = re.sub("[%?#]", lambda found: quote(found[0]), str(file))',
        "quoted = str(file)",
        (OF_DESTINATION,),
    ),
    Named("B44: and pictures", DESTINATION, '"mlartifacts").as_uri()', '"mlartifacts").as_posix()', (OF_DESTINATION,)),
    Named(
        "R11: a small share is no share", DATA,
        "if all(share > 0 for weight, share in zip(weights, shares, strict=True) if weight):",
        "if True:",
        (f"{OF_DATA_PY}::test_no_share_rounds_to_nothing",),
    ),
    Named(
        "R11: epochs end in the middle of a run", DATA,
        "if before + left * weight // sum(segment.weights) >= MAX_EPOCH * samples > 0:",
        "if False:",
        (f"{OF_DATA_PY}::test_more_epochs_than_random_numbers_are_refused_at_the_start",),
    ),
    Named(
        "R11: what a run has trained on before does not count", DATA,
        "_check_epochs(plan, config, step, cursor.images)",
        "_check_epochs(plan, config, step, [0] * len(cursor.images))",
        (f"{OF_DATA_PY}::test_more_epochs_than_random_numbers_are_refused_at_the_start",),
    ),
    Named(
        "B35: a foreign file in quarantine/ ends the attempt", "fitv2_scale/run/quarantine.py",
        r'quarantine/([0-9]{8,})\.json',
        r'quarantine/(.*?)(?:\.json)?',
        ("tests/fitv2_scale/run/test_foreign_files.py::test_foreign_files_are_ignored",),
    ),
    Named(
        "B36: a folder that knows no fsync ends all", "data_sharding/storage/atomic_write.py",
        "_NO_FOLDER_FSYNC = {errno.EINVAL, ",
        "_NO_FOLDER_FSYNC = {",
        ("tests/data_sharding/storage/test_lacking.py",),
    ),
    Named(
        "R2: label 0 of two datasets means two classes", DATA,
        "check_same_classes(manifest.url, manifest.classes, first.url, first.classes)",
        "pass",
        (f"{IDENTITY}::test_classes_of_mixed_datasets_are_compared",),
    ),
    Named(
        "R2: and of the images for validation", f"{EVALUATE}/validation.py",
        "check_same_classes(manifest.url, manifest.classes, training[0].url, training[0].classes)",
        "pass",
        (f"{IDENTITY}::test_classes_of_mixed_datasets_are_compared",),
    ),
    Named(
        "R2: and in a fork onto other data", RUNS,
        'sources = [(fork.run, f"{fork.run.url}@{fork.step}")] if fork else []',
        "sources = []",
        (f"{IDENTITY}::test_weights_of_another_run_learned_its_classes",),
    ),
    Named(
        "R2: and in a run from init_from", RUNS,
        "sources += [(Run.open(url), config.init_from)] if step is not None else []",
        "pass",
        (f"{IDENTITY}::test_weights_of_another_run_learned_its_classes",),
    ),
    Named(
        "R2: weights of another run learned other classes", RUNS,
        "_check_classes(run, weights, plan.manifests[0])",
        "pass",
        (f"{IDENTITY}::test_weights_of_another_run_learned_its_classes",),
    ),
    Named(
        "K2: an override of heads samples another network", f"{EVALUATE}/sampling/load_weights.py",
        'if config.model != trained.model.model_copy(update=positions):',
        "if False:",
        ("tests/fitv2_scale/cli/test_evaluate.py::test_bad_input_is_one_sentence",),
    ),
    Named(
        "K2: weights of another run learned latents of another codec", RUNS,
        "_check_codec(run, weights, plan.manifests[0])",
        "pass",
        ("tests/fitv2_scale/test_parent_weights.py::test_weights_that_learned_latents_of_another_codec",),
    ),
    Named(
        "K2: weights of another run are another network of the same shapes", RUNS,
        "_check_network(run, weights, config)",
        "pass",
        ("tests/fitv2_scale/test_parent_weights.py::test_weights_that_would_be_another_network_of_the_same_shapes",),
    ),
    Named(
        "R2: and in a run that another dataset continues", "fitv2_scale/run/class_list.py",
        "if classes != wanted:",
        "if False:",
        (f"{IDENTITY}::test_racing_attempts_adopt_one_class_list",),
    ),
    Named(
        "R2: and in a dataset that took the place of a run's own", f"{EVALUATE}/sampling/load_weights.py",
        "if then not in (None, now):",
        "if False:",
        (f"{KNOWN}::test_a_dataset_that_took_the_place_of_a_runs_own",),
    ),
    Named(
        "B51: a weights file is known by its path", "fitv2_scale/run/weights_source.py",
        "lambda: file_digest(self.url)",
        "lambda: self.url.encode().hex()",
        (f"{PICTURES}::test_other_weights_at_the_same_path_do_not_continue_a_folder",),
    ),
    Named(
        "B51: a folder takes the pictures of other weights", FOLDER,
        '"weights_digest": weights.digest,',
        '"weights_digest": "",',
        (f"{PICTURES}::test_other_weights_at_the_same_path_do_not_continue_a_folder",),
    ),
    Named(
        "K2: and of another VAE", FOLDER,
        '"codec": codec.digest,',
        '"codec": "",',
        (f"{PICTURES}::test_another_network_or_codec_does_not_continue_a_folder",),
    ),
    Named(
        "K2: and of another network of the same shapes", FOLDER,
        '"model": weights.config.model.model_dump(mode="json"),',
        '"model": {},',
        (f"{PICTURES}::test_another_network_or_codec_does_not_continue_a_folder",),
    ),
    Named(
        "K2: a VAE is known by the shapes of its tensors", "data_sharding/format/sd_vae.py",
        'digest.update(tensor.cpu().numpy().astype("<f4").tobytes())',
        "pass",
        ("tests/data_sharding/format/test_sd_vae.py::test_the_digest_follows_weights_and_arithmetic_not_files",),
    ),
    Named(
        "K2: two files of one name share evaluations/<name>.json", JOBS,
        'f"{Path(weights.name).stem}-{weights.digest:.8}"',
        "Path(weights.name).stem",
        (f"{KNOWN}::test_files_of_one_name_have_results_of_their_own",),
    ),
    Named(
        "K2: the FID of another VAE is found again", JOBS,
        "cell.name(weights.digest, model, codec, network.digest)",
        "cell.name(weights.digest, model, network.digest)",
        (f"{KNOWN}::test_another_codec_is_measured_again",),
    ),
    Named(
        "K2: the FID of another network is found again", JOBS,
        "cell.name(weights.digest, model, codec, network.digest)",
        "cell.name(weights.digest, codec, network.digest)",
        (f"{KNOWN}::test_another_network_of_the_same_shapes_is_another",),
    ),
    Named(
        "K2: the FID of a replaced reference is found again", REFERENCE,
        'hashlib.file_digest(file, "sha256").hexdigest()',
        "url",
        (f"{KNOWN}::test_a_replaced_reference_is_another",),
    ),
    Named(
        "K2: the FID of replaced photographs is found again", f"{EVALUATE}/image_sets.py",
        "name, data = found[i][0], found[i][1].read()",
        'name, data = found[i][0], b""',
        (f"{KNOWN}::test_a_replaced_reference_is_another",),
    ),
    Named(
        "K2: a weights file that was replaced before the first commit", "fitv2_scale/train/setup.py",
        "if known not in (None, digest):",
        "if False:",
        (f"{IDENTITY}::test_a_weights_file_that_was_replaced_before_the_first_commit",),
    ),
    Named(
        "B69: one law over runs of two datasets", "fitv2_scale/planning/scaling/curves_report.py",
        "if difference := first_difference({curve.name: curve.meaning for curve in curves}, metric):",
        "if difference := None:",
        ("tests/fitv2_scale/planning/scaling/test_meaning.py",),
    ),
    Named(
        "R8: of a dataset listed twice the last listing alone loses a frame", "data_sharding/stream/substitutes.py",
        'if m.digest == f["dataset"]',
        'if m.digest == f["dataset"] and m.digest not in [n.digest for n in self.manifests[dataset + 1 :]]',
        (SUBSTITUTES,),
    ),
    Named(
        "B46: of a training checkpoint the weights are taken, not their average", WEIGHTS_FILE,
        '*("ema", "model_ema", "ema_model", "params_ema", "ema_state_dict"),',
        "",
        (f"{OF_WEIGHTS}::test_of_a_training_checkpoint_its_weights_are_taken",),
    ),
    Named(
        "B49: NaN in weights is imported", WEIGHTS,
        "    if bad:",
        "    if False:",
        (f"{OF_WEIGHTS}::test_weights_that_are_not_finite_are_refused",),
    ),
    Named(
        "B53: a covariance may be negative", f"{EVALUATE}/fid.py",
        "if variances[0] < -_ROUNDING * variances[-1] or covariance.diagonal().min() < 0:",
        "if False:",
        (FID,),
    ),
    Named(
        "B28: a full disk while images are generated is a traceback", FOLDER,
        "with as_sentence(path), atomic_write(path, durable=False) as file:",
        "with atomic_write(path, durable=False) as file:",
        (f"{PICTURES}::test_a_full_disk_is_a_sentence_and_the_folder_is_continued",),
    ),
    Named("B53: that of a reference is not looked at", REFERENCE, "found.check(where)", "pass", (STATISTICS,)),
    Named(
        "B54: goodput of a clock that was set back", "fitv2_scale/train/metrics/meter.py",
        "if age < run.step_seconds + run.evaluation_seconds + run.compile_seconds:",
        "if False:",
        ("tests/fitv2_scale/train/metrics/test_accounting.py::test_a_run_from_the_future_has_no_goodput",),
    ),
    Named(
        "a finished run is done with any recipe", "fitv2_scale/train/setup.py",
        "check_finished(config, fork.parent() if fork else None)", "pass", (FINISHED,),
    ),
    Named(
        "one of several processes without a rank trains alone", "data_sharding/launched.py",
        ' or environment.get("WORLD_SIZE", "1") != "1"', "", ("tests/data_sharding/test_launched.py",),
    ),
    Named(
        "fuzzing: a sample without a label", "data_sharding/format/shard.py",
        "if not _fits(label, np.int32):", "if False:",
        ("tests/data_sharding/format/test_shard.py::test_a_sample_without_a_whole_number_as_its_label_is_refused",),
    ),
)  # fmt: skip
