"""The state of a long prompt as a file: saved, loaded elsewhere, continued, extended, forked."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import MODEL, text
from torch import Tensor
from torch.testing import assert_close

from vqlm import checkpoint
from vqlm.cli import main
from vqlm.model import LM
from vqlm.prefix import Prefix, fingerprint, read_facts
from vqlm.vocabulary import BYTES, END

MIXERS = {
    "vq": ("vq",), "ovq": ("ovq",), "window": ("window",), "hybrid": ("window", "vq"),
    "recurrent": ("gated-deltanet", "mamba2"),
}  # fmt: skip


def lm(mixers: tuple[str, ...] = ("window", "vq", "ovq"), **settings: object) -> LM:
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL, mixers=mixers, n_layer=len(mixers), n_entry=9, chunk=4)
    return LM(dataclasses.replace(config, **settings)).eval()  # type: ignore[arg-type]


def tokens(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (n_row, n_token), generator=generator)


@pytest.mark.parametrize("mixers", MIXERS.values(), ids=list(MIXERS))
def test_saved_loaded_and_continued_is_the_uncut_run(
    mixers: tuple[str, ...], tmp_path: Path
) -> None:
    model = lm(mixers).double()
    x, more = tokens(1, 301), tokens(1, 23, seed=1)
    want = model(torch.cat([x, more], 1)).logits[:, 300:]
    Prefix.read(model, x).save(tmp_path / "a.state", model)
    prefix = Prefix.load(tmp_path / "a.state", model)
    assert_close(model(prefix.start(more), prefix.state).logits, want)
    assert prefix.n_token == 301
    for cut in (0, 1, 8):
        further = prefix.extended(model, more[:, :cut])
        got = model(further.start(more[:, cut:]), further.state).logits
        assert_close(got, want[:, cut:])
        assert further.n_token == 301 + cut


def test_in_another_process_the_logits_are_the_same_bits(tmp_path: Path) -> None:
    model, x, more = lm(), tokens(1, 97), tokens(1, 7, seed=1)
    checkpoint.save_model(model, tmp_path)
    prefix = Prefix.read(model, x)
    prefix.save(tmp_path / "a.state", model)
    want = model(prefix.start(more), prefix.state).logits
    program = (
        "import sys, torch, safetensors.torch as st\n"
        "from vqlm.checkpoint import load_model\nfrom vqlm.prefix import Prefix\n"
        "torch.set_num_threads(1)\n"
        "model = load_model('.'); p = Prefix.load('a.state', model)\n"
        f"out = model(p.start(torch.tensor({more.tolist()})), p.state)\n"
        "st.save_file({'logits': out.logits.detach().contiguous()}, 'out.safetensors')"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{program}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["logits"], want)


def test_fifty_forks_do_not_touch_each_other() -> None:
    model = lm()
    prefix = Prefix.read(model, tokens(1, 61))
    kept = [x.clone() for x in prefix.state.tensors()]
    continuations = tokens(50, 9, seed=3)
    forks = prefix.forked(50)
    together = model(forks.start(continuations), forks.state).logits
    for i, row in enumerate(continuations.split(1)):
        alone = model(prefix.start(row), prefix.state).logits
        assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, prefix.state.tensors(), strict=True))
    assert not torch.allclose(together[0], together[1])


def test_the_file_has_one_size(tmp_path: Path) -> None:
    model = lm()
    sizes = set()
    for n_token in (1, 10, 101, 1000):
        Prefix.read(model, tokens(1, n_token)).save(tmp_path / "a.state", model)
        assert read_facts(tmp_path / "a.state")["n_token"] == n_token
        sizes.add((tmp_path / "a.state").stat().st_size)
    # As if so many tokens had been read: headers come in units of 8 bytes, so a few digits hide.
    long = Prefix.read(model, tokens(1, 5))._replace(n_token=10**15)
    long.save(tmp_path / "a.state", model)
    sizes.add((tmp_path / "a.state").stat().st_size)
    assert len(sizes) == 1
    assert sizes.pop() < model.state_bytes() + 4000


def test_it_can_be_trained_from() -> None:
    model = lm()
    prefix = Prefix.read(model, tokens(1, 50))
    loss = model.train()(prefix.start(tokens(1, 9)), prefix.state).logits.square().mean()
    loss.backward()
    assert model.embedding.weight.grad is not None


def test_a_wrong_file_is_told_from_a_state(tmp_path: Path) -> None:
    model, path = lm(), tmp_path / "a.state"
    Prefix.read(model, tokens(1, 20)).save(path, model)
    whole = path.read_bytes()

    def refused(content: bytes, said: str, by: LM = model) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            Prefix.load(path, by)

    for n in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        refused(whole[:n], "damaged, or no state file")
    refused(b"a book, not a state of one", "damaged, or no state file")
    refused(safetensors.torch.save({"x": torch.ones(2)}), "no 'vqlm state 1'")
    header = {"format": "vqlm state 1", "vqlm": "{}"}
    refused(safetensors.torch.save({"x": torch.ones(2)}, header), "damaged")
    header["vqlm"] = json.dumps({"model": fingerprint(model), "n_token": "7"})
    refused(safetensors.torch.save({"x": torch.ones(2)}, header), "damaged")
    tensors = safetensors.torch.load(whole)
    tensors["state.0"] = tensors["state.0"][..., :1].contiguous()
    refused(safetensors.torch.save(tensors, header), "wanted")
    refused(whole, "another model", lm(("vq",)))
    other = lm()
    with torch.no_grad():
        other.output.bias[3] += 1e-3
    refused(whole, "another model", other)
    other.output.bias.data[3] -= 1e-3
    path.unlink()
    with pytest.raises(FileNotFoundError, match="vqlm state make"):
        Prefix.load(path, model)


def test_what_has_no_constant_state_is_refused() -> None:
    with pytest.raises(ValueError, match="no smaller than the text"):
        Prefix.read(lm(("vq", "softmax")), tokens(1, 4))
    with pytest.raises(ValueError, match="no tokens"):
        Prefix.read(lm(), tokens(1, 4)[:, :0])


def test_a_failed_write_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = lm(), tmp_path / "a.state"
    Prefix.read(model, tokens(1, 20)).save(path, model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        Prefix.read(model, tokens(1, 21)).save(path, model)
    assert Prefix.load(path, model).n_token == 20
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = lm()
    Path("run").mkdir()
    checkpoint.save_model(model, Path("run"), checkpoint.Medium())
    first, second = text(60), text(30, seed=1)
    Path("book.txt").write_bytes(first)
    Path("more.txt").write_bytes(second)
    Path("both.txt").write_bytes(first + second)

    def run(*words: str) -> dict[str, object]:
        code = main([*words, "--json"])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out.splitlines()[-1])

    assert run("state", "make", "book.txt", "--model", "run")["n_token"] == 1 + len(first)
    assert run("state", "show", "book.state")["n_token"] == 1 + len(first)
    extend = ["state", "extend", "book.state", "--text", "more.txt", "--model", "run"]
    run(*extend, "--out", "extended.state")
    run("state", "make", "both.txt", "--model", "run", "--out", "both.state")
    a, b = (Prefix.load(f"{name}.state", model) for name in ("extended", "both"))
    for x, y in zip(a.state.tensors(), b.state.tensors(), strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-5)
    greedy = ["--temperature", "0", "--tokens", "12"]
    got = run("sample", "run", "--state", "book.state", "--prompt", "key ", *greedy)["text"]
    ids = torch.tensor([[END, *BYTES.encode(first + b"key ").tolist()]])
    made = model.generate(ids, 12, temperature=0.0)[0, ids.shape[1] :].tolist()
    made = made[: made.index(END)] if END in made else made
    assert got == BYTES.decode(made).decode("utf-8", "replace")
    many = run("sample", "run", "--state", "book.state", "--count", "2", *greedy)["texts"]
    assert many[0] == many[1]  # type: ignore[index]

    def refused(said: str, *words: str) -> None:
        assert main(list(words)) == 2
        assert said in capsys.readouterr().err

    refused("needs --model", "state", "make", "book.txt")
    refused("needs --text", "state", "extend", "book.state", "--model", "run")
    refused("the text itself", "state", "make", "book.txt", "--model", "run", "--out", "book.txt")
    refused("damaged", "sample", "run", "--state", "book.txt")
    checkpoint.save_medium(checkpoint.Medium("image", (2, 2, 3)), Path("run"))
    refused("--state is for text", "sample", "run", "--state", "book.state")
    checkpoint.save_medium(checkpoint.Medium(), Path("run"))
    refused("missing.state", "sample", "run", "--state", "missing.state")
