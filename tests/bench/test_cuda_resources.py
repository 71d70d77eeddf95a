"""What the CUDA kernels are made of: the decoder, loops and their names, and a gate that must be able to fail."""

import copy
import itertools
import os
import struct

import pytest
from click.testing import CliRunner

from benchmarks.cuda_resources import __main__ as command
from benchmarks.cuda_resources import sass, table, toolkit
from benchmarks.cuda_resources.count import COLUMNS, count_kernel
from benchmarks.cuda_resources.loops import costliest_way, find_loops, is_wait, is_waterfall
from benchmarks.cuda_resources.naming import Names
from benchmarks.cuda_resources.report import as_markdown
from fastlora.backends.cuda import extension

# A source tree with the functions by which code is named.
KERNEL = """template <class Traits>
__device__ __forceinline__ void consume() {
  compute_output_tile(c);
}
__device__ __forceinline__ void run() {
  if (elected) Producer<Traits>().run();
  consume<Traits>();
}
"""
PRODUCER = """  __device__ __forceinline__ void run() {
    load_output(tile);
  }
  __device__ __forceinline__ void share_boxes(int i) {
    for (int box = i + cta;;) {
      if (kBoxes % kCluster == 0 || box < kBoxes) copy_box(box);
    }
  }
  __device__ __forceinline__ void load_output(TileInfo tile) {
    copy(act);
    share_boxes(i);
    if (makes_s) Branch::load_down();
    if (claims) ticket = claim();
    if (expands) load_expand(tile);
  }
  __device__ __forceinline__ void load_expand(TileInfo tile) {
    copy(s);
    share_boxes(0);
    if (bias_now) copy(bias);
  }
"""
PRODUCT = """__device__ __forceinline__ void multiply() {
  wgmma();
}
__device__ __forceinline__ void finish_tile() {
  store();
}
__device__ __forceinline__ void compute_output_tile() {
  multiply<false, true>(c);
  multiply<true, false>(c);
  finish_tile(c);
  multiply<true, true>(c);
}
"""
LOAD = ("producer.cuh", 2), ("kernel.cuh", 6)
CONSUME = ("kernel.cuh", 3), ("kernel.cuh", 7)
BASE = ("product.cuh", 2), ("product.cuh", 9), *CONSUME


@pytest.fixture
def names(tmp_path):
    for name, text in (("kernel.cuh", KERNEL), ("producer.cuh", PRODUCER), ("product.cuh", PRODUCT)):
        (tmp_path / name).write_text(text)
    return Names(tmp_path)


def listing(*lines) -> str:
    """What the disassembler prints for (text, stall, places), or for labels, which are plain strings."""
    text, address = [".text.kernel:"], 0
    for line in lines:
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        code, stall, *places = line
        for place, caller in itertools.zip_longest(places, places[1:]):
            inlined = f' inlined at "/src/{caller[0]}", line {caller[1]}' if caller else ""
            text.append(f'\t//## File "/src/{place[0]}", line {place[1]}{inlined}')
        text.append(f"        /*{address:04x}*/  {code} ;  /* 0x{0:016x} */")
        text.append(f"                           /* 0x{stall << 41:016x} */")
        address += 16
    return "\n".join(text)


def code_of(*lines) -> list[sass.Instruction]:
    return sass.parse(listing(*lines))["kernel"]


@pytest.mark.parametrize(
    "bit, change",
    (
        (105, {"stall": 1}), (108, {"stall": 8}), (109, {"yields": False}), (110, {"sets_when_written": 1}),
        (112, {"sets_when_written": 4}), (113, {"sets_when_read": 1}), (116, {"waits_for": (0,)}),
        (121, {"waits_for": (5,)}), (122, {"reuse": 1}), (125, {"reuse": 8}), (104, {}), (126, {}),
    ),
)  # fmt: skip
def test_each_control_bit_is_decoded_where_it_is(bit, change):
    nothing = sass.Control(0, True, 0, 0, (), 0)
    assert sass.decode_control(0) == nothing
    decoded = sass.decode_control(1 << bit)
    assert decoded == sass.Control(**{**vars(nothing), **change})


def test_a_real_instruction_is_decoded():
    """S2R R0, SR_TID.X sets scoreboard 1 when its result is there, and lets the next instruction go at once."""
    control = sass.decode_control(0x000E620000002100 << 64 | 0x0000000000007919)
    assert control == sass.Control(1, False, 1, None, (), 0) and str(control) == "------:--:W1:-:01"


def test_a_listing_is_parsed():
    code = code_of(
        ".L_x_1",
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", 3, *BASE),
        ("MOV R1, R2", 2),
        ("@!P0 BRA `(.L_x_1)", 5, ("kernel.cuh", 7)),
    )
    assert [each.address for each in code] == [0, 16, 32] and [each.stall for each in code] == [3, 2, 5]
    assert code[0].places == tuple(reversed(BASE)) == code[1].places, "places hold until others are named"
    assert code[2].places == (("kernel.cuh", 7),)
    assert (code[2].predicate, code[2].target) == ("!P0", 0)
    assert code[0].is_a("HGMMA") and code[0].is_a("HGMMA.64x256x16") and not code[0].is_a("HGMMA.64x2", "HG")


@pytest.mark.parametrize(
    "text, message",
    (
        (listing(("MOV R1, R2", 1)).rsplit("\n", 1)[0], "second half"),
        (listing(("BRA `(.L_x_9)", 1)), r"\.L_x_9, which is nowhere"),
    ),
)
def test_a_broken_listing_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sass.parse(text)


def elf(machine: int, size: int) -> bytes:
    """A file of ``size`` bytes which ends with two section headers of 64 bytes."""
    header = b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", machine) + bytes(12)
    header += struct.pack("<QQ", 64, size - 128) + bytes(6) + struct.pack("<HHHH", 56, 1, 64, 2)
    return header + bytes(size - len(header))


def test_images_of_machine_code_are_cut_out_of_a_library():
    first, second = elf(190, 300), elf(190, 400)
    assert sass.cubins(elf(62, 256) + first + b"between" + second + b"behind") == [first, second]
    with pytest.raises(ValueError, match="no machine code"):
        sass.cubins(elf(62, 256))


WATERFALL = (
    ".L_x_2",
    ("@P0 ELECT P4, URZ, PT", 13, ("producer.cuh", 6), ("producer.cuh", 11), *LOAD),
    ("@P4 R2UR UR8, R4", 2),
    ("UTMALDG.2D.MULTICAST [UR8], [UR4], UR6", 2),
    ("@P0 BRA `(.L_x_2)", 5),
)
WAIT = (".L_x_3", ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R11", 1), ("@!P0 BRA `(.L_x_3)", 5))


def test_waterfalls_and_waits_are_told_from_loops():
    ((waterfall,), (wait,)) = (find_loops(code_of(*lines)) for lines in (WATERFALL, WAIT))
    assert is_waterfall(waterfall) and not is_wait(waterfall)
    assert is_wait(wait) and not is_waterfall(wait)
    # An election in the sources: at a loop's start, but nothing is moved; or moved, but inside a loop.
    elected = code_of(".L_x_1", ("ELECT P0, URZ, PT", 1), ("UTMALDG.2D [UR8], [UR4]", 1), ("@P1 BRA `(.L_x_1)", 5))
    inside = code_of(
        ".L_x_1", ("MOV R1, R2", 1), ("ELECT P0, URZ, PT", 1), ("R2UR UR8, R4", 1), ("@P1 BRA `(.L_x_1)", 5)
    )
    assert not any(is_waterfall(loop) for code in (elected, inside) for loop in find_loops(code))
    assert find_loops(code_of(".L_x_1", ("MOV R1, R2", 1), ("BRA `(.L_x_1)", 5))) == [], "a return from a wait"


def test_the_costliest_way_avoids_and_shares():
    code = code_of(
        ("@P0 BRA `(.L_x_1)", 1),
        ("rare R1", 15),
        ".L_x_1",
        ("@P1 BRA `(.L_x_2)", 1),
        ("turn R1", 4),
        ".L_x_2",
        ("@!P1 BRA `(.L_x_3)", 1),
        ("turn R2", 4),
        ("MOV R1, R2", 1),
        ".L_x_3",
        ("end", 2),
    )

    def way(avoided=(), share=1, shared=("turn",)):
        found = costliest_way(code, lambda e: e.is_a(*avoided), lambda e: e.is_a(*shared), share)
        return found and [each.opcode for each in found if not each.is_a("BRA")], found and sum(e.stall for e in found)

    assert way() == (["rare", "turn", "turn", "MOV", "end"], 29)
    assert way(("rare",)) == (["turn", "turn", "MOV", "end"], 14)
    assert way(("rare",), share=2) == (["turn", "MOV", "end"], 10), "one turn of two, the costlier"
    every_ways = ("turn", "BRA", "end")
    assert way(("rare",), 2, every_ways) == (["turn", "MOV", "end"], 10), "turns that no way goes around are no turns"
    assert way(("end",)) is not None and way(("BRA",)) == (None, None)


def test_code_is_named_by_the_functions_that_it_was_inlined_from(names):
    def name(*places):
        return names.name(tuple(reversed(places)))

    assert name(*BASE) == "consumer base: rest"
    assert name(("product.cuh", 2), ("product.cuh", 8), *CONSUME) == "consumer shrink: rest"
    assert name(("product.cuh", 2), ("product.cuh", 11), *CONSUME) == "consumer fused: rest"
    assert name(("product.cuh", 5), ("product.cuh", 10), *CONSUME) == "consumer base: epilogue"
    assert name(("producer.cuh", 10), *LOAD) == "producer base: rest"
    assert name(("producer.cuh", 2), ("kernel.cuh", 6)) == "producer: tile switch"
    assert name(("kernel.cuh", 3), ("kernel.cuh", 7)) == "consumer: tile switch"
    assert name(("kernel.cuh", 6)) == "start and exit"
    assert name(("elsewhere.h", 3), ("kernel.cuh", 6)) == "start and exit"


def consumer(*more):
    return (
        ".L_x_1",
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", 3, *BASE),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 2),
        *more,
        ("@!P0 BRA `(.L_x_1)", 5),
        ("UTMASTG.2D [UR8], [UR4]", 2, ("product.cuh", 5), ("product.cuh", 10), *CONSUME),
    )


def producer(*copy):
    """A step: a box of the CTA's own, two that the cluster's CTAs share, the shrinking factor, and a claim."""
    turn = ("producer.cuh", 6), ("producer.cuh", 11), *LOAD
    return (
        ".L_x_4",
        ("UTMALDG.2D [UR8], [UR4]", 2, ("producer.cuh", 10), *LOAD),
        ("@UP0 UTMALDG.2D.MULTICAST [UR8], [UR4], UR6", 2, *turn),
        *copy,
        ("@P2 BRA `(.L_x_5)", 1, ("producer.cuh", 12), *LOAD),
        ("UTMALDG.2D [UR8], [UR4]", 2, ("branch.cuh", 1), ("producer.cuh", 12), *LOAD),
        ("@P2 BRA `(.L_x_5)", 1, ("producer.cuh", 13), *LOAD),
        ("ATOMG.E.ADD R1, R2", 9),
        ".L_x_5",
        ("@!P2 BRA `(.L_x_4)", 5, ("producer.cuh", 10), *LOAD),
    )


SECOND_TURN = (("@!UP0 UTMALDG.2D.MULTICAST [UR8], [UR4], UR6", 2, ("producer.cuh", 6), ("producer.cuh", 11), *LOAD),)


def rows_of(names, *lines) -> dict:
    return count_kernel(code_of(*lines), names, cluster=2)


def test_a_kernels_rows(names):
    rows = rows_of(names, *consumer(), *producer(*SECOND_TURN))
    assert set(rows) == {"all", "consumer base: loop", "consumer base: epilogue", "producer base: loop"}
    loop = {"code": 3, "step": 3, "stalls": 10, "products": 1, "waits": 1}
    assert rows["consumer base: loop"] == dict.fromkeys(COLUMNS, 0) | loop
    # Two copies of a step, since one of the shared two is the other CTA's; neither the shrinking factor nor the claim.
    loop = {"code": 8, "step": 5, "stalls": 12, "copies": 4, "issued": 2}
    assert rows["producer base: loop"] == dict.fromkeys(COLUMNS, 0) | loop
    assert rows["consumer base: epilogue"] == dict.fromkeys(COLUMNS, 0) | {
        "code": 1,
        "step": 1,
        "stalls": 2,
        "stores": 1,
    }
    assert rows["all"]["waterfalls"] == 0


def test_a_step_of_a_fused_tile_loads_the_shrinking_factor(names, tmp_path):
    (tmp_path / "branch.cuh").write_text("__device__ __forceinline__ void load_down() {}\n")
    rows = rows_of(Names(tmp_path), *consumer(), *producer(*SECOND_TURN))
    assert rows["producer base: loop"]["issued"] == 2
    assert (rows["producer fused: loop"]["issued"], rows["producer fused: loop"]["stalls"]) == (3, 15)


def test_a_step_of_the_expand_loop_has_the_copies_of_its_every_step(names):
    """Not every tile has the loop, but each of its steps does the same, but for what is conditional inside."""
    call = ("producer.cuh", 14), *LOAD
    turn = ("producer.cuh", 6), ("producer.cuh", 18), *call
    expand = (
        ".L_x_6",
        ("UTMALDG.2D [UR8], [UR4]", 2, ("producer.cuh", 17), *call),
        ("@UP0 UTMALDG.2D.MULTICAST [UR8], [UR4], UR6", 2, *turn),
        ("@!UP0 UTMALDG.2D.MULTICAST [UR8], [UR4], UR6", 2, *turn),
        ("@P2 BRA `(.L_x_7)", 1, ("producer.cuh", 19), *call),
        ("UTMALDG.2D [UR8], [UR4]", 2, ("producer.cuh", 19), *call),
        ".L_x_7",
        ("@!P2 BRA `(.L_x_6)", 5, ("producer.cuh", 17), *call),
    )
    rows = rows_of(names, *consumer(), *producer(*SECOND_TURN), *expand)
    loop = {"code": 6, "step": 5, "stalls": 12, "copies": 4, "issued": 2}
    assert rows["producer base: expand loop"] == dict.fromkeys(COLUMNS, 0) | loop
    assert rows["producer base: loop"] == rows_of(names, *consumer(), *producer(*SECOND_TURN))["producer base: loop"]


def test_the_loop_over_tiles_is_no_loop_of_a_tile(names):
    around = (".L_x_0", *consumer(), *producer(*SECOND_TURN), ("@!P3 BRA `(.L_x_0)", 5, ("kernel.cuh", 3), CONSUME[1]))
    rows = rows_of(names, *around)
    assert set(rows) == set(rows_of(names, *consumer(), *producer(*SECOND_TURN))) | {"consumer: tile switch"}
    assert rows["consumer base: loop"]["code"] == 3


def as_table(rows: dict, **changes) -> dict:
    kernel = {"registers": 168, "shared": 1, "stack": 0, "spilled": 0, "rows": rows} | changes
    return {"nvcc": "13.0.88", "source": toolkit.source_digest(), "remarks": [], "kernels": {"k": kernel}}


def test_the_gate_sees_faults(names):
    good = rows_of(names, *consumer(), *producer(*SECOND_TURN))
    assert table.faults(as_table(good)) == []
    (waterfall,) = table.faults(as_table(rows_of(names, *consumer(), *producer(*WATERFALL))))
    assert waterfall == "k, producer base: loop: 1 waterfalls"
    (spill,) = table.faults(as_table(rows_of(names, *consumer(("LDL R1, [R2]", 1)), *producer())))
    assert spill == "k, consumer base: loop: 1 spills"
    for barrier, count in (("MEMBAR.ALL.GPU", 1), ("MEMBAR.SC.GPU", 1), ("MEMBAR.ALL.CTA", 0)):
        assert len(table.faults(as_table(rows_of(names, *consumer((barrier, 1)), *producer())))) == count, barrier
    assert len(table.faults(as_table(rows_of(names, *consumer())))) == 1, "no copies"
    for change in ({"stack": 8}, {"spilled": 4}, {"shared": 1 << 20}):
        assert len(table.faults(as_table(good, **change))) == 1, change
    assert table.faults({**as_table(good), "remarks": ["(C7510) serialised"]})


def test_every_difference_is_named(names):
    old = as_table(rows_of(names, *consumer(), *producer()))["kernels"]
    assert table.differences(old, copy.deepcopy(old)) == []
    new = as_table(rows_of(names, *consumer(("MOV R1, R2", 4)), *producer()), registers=160)["kernels"]
    assert table.differences(old, new) == [
        "k, all: code grew from 11 to 12", "k, all: stalls grew from 34 to 38", "k, all: step grew from 11 to 12",
        "k, consumer base: loop: code grew from 3 to 4", "k, consumer base: loop: stalls grew from 10 to 14",
        "k, consumer base: loop: step grew from 3 to 4", "k: registers fell from 168 to 160",
    ]  # fmt: skip
    assert table.differences(old, {}) == ["k: in the table only"]
    assert table.differences({}, old) == ["k: in the library only"]
    del new["k"]["rows"]["producer base: loop"]
    assert "k, producer base: loop: in the table only" in table.differences(old, new)


def test_the_check(names, monkeypatch, tmp_path):
    good = as_table(rows_of(names, *consumer(), *producer()))
    built = as_table(rows_of(names, *consumer(), *producer(*WATERFALL)))["kernels"]
    monkeypatch.setattr(table, "read_library", lambda library, variants: built)
    monkeypatch.setattr(toolkit, "nvcc_version", lambda: "13.0.88")
    problems, notes = command.check(good, tmp_path, [])
    assert "k, producer base: loop: waterfalls grew from 0 to 1" in problems and not notes
    assert "k, producer base: loop: 1 waterfalls" in problems
    # Another compiler's counts are not compared, but a waterfall is one everywhere.
    monkeypatch.setattr(toolkit, "nvcc_version", lambda: "12.8.55")
    problems, notes = command.check(good, tmp_path, [])
    assert problems == ["k, producer base: loop: 1 waterfalls"] and "nvcc 13.0.88, here is 12.8.55" in notes[0]
    problems, _ = command.check({**good, "source": "another"}, tmp_path, [])
    assert len(problems) == 1 and "csrc/ has changed" in problems[0]


def test_without_the_extension_the_command_says_so(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: (None, "no nvcc was found"))
    result = CliRunner().invoke(command.main, ["--check"])
    assert result.exit_code == 1 and "Error: nothing to count: no nvcc was found" in result.output


def test_a_library_older_than_the_sources_is_refused(tmp_path):
    library = tmp_path / "_C.so"
    library.write_bytes(b"")
    os.utime(library, (0, 0))
    with pytest.raises(ValueError, match="older than csrc/.*: build it again"):
        table.read_library(library, [])


def test_the_committed_table_passes_and_is_of_these_sources():
    """`make check` compares it with the library, which takes half a minute."""
    recorded = table.from_json(command.TABLE.read_text())
    assert table.faults(recorded) == []
    assert recorded["source"] == toolkit.source_digest()
    assert command.TABLE.with_suffix(".md").read_text() == as_markdown(recorded)
    assert command.TABLE.read_text() == table.to_json(recorded)
