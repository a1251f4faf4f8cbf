"""Recall tasks: what is asked can be known from the context, and only from there."""

from pathlib import Path

import pytest
import torch
from tiny import corpus

from vqlm import recall
from vqlm.data import decode
from vqlm.recall import ALIGN, TASKS, Examples, curriculum, find


def draw(task: str, size: int, seed: int = 0, n_row: int = 3) -> Examples:
    return TASKS[task](size, n_row, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", ["basic", "sparse", "positional"])
@pytest.mark.parametrize("size", [4, 37, 64])
def test_an_answer_stands_where_the_distance_says(task: str, size: int) -> None:
    x = draw(task, size)
    assert x.n_context % ALIGN == 0
    assert not x.counted[:, : x.n_context].any() and x.counted[:, x.n_context :].any(0).sum() >= 2
    for row, t in x.counted.nonzero().tolist():
        source = t + 1 - int(x.distance[row, t])
        assert source < x.n_context
        assert x.tokens[row, source] == x.targets[row, t]
        assert x.tokens[row, source - 1] == x.tokens[row, t]
        after = x.tokens[row, t + 1] if t + 1 < x.tokens.shape[1] else None
        assert after in (recall.FILLER, None)
        if task == "positional":
            earlier = (x.tokens[row, : source - 1] == x.tokens[row, t]).sum()
            assert x.tokens[row, t - 1] == recall._RANK0 + earlier


def test_keys_come_once_and_sparse_pairs_lie_among_filler() -> None:
    for task, share in (("basic", 1), ("sparse", 4)):
        x = draw(task, 64)
        body = x.tokens[:, : x.n_context]
        is_key = (body >= recall._KEY0) & (body < recall._VALUE0)
        assert is_key.sum(1).tolist() == [64] * 3
        assert all(len(set(row[own].tolist())) == 64 for row, own in zip(body, is_key, strict=True))
        assert x.n_context == 128 * share


@pytest.mark.parametrize("most", [4, 1])
def test_regression_asks_at_a_new_x_for_what_two_points_tell(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "PLACE", most)  # of three x, all have often come
    x = draw("regression", 64)
    assert x.n_context == 192 and x.tokens.shape[1] == 192 + 3 * 32
    name, place, y = (x.tokens[:, i:192:3] for i in range(3))
    place, y = place - recall._X0, y - recall._Y0
    asked, new, hidden = (x.tokens[:, 192 + i :: 3] for i in range(3))
    assert place.min() == -most and place.max() == most
    assert x.counted.sum() > 80 if most == 4 else x.counted.sum() < 60
    assert not x.counted[:, :193].any() and not x.counted[:, 192::3].any()
    assert not x.counted[:, 194::3].any() and (hidden == recall.FILLER).all()
    for row in range(len(name)):
        for i in range(32):
            own = [j for j in range(64) if name[row, j] == asked[row, i]]
            points = {int(place[row, j]): int(y[row, j]) for j in own}
            t = 193 + 3 * i
            assert bool(x.counted[row, t]) == (2 <= len(points) <= 2 * most)
            if x.counted[row, t]:
                at = int(new[row, i] - recall._X0)
                assert at not in points and -most <= at <= most
                (x1, y1), (x2, y2) = list(points.items())[:2]
                told = y1 + (y2 - y1) * (at - x1) / (x2 - x1)
                assert told == int(x.targets[row, t] - recall._Y0)
                source = t + 1 - int(x.distance[row, t])
                later = {int(place[row, j]) for j in own if 3 * j + 2 > source}
                assert source % 3 == 2 and (source - 2) // 3 in own and len(later) == 1
                assert int(place[row, (source - 2) // 3]) not in later


@pytest.mark.parametrize("task", TASKS)
def test_more_than_there_are_keys_is_refused(task: str) -> None:
    most = {"positional": 4096, "regression": 8192}.get(task, 1024)
    assert draw(task, most, n_row=1).n_context >= 2 * most
    for size in (most + 1, 0):
        with pytest.raises(ValueError, match=rf"size {size}, .* to {most}, .* 1024 keys"):
            draw(task, size)


def test_needle_is_answered_by_the_text(tmp_path: Path) -> None:
    split = corpus(tmp_path / "c", n_word=40).train
    x = find("needle", split)(2 * ALIGN, 4, torch.Generator().manual_seed(0))
    assert x.n_context == 2 * ALIGN
    for row in range(4):
        answer = decode(x.targets[row][x.counted[row]].tolist())
        text = decode(x.tokens[row, : x.n_context].tolist())
        assert len(answer) == 4 and b" is " + answer + b".\n" in text
        (first, *_) = x.counted[row].nonzero()[:, 0].tolist()
        source = first + 1 - int(x.distance[row, first])
        assert x.tokens[row, source] == x.targets[row, first]
        question = decode(x.tokens[row, x.n_context : first + 1].tolist())
        assert question in text
    with pytest.raises(ValueError, match="multiple of 64"):
        find("needle", split)(100, 1, torch.Generator())
    with pytest.raises(ValueError, match="want a text"):
        find("needle")


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_and_another_gives_others(task: str) -> None:
    assert torch.equal(draw(task, 16).tokens, draw(task, 16).tokens)
    assert not torch.equal(draw(task, 16).tokens, draw(task, 16, seed=1).tokens)


def test_curriculum_doubles() -> None:
    assert curriculum(512, 128, 64) == [128, 256, 512] and curriculum(320, 128, 64) == [320]
    assert curriculum(64) == [4, 8, 16, 32, 64]
    assert curriculum(5) == [5] and curriculum(24) == [6, 12, 24]


@pytest.mark.parametrize(("size", "asked"), [(4, 4), (20, 20), (64, 32)])
def test_all_is_asked_for_up_to_a_most(size: int, asked: int) -> None:
    for task in ("basic", "sparse", "positional"):
        assert draw(task, size).counted.sum(1).tolist() == [asked] * 3
