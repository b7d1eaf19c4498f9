"""The referee: what the attacker may learn from, what is written down, and when a model is ruined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dau_fast.data.split import Split
from dau_fast.methods.dau import referee
from dau_fast.methods.dau.referee import Referee
from dau_fast.methods.dau.shown import Shown
from dau_fast.methods.dau.view import View
from dau_fast.models import Outputs


class Identity(nn.Module):
    """A defender whose images are its logits."""

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(images, images)


def a_split(forget: int, validation: int, classwise: bool = False) -> Split:
    """Forget, retain (8 images), validation one after the other; no test set."""
    index = torch.arange(forget + 8 + validation)
    parts = index.split([forget, 8, validation])
    return Split(
        train=index[: forget + 8],
        validation=parts[2],
        test=index[:0],
        forget=parts[0],
        retain=parts[1],
        classwise=classwise,
    )


class Match:
    """A game whose outputs are set by hand before every look. All labels are 0 of 2."""

    def __init__(
        self,
        forget: int = 20,
        validation: int = 20,
        classwise: bool = False,
        share: float = 0.25,
        seed: int = 0,
        look_images: int = 1000,
    ) -> None:
        self.split = a_split(forget, validation, classwise)
        self.logits = torch.zeros(forget + 8 + validation, 2)
        labels = torch.zeros(len(self.logits), dtype=torch.int64)
        self.referee = Referee(
            self.split,
            labels,
            lambda index: self.logits[index],
            exam_share=share,
            look_images=look_images,
            view=View(),
            shown=Shown(labels),
            generator=torch.Generator().manual_seed(seed),
        )

    def attacker(self, u: Tensor) -> Tensor:
        """Scores a sample by its margin."""
        return u[:, 1]

    def look(
        self, forget_right: int, validation_right: int, margin: float = 2.0, retain_right: int = 8
    ) -> bool:
        """A look at a defender that is right on so many images; `margin` is that of forget images."""
        for index, right, m in (
            (self.split.forget, forget_right, margin),
            (self.split.validation, validation_right, 2.0),
            (self.split.retain, retain_right, 2.0),
        ):
            self.logits[index] = torch.tensor([0.0, m])
            self.logits[index[:right]] = torch.tensor([m, 0.0])
        return self.referee.look(Identity(), self.attacker, len(self.referee.history.step))

    def exam(self) -> tuple[set[int], set[int]]:
        """The forget and the validation images that the attacker is examined on."""
        self.logits[:, 0] = torch.linspace(-2, 2, len(self.logits))
        self.logits[:, 1] = 0
        confidence = self.logits[:, 0]
        compared: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(referee, "auc", lambda *scores: compared.extend(scores) or 0.5)
            self.referee.look(Identity(), self.attacker, 0)
        forget, validation = ({int((confidence - s).abs().argmin()) for s in scores} for scores in compared)
        return forget, validation

    def studied(self, index: Tensor) -> list[int]:
        return index[self.referee.grant_study(index).bool()].tolist()


# ---- exam and study


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("forget", "validation", "share"), [(20, 40, 0.25), (100, 8, 0.5), (10, 10, 0.1)])
def test_exam_and_study_share_no_image_and_are_all_there_is(
    forget: int, validation: int, share: float, seed: int
) -> None:
    match = Match(forget, validation, share=share, seed=seed)
    exams = match.exam()
    for exam, index in zip(exams, (match.split.forget, match.split.validation), strict=True):
        study = match.studied(index)
        assert len(exam) == round(share * len(index))
        assert not exam & set(study)
        assert sorted(exam | set(study)) == index.tolist()


def test_a_mixed_batch_loses_its_exam_images_and_keeps_the_order_of_the_others() -> None:
    match = Match()
    exam, _ = match.exam()
    batch = torch.tensor([3, 19, 3, 7, 0, 11, 2, 16])
    assert match.studied(batch) == [i for i in batch.tolist() if i not in exam]


def test_a_batch_of_exam_images_alone_teaches_the_attacker_nothing() -> None:
    match = Match()
    exam, _ = match.exam()
    assert match.studied(torch.tensor(sorted(exam))) == []


def test_a_set_too_small_to_spare_any_image_is_its_own_exam() -> None:
    match = Match(forget=1, validation=20)
    forget, validation = match.exam()
    assert forget == {0}
    assert len(validation) == 5
    assert match.studied(torch.tensor([0, 0, 0])) == [0, 0, 0]


def test_the_exam_follows_the_generator() -> None:
    first, again, other = (Match(100, 100, seed=seed).exam() for seed in (1, 1, 2))
    assert first == again
    assert first != other


# ---- what is written down


def test_a_look_writes_down_step_accuracies_and_auc() -> None:
    match = Match()
    match.look(15, 10)
    match.look(5, 20)
    seen = match.referee.history
    assert seen.step == [0, 1]
    assert seen.forget_accuracy == pytest.approx([75, 25])
    assert seen.validation_accuracy == pytest.approx([50, 100])
    assert len(seen.auc) == 2
    assert seen.retain_accuracy == [100, 100]


def test_auc_is_that_of_the_attacker_on_the_exam() -> None:
    match = Match()
    match.look(20, 0)
    match.look(0, 20)
    match.look(20, 20)
    assert match.referee.history.auc == [1.0, 0.0, 0.5]
    assert [len(scores) for scores in match.exam()] == [5, 5]


def test_of_large_sets_a_sample_is_looked_at() -> None:
    match = Match(forget=200, validation=100, look_images=50)
    match.look(200, 100)
    seen = {name: getattr(match.referee, f"_{name}") for name in ("forget", "validation", "retain")}
    assert {name: len(index) for name, index in seen.items()} == {"forget": 50, "validation": 50, "retain": 8}
    assert set(seen["forget"].tolist()) < set(match.split.forget.tolist())


# ---- ruin


def test_a_model_that_lost_more_than_a_point_of_its_retain_set_is_ruined() -> None:
    match = Match()
    for after, ruined in ((8, False), (7, True), (8, False)):
        match.referee.history.retain_accuracy.clear()
        match.look(20, 20)
        match.look(20, 20, retain_right=after)
        assert match.referee.finds_ruin() == ruined
    for after, ruined in ((99.1, False), (98.9, True)):
        match.referee.history.retain_accuracy[:] = [100.0, after]
        assert match.referee.finds_ruin() == ruined


def test_a_model_that_lost_more_than_ten_points_has_collapsed() -> None:
    match = Match()
    match.look(20, 20)
    for after, collapsed in ((90.1, False), (89.9, True)):
        match.referee.history.retain_accuracy[:] = [100.0, after]
        assert match.referee.finds_collapse() == collapsed


def test_of_a_few_images_known_half_two_standard_errors_more_are_no_ruin() -> None:
    match = Match()  # 8 retain images: a standard error of 17.7 points
    match.look(20, 20)
    match.referee.history.retain_accuracy[:] = [50.0, 50 - 1 - 35]
    assert not match.referee.finds_ruin()
    match.referee.history.retain_accuracy[:] = [50.0, 50 - 1 - 36]
    assert match.referee.finds_ruin()


def test_in_the_middle_of_a_game_less_than_half_of_it_left_is_beyond_help() -> None:
    match = Match()
    assert not match.look(20, 20)
    assert not match.look(20, 20, retain_right=4)
    assert match.look(20, 20, retain_right=3)
    # What ended unfinished is not given to anybody, whatever it knows once statistics are taken anew.
    assert not match.look(20, 20)
    assert match.referee.finds_ruin()
    assert match.referee.finds_collapse()


def test_outputs_that_are_no_numbers_are_beyond_help() -> None:
    match = Match()
    match.look(20, 20)
    assert match.look(20, 20, margin=float("nan"))


def test_a_look_leaves_the_mode_of_the_defender() -> None:
    match = Match()
    defender = Identity().train()
    match.referee.look(defender, match.attacker, 0)
    assert defender.training
