"""Samples equal recomputation, follow their seed and hold no special token.

python -m pytest tests/test_sample.py
"""

import pytest
import torch

import sample
from antlm.checkpoint import save_checkpoint
from antlm.tokenizer import END, MASK, PAD, SPECIAL, START, Tokenizer, save_tokenizer
from config import UserError
from model import BACKBONES, ModelConfig, Transformer
from sample import generate

each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def tiny(backbone: str, vocab_size: int = 31) -> Transformer:
    """A float64 model with weights so large that every position matters to every other."""
    torch.manual_seed(6)  # from which greedy sampling does not fall into a loop at once
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_ff=24, n_bucket=4, max_position=16)
    model = Transformer(ModelConfig(backbone, vocab_size, **sizes)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def random_tokens(n: int) -> torch.Tensor:
    return torch.randint(31, (1, n), generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------------- generate


def greedy(model: Transformer, tokens: torch.Tensor, n_new: int, window: int) -> list[int]:
    """The plain way: each step a forward pass over all tokens in the window."""
    n_prompt = tokens.size(1)
    for _ in range(n_new):
        token = model(tokens[:, -window:], causal=True)[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, token), dim=1)
    return tokens[0, n_prompt:].tolist()


@each_backbone
@pytest.mark.parametrize("n_prompt, block_size", [(4, 64), (4, 8), (12, 8), (1, 16)])
def test_greedy_generation_equals_recomputation(backbone, n_prompt, block_size):
    model = tiny(backbone)
    tokens = random_tokens(n_prompt)
    new = generate(model, tokens, 20, block_size=block_size, temperature=0)
    assert new == greedy(model, tokens, 20, block_size)
    assert len(set(new)) > 3, "a degenerate loop would prove little"
    assert generate(model, tokens, 20, block_size=block_size, top_k=1) == new


@each_backbone
def test_the_window_is_cropped_to_what_the_model_can_take(backbone):
    model = tiny(backbone)
    tokens = random_tokens(12)
    model.max_tokens = 8
    new = generate(model, tokens, 20, block_size=64, temperature=0)
    assert new == greedy(model, tokens, 20, window=8)


@each_backbone
def test_generation_ends_before_the_stop_token(backbone):
    model = tiny(backbone)
    tokens = random_tokens(4)
    new = generate(model, tokens, 20, block_size=64, temperature=0)
    stop = next(token for token in new if token != new[0])
    stopped = generate(model, tokens, 20, block_size=64, temperature=0, stop=stop)
    assert stopped == new[: new.index(stop)]


@pytest.mark.slow
@each_backbone
def test_forbidden_tokens_never_appear(backbone):
    model = tiny(backbone)
    tokens = random_tokens(4)
    generator = torch.Generator().manual_seed(10)
    settings = dict(block_size=64, temperature=3.0, generator=generator)
    assert {3, 7} <= set(generate(model, tokens, 200, **settings))
    assert not {3, 7} & set(generate(model, tokens, 200, forbidden=(3, 7), **settings))
    all_but_one = tuple(range(30))
    assert set(generate(model, tokens, 30, forbidden=all_but_one, **settings)) == {30}


class Dice(torch.nn.Module):
    """A model that always says the same logits."""

    blocks = ()
    max_tokens = None

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, tokens: torch.Tensor, *, causal: bool, cache=None) -> torch.Tensor:
        return self.logits.repeat(1, tokens.size(1), 1)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_is_what_logits_are_divided_by(temperature, top_k):
    """The lower it is, the oftener comes the likeliest token."""
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    generator = torch.Generator().manual_seed(1)
    settings = dict(block_size=1, temperature=temperature, top_k=top_k, generator=generator)
    tokens = generate(Dice(probabilities.log()), torch.tensor([[0]]), 4000, **settings)
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000

    expected = probabilities ** (1 / temperature)
    if top_k:
        expected[0] = 0  # the least likely of the four
    expected = expected / expected.sum()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.025)  # three deviations


def test_top_k_leaves_so_many_tokens():
    model = tiny("babyllama")
    tokens = random_tokens(4)
    likeliest = model(tokens, causal=True)[0, -1].topk(3).indices.tolist()
    generator = torch.Generator().manual_seed(1)
    settings = dict(block_size=64, temperature=100.0, top_k=3, generator=generator)
    first_tokens = {generate(model, tokens, 1, **settings)[0] for _ in range(50)}
    assert first_tokens == set(likeliest)


def test_generation_follows_its_generator():
    model = tiny("babyllama")
    samples = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        samples.append(generate(model, random_tokens(4), 30, block_size=64, generator=generator))
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


def test_broken_weights_are_an_error_not_a_sample():
    model = tiny("babyllama")
    model.blocks[1].down.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate(model, random_tokens(4), 5, block_size=64)


# -------------------------------------------------------------------------------------- the program


@pytest.fixture
def make_run(tmp_path):
    """A function that makes a run whose model much prefers tokens that may not come."""
    save_tokenizer(tmp_path / "tokenizer.json", [(b"t", b"h"), (b"th", b"e")])
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")

    def make(start_bias: float = -1000.0, schedule: str = "1_CLM+1_MLM") -> str:
        model = tiny("ltg_bert", vocab_size=tokenizer.vocab_size + 5).float()
        bias = model.head.vocab.bias.data
        bias[[PAD, END, MASK]] = 1000.0
        bias[tokenizer.vocab_size :] = 1000.0  # tokens that the tokenizer does not have
        bias[START] = start_bias
        save_checkpoint(
            tmp_path / "step_0000010.pt",
            model,
            step=10,
            settings=dict(schedule=schedule, block_size=16),
            boundary="line",
            tokenizer_sha256=tokenizer.sha256,
        )
        return str(tmp_path)

    return make


def printed_samples(capsys, *args: str) -> list[str]:
    sample.main([*args, "--device", "cpu"])
    printed = capsys.readouterr().out
    return printed.split("--- ")[1:]


def test_samples_follow_the_seed_and_hold_no_special_token(make_run, capsys):
    run = make_run()
    flags = ["--prompt", "The dog", "--n", "3", "--tokens", "30"]
    first = printed_samples(capsys, run, *flags, "--seed", "1")
    assert printed_samples(capsys, run, *flags, "--seed", "1") == first
    assert printed_samples(capsys, run, *flags, "--seed", "2") != first
    assert len(first) == 3
    for number, text in enumerate(first, start=1):
        assert text.startswith(f"{number}\nThe dog")
        assert len(text) > 30
        assert not any(special in text for special in SPECIAL)


def test_the_samples_of_a_call_differ(make_run, capsys):
    run = make_run()
    sample.main([str(run), "--n", "4", "--tokens", "12", "--temperature", "2"])
    samples = capsys.readouterr().out.split("--- ")[1:]
    texts = {text.partition("\n")[2] for text in samples}
    assert len(samples) == 4
    assert len(texts) > 1


def test_samples_stop_where_a_text_would_start(make_run, capsys):
    samples = printed_samples(capsys, make_run(start_bias=2000.0), "--n", "2")
    assert samples == ["1\n\n", "2\n\n"]


@pytest.mark.parametrize("schedule, noted", [("2_MLM", True), ("1_MLM:CLM", False)])
def test_samples_of_a_model_without_clm_come_with_a_note(make_run, capsys, schedule, noted):
    sample.main([make_run(schedule=schedule), "--n", "1", "--device", "cpu"])
    assert ("never learnt to predict the next token" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("flag, value", [("--n", "0"), ("--temperature", "nan"), ("--top_k", "-1")])
def test_a_flag_out_of_range_is_named(tmp_path, flag, value):
    with pytest.raises(UserError, match=f"{flag} {value}"):
        sample.main([str(tmp_path), flag, value])
