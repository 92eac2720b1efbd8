"""Tar entries in memory: tarfile's view of honest ones, and a refusal of all others."""

import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets.members import (
    BadEntries,
    Entry,
    _cut_any,
    _cut_usual,
    cut_members,
    entries_in,
    split_name,
)
from tests.tars import END, TarFormat, plain, read_by_tarfile, special, tar_of, with_sum

FORMATS: list[TarFormat] = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
letters = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0.\\", exclude_categories=["Cs"]), min_size=1
)
names = st.builds(
    lambda folders, stem, extension: "/".join([*folders, f"{stem}.{extension}"]),
    st.lists(letters, max_size=3),
    st.one_of(letters, st.integers(1, 400).map("a".__mul__)),
    st.sampled_from(["jpg", "target.npy", "cls"]),
)
payloads = st.binary(max_size=1500)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, payloads), max_size=4), st.sampled_from(FORMATS), st.booleans())
def test_entries_are_where_tarfile_finds_them(
    files: list[tuple[str, bytes]], tar_format: TarFormat, has_end: bool
) -> None:
    try:
        tar = tar_of([plain(*file) for file in files], tar_format=tar_format) + END * has_end
    except ValueError:  # a name that is too long for this format
        return
    found = [
        (e.name, e.begin, e.start, tar[e.start : e.start + e.length])
        for e in entries_in(tar, has_sums_checked=True)
    ]
    expected = read_by_tarfile(tar) if files else []
    assert found == expected
    assert [(name, payload) for name, _, _, payload in found] == files
    assert list(entries_in(tar)) == list(entries_in(memoryview(tar), has_sums_checked=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_tar_that_is_cut_anywhere_but_between_entries_is_refused(data: st.DataObject) -> None:
    tar = tar_of([plain("a.cls", b"1"), plain("ä" * 80 + ".jpg", bytes(700)), plain("b.cls", b"2")])
    whole = list(entries_in(tar))
    bounds = [0, *(entry.end for entry in whole)]
    stop = data.draw(st.one_of(st.integers(0, len(tar)), st.sampled_from(bounds)))
    found: list[Entry] = []

    def take_in() -> None:
        found.extend(entries_in(tar[:stop]))

    if stop in bounds:
        take_in()
        assert found == whole[: bounds.index(stop)]
    elif any(entry.start + entry.length <= stop < entry.end for entry in whole):
        # Only zeros behind the last payload are lacking: all of the entry is there.
        take_in()
        assert found[-1].end > stop
    else:
        with pytest.raises(BadEntries, match=r"cut short|ends behind an extended header"):
            take_in()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_headers_are_read_to_an_end_or_refused(changes: list[tuple[int, int]]) -> None:
    tar = bytearray(tar_of([plain("é" * 120 + ".cls", b"1"), plain("b.jpg", bytes(600))]) + END)
    for place, value in changes:
        tar[place % len(tar)] = value
    for is_checked in (False, True):
        try:
            found = list(entries_in(bytes(tar), has_sums_checked=is_checked))
        except BadEntries:
            continue
        assert all(entry.begin < entry.start <= entry.end for entry in found)


USUAL = tar_of(
    [plain("0a/b-1.cls", b"12"), plain("0a/b-1.target.npy", bytes(700))], tar_format=tarfile.USTAR_FORMAT
)
BYTES = st.one_of(st.integers(0, 255), st.sampled_from([*b"\0/.\\AZaz0789 "]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), BYTES) | st.tuples(st.integers(0, 511), BYTES), max_size=4))
def test_the_quick_way_through_usual_entries_says_the_same_or_nothing(changes: list[tuple[int, int]]) -> None:
    tar = bytearray(USUAL)
    for place, value in changes:
        tar[place] = value
    found = _cut_usual(bytes(tar))
    assert found is not None or changes
    assert found is None or found == _cut_any(bytes(tar))


def test_a_wrong_sum_is_found_where_sums_are_checked() -> None:
    tar = bytearray(tar_of([plain("a.cls", b"1")]))
    tar[0] ^= 2
    assert [entry.name for entry in entries_in(bytes(tar))] == ["c.cls"]
    with pytest.raises(BadEntries, match="is no tar entry where it should be one"):
        list(entries_in(bytes(tar), has_sums_checked=True))


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"+0000000010\0", b"0_000000010\0", b"00000000008\0", b"junk\0\0\0\0\0\0\0\0"]
)
def test_a_size_that_is_no_octal_number_is_refused(size: bytes) -> None:
    header = tar_of([plain("a.cls", b"")])[:512]
    tar = with_sum(header[:124] + size + header[136:]) + bytes(512)
    with pytest.raises(BadEntries, match="is no tar entry where it should be one"):
        list(entries_in(tar))


def test_gnus_binary_sizes_of_huge_files_are_understood() -> None:
    header = tar_of([plain("a.cls", b"")])[:512]
    big = with_sum(header[:124] + b"\x80" + (9 << 30).to_bytes(11, "big") + header[136:])
    with pytest.raises(BadEntries, match=r"has an entry 'a\.cls' that is cut short") as caught:
        list(entries_in(big + bytes(512)))
    assert caught.value.entry == "a.cls"
    small = with_sum(header[:124] + b"\x80" + (3).to_bytes(11, "big") + header[136:])
    assert bytes(cut_members(small + b"123" + bytes(509))["cls"]) == b"123"


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd.txt", "../a.txt", "a/../../b.txt", "..\\a.txt", "a\\b.txt", "../" * 60 + "a.txt"],
)
def test_names_that_point_out_of_their_folder_are_refused(name: str) -> None:
    with pytest.raises(BadEntries, match="which points out of its folder"):
        cut_members(tar_of([plain("a.cls", b"1"), plain(name, b"x")]))


@pytest.mark.parametrize("name", ["README", ".hidden", "a.", "folder.d/name", "a/.jpg"])
def test_names_without_an_extension_are_refused(name: str) -> None:
    with pytest.raises(BadEntries, match="without an extension"):
        cut_members(tar_of([plain(name, b"x")]))


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        b"Z",
    ],
)
def test_links_devices_folders_and_unknown_kinds_are_refused(kind: bytes) -> None:
    tar = tar_of([plain("a.cls", b"1"), special("a.jpg", kind, "/etc/passwd")])
    with pytest.raises(BadEntries, match=r"has an entry 'a\.jpg/?' that is no plain file"):
        cut_members(tar)


def test_sparse_files_are_refused() -> None:
    header = tar_of([plain("a.jpg", bytes(512))], tar_format=tarfile.GNU_FORMAT)
    old = with_sum(header[:156] + b"S" + header[157:512]) + header[512:]
    entry, payload = plain("a.jpg", bytes(512))
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}
    for tar in (old, tar_of([(entry, payload)])):
        with pytest.raises(BadEntries, match="that is a sparse file"):
            cut_members(tar)


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(BadEntries, match=r"has two entries 'b/a\.JPG'"):
        cut_members(tar_of([plain("b/a.jpg", b"1"), plain("b/a.JPG", b"2")]))


def test_a_stretch_without_entries_is_refused() -> None:
    with pytest.raises(BadEntries, match="has no tar entries"):
        cut_members(END)


def _extended(kind: bytes, payload: bytes) -> bytes:
    entry, _ = plain("././@Header", payload)
    entry.type = kind
    return tar_of([(entry, payload)], tar_format=tarfile.USTAR_FORMAT)


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    return b"%d" % (len(rest) + 2) + rest


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (_extended(b"x", b"99 path=a.jpg\n"), "extended header that cannot be read"),
        (_extended(b"x", b"0 path=a.jpg\n"), "extended header that cannot be read"),
        (_extended(b"x", b"path=a.jpg\n"), "extended header that cannot be read"),
        (_extended(b"x", _record(b"size", b"-1")), r"entry of the size b'-1'"),
        (_extended(b"x", _record(b"path", b"\xff\xfe.jpg")), "whose name is no UTF-8"),
        (_extended(b"g", _record(b"path", b"a/b.jpg")), "header for all entries that gives them one name"),
        (_extended(b"L", bytes(2 << 20)), "extended header of 2097152 bytes, cut short or too long"),
    ],
)
def test_extended_headers_that_lie_are_refused(head: bytes, message: str) -> None:
    with pytest.raises(BadEntries, match=message):
        cut_members(head + tar_of([plain("a.cls", b"1")]))
    with pytest.raises(BadEntries):
        cut_members(head)


def test_a_header_for_all_entries_that_only_comments_is_passed_over() -> None:
    tar = _extended(b"g", _record(b"comment", b"hello")) + tar_of([plain("a.cls", b"1")])
    assert {name: bytes(payload) for name, payload in cut_members(tar).items()} == {"cls": b"1"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x/y/a.seg.PNG", ("x/y/a", "seg.png")),
        ("x.d/a.target.npy", ("x.d/a", "target.npy")),
        ("./a.jpg", ("./a", "jpg")),
    ],
)
def test_keys_and_extensions_are_split_webdatasets_way(name: str, expected: tuple[str, str]) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == expected
    key, extension = base_plus_ext(name)
    assert (key, extension.lower()) == expected
