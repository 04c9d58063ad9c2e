"""Each mend of a fault in how sources of images become datasets, taken out again. Names begin with the fault's id."""

from tests.mutation.named import Named

WRITE, TESTS = "data_sharding/write", "tests/data_sharding/write"
WALK, TOP, CLASSES = f"{WRITE}/source_files.py", f"{WRITE}/image_sources.py", f"{WRITE}/class_tars.py"
LABELS, SAMPLES, DECODE = f"{WRITE}/labels.py", f"{WRITE}/webdataset.py", f"{WRITE}/image_file.py"
MEMBERS, FILES = "data_sharding/storage/tar_members.py", "data_sharding/storage/files.py"
FOLDERS, TARS = f"{TESTS}/test_source_folders.py", f"{TESTS}/test_class_tars.py"
WEBDATASET, IMPORTED = f"{TESTS}/test_webdataset.py", f"{TESTS}/test_import_refused.py"
PIXELS = f"{TESTS}/test_image_file.py"
LACKING, IN_TARS = "tests/data_sharding/storage/test_lacking.py", "tests/data_sharding/storage/test_tar_members.py"

OF_SOURCES = (
    Named(
        "B01: linked class folders are dropped", WALK,
        "if not entry.is_dir():",
        "if not entry.is_dir(follow_symlinks=False):",
        (FOLDERS,),
    ),
    Named(
        "B02: a link to nowhere ends the write", WALK,
        "_NOTHING = {errno.ENOENT, ",
        "_NOTHING = {",
        (FOLDERS,),
    ),
    Named(
        "K5: a class that is a link to nowhere is dropped", TOP,
        'if "/" not in name and not is_image_name(source) and name not in listing.folders:',
        "if False:",
        (FOLDERS,),
    ),
    Named(
        "K5: a folder and a link to it are two classes", TOP,
        "if identity and (other := of_identity.setdefault(identity, name)) != name:",
        "if False:",
        (FOLDERS,),
    ),
    Named(
        "K5: a class tar that is a link to nowhere is dropped", TOP,
        "tars = sorted(name for name in top.files if is_tar_name(name))",
        "tars = sorted(name for name in top.files if is_tar_name(name) and not top.files[name])",
        (TARS,),
    ),
    Named(
        "K5: a class in an archive beside class folders is dropped", TOP,
        "if archives := sorted(name for name in top.files if is_archive_name(name)):",
        "if archives := []:",
        (FOLDERS,),
    ),
    Named(
        "K5: tars that hold the class folders are the classes", CLASSES,
        "    _refuse_class_folders(src, images)\n",
        "",
        (TARS,),
    ),
    Named("K5: a class tar in upper case is dropped", MEMBERS, "name.lower().endswith", "name.endswith", (TARS,)),
    Named(
        "K5: a photograph that is none ends an evaluation", "fitv2_scale/evaluate/image_sets.py",
        "images.left_out[name] = str(error)\n",
        "raise\n",
        ("tests/fitv2_scale/evaluate/test_image_sets.py",),
    ),
    # The other tests would read it, which waits for ever.
    Named(
        "K5: a pipe is taken for an image", WALK,
        "if not stat.S_ISREG(found.st_mode):",
        "if False:",
        (f"{FOLDERS}::test_a_pipe_is_known_before_it_is_opened",),
    ),
    Named(
        "B04: the first image of a sample is taken, a depth map perhaps", SAMPLES,
        'plain = [suffix for suffix in images if "." not in suffix] or list(images)',
        "plain = list(images)[:1]",
        (WEBDATASET,),
    ),
    Named("B04: the first of two plain images is taken", SAMPLES, "if len(plain) > 1:", "if False:", (WEBDATASET,)),
    Named(
        "B05: numbers are sorted as texts", LABELS,
        "labels.items() if isinstance(label, int)}",
        "labels.items() if False}",
        (WEBDATASET,),
    ),
    Named(
        "B05: a label of 3.0 is a name", LABELS,
        "return _of_number(label, str(label))",
        "return label if isinstance(label, int) else str(label)",
        (WEBDATASET,),
    ),
    Named(
        "B05: with one name among them all numbers are names", LABELS,
        "labels.items() if isinstance(label, int)}",
        "labels.items() if all(isinstance(one, int) for one in labels.values())}",
        (WEBDATASET,),
    ),
    Named(
        "B05: -1 and 2.5 are names", LABELS,
        'raise BadLabel(f"is {text[:_SHOWN]}, which is no class: classes are counted 0, 1, 2, …")',
        "return text",
        (WEBDATASET,),
    ),
    Named(
        "B05: 2.5 is class 2", LABELS,
        "or number < 0 or number != int(number):",
        "or number < 0:",
        (WEBDATASET,),
    ),
    Named(
        "B05: null, true and lists are names", LABELS,
        'raise BadLabel(f"is {json.dumps(label)[:_SHOWN]}, neither a number nor a text")',
        "return str(label)",
        (WEBDATASET,),
    ),
    Named(
        "B05: of two labels that differ the first is taken", LABELS,
        'if "json" in files and',
        "if False and",
        (WEBDATASET,),
    ),
    # Not every number: a list of 2e9 names would fill the memory of whoever runs this.
    Named("B07: an id is a label", LABELS, "_MOST_CLASSES = 100_000", "_MOST_CLASSES = 1_500_000", (WEBDATASET,)),
    Named("B08: links in tars are dropped", MEMBERS, "if not info.isdir():", "if info.isreg():", (TARS,)),
    Named("B08: and in tars of latents", MEMBERS, "if not info.isdir():", "if info.isreg():", (IMPORTED,)),
    Named("B08: symbolic links in tars lead nowhere", MEMBERS, "header = targets[at]\n", "break\n", (IN_TARS,)),
    Named(
        "B09: a file's Latin-1 name ends the write", WALK,
        "    if not is_utf8(entry.name):",
        "    if False:",
        (FOLDERS,),
    ),
    Named("B09: and in a class tar", CLASSES, "elif not is_utf8(member.name):", "elif False:", (TARS,)),
    Named("B09: and in a WebDataset", SAMPLES, "if not is_utf8(member.name):", "if False:", (WEBDATASET,)),
    Named(
        "B09: and in a tar of latents", f"{WRITE}/published_latents.py",
        "elif not is_utf8(name):",
        "elif False:",
        (IMPORTED,),
    ),
    Named(
        "B10: 32-bit integers of a TIFF have no white", DECODE,
        'if file.mode == "I" and file.format not in ("PPM", "PNG"):',
        "if False:",
        (PIXELS,),
    ),
    Named("B10: a TIFF of floats becomes white", DECODE, 'if file.mode == "F":', "if False:", (PIXELS,)),
    Named(
        "B10: a 16-bit PGM becomes white", DECODE,
        'if image.mode.startswith("I"):',
        'if image.mode.startswith("I;16"):',
        (PIXELS,),
    ),
    Named("B10: a 12-bit TIFF becomes black", DECODE, "pixels >> (bits - 8)", "pixels >> 8", (PIXELS,)),
    Named(
        "B11: EPS bytes start Ghostscript", DECODE,
        "Image.open(io.BytesIO(data), formats=FORMATS)",
        "Image.open(io.BytesIO(data))",
        (PIXELS,),
    ),
    Named(
        "B12: __MACOSX is a class", WALK,
        "if is_system_folder(entry.name):",
        'if entry.name.startswith("."):',
        (FOLDERS,),
    ),
    Named(
        "B12: and on an object store", WALK,
        "dict.fromkeys(name for name in names if not is_system_folder(name))",
        "dict.fromkeys(names)",
        (FOLDERS,),
    ),
    Named("B12: and in a class tar", CLASSES, "if in_system_folder(member.name, findings):", "if False:", (TARS,)),
    Named(
        "B12: and in a WebDataset", SAMPLES,
        "if in_system_folder(member.name, findings):",
        "if False:",
        (WEBDATASET,),
    ),
    Named(
        "B12: a folder without images takes a label", f"{WRITE}/images.py",
        "if source.empty and not allow_empty:",
        "if False:",
        (FOLDERS,),
    ),
    Named(
        "B15: a :: in a folder's name ends it", "data_sharding/storage/filesystems.py",
        'if protocol in (url, "file") or url.startswith("/"):',
        "if False:",
        (FOLDERS,),
    ),
    Named(
        "B15: a { in a folder's name is a pattern", TOP,
        'if "{" in src and not _exists(src):',
        'if "{" in src:',
        (FOLDERS,),
    ),
    Named(
        "B15: a folder without permission is not a folder", WALK,
        'UserError(f"the folder {src} cannot be opened: {error.strerror}")',
        'UserError(f"{src} is not a folder")',
        (FOLDERS,),
    ),
    Named(
        "B15: nothing says that it is a link to nowhere", WALK,
        "link = os.path.islink(path)",
        "link = False",
        (FOLDERS,),
    ),
    Named(
        "B19: nothing explains the dots in a name", LABELS,
        'if "." not in suffix:',
        "if True:",
        (WEBDATASET,),
    ),
    Named(
        "B21: files that are no images are not counted", WALK,
        "if not wanted and not entry.is_symlink():\n            self._findings.aside(suffix_of(entry.name))",
        "if not wanted and not entry.is_symlink():",
        (FOLDERS,),
    ),
    Named("B21: nor in a class tar", CLASSES, "findings.aside(suffix_of(member.name))", "pass", (TARS,)),
    Named("B21: nor in a WebDataset", SAMPLES, 'findings.aside(suffix_of(f"x.{suffix}"))', "pass", (WEBDATASET,)),
    Named(
        "B21: the report leaves them out", f"{WRITE}/write_report.py",
        "if left_aside else [])",
        "if False else [])",
        (FOLDERS,),
    ),
    Named(
        "B22: train and val are two classes", TOP,
        'refuse_splits(src, filled, nested, f"give the folder below, such as {src}/{min(filled)}")',
        "pass",
        (FOLDERS,),
    ),
    Named(
        "B22: and as tars", CLASSES,
        'refuse_splits(src, set(names) - empty, nested, "unpack one part and give its folder")',
        "pass",
        (TARS,),
    ),
    Named("B27: bfloat16 is a missing tensor", f"{WRITE}/import_latents.py", "if of_type:", "if False:", (IMPORTED,)),
    Named(
        "B28: a full disk is a traceback", FILES,
        "with_local(url, lambda: _write(path, data), writing=True)",
        "_write(path, data)",
        (LACKING,),
    ),
    Named(
        "B28: a half-written file stays", "data_sharding/storage/atomic_write.py",
        "written.unlink()",
        "pass",
        (LACKING,),
    ),
    Named(
        "B28: and while an archive is unpacked", f"{WRITE}/archives.py",
        "        as_sentence(path),\n",
        "",
        (f"{TESTS}/test_archives.py",),
    ),
    Named(
        "B28: each try leaves another", f"{WRITE}/begun.py",
        "remove_unfinished(dst)  # of a writer that was killed",
        "pass",
        (LACKING,),
    ),
    Named(
        "K7: the reader of a pipe waits for ever", "data_sharding/storage/filesystems.py",
        "if Path(path).is_fifo():",
        "if False:",
        ("tests/data_sharding/storage/test_filesystems.py",),
    ),
    Named(
        "B70: a missing bucket is a traceback", FILES,
        "with _place_missing(url):\n        if is_local(fs):",
        "with suppress():\n        if is_local(fs):",
        (LACKING,),
    ),
)  # fmt: skip
