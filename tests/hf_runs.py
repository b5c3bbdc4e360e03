"""Small runs and their exports, which test_export_hf.py and test_import_hf.py share."""

import atexit
import functools
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

# where transformers copies the code that it is to trust
FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = str(FOLDER / "modules")
os.environ["HF_HUB_OFFLINE"] = "1"

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

import export_hf  # noqa: E402

import prepare  # noqa: E402
from antlm.checkpoint import load_run, save_checkpoint  # noqa: E402
from antlm.tokenizer import Tokenizer, save_tokenizer, train_bpe  # noqa: E402
from data import OBJECTIVES, find_objectives  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from train import Settings  # noqa: E402

TEXT = """The cats sleep in the garden and the dog sees them.
Zoë said the naïve café owner sleeps in Ærøskøbing.
Who have those men revealed they helped? The girl who sees the cats sleeps.

Schöne Grüße aus Köln, said the owner of the garden."""


@dataclass(frozen=True)
class Kind:
    """What a small run is made of."""

    backbone: str
    tied: bool
    boundary: str
    schedule: str = "4_CLM+16_MLM+4_CLM"

    @property
    def only_causal(self) -> bool:
        """Whether nothing in its training was masked."""
        return all(OBJECTIVES[name].causal for name in find_objectives(self.schedule))


# of each backbone one run that knows both masks and one that knows the causal one alone
KINDS = {
    "untied": Kind("babyllama", tied=False, boundary="line"),
    "tied": Kind("babyllama", tied=True, boundary="document", schedule="10_CLM"),
    "ltg": Kind("ltg_bert", tied=False, boundary="line"),
    "newline": Kind("ltg_bert", tied=False, boundary="none", schedule="10_CLM"),
}


def make_run(folder: Path, kind: Kind, words: int | None = 1_234_567, step: int = 5) -> Transformer:
    """Write a run folder with one checkpoint, or one more, of random weights; return the model.

    The weights are so large that every position matters to every other.
    """
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    save_tokenizer(
        folder / "tokenizer.json", train_bpe(prepare.count_pieces([folder / "text.txt"]), 80)
    )
    tokenizer = Tokenizer(folder / "tokenizer.json")
    sizes = {
        "backbone": kind.backbone,
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 32,
        "n_ff": 48,
        "tied": kind.tied,
        "dropout": 0.1,
        "n_bucket": 8,
        "max_position": 16,
    }
    vocab_size = tokenizer.vocab_size
    if kind.tied:
        vocab_size += 12  # rows that no token has
    torch.manual_seed(7)
    model = Transformer(ModelConfig(vocab_size=vocab_size, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    content = {
        "step": step,
        "optimizer": [],
        "boundary": kind.boundary,
        "settings": asdict(Settings(**sizes, block_size=64, schedule=kind.schedule)),
        "tokenizer_sha256": tokenizer.sha256,
        "tokens_sha256": "0" * 64,
    }
    if words is not None:
        content["words"] = words
    save_checkpoint(folder / f"step_{step:07}.pt", model, **content)
    return model


@dataclass(frozen=True)
class Exported:
    """A run, and the folder that export_hf.py has made of it."""

    model: Transformer
    tokenizer: Tokenizer
    boundary: str
    run: Path
    folder: Path


@functools.cache
def exported(kind: str) -> Exported:
    """Return the export of a small run, made once; tests must not write into its folders."""
    run = FOLDER / kind
    folder = FOLDER / f"{kind}_exported"
    make_run(run, KINDS[kind])
    export_hf.main([str(run), str(folder)])
    loaded = load_run(str(run))
    return Exported(loaded.model, loaded.tokenizer, loaded.boundary, run, folder)


def load_hf(auto_class: str, folder: Path, **settings):
    """Load a model, or the tokenizer, as a user of transformers would."""
    loaded = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, **settings
    )
    if auto_class != "AutoTokenizer":
        loaded.eval()
    return loaded


def some_tokens(model: Transformer, rows: int = 3, length: int = 40) -> Tensor:
    """Random tokens, in rows that are longer than max_position."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator)


def assert_close(first: Tensor, second: Tensor, tolerance: float = 1e-5):
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)
