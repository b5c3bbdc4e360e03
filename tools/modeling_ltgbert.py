"""LTG-BERT (Samuel et al. 2023) for Hugging Face transformers, with causal or open attention.

    AutoModelForMaskedLM, AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification
    .from_pretrained(FOLDER, trust_remote_code=True)

AntLM's tools/export_hf.py puts this file beside the weights. It needs torch and transformers, 4.41 to 5.23 were tried.
Whether a token sees those after it is said, in this order, by `causal=` of forward, by `causal` of config.json, and by
the class: AutoModelForCausalLM is causal, the others are not. Parameters bear the names of the reference (ltg-bert).
In comments: B rows, T tokens a row, D hidden_size, H heads, d = D / H, b position_bucket_size.
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
    """Sizes. max_position: distances from here on share a bucket; None: max_position_embeddings, as in ltg-bert."""

    model_type = "ltgbert"

    def __init__(self, vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=12, position_bucket_size=32, max_position_embeddings=512, max_position=None,
                 hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, layer_norm_eps=1e-7, causal=None,
                 pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True, use_cache=False, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.position_bucket_size = position_bucket_size
        self.max_position_embeddings, self.max_position = max_position_embeddings, max_position
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = hidden_dropout_prob, attention_probs_dropout_prob
        self.layer_norm_eps, self.causal = layer_norm_eps, causal
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings, self.use_cache = tie_word_embeddings, use_cache  # no cache: generate recomputes


def position_buckets(n_bucket, max_position):
    """Table row of every distance i - j from -(max_position - 1) to max_position - 1 (DeBERTa, He et al. 2021, A.3)."""
    mid = n_bucket // 2

    def bucket(r):
        a = abs(r)
        if a > mid:  # the 1e-9 keeps ceil of a whole number whole under rounding
            a = mid + math.ceil(math.log(a / mid) / math.log((max_position - 1) / mid) * (mid - 1) - 1e-9)
        return a if r >= 0 else -a

    return [n_bucket - 1 + bucket(r) for r in range(1 - max_position, max_position)]


def skew(x):
    """Column T - 1 + j - i of row i moves to column j: (..., T, 2T - 1) -> (..., T, T), without an index tensor."""
    T = x.size(-2)
    return x.flatten(-2)[..., T - 1:-1].unflatten(-1, (T, 2 * T - 2))[..., :T] if T > 1 else x


def bare_norm(c, size):
    return nn.LayerNorm(size, eps=c.layer_norm_eps, elementwise_affine=False)


class Embedding(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.word_layer_norm = bare_norm(c, c.hidden_size)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)
        self.relative_embedding = nn.Parameter(torch.empty(2 * c.position_bucket_size - 1, c.hidden_size))
        self.relative_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.max_distance = (c.max_position or c.max_position_embeddings) - 1
        self.buckets = position_buckets(c.position_bucket_size, self.max_distance + 1)  # no buffer: 5.x would lose it

    def forward(self, input_ids):
        """(B, T) -> x (B, T, D), position table (2b - 1, D), and its row for each distance from T - 1 down to 1 - T."""
        T = input_ids.size(1)
        distances = torch.arange(T - 1, -T, -1, device=input_ids.device).clamp(-self.max_distance, self.max_distance)
        rows = torch.tensor(self.buckets, device=input_ids.device)[distances + self.max_distance]
        x = self.dropout(self.word_layer_norm(self.word_embedding(input_ids)))
        return x, self.relative_layer_norm(self.relative_embedding), rows


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.num_attention_heads
        self.pre_layer_norm = bare_norm(c, c.hidden_size)
        self.in_proj_qk = nn.Linear(c.hidden_size, 2 * c.hidden_size)
        self.in_proj_v = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.post_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.dropout = nn.Dropout(c.attention_probs_dropout_prob)

    def forward(self, x, table, rows, hidden):  # hidden: which keys a query may not see, (B or 1, 1, T or 1, T)
        def heads(y):
            return y.unflatten(-1, (self.n_head, -1)).transpose(-3, -2)  # (..., T, D) -> (..., H, T, d)

        h = self.pre_layer_norm(x)
        q, k = map(heads, self.in_proj_qk(h).chunk(2, dim=-1))  # (B, H, T, d)
        q_pos, k_pos = map(heads, self.in_proj_qk(self.dropout(table)).chunk(2, dim=-1))  # (H, 2b - 1, d)
        scale = (3 * q.size(-1)) ** -0.5
        content_to_position = skew(q @ k_pos[:, rows].mT)  # q_i . k_pos[i - j]
        position_to_content = skew(k @ q_pos[:, rows.flip(0)].mT).mT  # k_j . q_pos[i - j]
        bias = (content_to_position + position_to_content) * scale
        # Not -inf: a pad that may see nothing (causal, padded on the left) would turn into NaN and spread.
        bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        y = F.scaled_dot_product_attention(q, k, heads(self.in_proj_v(h)), attn_mask=bias, scale=scale,
                                           dropout_p=self.dropout.p if self.training else 0.0)
        return self.dropout(self.post_layer_norm(self.out_proj(y.transpose(-3, -2).flatten(-2))))


class GeGLU(nn.Module):
    def forward(self, x):  # (B, T, 2F) -> (B, T, F)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate, approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.mlp = nn.Sequential(
            bare_norm(c, c.hidden_size), nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False), GeGLU(),
            bare_norm(c, c.intermediate_size), nn.Linear(c.intermediate_size, c.hidden_size, bias=False),
            nn.Dropout(c.hidden_dropout_prob))

    def forward(self, x):
        return self.mlp(x)


class EncoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = Attention(c)
        self.mlp = FeedForward(c)

    def forward(self, x, table, rows, hidden):
        x = x + self.attention(x, table, rows, hidden)
        return x + self.mlp(x)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x, table, rows, hidden):
        """Hidden states: what goes into each layer, and what comes out of the last."""
        states = [x]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states.append(self._gradient_checkpointing_func(layer.__call__, states[-1], table, rows, hidden))
            else:
                states.append(layer(states[-1], table, rows, hidden))
        return tuple(states)


class Head(nn.Module):
    def __init__(self, c, n_out):
        super().__init__()
        self.nonlinearity = nn.Sequential(
            bare_norm(c, c.hidden_size), nn.Linear(c.hidden_size, c.hidden_size), nn.GELU(),
            bare_norm(c, c.hidden_size), nn.Dropout(c.hidden_dropout_prob), nn.Linear(c.hidden_size, n_out))

    def forward(self, x):
        return self.nonlinearity(x)


class LtgBertModel(PreTrainedModel):
    """The transformer without a head; the classes below add one."""

    config_class = LtgBertConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["EncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"position_indices"]  # ltg-bert stores the buckets
    causal_by_default = False

    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.transformer = Encoder(config)
        self.add_head(config)
        self.post_init()

    def add_head(self, config):
        """A fresh head, where a class has one."""

    def _init_weights(self, module):
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

    def is_causal_for(self, causal):
        return next(x for x in (causal, self.config.causal, self.causal_by_default) if x is not None)

    def encode(self, input_ids, attention_mask, causal, output_attentions):
        """Hidden states, n_layers + 1 of (B, T, D). attention_mask (B, T) or (B, T, T), 0: may not be seen."""
        if output_attentions:
            raise ValueError("output_attentions: this model computes attention in one step and keeps no probabilities")
        T = input_ids.size(1)
        hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        if self.is_causal_for(causal):
            hidden = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
        if attention_mask is not None:
            if attention_mask.dim() not in (2, 3):
                raise ValueError(f"attention_mask: (B, T) or (B, T, T) was expected, not {tuple(attention_mask.shape)}")
            seen = attention_mask.bool()
            hidden = hidden | ~(seen[:, None, None] if seen.dim() == 2 else seen[:, None])
        return self.transformer(*self.embedding(input_ids), hidden)

    def output(self, kind, states, output_hidden_states, return_dict, **fields):
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        out = kind(**fields, hidden_states=states if wanted else None)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def forward(self, input_ids, attention_mask=None, causal=None, output_hidden_states=None, output_attentions=None,
                return_dict=None):
        states = self.encode(input_ids, attention_mask, causal, output_attentions)
        return self.output(BaseModelOutput, states, output_hidden_states, return_dict, last_hidden_state=states[-1])


class LtgBertForMaskedLM(LtgBertModel):
    """Scores of every token at every position; labels stand where their token does, -100 where nothing is asked."""

    _tied_weights_keys = {"classifier.nonlinearity.5.weight": "embedding.word_embedding.weight"}  # 4.x reads the keys
    output_class = MaskedLMOutput

    def add_head(self, config):
        self.classifier = Head(config, config.vocab_size)

    def get_output_embeddings(self):
        return self.classifier.nonlinearity[5]

    def set_output_embeddings(self, value):
        self.classifier.nonlinearity[5] = value

    def loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def forward(self, input_ids, attention_mask=None, labels=None, causal=None, output_hidden_states=None,
                output_attentions=None, return_dict=None):
        states = self.encode(input_ids, attention_mask, causal, output_attentions)
        logits = self.classifier(states[-1])
        return self.output(self.output_class, states, output_hidden_states, return_dict, logits=logits,
                           loss=None if labels is None else self.loss(logits, labels))


class LtgBertForCausalLM(LtgBertForMaskedLM, GenerationMixin):
    """The same network asked for the next token; labels are the input, the shift is made here."""

    causal_by_default = True
    output_class = CausalLMOutput

    def loss(self, logits, labels):
        return super().loss(logits[:, :-1], labels[:, 1:])

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class LtgBertForSequenceClassification(LtgBertModel):
    """A fresh head on the first position, in causal mode on the last one that is no pad."""

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.head = Head(config, config.num_labels)

    def forward(self, input_ids, attention_mask=None, labels=None, causal=None, output_hidden_states=None,
                output_attentions=None, return_dict=None):
        states = self.encode(input_ids, attention_mask, causal, output_attentions)
        at = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        if self.is_causal_for(causal):
            known = attention_mask is not None and attention_mask.dim() == 2
            seen = attention_mask.bool() if known else input_ids != self.config.pad_token_id
            at = (seen * torch.arange(1, seen.size(1) + 1, device=seen.device)).argmax(1)
        logits = self.head(states[-1][torch.arange(len(at), device=at.device), at])
        loss = None
        if labels is not None:
            kind = self.config.problem_type
            if kind == "regression" or kind is None and self.num_labels == 1:
                loss = F.mse_loss(logits.squeeze(-1).float(), labels.float())
            elif kind == "multi_label_classification" or kind is None and labels.is_floating_point():
                loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
            else:
                loss = F.cross_entropy(logits.float(), labels.flatten())
        fields = dict(logits=logits, loss=loss)
        return self.output(SequenceClassifierOutput, states, output_hidden_states, return_dict, **fields)
