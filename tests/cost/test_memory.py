"""What grows first is what breaks first."""

from __future__ import annotations

from dataclasses import replace

from machines import JOB, NETWORK

from dau_fast.cost import count_memory, count_work, predict_memory, what_breaks_first
from dau_fast.cost.memory import grow_sets
from dau_fast.methods.dau.difficulty import FEATURES


def test_what_breaks_first_is_what_grows_first() -> None:
    wide = replace(JOB, network=replace(NETWORK, classes=100_000))
    large = replace(JOB, image_bytes=1e6)
    cases = {
        "images": (large, 8e9),
        "labels and indices": (replace(large, streamed=True), 8e9),
        "attacker": (replace(wide, streamed=True), 2e9),
    }
    for part, (job, memory) in cases.items():
        found = what_breaks_first(job, memory)
        assert found.part == part
        fits, fails = (predict_memory(grow_sets(job, f * found.growth))[1] for f in (0.95, 1.05))
        assert fits <= memory < fails, part


def test_however_many_classes_the_attackers_lesson_has_a_limit() -> None:
    wide = replace(JOB, network=replace(NETWORK, classes=100_000), streamed=True)
    many = grow_sets(wide, 1000)
    warm_up = count_memory(many)["warm-up of the attacker"]
    assert many.lesson_sizes == [many.schedule.lesson_images] * 2
    assert warm_up["u of the lesson"] <= 2 * 2**29
    assert count_work(many).attacker_rows < 2 * count_work(wide).attacker_rows * 1000


def test_a_model_that_does_not_fit_cannot_be_helped_by_fewer_images() -> None:
    found = what_breaks_first(replace(JOB, network=replace(NETWORK, parameters=10**10)), 8e9)
    assert (found.part, found.growth) == ("weights", 0.0)


def test_after_earlier_requests_a_turn_holds_more_of_the_original() -> None:
    usual, later = (count_memory(replace(JOB, earlier=count)) for count in (0, 50))
    assert later["game"]["logits"] > usual["game"]["logits"]
    assert later["game"]["images"] - usual["game"]["images"] == 50 * JOB.image_bytes


def test_more_processes_than_images_in_a_batch_break_before_memory_does() -> None:
    assert what_breaks_first(replace(JOB, processes=65), 8e9).part.startswith("batch")


def test_the_plain_model_of_difficulty_holds_its_sums_by_class_where_it_is_asked_for() -> None:
    many = replace(JOB, network=replace(NETWORK, classes=100_000))
    held, without = (
        sum(
            count_memory(replace(many, config=replace(many.config, difficulty=asked)))[
                "difficulty of images"
            ].values()
        )
        for asked in (True, False)
    )
    assert held - without >= 100_000 * FEATURES * 8  # in float64
