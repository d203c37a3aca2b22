"""What is counted in compiled modules: written by hand, in the ways of each compiler, and real."""

import jax
import jax.numpy as jnp
import pytest

from launch import hlo


def module(entry: str, *others: str) -> str:
    """A module of an entry computation and others; instructions a line each."""
    head = "HloModule jit_f, is_scheduled=true\n\n"
    return head + "\n\n".join([*others, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}"])


def loop(trips: str, body: str, start: str = "0") -> str:
    """A module with a loop; `trips` stands behind its attributes."""
    return module(
        f"  %zero = s32[] constant({start})\n  %p = f32[8]{{0}} parameter(0)\n"
        "  %init = (s32[], f32[8]{0}) tuple(%zero, %p)\n"
        "  %while.1 = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body"
        f"{trips}\n"
        "  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1",
        "%cond (c: (s32[], f32[8])) -> pred[] {\n  %c = (s32[], f32[8]{0}) parameter(0)\n"
        "  %n = s32[] constant(6)\n  %i = s32[] get-tuple-element(%c), index=0\n"
        "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}",
        "%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {\n  %b = (s32[], f32[8]{0}) parameter(0)\n"
        "  %j = s32[] get-tuple-element(%b), index=0\n"
        f"  %x = f32[8]{{0}} get-tuple-element(%b), index=1\n{body}\n"
        "  ROOT %next = (s32[], f32[8]{0}) tuple(%j, %y)\n}",
    )


SINE = "  %y = f32[8]{0} sine(%x)"


@pytest.mark.parametrize(
    ("text", "shape", "size", "space"),
    [
        ("f32[2,3]{1,0}", (2, 3), 24, 0),
        ("bf16[]", (), 2, 0),
        ("pred[7]{0}", (7,), 7, 0),
        ("s4[8]{0}", (8,), 4, 0),
        ("f8e4m3fn[5]{0}", (5,), 5, 0),
        ("bf16[16,256]{1,0:T(8,128)(2,1)S(1)}", (16, 256), 8192, 1),
        ("token[]", (), 0, 0),
    ],
)
def test_types(text, shape, size, space):
    assert hlo.arrays_of(text) == (hlo.Array(shape, size, space),)


def test_a_line_with_everything():
    line = (
        "  ROOT %a.1 = (f32[2]{0:T(8,128)}, /*index=1*/s32[]) custom-call(%b, %c.2), "
        'custom_call_target="f(%x)", control-predecessors={%d}, called_computations={%e, %g}'
    )
    found = hlo.parse_instruction(line)
    assert (found.name, found.opcode, found.root) == ("a.1", "custom-call", True)
    assert [a.shape for a in found.arrays] == [(2,), ()]
    assert found.operands == ("b", "c.2") and found.called == {"called_computations": ("e", "g")}


@pytest.mark.parametrize(
    "line", ["", "}", "HloModule x", '1 "/a/b.py"', "%f (p: f32[]) -> f32[] {"]
)
def test_what_is_no_instruction(line):
    assert hlo.parse_instruction(line) is None


def test_what_is_no_module():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.count("something else")


@pytest.mark.parametrize(
    ("trips", "start", "kernels", "unknown"),
    [
        (', backend_config={"known_trip_count":{"n":"4"}}', "0", 4, 0),  # CPUs and GPUs
        ("", "0", 6, 0),  # TPUs: from one constant to another
        ("", "2", 4, 0),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(trips, start, kernels, unknown):
    found = hlo.count(loop(trips, SINE, start))
    assert (found.kernels, found.loops, found.open_loops) == (kernels, 1, unknown)


def test_a_loop_of_unknown_length_counts_once():
    text = loop("", SINE).replace(
        "%n = s32[] constant(6)", "%n = s32[] get-tuple-element(%c), index=0"
    )
    found = hlo.count(text)
    assert (found.kernels, found.loops, found.open_loops) == (1, 1, 1)


FUSED = """%fused (a: f32[4,8], b: f32[8], i: s32[]) -> f32[4,8] {{
  %a = f32[4,8]{{1,0}} parameter(0)
  %b = f32[8]{{0}} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %add = s32[] add(%i, %zero)
{work}
  %row = f32[1,8]{{1,0}} bitcast(%c)
  ROOT %update = f32[4,8]{{1,0}} dynamic-update-slice(%a, %row, %add, %zero)
}}"""
UPDATE = """  %p = f32[8]{0} parameter(0)
  %i = s32[] constant(1)
  %a = f32[4,8]{1,0} constant({...})
  ROOT %f = f32[4,8]{1,0} fusion(%a, %p, %i), kind=kCustom, calls=%fused"""


@pytest.mark.parametrize(
    ("work", "copies", "copied", "kernels"),
    [
        ("  %c = f32[8]{0} copy(%b)", 1, 32, 0),  # a row is written into its place
        ("  %c = f32[8]{0} sine(%b)", 0, 0, 1),  # a result is
        ("  %c = f32[8]{0} convert(%b)", 0, 0, 1),
    ],
)
def test_a_fusion_that_only_moves_is_a_copy(work, copies, copied, kernels):
    found = hlo.count(module(UPDATE, FUSED.format(work=work)))
    assert (found.copies, found.copied, found.kernels) == (copies, copied, kernels)


HBM, VMEM = "f32[8]{0:T(128)}", "f32[8]{0:T(128)S(1)}"


@pytest.mark.parametrize(
    ("line", "copies"),
    [
        (f"%c = {HBM} copy(%p)", 1),
        (f"%c = {VMEM} copy(%p)", 0),  # into the fast memory of a TPU
        (f"%c = {HBM} copy(%v)", 0),  # and out of it
        (f"%c = ({HBM}, {HBM}, u32[]{{:S(2)}}) copy-start(%p)", 1),
        (f"%c = ({VMEM}, {HBM}, u32[]{{:S(2)}}) copy-start(%p)", 0),
        (f"%c = (({HBM}), f32[4]{{0:S(1)}}, s32[]{{:S(2)}}) slice-start(%p), slice={{[0:4]}}", 0),
        (f"%c = (({HBM}), f32[4]{{0}}, s32[]{{:S(2)}}) slice-start(%p), slice={{[0:4]}}", 1),
        ("%c = f32[8]{0} bitcast(%p)", 0),
    ],
)
def test_copies_are_within_the_large_memory(line, copies):
    entry = f"  %p = {HBM} parameter(0)\n  %v = {VMEM} sine(%p)\n  ROOT {line}"
    assert hlo.count(module(entry)).copies == copies


def collectives(entry: str, *others: str) -> dict:
    return hlo.count(module("  %p = f32[8]{0} parameter(0)\n" + entry, *others)).traffic()


def test_the_result_of_a_collective_counts_not_its_operands():
    gather = (
        "  %s = ((f32[8]{0}, bf16[2]{0}), (f32[16]{0}, bf16[4]{0})) all-gather-start(%p, %q), "
        "channel_id=1\n  ROOT %d = (f32[16]{0}, bf16[4]{0}) all-gather-done(%s)"
    )
    assert collectives(gather) == {"all-gather": (1, 72)}
    assert collectives("  ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%add") == {
        "all-reduce": (1, 32)
    }


def test_collectives_of_one_channel_are_several():
    """`jax.shard_map` gives all of its all-to-alls the same."""
    two = (
        "  %a = f32[8]{0} all-to-all(%p), channel_id=1\n"
        "  ROOT %b = f32[8]{0} all-to-all(%a), channel_id=1"
    )
    assert collectives(two) == {"all-to-all": (2, 64)}


def test_a_collective_spread_over_fusions_is_one():
    """As TPUs do, to hide it behind matmuls."""
    part = (
        "%part{0} (x: f32[8]) -> f32[16] {{\n  %x{0} = f32[8]{{0}} parameter(0)\n  ROOT %g{0} = "
        'f32[16]{{0}} all-gather(%x{0}), channel_id=7, metadata={{op_name="dot" '
        "stack_frame_id={1}}}\n}}"
    )
    entry = "\n".join(
        f"  {'ROOT ' * (i == 2)}%f{i} = f32[16]{{0}} fusion(%p), kind=kCustom, calls=%part{i}"
        for i in range(3)
    )
    parts = [part.format(i, 3 if i < 2 else 4) for i in range(3)]
    assert collectives(entry, *parts) == {"all-gather": (2, 128)}


def test_what_packs_for_a_collective_is_no_copy():
    entry = (
        "  %p = f32[8]{0} parameter(0)\n  %c = f32[16]{0} concatenate(%p, %p), dimensions={0}\n"
        "  %s = f32[16]{0} all-reduce-start(%c), to_apply=%add\n"
        "  %d = f32[16]{0} all-reduce-done(%s)\n  %b = f32[4,4]{1,0} bitcast(%d)\n"
        "  %a = f32[2,4]{1,0} slice(%b), slice={[0:2], [0:4]}\n"
        "  ROOT %e = f32[2,4]{0,1} copy(%a)"
    )
    found = hlo.count(module(entry))
    assert (found.packed, found.copies, found.copied) == (2, 1, 32)


def test_an_asynchronous_call_counts_what_it_calls():
    inner = (
        "%async (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
        "  ROOT %r = f32[8]{0} reduce-scatter(%x), channel_id=2, to_apply=%add\n}"
    )
    entry = (
        "  %s = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%async\n"
        "  ROOT %d = f32[8]{0} async-done(%s)"
    )
    assert collectives(entry, inner) == {"reduce-scatter": (1, 32)}


def test_a_collective_in_a_loop_counts_every_time():
    body = "  %y = f32[8]{0} all-reduce(%x), to_apply=%add"
    assert hlo.count(loop("", body)).traffic() == {"all-reduce": (6, 192)}


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%no, %yes}", "true_computation=%yes, false_computation=%no"],
)
def test_where_its_condition_holds(branches):
    """What stands in the other branch is known, and does not count."""
    no, yes = (
        f"%{name} (x: f32[8]) -> f32[8] {{\n  %x{name} = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %r{name} = f32[8]{{0}} {work}(%x{name}), channel_id=1\n}}"
        for name, work in (("no", "all-gather"), ("yes", "all-to-all"))
    )
    entry = (
        "  %p = f32[8]{0} parameter(0)\n  %i = s32[] constant(1)\n"
        f"  ROOT %c = f32[8]{{0}} conditional(%i, %p, %p), {branches}"
    )
    found = hlo.count(module(entry, no, yes))
    assert found.traffic() == {"all-to-all": (1, 32)}
    assert {(c.name, c.times) for c in found.collectives} == {("all-to-all", 1), ("all-gather", 0)}


def test_custom_calls():
    entry = (
        '  %a = f32[8]{0} custom-call(%p), custom_call_target="__cudnn$fmha"\n'
        '  ROOT %b = f32[8]{0} custom-call(%a), custom_call_target="ConcatBitcast"'
    )
    assert hlo.count(module("  %p = f32[8]{0} parameter(0)\n" + entry)).custom_calls == {
        "__cudnn$fmha": 1
    }


# real modules


def compiled(f, *shapes: tuple[int, ...]) -> hlo.Counts:
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.count(jax.jit(f).lower(*arguments).compile().as_text())


def test_a_real_scan():
    """One more kernel in the body of a loop of nine is nine more."""

    def scanned(body):
        return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, length=9)[0]

    one = compiled(scanned(jnp.sin), (128, 128))
    two = compiled(scanned(lambda c: jnp.sin(c) @ c), (128, 128))
    assert one.loops == two.loops == 1 and one.open_loops == 0
    assert two.kernels + sum(two.custom_calls.values()) >= one.kernels + 9


def test_a_real_loop_of_unknown_length():
    found = compiled(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, jnp.exp, x), (64,))
    assert found.loops == found.open_loops == 1


def test_a_real_copy():
    """A transposed result is a copy of an argument."""
    assert compiled(lambda x: x.T, (64, 32)).copies == 1
    assert compiled(lambda x: jnp.sin(x), (64, 32)).copies == 0
