"""``vqlm recall``: cells, their curriculum, what is refused, and the table."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import text

from vqlm import cli, recall, recall_study, recall_table
from vqlm.model import LM, LMOutput, Objective, Scored
from vqlm.recall import TASKS, Examples
from vqlm.recall_study import Cell, run_cell
from vqlm.recall_table import table
from vqlm.sizes import n_learned


def draw(task: str, size: int, seed: int = 0, n_row: int = 3) -> Examples:
    return TASKS[task](size, n_row, torch.Generator().manual_seed(seed))


def test_questions_begin_with_nothing_but_the_dictionary_to_look_in() -> None:
    for task in TASKS:
        cell = Cell(task, "window+ovq", 16, 0.25, 0, 1)
        x = draw(task, 16)
        lm = LM(cell.model(x.n_context))
        state = lm(x.tokens[:, : x.n_context]).state.layers[1]
        assert int(state.n_used.min()) == round(0.25 * x.n_context)
        assert (state.length % lm.config.chunk == 0).all()


def test_a_cell_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("d_model=16", "d_k=8", "d_v=8", "d_ff=8")
    cell = Cell("basic", "window+ovq", 4, 0.25, 0, 3, (1, 2), small)
    first = run_cell(cell, TASKS["basic"], tmp_path)
    assert [row["times"] for row in first["lengths"]] == [1, 2]
    assert cell.model(64).n_entry == 16 and first["steps"] == 3
    monkeypatch.setattr(recall_study, "train", None)
    assert run_cell(cell, TASKS["basic"], tmp_path) == first
    text = table([first]).splitlines()
    assert len(text) == 3 and "scaled" in text[1] and "as trained" in text[2]


def test_the_table_has_the_mean_of_the_seeds_and_the_least() -> None:
    def result(seed: int, *right: float, reached: int = 4) -> dict[str, Any]:
        rows = [
            {"times": 2**i, "scaled": {"accuracy": share, "state_bytes": 2048}}
            for i, share in enumerate(right)
        ]
        cell = dataclasses.asdict(Cell("basic", "window", 4, 1.0, seed, 3))
        return {"cell": cell, "lengths": rows, "reached": reached}

    results = [result(0, 0.5, 1.0), result(1, 0.25, 1.0), result(2, 0.75, 0.4)]
    head, line = table(results).split("\n")
    assert head.split() == ["mixers,", "N/T,", "N", "seeds", "1x", "2x"]
    assert line.split("3", 1)[1].split() == "0.500 (0.250) 2 KB 0.800 (0.400) 2 KB".split()
    assert len(head) == len(line)
    alone = table([result(0, 0.5, 1.0)]).split("\n")[1]
    assert alone.split()[1:] == "1 0.500 2 KB 1.000 2 KB".split()
    _, line, note = table([result(0, 0.5), result(1, 0.1, reached=2)]).split("\n")
    assert line.split()[:2] == ["window", "2!"] and note.startswith("!: with some seeds nothing")


def test_what_has_no_dictionary_is_drawn_beside_both_kinds_of_n(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def result(mixers: str, *kinds: str) -> dict[str, Any]:
        rows = [{"times": n, **{k: {"accuracy": 1 / n} for k in kinds}} for n in (1, 2)]
        cell = dataclasses.asdict(Cell("basic", mixers, 4, 0.25, 0, 3))
        return {"cell": cell, "lengths": rows, "reached": 4}

    figures: list[Any] = []
    monkeypatch.setattr(recall_table.ablate, "save", lambda figure, path: figures.append(figure))
    ovq, vq = result("ovq", "scaled", "fixed"), result("vq", "scaled")
    for results in ([ovq, vq, result("window", "scaled")], [vq]):
        recall_table.plot(results, "title", Path("no file"))
    both, alone = (
        [[x.get_color() for x in a.lines if x.get_linestyle() == "-"] for a in f.axes]
        for f in figures
    )
    assert len(both) == 2 and both[0] == both[1] and len(both[0]) == len(set(both[0])) == 3
    assert len(alone) == 1 and len(alone[0]) == 1


@pytest.mark.parametrize("task", TASKS)
def test_small_sizes_are_trained_in_more_rows_and_without_the_filler_in_front(task: str) -> None:
    def drawn(size: int) -> Examples:
        return recall_study.batch(TASKS[task], size, 64, torch.Generator().manual_seed(0))

    x, whole = drawn(16), TASKS[task](16, 4 * 16, torch.Generator().manual_seed(0))
    front = whole.tokens.shape[1] - x.tokens.shape[1]
    assert len(x.tokens) == 4 * 16 and (x.tokens[:, 0] != recall.FILLER).all()
    assert (whole.tokens[:, :front] == recall.FILLER).all()
    assert front == {"basic": 32, "positional": 32, "regression": 16}.get(task, 0)
    for field in ("tokens", "targets", "counted", "distance"):
        assert torch.equal(getattr(x, field), getattr(whole, field)[:, front:])
    assert x.n_context == whole.n_context - front
    assert x.counted.sum() == whole.counted.sum()
    assert torch.equal(
        drawn(64).tokens, TASKS[task](64, 16, torch.Generator().manual_seed(0)).tokens
    )
    assert len(drawn(4).tokens) == 64


@pytest.mark.parametrize(("at_first", "reached"), [(0.9, 32), (0.7, 32), (0.5, 4)])
def test_what_never_passes_goes_on_all_the_same_unless_it_has_learned_nothing(
    at_first: float, reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    rates: list[float] = []

    def step(lm: LM, optimizer: object, x: Examples, rate: float) -> None:
        seen.append(int(x.counted[0].sum()))
        rates.append(rate / recall_study.LEARNING_RATE)

    def right(lm: LM, x: Examples) -> torch.Tensor:
        return torch.tensor([at_first if x.counted[0].sum() == 4 else 0.5])

    monkeypatch.setattr(recall_study, "_step", step)
    monkeypatch.setattr(recall_study, "_right", right)
    monkeypatch.setattr(recall_study, "PATIENCE", 0.25)
    small = ("d_model=16", "d_k=8", "d_v=8", "d_ff=8")
    cell = Cell("basic", "window", 32, 1.0, 0, 200, settings=small)
    _, facts = recall_study.train(cell, TASKS["basic"])
    assert facts["reached"] == reached
    warming, falling = [n / 50 for n in range(1, 51)], [(200 - n) / 60 for n in range(140, 200)]
    if reached == 32:
        first = 25 if at_first == 0.9 else 50
        assert [seen.count(n) for n in (4, 8, 16, 32)] == [first, 50, 50, 100]
        assert rates == pytest.approx(warming + [1] * (90 + first) + falling)
    else:
        assert rates == pytest.approx(warming + [1] * 750)


def test_commitment_weighs_as_much_a_token_however_few_answers_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, objective = [], Scored.objective

    def noting(out: Scored, commitment: float, n_token: int) -> Objective:
        weights.append(commitment / n_token)
        return objective(out, commitment, n_token)

    monkeypatch.setattr(Scored, "objective", noting)
    lm = LM(Cell("sparse", "window+vq", 4, 1.0, 0, 0).model(64))
    optimizer = torch.optim.SGD(lm.parameters(), 1e-3)
    for task in ("basic", "sparse", "regression"):
        x = draw(task, 8)
        recall_study._step(lm, optimizer, x, 1e-3)
        assert weights.pop() * x.tokens.numel() == pytest.approx(1e-4)


def test_cells_have_equal_sizes_and_linear_growth_ends_with_the_context() -> None:
    names = ["softmax", "window", "window+ovq", "vq", "gated-deltanet", "mamba2"]
    models = [Cell("basic", name, 64, 0.25, 0, 3).model(128) for name in names]
    sizes = [n_learned(model) for model in models]
    assert len({model.d_ff for model in models}) > 2
    assert max(sizes) / min(sizes) < 1.02
    assert {model.growth_span for model in models} == {128}
    chosen = Cell("basic", "ovq", 64, 0.25, 0, 3, settings=("growth_span=9",)).model(128)
    assert (chosen.growth_span, chosen.n_entry) == (9, 32)


@pytest.mark.parametrize(
    ("vary", "values"),
    [
        ("founders", ["spread", "random"]), ("growth", ["plateau", "linear"]),
        ("entry_rate", ["none", "0.05"]), ("n_code", ["4", "8"]),
    ],
)  # fmt: skip
def test_an_ablation_is_one_command(
    vary: str, values: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "d_model=16 d_k=8 d_v=8 chunk=8 --size 4 --steps 1 --times 1,2 --seeds 0,1".split()
    words = ["recall", "basic", *small, "--mixers", "ovq", "--out", str(tmp_path)]
    assert cli.main([*words, "--vary", f"{vary}={','.join(values)}"]) == 0
    out = capsys.readouterr().out.splitlines()
    for value in values:
        (line,) = [x for x in out if f"{vary}={value} N/T=0.25 scaled" in x and "step" not in x]
        assert line.split("scaled")[1].split()[0] == "2"  # seeds
    found = json.loads((tmp_path / f"basic-{vary}.json").read_bytes())["results"]
    assert [r["cell"]["settings"][-1] for r in found] == [f"{vary}={v}" for v in values * 2]
    assert (tmp_path / f"basic-{vary}.png").stat().st_size > 10_000


def test_a_setting_that_is_so_anyway_is_the_same_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, said, other = (
        Cell("basic", "ovq", 4, 0.25, 0, 1, (1,), settings=("d_model=16", *more))
        for more in ((), ("growth=linear",), ("growth=plateau",))
    )
    first = run_cell(plain, TASKS["basic"], tmp_path)
    monkeypatch.setattr(recall_study, "train", None)
    found = run_cell(said, TASKS["basic"], tmp_path)
    assert found["lengths"] == first["lengths"]
    assert list(found["cell"]["settings"]) == ["d_model=16", "growth=linear"]
    assert other.name != plain.name
    taken_back = dataclasses.replace(other, settings=(*other.settings, "growth=linear"))
    assert taken_back.name == plain.name and taken_back.model(64) == plain.model(64)
    assert dataclasses.replace(plain, settings=("growth_span=256",)).name.endswith(
        "growth_span=256"
    )


def test_cells_of_other_commands_stand_in_the_table_if_they_are_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "d_model=16 d_k=8 d_v=8 chunk=8 --size 4 --times 1,2".split()

    def ask(task: str, *words: str) -> dict[str, list[str]]:
        command = ["recall", task, *small, *words, "--out", str(tmp_path), "--json"]
        assert cli.main([*command, *(() if "--steps" in words else ("--steps", "1"))]) == 0
        found: dict[str, list[str]] = {}
        for result in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]:
            cell = result["cell"]
            said = " ".join([*cell["settings"][4:], f"{cell['share']:g}", str(cell["seed"])])
            found.setdefault(cell["mixers"], []).append(said)
        return found

    assert ask("basic", "--mixers", "window") == {"window": ["1 0"]}
    ask("basic", "--mixers", "window", "--steps", "2")
    ask("sparse", "--mixers", "window")
    ovq = ask("basic", "--mixers", "ovq", "growth=linear", "--shares", "0.5", "--seeds", "1")
    assert ovq == {"ovq": ["growth=linear 0.5 1"], "window": ["growth=linear 1 0"]}
    assert ask("basic", "--mixers", "softmax", "--seeds", "3") == {
        "softmax": ["1 3"], "ovq": ["0.5 1"], "window": ["1 0"],
    }  # fmt: skip
    varied = ask("basic", "--mixers", "ovq", "--vary", "growth=eager,linear")
    assert varied == {"ovq": ["growth=eager 0.25 0", "growth=linear 0.25 0"]}
    assert list(ask("basic", "--mixers", "mamba2")) == ["mamba2", "ovq", "softmax", "window"]
    for name, made in (("run", None), ("contest", {"model": {}, "train": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text("{}")
        if made is not None:
            (tmp_path / name / "cell.json").write_text(json.dumps(made))
    monkeypatch.setattr(recall_study, "COMMITMENT", 0.5)
    assert ask("basic", "--mixers", "vq") == {"vq": ["1 0"]}


def test_a_mistaken_ablation_trains_nothing(tmp_path: Path) -> None:
    for vary in ("growth=", "growth=plato", "growt=linear"):
        assert cli.main(["recall", "basic", "--vary", vary, "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_every_mixer_is_asked_by_length_with_its_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "d_model=16 d_k=8 d_v=8 chunk=8 --size 4 --steps 1 --times 1,16".split()
    mixers = "softmax,window,window+ovq,gated-deltanet,mamba2"
    words = [*small, "--shares", "0.125,0.25,0.5", "--mixers", mixers, "--out", str(tmp_path)]
    assert cli.main(["recall", "basic", *words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len(results) == 4 + 3
    for result in results:
        short, long = (row["scaled"]["state_bytes"] for row in result["lengths"])
        grows = result["cell"]["mixers"] in ("softmax", "window+ovq")  # N is scaled
        assert (long > short) == grows


def test_accuracy_is_that_of_the_counted_tokens() -> None:
    """A model that says what came after a token when it came first is always right."""
    lm = LM(Cell("basic", "window", 16, 1.0, 0, 0).model(64))

    def knowing(tokens: torch.Tensor, with_stats: bool = False) -> LMOutput:
        logits = torch.zeros(*tokens.shape, recall.VOCAB_SIZE)
        first = (tokens[:, None] == tokens[..., None]).int().argmax(-1)  # of each token
        said = tokens.gather(1, (first + 1).clamp(max=tokens.shape[1] - 1))
        logits = logits.scatter(-1, said[..., None], 1.0)
        return LMOutput(logits, lm.init_state(len(tokens)), ())

    lm.forward = knowing  # type: ignore[method-assign]
    found = recall_study.accuracy(lm, TASKS["basic"], 16, 0)
    assert found["accuracy"] == 1 and found["by_distance"] == [1] * 4
    assert found["state_bytes"] == lm.state_bytes() and found["distance_up_to"] == sorted(
        found["distance_up_to"]
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "recall",
        "basic",
        "--mixers",
        "ovq",
        "--size",
        "4",
        "--steps",
        "1",
        "--times",
        "1",
    ]
    small = ["d_model=16", "d_k=8", "d_v=8", "--shares", "0.5", "--out", str(tmp_path), "--json"]
    assert cli.main([*arguments, *small, "--seeds", "0,0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (result,) = json.loads(lines[-1])["results"]
    assert result["cell"]["mixers"] == "ovq"
    assert cli.main([*arguments, "d_mod=1", "--out", str(tmp_path)]) == 2
    assert "did you mean 'd_model'" in capsys.readouterr().err
    assert cli.main(["recall", "basic", "--mixers", "ovk"]) == 2
    assert "did you mean 'ovq'" in capsys.readouterr().err


def test_another_number_of_entries_has_the_same_parameters() -> None:
    lm = Cell("basic", "window+ovq", 4, 0.25, 0, 3).model(64)
    small = LM(lm)
    large = small.with_entries(99)
    assert large.config.n_entry == 99
    assert large.embedding.weight.data_ptr() == small.embedding.weight.data_ptr()
    tokens = torch.arange(1, 190)[None]
    assert torch.equal(large(tokens[:, :140]).logits, small(tokens[:, :140]).logits) is False
    same = small.with_entries(lm.n_entry)
    assert torch.equal(same(tokens).logits, small(tokens).logits)
    assert large(tokens).state.bytes() > small(tokens).state.bytes()


def test_a_result_of_something_else_is_not_taken_for_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("d_model=16", "d_k=8", "d_v=8")
    cell = Cell("basic", "window", 4, 1.0, 0, 1, (1,), small, "a text")
    done = run_cell(cell, TASKS["basic"], tmp_path)
    assert run_cell(cell, TASKS["basic"], tmp_path) == done
    for changes, said in (
        ({"times": (1, 2)}, r"times is \[1\] there and \[1, 2\] here; use another --out"),
        ({"text": "another"}, "text is 'a text' there and 'another' here"),
    ):
        with pytest.raises(ValueError, match=said):
            run_cell(dataclasses.replace(cell, **changes), TASKS["basic"], tmp_path)
    monkeypatch.setattr(recall_study, "WARMUP", 7)
    with pytest.raises(ValueError, match="warmup is 50 there and 7 here"):
        run_cell(cell, TASKS["basic"], tmp_path)
    (tmp_path / cell.name / "cell.json").unlink()
    with pytest.raises(ValueError, match="no part of a study"):
        run_cell(cell, TASKS["basic"], tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--times", "1,32"], "size 2048, but this task's must be from 1 to 1024"),
        (["--times", "0"], "--times [0]"),
        (["--steps", "0"], "--steps 0"),
        (["--shares", "-1"], "shares of more than 0"),
        (["--shares", "a"], "'a' is not numbers"),
        (["--mixers", "window+window+ovq"], "want 3 layers or more, but n_layer=2"),
        (["--vary", "n_entry=16,512"], "n_entry is a setting that --shares decides"),
        (["mixers=vq"], "mixers is a setting that --mixers decides"),
        (["chunk=256"], "chunk=256 is no divisor of 64"),
        (["layer=gau"], "no SwiGLU"),
        (["--out", __file__], "ot a directory"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(recall_study, "train", None)
    out = [] if "--out" in words else ["--out", str(tmp_path)]
    mixers = [] if "--mixers" in words else ["--mixers", "window+ovq"]
    try:
        code = cli.main(["recall", "basic", *mixers, *out, *words])
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code not in (0, None)
    assert said in capsys.readouterr().err


def test_another_study_s_folder_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recall_study, "train", None)
    last = Cell("basic", "window", 64, 1.0, 1, 2000)
    (tmp_path / last.name).mkdir()
    (tmp_path / last.name / "result.json").write_text("{}")
    arguments = ["recall", "basic", "--mixers", "window", "--seeds", "0,1"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "no part of a study" in capsys.readouterr().err


def test_settings_are_checked_all_together() -> None:
    cell = Cell("basic", "window+ovq", 4, 0.25, 0, 3, settings=("n_head=6", "n_kv_head=3"))
    assert cell.model(64).kv_heads == 3 and cell.name.endswith(",n_head=6,n_kv_head=3")


def test_a_needle_is_hidden_in_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece")
    books, prepared = tmp_path / "books", str(tmp_path / "prepared")
    for i, split in enumerate(["train"] * 4 + ["validation", "test"]):
        (books / split).mkdir(parents=True, exist_ok=True)
        (books / split / f"{i}.txt").write_bytes(text(300, seed=i))
    (books / "metadata.csv").write_text("".join(f"{i},T,1900,u\n" for i in range(6)))
    command = ["data", "prepare", "pg19", "--source", str(books), "--out", prepared]
    assert cli.main([*command, "vocab_size=300"]) == 0
    arguments = ["recall", "needle", "--data", prepared, "--size", "64", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "needle wants a text in bytes" in capsys.readouterr().err
