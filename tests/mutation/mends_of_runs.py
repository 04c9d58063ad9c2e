"""Each mend of a fault of training, checkpoints, tracking and clusters, taken out again.

A name begins with the fault's number: B, found by trying what public bug reports tell; R, by reading the code; I7 is
that an absent key means its default. A fault that had several places has a row for each.
"""

from tests.mutation.named import Named

UNIT, DATA, LAUNCHERS = "tests/fitv2_scale", "tests/data_sharding", "tests/launchers"
AGREEMENT, RANKS = f"{UNIT}/parallel/test_agreement.py", f"{UNIT}/cli/test_ranks.py"
DIFFERENCES = f"{AGREEMENT}::test_differences_between_real_ranks"
REFUSED = f"{AGREEMENT}::test_nothing_is_trained_by_ranks_that_were_told_differently"
COPIES = f"{UNIT}/checkpoint/test_copies.py"
TRACEBACK = f"{UNIT}/train/test_lost_ranks.py::test_a_bug_in_the_loader_keeps_its_traceback_where_it_arose"
COORDINATION, ERRNO = f"{UNIT}/train/test_coordination.py", f"{DATA}/storage/test_errno.py"
SBATCH, DESTINATION = f"{LAUNCHERS}/test_sbatch_options.py", f"{UNIT}/tracking/test_destination.py"
FACTS, STEPS, SUBMIT = "fitv2_scale/parallel/rank_facts.py", "fitv2_scale/train/coordination.py", "launchers/submit.py"
OPTIONS, SLURM, DEVICE = "launchers/sbatch_options.py", "launchers/slurm.py", "data_sharding/format/sd_vae.py"
LAUNCHED, STOP, SUPERVISE = "data_sharding/launched.py", f"{UNIT}/train/test_stop_signal.py", "launchers/supervise.py"
CLUSTER, SUPERVISED = f"{LAUNCHERS}/test_cluster_check.py", f"{LAUNCHERS}/test_supervise.py"
TASKS, VAE = f"{DATA}/test_launched.py", f"{DATA}/format/test_sd_vae.py::test_the_vae_is_on_the_gpu_of_its_process"
PLACE, SAVES = "fitv2_scale/tracking/destination.py", "fitv2_scale/checkpoint/checkpointer.py"
LOOP, CLI, FAILURES = "fitv2_scale/train/loop.py", "fitv2_scale/cli/__main__.py", "data_sharding/storage/failures.py"

OF_RUNS: tuple[Named, ...] = (
    Named(
        "B30: facts of the ranks are never compared", "fitv2_scale/parallel/agreement.py",
        "if len({digest for digest, _ in told}) > 1:", "if False:", (REFUSED,),
    ),
    Named(
        "B30: a rank with another learning rate trains", FACTS,
        "if key not in PER_NODE}", 'if key not in PER_NODE and not key.startswith(("optimizer.", "ema.", "flow."))}',
        (REFUSED,),
    ),
    Named(
        "B30: a rank with another runtime trains", FACTS,
        "if key not in PER_NODE}",
        'if key not in PER_NODE and not key.startswith(("layout.", "train.", "checkpoint."))}', (DIFFERENCES,),
    ),
    Named("B30: a rank has another seed", FACTS, "not in PER_NODE}", 'not in {*PER_NODE, "seed"}}', (DIFFERENCES,)),
    Named(
        "B30: a copy of the data with other labels", FACTS,
        "return (layout, data), datasets | divided", "return (layout, data), {}", (DIFFERENCES,),
    ),
    Named(
        "B30: a rank begins with other weights", "fitv2_scale/checkpoint/init_from.py",
        'return weights.origin, {f"content of {file}": digest.hexdigest()}', "return weights.origin, {}",
        (f"{RANKS}::test_weights_of_other_content",),
    ),
    Named("B30: a rank runs other code", FACTS, '"digest of the code": code_digest(), ', "", (DIFFERENCES,)),
    Named("B30: a rank has another torch", FACTS, "facts | packages |", "facts |", (DIFFERENCES,)),
    Named("B30: NCCL is told otherwise on a rank", FACTS, "packages | variables", "packages", (DIFFERENCES,)),
    Named(
        "B30: ranks with other numbers of packs", STEPS,
        '"packs": len(batch.packs),', "", (f"{COORDINATION}::test_other_numbers_of_packs",),
    ),
    Named(
        "B30: other tokens than planned", STEPS,
        "if tokens != planned and not (", "if False and not (",
        (f"{COORDINATION}::test_images_that_are_not_those_of_the_plan",),
    ),
    Named(
        "B30: a rank validates on other data", "fitv2_scale/cli/validate.py",
        "agree(world, command_facts(args) | software_facts(world.device))", "pass", (f"{RANKS}::test_validation",),
    ),
    Named(
        "B30: a rank samples with another seed", "fitv2_scale/cli/sample.py",
        "return (sample_as, sizes), command_facts(args) | software_facts(device)", "return (sample_as, sizes), {}",
        (f"{RANKS}::test_sampling",),
    ),
    Named(
        "B30: a rank decodes with another VAE", "fitv2_scale/evaluate/sampling/load_weights.py",
        'return codec, {"digest of the codec": codec.digest}', "return codec, {}",
        (f"{RANKS}::test_a_vae_of_other_content",),
    ),
    Named(
        "B30: tasks that write a dataset run other code", "data_sharding/write/begun.py",
        "_agree_on_software(dst, vae)\n    return", "return",
        (f"{DATA}/write/test_begun.py::test_another_program_is_refused_until_its_record_is_removed",),
    ),
    Named(
        "B37: a damaged last commit counts as done", "fitv2_scale/checkpoint/restore.py",
        'problem = "; ".join(verify_together(run, entry, world))', 'problem = ""',
        (f"{UNIT}/checkpoint/test_checkpointer.py::test_a_finished_run_whose_last_commit_is_damaged_trains_it_again",),
    ),
    Named(
        "R3: copies of the state are never compared", SAVES,
        "require_equal_copies(self._staging.tensors, scalars, copy, ranks)", "pass",
        (f"{COPIES}::test_training_ends_without_a_commit_and_the_next_attempt_repairs_it",),
    ),
    Named(
        "R3: a commit mixes the copies", SAVES,
        "logical if engine.copy.writes(logical.split) else LogicalTensor(logical.shape, [])", "logical",
        (f"{COPIES}::test_one_copy_saves",),
    ),
    Named(
        "R3: bf16 copies of frozen weights are never compared", SAVES,
        '**header["scalars"], **derived}', '**header["scalars"]}',
        (f"{COPIES}::test_a_flipped_bit_in_frozen_weights_is_caught",),
    ),
    Named(
        "R6: moments of a damaged commit remain", "fitv2_scale/checkpoint/restore.py",
        "_reset_optimizer(engine)\n", "pass\n",
        (f"{UNIT}/checkpoint/test_weights.py::test_nothing_of_a_damaged_commit_remains_beside_imported_weights",),
    ),
    Named(
        "B32: what a rank other than 0 cannot read is printed nowhere", "data_sharding/errors.py",
        "return str(self)\n        if", "return str(self) if rank == 0 else None\n        if",
        (f"{RANKS}::test_training_that_one_rank_cannot_begin",),
    ),
    Named(
        "B33, R7: a BrokenPipeError of storage is a closed pager", CLI,
        "except ReaderGone:", "except (ReaderGone, BrokenPipeError):", (f"{UNIT}/cli/test_crash.py",),
    ),
    Named(
        "B33: ESHUTDOWN is not waited for", FAILURES,
        "error.errno in _NAME or isinstance(error, FileN",
        "error.errno in {*_NAME, errno.ESHUTDOWN} or isinstance(error, FileN",
        (f"{UNIT}/train/test_storage_trouble.py::test_training_waits_for_shards",),
    ),
    Named(
        "B33: five minutes of throttling lose frames", "data_sharding/stream/frames.py",
        "if _is_bad_place(manifest, f, error.__cause__):", "if True:",
        (f"{DATA}/stream/test_frames.py::test_storage_that_serves_no_shard_until_the_deadline_is_down",),
    ),
    Named(
        "B34: only EIO and its like are waited for", FAILURES,
        "error.errno in _NAME or isinstance(error, FileN",
        "error.errno not in {errno.EIO, errno.ESTALE, errno.ETIMEDOUT} or isinstance(error, FileN", (ERRNO,),
    ),
    Named(
        "B34: EACCES on what could be read is final", "data_sharding/storage/local_store.py",
        "retry_refused=kind in self._allowed", "retry_refused=False", (ERRNO,),
    ),
    Named(
        "B34: storage that stays away is bad input", STEPS,
        "None if isinstance(error, StorageDown) else error", "error", (COORDINATION,),
    ),
    Named(
        "B55: tasks of srun do not know of each other", LAUNCHED,
        "if _is_slurm_task(environment):", "if False:", (TASKS,),
    ),
    Named(
        "B55: processes of mpirun do not know of each other", LAUNCHED,
        "(_TORCHRUN, *_MPI)", "(_TORCHRUN,)", (TASKS,),
    ),
    Named(
        "B55: a task of srun becomes no rank", "launchers/rank.py",
        'task.launcher != "torchrun":', 'task.launcher == "mpirun":', (f"{LAUNCHERS}/test_rank.py",),
    ),
    Named(
        "B55: training does not ask who started it", CLI,
        'if getattr(args, "on_ranks", False):', "if False:", (f"{LAUNCHERS}/test_rank.py",),
    ),
    Named("B79: SIGHUP kills", "fitv2_scale/run/stop_signals.py", "    signal.SIGHUP,\n", "", (STOP,)),
    Named(
        "B79: ranks outlive torchrun", "fitv2_scale/train/signals.py",
        'return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None', "return None", (STOP,),
    ),
    Named(
        "B79: SIGHUP kills a supervisor", SUPERVISE,
        "for number in noted_signals()}", "for number in noted_signals() if number != signal.SIGHUP}",
        (f"{SUPERVISED}::test_a_signal_to_the_supervisor_saves_and_ends",),
    ),
    Named("B80: a broken pipe ends training", LOOP, "with dropping(), ", "with ", (f"{UNIT}/train/test_loop.py",)),
    Named(
        "B80: a broken pipe ends a supervisor", SUPERVISE,
        "with dropping(), ", "with ", (f"{SUPERVISED}::test_a_supervisor_that_nobody_reads_starts_the_next_attempt",),
    ),
    Named(
        "B80: a long job fails of what it cannot print", "data_sharding/standard_streams.py",
        "except (OSError, ValueError) as error:  # ValueError", "except ValueError as error:  # ValueError",
        (f"{DATA}/test_standard_streams.py",),
    ),
    Named(
        "B82: a cache without flock fails", "data_sharding/stream/disk_cache.py",
        "file = _acquire(path, seconds, policy)\n        except OSError as error:\n            self._warn(error)",
        "file = _acquire(path, seconds, policy)\n        except OSError:\n            raise", (ERRNO,),
    ),
    Named(
        "R9: a bug of the loader arrives without its traceback", "fitv2_scale/parallel/world.py",
        "shared(self.all_gather(portable(failure)), failure,", "shared(self.all_gather(portable(failure)), None,",
        (TRACEBACK,),
    ),
    Named("R9: a bug's traceback is not in the log", LOOP, "world.rank, exc_info=error)", "world.rank)", (TRACEBACK,)),
    Named(
        "R12: groups break before the watchdog names who hangs", "fitv2_scale/train/watchdog.py",
        "set_group_timeouts(_BEYOND_LIMITS * max(limits))", "pass",
        (f"{UNIT}/train/test_watchdog.py::test_a_rank_that_never_returns_from_a_step_is_named",),
    ),
    Named("B56: several partitions are one of that name", SLURM, 'partition.split(",")', "[partition]", (CLUSTER,)),
    Named("B56: a partition that sinfo hides is refused", SLURM, "default=math.inf)", "default=0.0)", (CLUSTER,)),
    Named("B57: account and partition of the shell are dropped", OPTIONS, "changes[key] = value", "pass", (SBATCH,)),
    Named(
        "B57: submit asks the shell nothing", SUBMIT,
        "with_shell_options(config.slurm, os.environ)", "(config.slurm, [])", (SBATCH,),
    ),
    Named(
        "B58: a job that could never start is queued", "launchers/cluster_check.py",
        "if time and seconds_of(time) > limit and not may_exceed_limits(site):", "if False:", (CLUSTER,),
    ),
    Named("B58: submit does not ask the cluster", SUBMIT, "check_cluster(site)\n        _check", "_check", (CLUSTER,)),
    Named(
        "B58: why a job is pending is not said", "launchers/control.py",
        'for job in queued if job.state == "PENDING"]', "for job in []]", (f"{LAUNCHERS}/test_slurm.py",),
    ),
    Named(
        "B59: an array job of the same name ends the chain", SLURM,
        r'int(re.split(r"\D", job.id)[0])', "int(job.id)", (f"{LAUNCHERS}/test_slurm.py",),
    ),
    Named("B59: an array is submitted", OPTIONS, "for option in _parse(extra):", "for option in ():", (SBATCH,)),
    Named("B59: submit takes any slurm.extra", SUBMIT, "refuse_conflicts(site.extra, chain=True)", "pass", (SBATCH,)),
    Named("B61: --export loses a secret", OPTIONS, "if secret and exported is not None and", "if False and", (SBATCH,)),
    Named(
        "B61: submit does not look for lost secrets", SUBMIT,
        "refuse_lost_secrets(site.extra, secret_overrides(config))", "pass", (SBATCH,),
    ),
    Named(
        "B61: a job without its secret trains", "fitv2_scale/cli/slurm_task.py",
        '_refuse_hidden(config.model_dump(mode="json"))', "pass",
        (f"{LAUNCHERS}/test_batch_script.py::test_a_job_without_its_secret_trains_nothing",),
    ),
    Named(
        "B64: a deleted experiment is reported by nobody", PLACE,
        " or deleted_experiment(target, experiment):", ":",
        (f"{DESTINATION}::test_a_deleted_experiment_is_seen_in_the_file",),
    ),
    Named(
        "B64: a wrong scheme is reported by nobody", PLACE,
        "if problem := uri_problem(target) or ", "if problem := ",
        (f"{DESTINATION}::test_what_can_never_work_is_said_at_the_start",),
    ),
    Named(
        "B64: what lasts is retried in silence", "fitv2_scale/tracking/uploader.py",
        "lasting or long)", "long)", (f"{UNIT}/tracking/test_outages.py::test_training_is_told_what_lasts",),
    ),
    Named(
        "B64: what can never work is not said at the start", "fitv2_scale/train/setup.py",
        "notes += notes_at_start(run, tracking.uri, tracking.experiment)", "pass", (f"{UNIT}/train/test_recorder.py",),
    ),
    Named(
        "B64: training does not say what lasts", "fitv2_scale/train/recorder.py",
        "return self._check_uploader()", "return []", (f"{UNIT}/train/test_recorder.py",),
    ),
    Named(
        "B67: MLFLOW_TRACKING_URI is not taken", PLACE,
        "if told := os.environ.get(URI_VARIABLE):", "if told := None:", (DESTINATION,),
    ),
    Named(
        "B68: a copied run writes into the first one's", "fitv2_scale/tracking/identity.py",
        "if before and _holds(before, run):", "if False:",
        (f"{UNIT}/tracking/test_identity.py::test_a_copy_gets_an_mlflow_run_of_its_own",),
    ),
    Named(
        "R4: each writer's VAE is on GPU 0", DEVICE,
        'local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))', "local = 0", (VAE,),
    ),
    Named("R4: a rank's VAE is not on its GPU", DEVICE, "if torch.cuda.is_initialized():", "if False:", (VAE,)),
    Named(
        "R5: the thread that saves takes memory of GPU 0", SAVES,
        "torch.cuda.set_device(self._writers.device)", "pass",
        (f"{UNIT}/checkpoint/test_staging.py::test_the_thread_that_saves_stays_on_the_gpu_of_its_rank",),
    ),
    Named(
        "R10: pack shapes depend on where an attempt begins", "data_sharding/plan/pack_shapes.py",
        "choose_shapes(_first_steps(plan, segment), cost",
        "choose_shapes([plan.step(k).tokens for k in range(step, step + 64)], cost",
        (f"{DATA}/plan/test_balance.py::test_a_step_has_the_same_shapes_wherever_an_attempt_begins",),
    ),
    Named(
        "R13: compilation counts as goodput", "fitv2_scale/train/metrics/meter.py",
        "seconds - took.compile - w.data_wait", "seconds - w.data_wait",
        (f"{UNIT}/train/metrics/test_accounting.py::test_compilation_is_no_goodput",),
    ),
    Named(
        "I7: an absent key has no default", "fitv2_scale/config/defaults.py",
        "filled[key] = to_jsonable_python(field.get_default(call_default_factory=True))", "pass",
        (f"{UNIT}/config/test_defaults.py::test_absent_keys_get_their_defaults",),
    ),
    Named(
        "I7: recipes are compared as they were stored", "fitv2_scale/run/run.py",
        'complete(self.recipe), complete(json.loads(json.dumps(new["recipe"])))',
        'self.recipe, json.loads(json.dumps(new["recipe"]))',
        (f"{UNIT}/test_identity.py::test_new_keys_at_their_defaults_continue_an_old_run",),
    ),
    Named(
        "fuzzing: an attempt that no log can have", "fitv2_scale/run/log.py", 'if record["attempt"] > n:', "if False:",
        (f"{UNIT}/run/test_log.py::test_an_attempt_that_cannot_be_the_entrys_is_damage",),
    ),
    Named(
        "the save before is taken for the one in flight", "fitv2_scale/train/coordination.py",
        "0 < ended == self._world.size * self._checkpoints.newest", "0 < ended",
        (f"{UNIT}/train/test_coordination.py::test_a_save_counts_as_ended_when_all_tell_so_of_the_one_in_flight",),
    ),
    Named(
        "the first rank stays for a killed one", "fitv2_scale/parallel/failures.py", "size - len(lost))", "size)",
        (f"{UNIT}/parallel/test_failures.py::test_the_first_rank_stays_for_those_that_can_come_not_for_the_lost",),
    ),
)  # fmt: skip
