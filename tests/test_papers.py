"""README.md and docs/: commands parse, flags, files and sections are there, Python blocks run."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch
from _commands import run, save_reward, scores_of
from _tiny import save_tiny, stir, tiny_model, tokens

import perl_kernels as pk
from perl import cli
from perl import config as cfg

REPO = Path(__file__).parent.parent
PAPERS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TEXTS = {paper.name: paper.read_text(encoding="utf-8") for paper in PAPERS}
OTHERS = {"--no-build-isolation", "--nproc-per-node", "--help", "--check"}  # pip's, torchrun's, ...
FOLDERS = "|".join(path.name for path in REPO.iterdir() if path.is_dir())
BLOCKS = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)


def commands() -> list[str]:
    """Every `python -m perl ...` of an indented block, on one line, without what is before perl."""
    found = []
    for text in TEXTS.values():
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.match(r" {4}(?:python|torchrun .*) -m perl (\w.*)", line):
                found.append(match[1])
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command):
    words = shlex.split(command, comments=True)
    flags = vars(cli.build_parser().parse_args([word for word in words if word != "..."]))
    cls, _, _ = cli.COMMANDS[flags.pop("command")]
    flags.pop("sweep", None)
    if "..." not in words:  # what is left out may be what is required
        cfg.load(cls, flags)


def test_flags_are_there():
    parser = cli.build_parser()
    (choice,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = {flag for command in choice.choices.values() for flag in command._option_string_actions}
    for name, text in TEXTS.items():
        text = re.sub(r"`(?:pytest|git|gh|pip) .*?`|<!--.*?-->", "", text)
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert named <= known | OTHERS, (name, named - known - OTHERS)


def test_files_and_sections_are_there():
    count = 0
    for paper in PAPERS:
        text = TEXTS[paper.name]
        linked = re.findall(r"\]\(([^)\s]+)\)", text)
        inside = [link[1:] for link in linked if link.startswith("#")]
        titles = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}
        assert set(inside) <= titles, (paper.name, set(inside) - titles)
        files = [paper.parent / x for x in linked if not x.startswith(("#", "http"))]
        files += [REPO / x for x in re.findall(rf"`((?:{FOLDERS})/[\w/.-]+?)(?::\w+)?`", text)]
        assert not [file for file in files if not file.exists() and "<op>" not in str(file)]
        count += len(files)
    assert count > 20


def test_before_and_after_are_one_loss():
    peft = pytest.importorskip("peft")
    start = BLOCKS[0].splitlines()[0].index("# after")
    after = "\n".join(line[start:] for line in BLOCKS[0].splitlines())
    model, ids, advantage = tiny_model(), tokens(), torch.randn(2, 7)
    names = dict(
        vars(peft), pk=pk, model=model, ids=ids, target=ids, advantage=advantage,
        head=model.get_output_embeddings(), ref=model.model(ids)[0].detach() + 0.1,
    )  # fmt: skip
    exec(after, names)
    stir(names["model"])
    with torch.no_grad():
        logp = names["model"](ids).logits.log_softmax(-1)
        ref = (names["ref"] @ names["head"].weight.T).log_softmax(-1)
    exec(after.partition("\n")[2].partition("pk.accelerate_peft(model)")[2], names)
    loss = -(advantage * logp.gather(-1, ids[..., None])[..., 0]).mean()
    loss = loss + 0.05 * (logp.exp() * (logp - ref)).sum(-1).mean()
    torch.testing.assert_close(names["out"].loss, loss, rtol=1e-4, atol=1e-5)
    assert all(p.grad.any() for p in names["model"].parameters() if p.requires_grad)


def test_a_model_you_have(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    before = model(tokens()).logits
    exec(BLOCKS[1], {"model": model})
    assert "lora_mlp" in capsys.readouterr().out and (tmp_path / "adapter").is_dir()
    torch.testing.assert_close(model(tokens()).logits, before)  # a new adapter changes nothing


def test_the_exported_model_gives_the_scores(tmp_path, monkeypatch, capsys):
    base = save_tiny(tmp_path / "base")
    reward = save_reward(tmp_path / "reward", base, 3)
    monkeypatch.chdir(tmp_path)
    run(capsys, "export", "--model", reward, "--out", "rm")
    names = {"prompt": "one latte", "answer": " please"}
    exec(BLOCKS[2], names)
    (want,) = scores_of(base, reward, [("one latte", " please")])
    assert names["score"].item() == pytest.approx(want, rel=1e-5)
