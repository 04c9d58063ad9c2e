"""The sources of images. In each, an image's key holds its class and name, and its id depends on the key only.

A folder with one folder per class:

    SRC/cat/0007.jpg    key "cat/0007.jpg", class "cat"
    SRC/cat/kittens/a.png    key "cat/kittens/a.png", class "cat"

A tar of class tars, as ImageNet is distributed (ILSVRC2012_img_train.tar), or a folder with the class tars
(``class_tars.py``). Keys and labels are the same as those of the class folders:

    SRC: n01440764.tar: n01440764_18.JPEG    key "n01440764/n01440764_18.JPEG", class "n01440764"

WebDataset tars, as a folder or a pattern such as data/train-{0000..0146}.tar (``webdataset.py``):

    train-0000.tar: 0007.jpg, 0007.cls    key "train-0000/0007.jpg", label from .cls, or from "label" in .json

A class's label is its index in sorted order, including classes without images (sorted WNIDs are ImageNet's labels); or,
if all WebDataset labels are numbers, that number. Files without an image suffix are counted (``findings.py``).
"""

import os

from data_sharding.errors import UserError
from data_sharding.storage.files import fs_call
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.tar_members import is_tar_name
from data_sharding.write.class_tars import is_archive_name, open_tars, refuse_compressed
from data_sharding.write.entries import (
    ImageSource,
    image_source,
    listed,
    no_images,
    refuse_class_names,
    refuse_splits,
)
from data_sharding.write.findings import Findings, printable
from data_sharding.write.image_file import IMAGE_SUFFIXES, is_image_name
from data_sharding.write.source_files import Listing, Top, list_folder, list_top
from data_sharding.write.webdataset import webdataset_library


def open_source(src: str) -> ImageSource:
    """Lists the images of ``src``, whichever kind of source it is (see the module).

    Raises:
        UserError: there is nothing at ``src``, or another kind of source; or two images have the same id.
    """
    if "{" in src and not _exists(src):
        return open_tars(webdataset_library().expand_urls(src))
    if is_tar_name(src) and _is_file(src):
        return open_tars([src])
    top = list_top(src)
    tars = sorted(name for name in top.files if is_tar_name(name))
    if tars and not top.folders:
        return _folder_of_tars(src, tars, top)
    if archives := sorted(name for name in top.files if is_archive_name(name)):
        raise UserError(
            f"{src} holds archives ({listed(archives)}), each of which may be a class that would be missing: unpack "
            "each into a folder, or move it away"
        )
    return open_folder(src)


def open_folder(src: str) -> ImageSource:
    """Lists a class-folder tree. Raises UserError if it is empty, without class folders or without images, if images
    lie outside of the class folders, or if two classes cannot be told apart."""
    findings = Findings()
    listing = list_folder(src, IMAGE_SUFFIXES, findings)
    if not listing.folders and not findings.seen and not findings.left_out and not findings.left_aside:
        raise UserError(f"{src} is empty: put the images in it, one folder per class")
    if not listing.folders:
        raise UserError(f"{src} has no class folders: move its images into one folder per class")
    classes = sorted(listing.folders)
    _refuse_odd_classes(src, listing, findings)
    if not listing.files:
        raise no_images(f"the class folders in {src} hold", findings)
    images = {key: (key.partition("/")[0], data) for key, data in listing.files.items()}
    filled = {name for name, _ in images.values()}
    nested = all("/" in key.partition("/")[2] for key in images)
    refuse_splits(src, filled, nested, f"give the folder below, such as {src}/{min(filled)}")
    named = {skipped.source.partition("/")[0] for skipped in findings.left_out}
    empty = [name for name in classes if name not in filled and printable(name) not in named]
    return image_source(classes, images, findings, empty)


def _refuse_odd_classes(src: str, listing: Listing, findings: Findings) -> None:
    """Raises UserError where an image would have no class or two, or a class would be missing."""
    if outside := sorted(key for key in listing.files if "/" not in key):
        raise UserError(
            f"{len(outside)} images lie directly in {src} and belong to no class ({listed(outside)}): move them into "
            f"one folder per class; or, if {src} is itself a class, give the folder above"
        )
    for source, reason in findings.left_out:
        name = source.rstrip("/")
        if "/" not in name and not is_image_name(source) and name not in listing.folders:
            raise UserError(
                f"{src}/{name} may be a class, but cannot be read ({reason}): correct it, or remove it if it is none"
            )
    refuse_class_names(src, listing.folders)
    of_identity: dict[tuple[int, int], str] = {}
    for name, identity in sorted(listing.folders.items()):
        if identity and (other := of_identity.setdefault(identity, name)) != name:
            raise UserError(
                f"the classes {listed([other, name])} in {src} are one folder, one of them a link: every image would "
                "have two labels; remove the link"
            )
    doubled = [keys for keys in listing.linked if len({key.partition("/")[0] for key in keys}) > 1]
    if doubled:
        raise UserError(
            f"{src} holds images that lie in several classes by links, and would have several labels "
            f"({listed(min(doubled))} are one; {len(doubled)} in all): remove the links"
        )


def _folder_of_tars(src: str, tars: list[str], top: Top) -> ImageSource:
    if broken := [name for name in tars if top.files[name]]:
        raise UserError(f"{src}/{broken[0]} cannot be read: {top.files[broken[0]]}; correct it, or move it away")
    refuse_compressed(src, sorted(top.files))
    fs, root = file_system(src)
    prefix = fs.unstrip_protocol(root).rstrip("/")
    source = open_tars([f"{prefix}/{name}" for name in tars])
    for name in sorted(top.files.keys() - set(tars)):
        source.findings.file(name)
        source.findings.unusable(name, top.files[name] or "it lies beside the tars and belongs to no class")
    for name in top.left_aside:
        source.findings.aside(f"folder {printable(name)}")
    return source


def _exists(url: str) -> bool:
    fs, path = file_system(url)
    return is_local(fs) and os.path.exists(path)


def _is_file(url: str) -> bool:
    try:
        return fs_call(url, "info")["type"] == "file"  # s3fs's isfile returns False after any error
    except (FileNotFoundError, NotADirectoryError):
        return False
