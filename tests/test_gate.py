"""The gate's prices and the line's bookkeeping, in plain numbers: no model, no tensor, no clock but the test's."""

import subprocess
import sys

import pytest
from common import ROOT

from weights.drafting import Gate, Line
from weights.sources import agreeing


def priced(step=5.0, draft=5.0, verify=5.3, late=0.0):
    """A gate that has seen these times, milliseconds. late: by how much a drafter delayed the first id of clips "s"."""
    gate = Gate()
    for what, ms in (("step", step), ("draft", draft), (("verify", 5), verify), (("first id", "s", False), 50.0),
                     (("first id", "s", True), 50.0 + late)):
        gate.timed(what, ms / 1e3)
    return gate


def taught(gate, kind, agreed, drafted=15, times=20):
    for _ in range(times):
        gate.accepted(kind, "q", drafted, agreed)
    return gate


def test_no_tensor_is_needed(user_env):
    code = "import sys; sys.modules['torch'] = None; import weights.sources"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=user_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ours, theirs, length", [
    ([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 9], 1), ([1, 2], [1, 2, 3], 2), ([9, 2], [1, 2], 0),
])
def test_the_common_prefix(ours, theirs, length):
    assert agreeing(ours, theirs) == agreeing(theirs, ours) == length


# ---- the gate


def test_acceptance_is_counted_per_depth_and_stops_at_the_first_rejection():
    gate = taught(Gate(), "head start", agreed=3)
    alive = gate.alive("head start", "q", 6)
    assert alive[:3] == pytest.approx([1, 1, 1]) and alive[3] < 0.05 and alive == sorted(alive, reverse=True)
    assert gate.alive("head start", "another question", 6) == alive
    assert gate.alive("drafter", "q", 3) == [1, 1, 1], "another kind has no record"


def test_half_the_tries_is_half_the_probability():
    gate = Gate(decay=1.0)
    for i in range(400):
        gate.accepted("drafter", "q", 5, 5 if i % 2 else 0)
    assert gate.alive("drafter", "q", 5) == pytest.approx([0.5] * 5, abs=0.01)


def test_a_price_is_the_undisturbed_one_of_the_last_nine():
    gate = Gate()
    for ms in (1, *[5, 9, 7] * 3):
        gate.timed("step", ms / 1e3)
    assert gate.step == 5e-3
    assert gate.draft == 5e-3, "no draft was seen: a step stands in"
    gate.timed("head draft", 2e-3)
    assert gate.draft == 2e-3
    for width, ms in ((1, 5.1), (15, 6.0), (31, 7.0)):
        gate.timed(("verify", width), ms / 1e3)
    assert [gate.verify(drafts) for drafts in (2, 14, 40)] == pytest.approx([5.1e-3, 6e-3, 7e-3]), "the nearest width's"


@pytest.mark.parametrize("draft, agreed, wanted", [(5.0, 5, 0), (1.7, 5, 5), (1.7, 0, 0), (1.7, 2, 2)])
def test_rounds_are_as_long_as_pays(draft, agreed, wanted):
    """A drafter that steps as slowly as its target never pays on one device, however right it is."""
    gate = taught(priced(draft=draft), "drafter", agreed, drafted=5)
    assert gate.best_len("drafter", "q", range(1, 6), gate.draft) == wanted


def test_without_prices_as_much_is_tried_as_may_be():
    assert Gate().best_len("drafter", "q", (5, 15), None) == Gate().best_len("drafter", "q", (5, 15), 1e-3) == 15
    assert Gate().head_start("q", 15, "s") and Gate().pays("mine") and priced().head_start("q", 15, "s")


@pytest.mark.parametrize("late, agreed, wanted", [(0, 0, False), (0, 3, True), (10, 0, False), (10, 12, True),
                                                  (100, 12, False)])
def test_a_head_start_pays_where_it_brings_more_than_it_delays(late, agreed, wanted):
    """A draft that is right saves a step of 5 ms; the drafter makes the first id `late` ms later."""
    gate = taught(priced(late=late), "head start", agreed)
    assert gate.head_start("q", 15, "s") is wanted
    assert gate.head_start("q", 15, "clips of another size") is (agreed > 0), "nothing is known of a delay there"


def test_what_rounds_will_bring_counts_for_a_head_start():
    """Nothing of the head start is right, and 10 ms are lost; 50 ids in rounds of 5 right drafts make up for it."""
    gate = taught(taught(priced(draft=1.0, late=10), "head start", 0), "drafter", 5, drafted=5)
    assert not gate.head_start("q", 15, "s") and gate.head_start("q", 15, "s", rest=50, draft_len=5)


def test_what_is_refused_is_tried_again_after_ever_longer_pauses():
    gate = taught(priced(late=10), "head start", 0)
    tried = [turn for turn in range(300) if gate.head_start("q", 15, "s")]
    assert tried == [gate.probe - 1, 3 * gate.probe - 1, 7 * gate.probe - 1]
    taught(gate, "head start", 15, times=100)
    assert gate.head_start("q", 15, "s"), "it got better"
    taught(gate, "head start", 0, times=200)
    tried = [turn for turn in range(100) if gate.head_start("q", 15, "s")]
    assert tried == [gate.probe - 1], "and the pauses begin anew"


def test_beside_a_target_that_is_ready_a_head_start_grows_while_drafts_are_worth_their_time():
    assert not taught(priced(), "head start", 0).another("q", 3) and not Gate().another("q", 3)
    assert taught(priced(draft=1.7), "head start", 15).another("q", 3)
    assert not taught(priced(draft=5.1), "head start", 15).another("q", 3), "a draft takes longer than a step"


def test_a_source_pays_by_its_own_pace_alone():
    gate = priced()
    for _ in range(5):
        gate.round("bad", 5.6e-3, 1)
        gate.round("good", 5.6e-3, 2)
    assert gate.pace("good") == pytest.approx(2.8e-3) and gate.pays("good") and not gate.pays("bad")
    for _ in range(30):
        gate.round("bad", 5.6e-3, 3)
    assert gate.pays("bad"), "recent rounds count more"


def test_a_sure_draft_of_the_4_bit_copy_is_worth_more_and_experience_counts():
    gate = Gate()
    assert [gate.right(sure) for sure in (0.2, 0.55, 0.95)] == pytest.approx([0.66, 0.79, 0.999])
    for _ in range(500):
        gate.judged([0.99, 0.99, 0.99], 1)                   # the second is wrong, the third was not reached
    assert gate.right(0.99) == pytest.approx(0.5, abs=0.02) and gate.right(0.2) == pytest.approx(0.66)
    gate.round("self", 10e-3, 2)
    assert gate.next_draft(1.0, 1e-3, 5e-3) and not gate.next_draft(0.1, 1e-3, 5e-3)


# ---- a drafter's line


def test_a_line_drops_what_was_drafted_behind_a_wrong_id():
    line = Line([], 50)
    line.extend([], [1, 2, 3, 4])
    line.commit([1, 2], 0.0)
    assert line.next(0.0) == ([1, 2, 3, 4], 4) and line.tail()[:2] == ([1, 2, 3, 4], 2)
    line.extend([1, 2, 3, 4], [5])                           # their rows are there, the last id's is not
    assert line.next(0.0) == ([1, 2, 3, 4, 5], 1)
    line.commit([1, 2, 9], 0.0)
    assert line.broken and line.next(0.0) == ([1, 2, 9], 1) and line.tail()[:2] == ([1, 2, 9], 0)
    line.extend([1, 2, 3, 4, 5], [6])                        # was on its way when the target spoke
    assert line.next(0.0) == ([1, 2, 9], 1), "two rows of it are still right"
    line.extend([1, 2, 9], [7])
    assert line.next(0.0) == ([1, 2, 9, 7], 1)
    line.commit([1, 2, 9, 7, 5, 5, 5], 0.0)                  # left far behind
    assert line.next(0.0) == ([1, 2, 9, 7, 5, 5, 5], 4)


def test_how_often_the_line_is_right_stops_at_its_first_wrong_id():
    line = Line([], 50)
    line.extend([], [1, 2, 3, 4])
    line.commit([1, 2, 9, 4], 0.0)
    assert line.right == pytest.approx(((0.5 * 0.98 + 0.02) * 0.98 + 0.02) * 0.98)
    ids, drafts, worth = line.tail()
    assert (ids, drafts, worth) == ([1, 2, 9, 4], 0, 0)
    line.extend([1, 2, 9, 4], [5, 6])
    assert line.tail()[2] == pytest.approx(line.right + line.right ** 2)


def test_a_line_ends_with_the_answer_and_at_its_limit():
    line = Line([2], 4)
    line.extend([], [5, 2])
    assert line.next(0.0) is None
    line.commit([5, 6], 0.0)
    assert line.next(0.0) == ([5, 6], 2)
    line.extend([5, 6], [7, 8])
    assert line.next(0.0) is None, "four ids are as many as were asked for"


def test_a_drafter_waits_for_the_target_rather_than_be_late_for_it():
    """The target speaks every 4 seconds, a forward takes 1.5: the third in a row is known half a second late."""
    line = Line([], 50)
    line.extend([], [1, 2])
    line.commit([1], 0.0)
    line.commit([1, 2], 4.0)
    line.forward, line.right = 1.5, 0.5
    assert line.step == 4.0 and line.next(5.5) is not None
    line.extend([1, 2], [3])
    assert line.next(6.5) is not None and line.next(7.0) is not None             # with 0.5: half a second is worth it
    assert line.next(7.5) is None and line.next(9.0) is None
    assert line.next(12.1) is not None, "a target that is overdue is not waited for"
    line.commit([1, 2, 3], 7.6)
    assert line.next(7.6) is not None
