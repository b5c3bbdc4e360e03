"""LTG-BERT (Samuel et al. 2023) for Hugging Face transformers, with causal or open attention.

    AutoModelForMaskedLM, AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification
    .from_pretrained(FOLDER, trust_remote_code=True)

tools/export_hf.py of AntLM puts this file beside the weights. It needs torch and transformers,
4.41 or newer. Parameters have the names of the reference code (ltg-bert).

Does a token see those after it? The first of these that is set decides: `causal=` of forward,
`causal` of config.json, the class (AutoModelForCausalLM is causal, AutoModelForMaskedLM is not) and
for the other two, which are fine-tuned, `finetune_causal` of config.json: true for a run that has
seen no masked text in training.

In comments: B rows, T tokens a row, D hidden_size, H heads, d = D / H, F intermediate_size,
b position_bucket_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)


class LtgBertConfig(PretrainedConfig):
    """Settings of the network; transformers sets those that config.json holds, see export_hf.py."""

    model_type = "ltgbert"
    causal = None  # True or False for every class; None: the class decides
    finetune_causal = False  # of the classes that leave it open
    max_position = None  # distances from here on share a bucket; None: max_position_embeddings
    use_cache = False  # there is no cache: generate computes all positions at every step


def position_buckets(n_bucket, max_position):
    """Return the row of the position table for each distance that has one of its own.

    Distances run from 1 - max_position to max_position - 1. The near ones have a row each, the far
    ones share rows that cover ever more of them (DeBERTa, He et al. 2021, appendix A.3).
    """
    middle = n_bucket // 2
    rows = []
    for distance in range(1 - max_position, max_position):
        bucket = abs(distance)
        if bucket > middle:
            share = math.log(bucket / middle) / math.log((max_position - 1) / middle)
            # the 1e-9 keeps a whole number whole where rounding has lifted it
            bucket = middle + math.ceil(share * (middle - 1) - 1e-9)
        if distance < 0:
            bucket = -bucket
        rows.append(n_bucket - 1 + bucket)
    return rows


def bare_norm(config, size):
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.word_embedding = nn.Embedding(config.vocab_size, D)
        self.word_layer_norm = bare_norm(config, D)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.relative_embedding = nn.Parameter(torch.empty(2 * config.position_bucket_size - 1, D))
        self.relative_layer_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)

        # a list and no buffer: transformers 5 would lose a buffer that is not in the weights file
        max_position = config.max_position or config.max_position_embeddings
        self.max_distance = max_position - 1
        self.buckets = position_buckets(config.position_bucket_size, max_position)

    def forward(self, input_ids):
        """Return what the layers work on.

        x (B, T, D), the position table (2b - 1, D), and its row for each query and key (T, T)
        """
        x = self.dropout(self.word_layer_norm(self.word_embedding(input_ids)))
        table = self.relative_layer_norm(self.relative_embedding)

        position = torch.arange(input_ids.size(1), device=input_ids.device)
        distance = position[:, None] - position
        distance = distance.clamp(-self.max_distance, self.max_distance)
        buckets = torch.tensor(self.buckets, device=input_ids.device)
        return x, table, buckets[distance + self.max_distance]


class Attention(nn.Module):
    """Attention with disentangled relative positions (DeBERTa, He et al. 2021, section 3.1)."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.n_head = config.num_attention_heads
        self.pre_layer_norm = bare_norm(config, D)
        self.in_proj_qk = nn.Linear(D, 2 * D)
        self.in_proj_v = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)
        self.post_layer_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(-3, -2)  # (..., T, D) -> (..., H, T, d)

    def forward(self, x, table, rows, hidden):
        """Return (B, T, D). hidden (B or 1, 1, T or 1, T): True where a query may not see a key."""
        # content: q, k and v (B, H, T, d)
        x = self.pre_layer_norm(x)
        q, k = self.in_proj_qk(x).chunk(2, dim=-1)
        q = self.split_heads(q)
        k = self.split_heads(k)
        v = self.split_heads(self.in_proj_v(x))

        # positions pass through the same matrices as content: (H, 2b - 1, d)
        q_position, k_position = self.in_proj_qk(self.dropout(table)).chunk(2, dim=-1)
        q_position = self.split_heads(q_position)
        k_position = self.split_heads(k_position)

        # add q_i . k_position[i - j] and k_j . q_position[i - j] to the score q_i . k_j
        rows = rows.expand(*q.shape[:2], -1, -1)  # (B, H, T, T)
        content_to_position = (q @ k_position.mT).gather(-1, rows)
        position_to_content = (k @ q_position.mT).gather(-1, rows.mT).mT
        scale = (3 * q.size(-1)) ** -0.5  # the score is a sum of three products, not of one
        bias = (content_to_position + position_to_content) * scale

        # not -inf: a pad on the left that may see nothing would turn into NaN, and NaN spreads
        bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        rate = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, rate, scale=scale)
        y = y.transpose(-3, -2).flatten(-2)
        return self.dropout(self.post_layer_norm(self.out_proj(y)))


class GeGLU(nn.Module):
    def forward(self, x):  # (B, T, 2F) -> (B, T, F)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate, approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        n_ff = config.intermediate_size
        self.mlp = nn.Sequential(
            bare_norm(config, D),
            nn.Linear(D, 2 * n_ff, bias=False),
            GeGLU(),
            bare_norm(config, n_ff),
            nn.Linear(n_ff, D, bias=False),
            nn.Dropout(config.hidden_dropout_prob),
        )

    def forward(self, x):
        return self.mlp(x)


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x, table, rows, hidden):
        x = x + self.attention(x, table, rows, hidden)
        return x + self.mlp(x)


class Encoder(nn.Module):
    """All layers; a class of its own since the names of parameters are those of ltg-bert."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, table, rows, hidden):
        """Return what goes into each layer and what comes out of the last: n_layer + 1 tensors."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], table, rows, hidden))
        return tuple(states)


class Head(nn.Module):
    def __init__(self, config, n_out):
        super().__init__()
        D = config.hidden_size
        self.nonlinearity = nn.Sequential(
            bare_norm(config, D),
            nn.Linear(D, D),
            nn.GELU(),
            bare_norm(config, D),
            nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(D, n_out),
        )

    def forward(self, x):
        return self.nonlinearity(x)


class LtgBertModel(PreTrainedModel):
    """The transformer without a head; the classes below add one."""

    config_class = LtgBertConfig
    output_class = BaseModelOutput
    causal_by_default = None
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.transformer = Encoder(config)
        self.add_head(config)
        self.post_init()

    def add_head(self, config):
        """Add a fresh head, in the classes that have one."""

    def _init_weights(self, module):
        # as init_ltg of model.py without its factors by layer: it starts fresh heads and rows only
        std = math.sqrt(2 / (5 * self.config.hidden_size))
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Embedding):
            nn.init.trunc_normal_(module.relative_embedding, std=std, a=-2 * std, b=2 * std)

    def get_input_embeddings(self):
        return self.embedding.word_embedding

    def set_input_embeddings(self, value):
        self.embedding.word_embedding = value

    def encode(self, input_ids, attention_mask, causal):
        """Return the hidden states, n_layer + 1 of shape (B, T, D)."""
        # True where a key is hidden from a query: later ones, then pads
        T = input_ids.size(1)
        hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        if causal:
            hidden = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
        if attention_mask is not None:
            shape = tuple(attention_mask.shape)
            if len(shape) not in (2, 3):
                raise ValueError(f"attention_mask must be (B, T) or (B, T, T), not {shape}")
            if len(shape) == 2:
                attention_mask = attention_mask[:, None]  # every query sees the same keys
            hidden = hidden | (attention_mask == 0)[:, None]
        return self.transformer(*self.embedding(input_ids), hidden)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        causal=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """Return the output that is usual in transformers for this class.

        attention_mask: (B, T), or (B, T, T) for each query; 0 where a key may not be seen
        labels: see the classes that have a head
        causal: may tokens see only those before them? None: as config.json or the class says
        """
        # transformers 4 passes this in generate, as False
        if output_attentions:
            raise ValueError("output_attentions: this model keeps no attention probabilities")
        # who decides whether attention is causal?
        config = self.config
        for choice in (causal, config.causal, self.causal_by_default, config.finetune_causal):
            if choice is not None:
                causal = choice
                break
        states = self.encode(input_ids, attention_mask, causal)
        fields = self.answer(states[-1], labels, input_ids, attention_mask, causal)

        # hand over what was asked for, in the form that was asked for
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states:
            fields["hidden_states"] = states
        if return_dict is None:
            return_dict = self.config.return_dict
        output = self.output_class(**fields)
        return output if return_dict else output.to_tuple()

    def answer(self, x, labels, input_ids, attention_mask, causal):
        """Return the fields of output_class that follow from the last hidden state x (B, T, D)."""
        return {"last_hidden_state": x}


class LtgBertForMaskedLM(LtgBertModel):
    """Logits for every position; labels stand where their token does, -100 where none is asked."""

    # transformers 5 reads the pairs, 4 the keys alone
    _tied_weights_keys = {"classifier.nonlinearity.5.weight": "embedding.word_embedding.weight"}
    output_class = MaskedLMOutput
    causal_by_default = False

    def add_head(self, config):
        self.classifier = Head(config, config.vocab_size)

    def get_output_embeddings(self):
        return self.classifier.nonlinearity[5]

    def set_output_embeddings(self, value):
        self.classifier.nonlinearity[5] = value

    def loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def answer(self, x, labels, input_ids, attention_mask, causal):
        logits = self.classifier(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": self.loss(logits, labels)}


class LtgBertForCausalLM(LtgBertForMaskedLM, GenerationMixin):
    """The same network asked for the next token; labels are the input, they are shifted here."""

    output_class = CausalLMOutput
    causal_by_default = True

    def loss(self, logits, labels):
        return super().loss(logits[:, :-1], labels[:, 1:])

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class LtgBertForSequenceClassification(LtgBertModel):
    """A fresh head on the first position of a text; in causal mode on its last.

    A text stands where the mask lets a query see; without a mask, where there is no pad.
    labels (B,) are numbers of classes.
    """

    output_class = SequenceClassifierOutput

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.head = Head(config, config.num_labels)

    def find_text(self, input_ids, attention_mask):
        """Return True where a text stands, (B, T)."""
        if attention_mask is None:
            pad = self.config.pad_token_id
            return input_ids != (-1 if pad is None else pad)
        if attention_mask.dim() == 3:
            return (attention_mask != 0).any(dim=1)
        return attention_mask != 0

    def answer(self, x, labels, input_ids, attention_mask, causal):
        # the largest number among the positions of the text, whichever side the pads are on
        number = torch.arange(1, x.size(1) + 1, device=x.device)
        if not causal:
            number = number.flip(0)
        position = (self.find_text(input_ids, attention_mask) * number).argmax(dim=1)
        logits = self.head(x[torch.arange(len(x), device=x.device), position])
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.float(), labels.flatten())}
