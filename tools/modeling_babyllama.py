"""BabyLlama for Hugging Face transformers where every token sees the whole text, later ones too.

    AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)

The network is Llama's, with the same weights as the LlamaForCausalLM that the folder loads as
without any code of its own; only the mask differs. Where config.json names them, AutoModel and
AutoModelForSequenceClassification are the classes of this file, too: tools/export_hf.py of AntLM
names them for a run that has seen masked text in training. This file needs torch and transformers,
4.41 or newer.

In comments: B rows, T tokens a row.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class BabyLlamaModel(LlamaModel):
    """The transformer without a head; the classes below add one."""

    _auto_class = "AutoModel"  # a folder that is saved again gets this file, too
    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]
    # kernels that do not take a mask as it is; the first has had two names
    _supports_flash_attn = False
    _supports_flash_attn_2 = False
    _supports_flex_attn = False

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """Return the output of LlamaModel.

        attention_mask: (B, T), or (B, T, T) for each query; 0 where a key may not be seen
        """
        tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
        B, T = tokens.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(B, T, device=tokens.device)
        if attention_mask.dim() not in (2, 3):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be (B, T) or (B, T, T), not {shape}")
        if attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None]  # every query sees the same keys

        # a mask of four dimensions is added to the scores as it is; not -inf, since a query that
        # may see nothing would turn into NaN
        hidden = (attention_mask == 0)[:, None].expand(B, 1, T, T)
        scores = torch.zeros(B, 1, T, T, dtype=self.dtype, device=tokens.device)
        scores = scores.masked_fill(hidden, torch.finfo(self.dtype).min)
        kwargs["use_cache"] = False  # a later token would change the keys of the earlier ones
        return super().forward(input_ids=input_ids, attention_mask=scores, **kwargs)


class BabyLlamaForMaskedLM(LlamaPreTrainedModel):
    """Logits for every position; labels stand where their token does, -100 where none is asked."""

    _auto_class = "AutoModelForMaskedLM"
    # transformers 5 reads the pairs, 4 the keys alone
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = BabyLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None, **kwargs):
        output = self.model(input_ids, attention_mask, return_dict=True, **kwargs)
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

        if return_dict is None:
            return_dict = self.config.return_dict
        output = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return output if return_dict else output.to_tuple()


class BabyLlamaForSequenceClassification(LlamaForSequenceClassification):
    """A fresh head on the last position of a text, as Llama has it; labels (B,) are classes."""

    _auto_class = "AutoModelForSequenceClassification"
    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = BabyLlamaModel(config)
        self.post_init()
