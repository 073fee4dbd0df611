"""Checkpoints to tamper with: sound ones, and mutations that break one rule of the format and seal the file again.

    Draft         a checkpoint taken apart; `seal` computes offsets and digests anew, as a forger would
    bases         sound files of many patterns, shapes and dtypes, from the slow encoder of the golden files
    MUTATIONS     name -> a way to break a rule, its details drawn at random

A mutation that has nothing to work on (no padding bits, no second position in a group) raises `NotHereError`.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tests.golden.encoder import Dense, Sparse, encode
from tests.oracle import ORDER, SIZES, compact, decode_row, encode_row, width

Mutation = Callable[[random.Random, "Draft"], None]


class NotHereError(Exception):
    """The base has nothing that this mutation could break."""


@dataclass
class Draft:
    """A checkpoint taken apart."""

    entries: dict[str, dict[str, Any]]
    """Stored name -> dtype, shape."""
    blobs: dict[str, bytes]
    manifest: dict[str, Any]
    key: str = "lbc"
    """The metadata's key of the manifest."""
    rehash: bool = True
    """Whether sealing writes true digests of the tensors into the manifest."""
    spell_manifest: Callable[[Any], str] = field(default=lambda manifest: compact(manifest, ordered=True))
    edit_metadata: Callable[[dict[str, str]], None] = field(default=lambda metadata: None)
    edit_header: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda header: header)
    spell_header: Callable[[dict[str, Any]], bytes] = field(default=lambda header: padded(header_text(header)))

    @classmethod
    def of(cls, content: bytes) -> Draft:
        """Take a sound file apart."""
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        metadata = header.pop("__metadata__")
        key = next(key for key in metadata if key + ".sha256" in metadata)
        blobs = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
        entries = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()}
        return cls(entries, blobs, json.loads(metadata[key]), key)

    def add(self, name: str, dtype: str, shape: list[int], blob: bytes) -> None:
        """Put a tensor into the file and into the manifest's list."""
        self.entries[name], self.blobs[name] = {"dtype": dtype, "shape": shape}, blob
        self.manifest["tensors"][name] = {"dtype": dtype, "shape": list(shape), "sha256": ""}

    def drop(self, name: str) -> bytes:
        """Remove a tensor from the file and from the manifest's list."""
        del self.entries[name], self.manifest["tensors"][name]
        return self.blobs.pop(name)

    def rename(self, old: str, new: str) -> None:
        """Rename a tensor in the file and in the manifest's list."""
        entry = self.entries[old]
        self.add(new, entry["dtype"], entry["shape"], self.drop(old))

    def resize(self, name: str, shape: list[int], blob: bytes) -> None:
        """Another shape and other bytes, in the file and in the manifest's list."""
        self.add(name, self.entries[name]["dtype"], shape, blob)

    def seal(self) -> bytes:
        """The file, with every offset and digest as it should be for this content."""
        if self.rehash:
            for name, listed in self.manifest.get("tensors", {}).items():
                if name in self.blobs and isinstance(listed, dict) and "sha256" in listed:
                    listed["sha256"] = hashlib.sha256(self.blobs[name]).hexdigest()
        text = self.spell_manifest(self.manifest)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        metadata = {"format": "pt", self.key: text, self.key + ".sha256": digest}
        self.edit_metadata(metadata)
        header: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        names = sorted(self.entries, key=lambda name: (ORDER.index(self.entries[name]["dtype"]), name))
        for name in names:
            header[name] = {**self.entries[name], "data_offsets": [at, at + len(self.blobs[name])]}
            at += len(self.blobs[name])
        raw = self.spell_header(self.edit_header(header))
        return len(raw).to_bytes(8, "little") + raw + b"".join(self.blobs[name] for name in names)


def header_text(header: dict[str, Any]) -> bytes:
    return compact(header, ordered=False).encode("utf-8", "surrogatepass")


def padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % 8)


# Sound files.

LARGEST = {
    "F32": 0x7F000000,
    "F64": 0x7FE << 52,
    "F16": 0x7B00,
    "BF16": 0x7F00,
    "I8": 0xFF,
    "F8_E4M3": 0x7E,
    "F8_E5M2": 0x7B,
}


def weight(rng: random.Random, shape: list[int], dtype: str, pattern: str) -> Sparse:
    """A weight of random finite positive numbers that holds the pattern; one group in five is under-filled."""
    n, m, vector = (int(number) for number in (pattern + "/1").replace("/", ":").split(":")[:3])
    out, inp, *kernel = shape
    elements = dict.fromkeys(itertools.product(*(range(size) for size in shape)), 0)
    for o, g in itertools.product(range(0, out, vector), range(inp // m)):
        for k in itertools.product(*(range(size) for size in kernel)):
            for p in rng.sample(range(m), n - (rng.random() < 0.2)):
                for v in range(vector):
                    elements[(o + v, g * m + p, *k)] = rng.randint(1, LARGEST[dtype])
    return Sparse(shape, dtype, n, m, vector, list(elements.values()))


def dense(rng: random.Random, shape: list[int], dtype: str = "F32") -> Dense:
    return Dense(shape, dtype, [rng.randint(1, LARGEST.get(dtype, 99)) for _ in range(math.prod(shape))])


@lru_cache(maxsize=1)
def bases() -> dict[str, bytes]:
    """Name -> a sound file."""
    rng = random.Random(20)
    about: dict[str, Any] = {
        "model": {"arch": "resnet18", "kwargs": {"num_classes": 3, "img_size": [32, 32]}, "task": "classification"},
        "unstructured": {},
        "method": "lbc",
        "phase": "final",
        "epoch": 7,
        "metrics": {"top1": 61.5, "loss": "NaN"},
        "recipe": 'pattern = "2:4"  # é\n',
        "environment": {"torch": "2.10.0", "threads": 2},
    }
    bare = about | {"model": {"arch": None, "kwargs": {}, "task": None}, "epoch": None, "metrics": {}, "recipe": ""}
    plain = {
        "head.weight": dense(rng, [3, 6]),
        "head.bias": dense(rng, [3]),
        "steps": dense(rng, [], "I64"),
        "empty": Dense([0, 4], "U8", []),
    }
    counted = sum(element != 0 for element in plain["head.weight"].elements)
    return {
        "linear 2:4 F32": encode({"fc.weight": weight(rng, [6, 8], "F32", "2:4"), **plain}, **about),
        "conv2d 1:4 BF16": encode(
            {"conv.weight": weight(rng, [4, 8, 3, 1], "BF16", "1:4"), "norm.weight": dense(rng, [4], "BF16")}, **about
        ),
        "linear 3:8 F16": encode({"größe.weight": weight(rng, [4, 16], "F16", "3:8"), **plain}, **bare),
        "conv1d 8:16/4 F16": encode({"w": weight(rng, [8, 32, 3], "F16", "8:16/4")}, **about),
        "conv3d 5:32 I8": encode({"conv.weight": weight(rng, [2, 32, 1, 2, 2], "I8", "5:32")}, **bare),
        "grouped 3:5/2 F64": encode(
            {"a.weight": weight(rng, [4, 10, 1, 2], "F64", "3:5/2"), "b.weight": weight(rng, [4, 10], "F32", "2:5")},
            **about,
        ),
        "float8 7:12 and 2:4": encode(
            {
                "a.weight": weight(rng, [3, 12, 2], "F8_E4M3", "7:12"),
                "b.weight": weight(rng, [4, 8], "F8_E5M2", "2:4/2"),
                **plain,
            },
            **about,
        ),
        "1:2 next to 31:32": encode(
            {"a.weight": weight(rng, [2, 6], "F32", "1:2"), "b.weight": weight(rng, [2, 32], "F32", "31:32")}, **bare
        ),
        "unstructured": encode({**plain}, **about | {"unstructured": {"head.weight": counted}, "method": "gmp"}),
        "training": encode({**plain}, **about | {"phase": "training"}),
    }


# Choices.


def pick(rng: random.Random, choices: Any) -> Any:
    listed = sorted(choices) if isinstance(choices, set | dict) else list(choices)
    if not listed:
        raise NotHereError
    return copy.deepcopy(rng.choice(listed))  # later edits may change what was chosen


def other(rng: random.Random, choices: Any, than: Any) -> Any:
    """One that JSON spells in another way than `than`."""
    return pick(rng, [choice for choice in choices if json.dumps(choice) != json.dumps(than)])


ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 1.0, 10**30, 10**400, "", "x", "1", [], {}, [1], [[1]], {"a": 1}, "\u2028",
]  # fmt: skip


def odd(rng: random.Random, *kinds: type) -> Any:
    """A value whose type is none of these."""
    return pick(rng, [value for value in ODD if type(value) not in kinds])


def sparse(rng: random.Random, draft: Draft) -> tuple[str, dict[str, Any]]:
    name = pick(rng, draft.manifest["sparse"])
    return name, draft.manifest["sparse"][name]


def parts(draft: Draft) -> list[str]:
    return [name + end for name in draft.manifest["sparse"] for end in (".nm_values", ".nm_index")]


def entry_names(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


# Mutations. Each names what the oracle must find.

EXPECTED: dict[str, frozenset[str]] = {}
MUTATIONS: dict[str, Mutation] = {}


def breaks(*rules: str) -> Callable[[Mutation], Mutation]:
    def register(mutation: Mutation) -> Mutation:
        name = mutation.__name__.replace("_", " ")
        MUTATIONS[name], EXPECTED[name] = mutation, frozenset(rules)
        return mutation

    return register


def edit_row(rng: random.Random, draft: Draft, edit: Callable[[list[int], int, dict[str, Any]], int]) -> None:
    """Change a random row of a random index.

    Args:
        rng: the choices.
        draft: changed in place.
        edit: given the codes, where a random group starts, and the manifest's entry; gives the padding.
    """
    name, entry = sparse(rng, draft)
    index, size = draft.blobs[name + ".nm_index"], draft.entries[name + ".nm_index"]["shape"][-1]
    at = rng.randrange(len(index) // size) * size
    codes, _ = decode_row(index[at : at + size], entry)
    n = int(entry["pattern"].split(":")[0])
    padding = edit(codes, rng.randrange(len(codes) // n) * n, entry)
    row = encode_row(codes, padding, entry, size)
    draft.blobs[name + ".nm_index"] = index[:at] + row + index[at + size :]


@breaks("position")
def position_beyond_the_group(rng: random.Random, draft: Draft) -> None:
    def edit(codes: list[int], at: int, entry: dict[str, Any]) -> int:
        n, m = (int(number) for number in entry["pattern"].split(":"))
        codes[at + pick(rng, [n - 1, rng.randrange(n)])] = pick(rng, range(m, 2 ** width(m)))
        return 0

    edit_row(rng, draft, edit)


@breaks("repeated")
def position_repeated(rng: random.Random, draft: Draft) -> None:
    def edit(codes: list[int], at: int, entry: dict[str, Any]) -> int:
        slot = at + pick(rng, range(1, int(entry["pattern"].split(":")[0])))
        codes[slot - rng.randrange(2)] = codes[slot] if rng.random() < 0.5 else codes[slot - 1]
        if codes[slot] != codes[slot - 1]:
            codes[slot] = codes[slot - 1]
        return 0

    edit_row(rng, draft, edit)


@breaks("unsorted")
def positions_out_of_order(rng: random.Random, draft: Draft) -> None:
    def edit(codes: list[int], at: int, entry: dict[str, Any]) -> int:
        n = int(entry["pattern"].split(":")[0])
        if n < 2:
            raise NotHereError
        a, b = rng.sample(range(at, at + n), 2)
        codes[a], codes[b] = codes[b], codes[a]
        return 0

    edit_row(rng, draft, edit)


@breaks("padding")
def padding_bit_set(rng: random.Random, draft: Draft) -> None:
    def edit(codes: list[int], at: int, entry: dict[str, Any]) -> int:
        free = -len(codes) * width(int(entry["pattern"].split(":")[1])) % 8
        return 1 << pick(rng, range(free))

    edit_row(rng, draft, edit)


@breaks("parts")
def index_row_longer(rng: random.Random, draft: Draft) -> None:
    name = sparse(rng, draft)[0] + ".nm_index"
    shape, blob, more = draft.entries[name]["shape"], draft.blobs[name], rng.randint(1, 3)
    rows = [blob[at : at + shape[-1]] + bytes(more) for at in range(0, len(blob), shape[-1])]
    draft.resize(name, [*shape[:-1], shape[-1] + more], b"".join(rows))


@breaks("parts")
def index_for_another_vector_length(rng: random.Random, draft: Draft) -> None:
    """A row of the index for each output channel of a vector, or the first rows only."""
    name, entry = sparse(rng, draft)
    shape, blob = draft.entries[name + ".nm_index"]["shape"], draft.blobs[name + ".nm_index"]
    size = len(blob) // shape[0]
    if entry["vector"] > 1:
        rows = b"".join(blob[at : at + size] * entry["vector"] for at in range(0, len(blob), size))
        draft.resize(name + ".nm_index", [entry["shape"][0], *shape[1:]], rows)
    else:
        draft.resize(name + ".nm_index", [shape[0] // 2, *shape[1:]], blob[: size * (shape[0] // 2)])


@breaks("parts")
def values_with_more_slots(rng: random.Random, draft: Draft) -> None:
    """N + 1 values in each group, under an index of N."""
    name = sparse(rng, draft)[0] + ".nm_values"
    shape, size = draft.entries[name]["shape"], SIZES[draft.entries[name]["dtype"]]
    group = shape[-1] * size
    blob = b"".join(draft.blobs[name][at : at + group] + bytes(size) for at in range(0, len(draft.blobs[name]), group))
    draft.resize(name, [*shape[:-1], shape[-1] + 1], blob)


@breaks("parts")
def part_of_another_shape(rng: random.Random, draft: Draft) -> None:
    """The same bytes under a shape of as many elements."""
    name = pick(rng, parts(draft))
    shape = draft.entries[name]["shape"]
    draft.entries[name]["shape"] = other(
        rng, [[math.prod(shape)], [1, *shape], [*shape, 1], shape[::-1], [*shape[1:], shape[0]]], shape
    )
    draft.manifest["tensors"][name]["shape"] = list(draft.entries[name]["shape"])


@breaks("parts")
def values_of_another_dtype(rng: random.Random, draft: Draft) -> None:
    """The same bytes under a dtype of the same size, in the file and its list but not in `sparse`."""
    name = pick(rng, parts(draft))
    dtype = draft.entries[name]["dtype"]
    found = other(rng, [d for d in SIZES if SIZES[d] == SIZES[dtype]], dtype)
    draft.resize(name, draft.entries[name]["shape"], draft.blobs[name])
    draft.entries[name]["dtype"] = draft.manifest["tensors"][name]["dtype"] = found


@breaks("parts")
def part_missing(rng: random.Random, draft: Draft) -> None:
    draft.drop(pick(rng, parts(draft)))


@breaks("parts")
def part_renamed(rng: random.Random, draft: Draft) -> None:
    name = pick(rng, parts(draft))
    stem, end = name.rsplit(".", 1)
    draft.rename(name, pick(rng, [f"x{stem}.{end}", f"{stem}.{end}s", f"{stem}.{end.upper()}", end, f"{name}.{end}"]))


@breaks("parts")
def parts_exchanged(rng: random.Random, draft: Draft) -> None:
    name = sparse(rng, draft)[0]
    draft.rename(name + ".nm_values", "aside")
    draft.rename(name + ".nm_index", name + ".nm_values")
    draft.rename("aside", name + ".nm_index")


@breaks("parts")
def part_of_no_tensor(rng: random.Random, draft: Draft) -> None:
    end = pick(rng, [".nm_values", ".nm_index"])
    draft.add("stray" + end, "U8", [2], bytes(2))


@breaks("parts")
def dense_beside_packed(rng: random.Random, draft: Draft) -> None:
    name, entry = sparse(rng, draft)
    draft.add(name, entry["dtype"], entry["shape"], bytes(math.prod(entry["shape"]) * SIZES[entry["dtype"]]))


@breaks("parts")
def sparse_entry_gone(rng: random.Random, draft: Draft) -> None:
    del draft.manifest["sparse"][sparse(rng, draft)[0]]


@breaks("parts")
def sparse_entry_without_parts(rng: random.Random, draft: Draft) -> None:
    shape = pick(rng, [[4, 8], [2, 8, 3], [8, 16, 1, 1]])
    name = pick(rng, ["ghost", "steps.nm_index", "fc.weight.nm_values.x"])
    draft.manifest["sparse"][name] = {"pattern": "2:4", "vector": 1, "shape": shape, "dtype": "F32"}


@breaks("parts", "shape", "pattern")
def another_n(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    n, m = entry["pattern"].split(":")
    entry["pattern"] = f"{other(rng, range(1, int(m)), int(n))}:{m}"


@breaks("parts", "shape", "pattern")
def another_m(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    n, m = entry["pattern"].split(":")
    entry["pattern"] = f"{n}:{other(rng, range(int(n) + 1, 33), int(m))}"


@breaks("parts", "shape", "pattern")
def another_pattern_of_the_same_density(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    n, m = (int(number) for number in entry["pattern"].split(":"))
    entry["pattern"] = pick(rng, [f"{n * f}:{m * f}" for f in (2, 3, 4, 8)])


@breaks("pattern")
def impossible_pattern(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    n, m = entry["pattern"].split(":")
    swapped = [f"{m}:{n}", f"{m}:{m}", f"0:{m}", f"{n}:0", f"-{n}:{m}", f"{n}:{int(m) + 32}", f"{n}:{10**400}"]
    spelled = [
        f"0{n}:{m}",
        f"{n}:0{m}",
        f"{n} :{m}",
        f" {n}:{m}",
        f"{n}:{m}\n",
        f"+{n}:{m}",
        f"{n}.0:{m}",
        f"{n}:{m}/1",
    ]
    scripts = [str.maketrans("0123456789", digits) for digits in ("٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９")]
    foreign = [f"{n}:{m[:-1]}{m[-1].translate(script)}" for script in scripts]
    entry["pattern"] = pick(rng, [*swapped, *spelled, *foreign, "", ":", n, f"{n}/{m}", "dense"])


@breaks("types")
def pattern_of_another_type(rng: random.Random, draft: Draft) -> None:
    sparse(rng, draft)[1]["pattern"] = odd(rng, str)


@breaks("parts", "shape")
def another_vector_length(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    entry["vector"] = other(rng, [1, 2, 3, 4, 8, 16, 10**30, 10**400], entry["vector"])


@breaks("types", "pattern")
def impossible_vector_length(rng: random.Random, draft: Draft) -> None:
    sparse(rng, draft)[1]["vector"] = pick(rng, [0, -1, -4, True, False, 1.0, 2.0, "1", None, [1], -(10**400)])


@breaks("parts", "shape")
def another_shape(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    shape = list(entry["shape"])
    axis = rng.randrange(len(shape))
    scaled = [[*shape[:axis], shape[axis] * f, *shape[axis + 1 :]] for f in (2, 3, 16, 10**6, 10**12, 10**400)]
    smaller = [[*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]], shape[:1], shape[1:], shape[:-1], []]
    moved = [shape[::-1], [*shape[2:], *shape[:2]], [shape[0], 1, *shape[1:]], [*shape, 1], [1, *shape]]
    entry["shape"] = other(rng, [*scaled, *smaller, *moved], shape)


@breaks("shape")
def impossible_shape(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    shape = list(entry["shape"])
    axis = rng.randrange(len(shape))
    value = pick(rng, [0, -shape[axis], float(shape[axis]), str(shape[axis]), [shape[axis]], None, True, {}])
    whole = pick(rng, [None, "x", {}, 3, True, [*shape, *[1] * 16], [*shape, True]])
    entry["shape"] = whole if rng.random() < 0.3 else [*shape[:axis], value, *shape[axis + 1 :]]


@breaks("parts", "dtype")
def another_dtype_in_the_manifest(rng: random.Random, draft: Draft) -> None:
    _, entry = sparse(rng, draft)
    dtype = entry["dtype"]
    entry["dtype"] = other(rng, [*SIZES, "F31", "", dtype.lower(), dtype + " ", "torch.float32"], dtype)


@breaks("dtype")
def dtype_of_another_type(rng: random.Random, draft: Draft) -> None:
    sparse(rng, draft)[1]["dtype"] = odd(rng, str)


@breaks("dtype")
def sparse_without_a_zero(rng: random.Random, draft: Draft) -> None:
    """F8_E8M0 cannot say zero, so nothing can be left out."""
    name, entry = sparse(rng, draft)
    if SIZES[entry["dtype"]] != 1:
        raise NotHereError
    values = name + ".nm_values"
    entry["dtype"] = draft.entries[values]["dtype"] = draft.manifest["tensors"][values]["dtype"] = "F8_E8M0"


def objects(draft: Draft) -> list[dict[str, Any]]:
    """The objects of the manifest that have fixed members."""
    manifest = draft.manifest
    return [manifest, manifest["model"], *manifest["sparse"].values(), *manifest["tensors"].values()]


@breaks("members")
def member_missing(rng: random.Random, draft: Draft) -> None:
    draft.rehash = rng.random() < 0.5
    place = objects(draft)[pick(rng, range(len(objects(draft))))]
    del place[pick(rng, place)]


@breaks("members")
def member_unknown(rng: random.Random, draft: Draft) -> None:
    place = objects(draft)[pick(rng, range(len(objects(draft))))]
    place[pick(rng, ["", "code", "extra", "Version", "import", "__class__", "é", "sha-256"])] = odd(rng)


@breaks("members", "types")
def object_replaced(rng: random.Random, draft: Draft) -> None:
    draft.rehash = False
    kind = pick(rng, ["sparse", "tensors", "model", None])
    if kind is None:
        draft.manifest = odd(rng, dict)
    elif kind == "model" or rng.random() < 0.5:
        draft.manifest[kind] = odd(rng, dict)
    else:
        draft.manifest[kind][pick(rng, draft.manifest[kind])] = odd(rng, dict)


@breaks("types", "members")
def member_of_another_type(rng: random.Random, draft: Draft) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "unstructured": (dict,), "method": (str,), "epoch": (int, type(None)), "metrics": (dict,), "recipe": (str,),
        "environment": (dict,), "arch": (str, type(None)), "kwargs": (dict,), "task": (str, type(None)),
    }  # fmt: skip
    name = pick(rng, kinds)
    place = draft.manifest if name in draft.manifest else draft.manifest["model"]
    place[name] = odd(rng, *kinds[name])


@breaks("version", "types")
def another_version(rng: random.Random, draft: Draft) -> None:
    draft.manifest["version"] = other(rng, [0, 2, -1, 10**400, *ODD], 1)


@breaks("phase", "types")
def another_phase(rng: random.Random, draft: Draft) -> None:
    draft.manifest["phase"] = pick(rng, ["", "Final", "final ", "done", "FINAL", "trainin", "final\n", *ODD])


@breaks("phase")
def training_with_sparse_tensors(rng: random.Random, draft: Draft) -> None:
    if not (draft.manifest["sparse"] or draft.manifest["unstructured"]):
        raise NotHereError
    draft.manifest["phase"] = "training"


@breaks("tensors")
def tensor_unlisted(rng: random.Random, draft: Draft) -> None:
    del draft.manifest["tensors"][pick(rng, draft.entries)]


@breaks("tensors")
def tensor_listed_but_missing(rng: random.Random, draft: Draft) -> None:
    draft.manifest["tensors"]["ghost"] = copy.deepcopy(draft.manifest["tensors"][pick(rng, draft.entries)])


@breaks("tensors")
def tensor_unknown(rng: random.Random, draft: Draft) -> None:
    draft.add("extra", "F32", [2], bytes(8))
    del draft.manifest["tensors"]["extra"]


@breaks("tensors")
def tensor_gone_from_the_file(rng: random.Random, draft: Draft) -> None:
    name = pick(rng, draft.entries)
    listed = copy.deepcopy(draft.manifest["tensors"][name])
    draft.drop(name)
    draft.manifest["tensors"][name] = listed


@breaks("tensors")
def listed_dtype(rng: random.Random, draft: Draft) -> None:
    name = pick(rng, draft.entries)
    draft.manifest["tensors"][name]["dtype"] = other(rng, [*SIZES, *ODD, "F31"], draft.entries[name]["dtype"])


@breaks("tensors")
def listed_shape(rng: random.Random, draft: Draft) -> None:
    name = pick(rng, draft.entries)
    shape = draft.entries[name]["shape"]
    floats = [float(size) for size in shape]
    truths = [bool(size) if size in (0, 1) else size for size in shape]
    choices = [*ODD, floats, truths, [*shape, 1], shape[::-1], shape[1:], [size + 1 for size in shape], [10**12, 0]]
    draft.manifest["tensors"][name]["shape"] = other(rng, choices, shape)


@breaks("digest", "tensors")
def digest_of_a_tensor(rng: random.Random, draft: Draft) -> None:
    draft.rehash = False
    listed = draft.manifest["tensors"][pick(rng, draft.entries)]
    true, at = listed["sha256"], rng.randrange(64)
    near = true[:at] + other(rng, "0123456789abcdef", true[at]) + true[at + 1 :]
    choices = [near, near, true.upper(), true[:-1], true + "0", " " + true, true + "\n", "", true[::-1], "0" * 64, *ODD]
    listed["sha256"] = other(rng, choices, true)


@breaks("digest")
def data_changed_under_old_digests(rng: random.Random, draft: Draft) -> None:
    draft.rehash = False
    name = pick(rng, [name for name in draft.blobs if draft.blobs[name]])
    blob = bytearray(draft.blobs[name])
    blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    draft.blobs[name] = bytes(blob)


@breaks("unstructured")
def unstructured_that_cannot_be(rng: random.Random, draft: Draft) -> None:
    dense_names = sorted(set(draft.entries) - set(parts(draft)))
    names = [*draft.manifest["sparse"], *parts(draft), "ghost", ""]
    if rng.random() < 0.5 and dense_names:
        name = pick(rng, dense_names)
        elements = math.prod(draft.entries[name]["shape"])
        draft.manifest["unstructured"][name] = pick(rng, [-1, elements + 1, 10**400, odd(rng, int)])
    else:
        draft.manifest["unstructured"][pick(rng, names)] = rng.choice([0, 1])


# The container.


def hostile_name(rng: random.Random) -> str:
    return str(
        pick(
            rng,
            ["", "..", "../x", "a/../b", "a\\..\\b", "/etc/x", "\\x", "a\nb", "a\0", "\x7f", "\x85", "\u2028", "\x1b["],
        )
    )


@breaks("name", "parts")
def name_that_is_hostile(rng: random.Random, draft: Draft) -> None:
    draft.rename(pick(rng, draft.entries), hostile_name(rng))


@breaks("metadata")
def metadata_keys(rng: random.Random, draft: Draft) -> None:
    key, action = pick(rng, ["format", draft.key, draft.key + ".sha256"]), rng.randrange(4)

    def edit(metadata: dict[str, Any]) -> None:
        if action == 0:
            del metadata[key]
        elif action == 1:
            metadata[pick(rng, ["a", "lbc.", "lbc.recipe", "zz", ""])] = ""
        elif action == 2:
            metadata[key] = odd(rng, str)
        else:
            metadata["format"] = pick(rng, ["", "np", "PT", "pt ", "tf"])

    draft.edit_metadata = edit


@breaks("seal")
def manifest_under_another_digest(rng: random.Random, draft: Draft) -> None:
    action, seal = rng.randrange(4), draft.key + ".sha256"

    def edit(metadata: dict[str, Any]) -> None:
        digest = metadata[seal]
        if action == 0:
            metadata[draft.key] = metadata[draft.key].replace('"version"', '"versiom"', 1)
        elif action == 1:
            metadata[seal] = other(rng, [digest.upper(), digest[::-1], digest[:-1], "", digest + " "], digest)
        elif action == 2:
            at = rng.randrange(64)
            metadata[seal] = digest[:at] + other(rng, "0123456789abcdef", digest[at]) + digest[at + 1 :]
        else:
            metadata[draft.key] += " "

    draft.edit_metadata = edit


@breaks("manifest", "members", "types")
def manifest_spelled_otherwise(rng: random.Random, draft: Draft) -> None:
    text = compact(draft.manifest, ordered=True)
    colon = pick(rng, [at for at, sign in enumerate(text) if sign == ":" and text[at - 1] == '"'])
    brace = text.rindex("}")
    spelled = [
        text[: colon + 1] + pick(rng, [" ", "\t", "\n"]) + text[colon + 1 :],
        pick(rng, [" ", "\n", "\ufeff"]) + text,
        text + pick(rng, [" ", "\n", "\0", "{}", ","]),
        json.dumps(draft.manifest, separators=(",", ":"), sort_keys=True).replace('"version"', '"versio\\u006e"'),
        text.replace('"version":1', '"version":1,"version":1'),
        text.replace('"version":1', '"version":1.0'),
        text.replace('"version":1', '"version":01'),
        text.replace('"metrics":{', '"metrics":{"a":1,"a":1,'),
        text.replace(
            '"metrics":{', '"metrics":{"a":' + pick(rng, ["NaN", "1e999", "1E2", "-0", "1.50", "Infinity"]) + ","
        ),
        text.replace('"phase":"final"', '"phase":"final","aaaa":0'),
        text[:brace],
        text[1:],
        text.replace('"', "'"),
        "",
        "null",
        "[" * 100_000,
        text.replace('"metrics":{', '"metrics":{"a":' + "[" * 100_000 + ","),
    ]
    found = other(rng, spelled, text)
    draft.spell_manifest = lambda manifest: found


@breaks("manifest")
def manifest_nested_too_deep(rng: random.Random, draft: Draft) -> None:
    """Depths at which some parsers and printers give up and others do not."""
    nested: Any = rng.choice([1, {}])
    for _ in range(rng.choice([rng.randint(65, 400), rng.randint(400, 1000)])):
        nested = rng.choice([[nested], {"a": nested}])
    text = compact(draft.manifest, ordered=True)
    deep = spell_deep(nested)
    member = pick(rng, ['"metrics":{', '"kwargs":{', '"environment":{', '"unstructured":{', '"sparse":{'])
    if rng.random() < 0.2:
        found = text.replace('"version":1', '"version":' + deep)
    else:
        found = text.replace(member, member + '" ":' + deep + ",").replace(",}", "}")
    draft.spell_manifest = lambda manifest: found


def spell_deep(nested: Any) -> str:
    """Compact JSON without recursion, which would meet its own limit."""
    opening, closing = [], []
    while isinstance(nested, list) or nested:
        if nested == 1:
            break
        opening.append("[" if isinstance(nested, list) else '{"a":')
        closing.append("]" if isinstance(nested, list) else "}")
        nested = nested[0] if isinstance(nested, list) else nested["a"]
    return "".join(opening) + ("1" if nested == 1 else "{}") + "".join(reversed(closing))


@breaks("spelling", "header")
def header_order(rng: random.Random, draft: Draft) -> None:
    action = rng.randrange(4)

    def edit(header: dict[str, Any]) -> dict[str, Any]:
        names = entry_names(header)
        if action == 0:
            return {**{name: header[name] for name in names}, "__metadata__": header["__metadata__"]}
        if action == 1:
            header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
            return header
        if action == 2 and len(names) > 1:
            a, b = rng.sample(range(len(names)), 2)
            names[a], names[b] = names[b], names[a]
            return {"__metadata__": header["__metadata__"], **{name: header[name] for name in names}}
        name = pick(rng, names)
        header[name] = dict(reversed(header[name].items()))
        return header

    draft.edit_header = edit


@breaks("spelling", "header", "size")
def offsets(rng: random.Random, draft: Draft) -> None:
    action = rng.randrange(5)

    def edit(header: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in entry_names(header) if draft.blobs[name]]
        name = pick(rng, names)
        begin, end = header[name]["data_offsets"]
        shift = pick(rng, [-8, -1, 1, 8, 10**12, 10**400, 10**4299])
        if action == 0:
            header[name]["data_offsets"] = [begin + shift, end + shift]
        elif action == 1:
            header[name]["data_offsets"] = pick(rng, [[begin, end + shift], [begin + shift, end], [end, begin]])
        elif action == 2:
            odd_pairs = [
                [begin],
                [begin, end, end],
                [float(begin), float(end)],
                [str(begin), end],
                None,
                "",
                [None, None],
            ]
            header[name]["data_offsets"] = pick(rng, odd_pairs)
        elif action == 3:  # an empty tensor far outside: every sum with such a number has one digit more than allowed
            far = 10**4300 - 1
            header["zz"] = {"dtype": "BOOL", "shape": [0], "data_offsets": [far, far]}
        else:
            header[name]["data_offsets"] = [0, end - begin] if begin else [begin + 1, end + 1]
        return header

    draft.edit_header = edit


@breaks("header", "spelling", "size", "metadata", "tensors")
def header_entries(rng: random.Random, draft: Draft) -> None:
    action = rng.randrange(7)

    def edit(header: dict[str, Any]) -> dict[str, Any]:
        name = pick(rng, entry_names(header))
        entry = header[name]
        if action == 0:
            del entry[pick(rng, entry)]
        elif action == 1:
            entry[pick(rng, ["", "extra", "Dtype", "é"])] = odd(rng)
        elif action == 2:
            entry["dtype"] = other(rng, [*ODD, "F31", entry["dtype"].lower(), "U8", "F32", "F64"], entry["dtype"])
        elif action == 3:
            shape = entry["shape"]
            choices = [*ODD, [float(size) for size in shape], [*shape, 1], [-size for size in shape], [[]], [0, 10**12]]
            entry["shape"] = other(rng, [*choices, [10**400, 0], [*shape, 10**4299]], shape)
        elif action == 4:
            header[name] = odd(rng, dict)
        elif action == 5:
            header["zz"] = {"dtype": "BOOL", "shape": [0, 10**12], "data_offsets": [0, 0]}
        else:
            header["__metadata__"] = odd(rng, dict)
        return header

    draft.edit_header = edit


@breaks("spelling", "header", "size", "metadata")
def header_spelled_otherwise(rng: random.Random, draft: Draft) -> None:
    action = rng.randrange(9)

    def spell(header: dict[str, Any]) -> bytes:
        text = header_text(header)
        name = pick(rng, entry_names(header))
        entry = compact({name: header[name]}, ordered=False).encode()[1:-1]
        if action == 0:
            return padded(text) + b" " * 8
        if action == 1:
            return text.rstrip(b"}")
        if action == 2:
            return padded(json.dumps(header, ensure_ascii=False).encode())
        if action == 3:
            return padded(text[:-1] + b"," + entry + b"}")
        if action == 4:
            return padded(text.replace(b'"dtype"', b'"dtyp\\u0065"', 1))
        if action == 5:
            return b" " * (-len(text) % 8 or 8) + text
        if action == 6:
            return text + b"\n" * (-len(text) % 8 or 8)
        if action == 7:
            return padded(text.replace(b"data_offsets", b"data\xff_offsets", 1))
        return padded(pick(rng, [b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"3", b"{}", b'{"__metadata__":{}}']))

    draft.spell_header = spell


def mutate(seed: int) -> tuple[str, str, bytes, bytes]:
    """A base, how it was broken, the sound file and the broken one. The same for the same seed."""
    rng = random.Random(seed)
    base = pick(rng, bases())
    while True:
        name = pick(rng, MUTATIONS)
        draft = Draft.of(bases()[base])
        try:
            MUTATIONS[name](rng, draft)
            return base, name, bases()[base], draft.seal()
        except NotHereError:
            continue
