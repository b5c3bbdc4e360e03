"""What export_hf.py and import_hf.py share: names of parameters, normalizers of tokenizers.

A row of LLAMA or LTG_BERT names one of our parameters and those in a Hugging Face folder that,
stacked in this order, make it; N is the number of a layer.
"""

import re

from config import UserError

LLAMA = {  # LlamaForCausalLM of transformers
    "embedding.tokens.weight": ["model.embed_tokens.weight"],
    "blocks.N.attention_norm.weight": ["model.layers.N.input_layernorm.weight"],
    "blocks.N.qkv.weight": [
        "model.layers.N.self_attn.q_proj.weight",
        "model.layers.N.self_attn.k_proj.weight",
        "model.layers.N.self_attn.v_proj.weight",
    ],
    "blocks.N.out.weight": ["model.layers.N.self_attn.o_proj.weight"],
    "blocks.N.ff_norm.weight": ["model.layers.N.post_attention_layernorm.weight"],
    "blocks.N.gate_up.weight": [
        "model.layers.N.mlp.gate_proj.weight",
        "model.layers.N.mlp.up_proj.weight",
    ],
    "blocks.N.down.weight": ["model.layers.N.mlp.down_proj.weight"],
    "head.norm.weight": ["model.norm.weight"],
    "head.vocab.weight": ["lm_head.weight"],
}
LTG_BERT = {  # modeling_ltgbert.py, which has the names of the reference code (ltg-bert)
    "embedding.tokens.weight": ["embedding.word_embedding.weight"],
    "embedding.relative": ["embedding.relative_embedding"],
    "embedding.relative_norm.weight": ["embedding.relative_layer_norm.weight"],
    "embedding.relative_norm.bias": ["embedding.relative_layer_norm.bias"],
    "blocks.N.qk.weight": ["transformer.layers.N.attention.in_proj_qk.weight"],
    "blocks.N.qk.bias": ["transformer.layers.N.attention.in_proj_qk.bias"],
    "blocks.N.v.weight": ["transformer.layers.N.attention.in_proj_v.weight"],
    "blocks.N.v.bias": ["transformer.layers.N.attention.in_proj_v.bias"],
    "blocks.N.out.weight": ["transformer.layers.N.attention.out_proj.weight"],
    "blocks.N.out.bias": ["transformer.layers.N.attention.out_proj.bias"],
    "blocks.N.out_norm.weight": ["transformer.layers.N.attention.post_layer_norm.weight"],
    "blocks.N.out_norm.bias": ["transformer.layers.N.attention.post_layer_norm.bias"],
    "blocks.N.up_gate.weight": ["transformer.layers.N.mlp.mlp.1.weight"],
    "blocks.N.down.weight": ["transformer.layers.N.mlp.mlp.4.weight"],
    "head.dense.weight": ["classifier.nonlinearity.1.weight"],
    "head.dense.bias": ["classifier.nonlinearity.1.bias"],
    "head.vocab.weight": ["classifier.nonlinearity.5.weight"],
    "head.vocab.bias": ["classifier.nonlinearity.5.bias"],
}
NAMES = {"babyllama": LLAMA, "ltg_bert": LTG_BERT}

# normalizers in an exported tokenizer.json: a newline that is a start token, ...
NEWLINE_TO_START = {"type": "Replace", "pattern": {"String": "\n"}, "content": "<s>"}
# ... and the space in front of a hidden word, which training hides with the word; lstrip of the
# mask token would take a newline or a further space as well, and those stay in training
NO_SPACE_BEFORE_MASK = {"type": "Replace", "pattern": {"Regex": " (?=<mask>)"}, "content": ""}


def hf_names(backbone: str, name: str) -> list[str]:
    """Return the Hugging Face names of the parameters that, stacked, make our parameter `name`.

    Raises UserError for a parameter that NAMES does not have.
    """
    layer = re.search(r"\d+", name)
    row = name
    if layer:
        row = name.replace(layer[0], "N", 1)
    if row not in NAMES[backbone]:
        raise UserError(
            f"{name} of {backbone} has no Hugging Face name; add it to NAMES in tools/hf_names.py"
        )
    names = NAMES[backbone][row]
    if layer:
        names = [hf_name.replace("N", layer[0]) for hf_name in names]
    return names


def is_tied(backbone: str, name: str, tied: bool) -> bool:
    """Return whether our parameter `name` is an output matrix that is the embedding as well."""
    return name == "head.vocab.weight" and (tied or backbone == "ltg_bert")


def split_merges(merges: list) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json, lists of two or texts with a space, as pairs."""
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
