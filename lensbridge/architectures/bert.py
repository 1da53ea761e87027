"""BERT (Devlin et al. 2019) and its relatives as language models.

The embeddings of token, position and token type are added, then normed; norms stand behind attention and MLP; what the
last layer returns is transformed (an affine map, a norm) before it is unembedded. With ``is_decoder`` off, HuggingFace
lets every position attend to every other.

- BERT, ERNIE (Sun et al. 2020), BigBird (Zaheer et al. 2020): the same
- RoCBERT (Su et al. 2022): the token embedding is mapped together with those of a character's shape and sound
- BERT-Generation (Rothe et al. 2020), GIT (Wang et al. 2022): no token types, no transform
- ELECTRA (Clark et al. 2020), RemBERT (Chung et al. 2021): embeddings of another width, mapped to the stream's
- RoFormer (Su et al. 2021): rotary positions
- RoBERTa (Liu et al. 2019), CamemBERT (Martin et al. 2020), XLM-RoBERTa (Conneau et al. 2020), data2vec (Baevski et al.
  2022): positions are counted from the row behind the padding token's
- X-MOD (Pfeiffer et al. 2022): an adapter of the language between the MLP and the norm behind it
- RoBERTa-PreLayerNorm (Ott et al. 2019), XLM-RoBERTa-XL (Goyal et al. 2021), Megatron-BERT (Shoeybi et al. 2019): norms
  before attention and MLP, and at the end
"""

from dataclasses import replace

from .forms import Refusal, Softmax
from .record import Architecture, Block

POST_NORM = Block(
    ln1="attention.output.LayerNorm",
    attn="attention.self",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    ln2="output.LayerNorm",
    mlp="",
    gate=None,
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
    attn_branch="attention.output.dense",
    mlp_branch="output.dense",
    rotary=False,
    post_norm=True,
)
#: Scores and pattern are made in the attention's forward itself.
WITHIN = Softmax(call=None)

BERT = Architecture(
    model_type="bert",
    hf_class="BertLMHeadModel",
    embed="bert.embeddings.word_embeddings",
    pos_embed="bert.embeddings.position_embeddings",
    type_embed="bert.embeddings.token_type_embeddings",
    embed_norm="bert.embeddings.LayerNorm",
    embed_norm_of_sum=True,
    layers="bert.encoder.layer",
    ln_final=None,
    head="cls.predictions.transform",
    unembed="cls.predictions.decoder",
    block=POST_NORM,
    norm="LN",
    refused={
        "add_cross_attention": "its blocks add a third branch, which TransformerLens has no points for",
        "chunk_size_feed_forward": "its MLPs run on pieces of the text, one after the other",
    },
)
BIG_BIRD = replace(
    BERT,
    model_type="big_bird",
    hf_class="BigBirdForCausalLM",
    block=replace(POST_NORM, softmax=WITHIN),
    variants={"rescale_embeddings": {"embed_factor": "config.hidden_size", "embed_factor_power": 0.5}},
    refused={
        **BERT.refused,
        "attention_type=block_sparse": "its pattern is made in pieces; load it with attention_type='original_full', "
        "which HuggingFace takes for short texts anyway",
    },
)
BERT_GENERATION = replace(
    BERT,
    model_type="bert-generation",
    hf_class="BertGenerationDecoder",
    type_embed=None,
    head=None,
    unembed="lm_head.decoder",
)


def beneath(root: str, **changes: object) -> Architecture:
    """BERT's record with another name for what is called ``bert`` there."""
    paths = {name: getattr(BERT, name) for name in ("embed", "pos_embed", "type_embed", "embed_norm", "layers")}
    return replace(BERT, **{name: path.replace("bert.", f"{root}.", 1) for name, path in paths.items()} | changes)


ERNIE = beneath(
    "ernie",
    model_type="ernie",
    hf_class="ErnieForCausalLM",
    refused={**BERT.refused, "use_task_id": "it adds an embedding of the task"},
)
ROC_BERT = beneath(
    "roc_bert",
    model_type="roc_bert",
    hf_class="RoCBertForCausalLM",
    embed_extra="the token embedding is mapped together with those of the character's shape and sound",
    refused={**BERT.refused, "concat_input=False": "it norms the embeddings before it adds those of shape and sound"},
)
GIT = beneath(
    "git",
    model_type="git",
    hf_class="GitForCausalLM",
    type_embed=None,
    head=None,
    unembed="output",
    block=replace(POST_NORM, softmax=WITHIN),
    refused={"chunk_size_feed_forward": BERT.refused["chunk_size_feed_forward"]},
)
ELECTRA = beneath(
    "electra",
    model_type="electra",
    hf_class="ElectraForCausalLM",
    embed_map="electra.embeddings_project",
    head="generator_predictions",
    unembed="generator_lm_head",
    optional=("embed_map",),
)
REMBERT = beneath(
    "rembert",
    model_type="rembert",
    hf_class="RemBertForCausalLM",
    embed_map="rembert.encoder.embedding_hidden_mapping_in",
    head="cls.predictions",
    block=replace(POST_NORM, softmax=WITHIN),
)
ROFORMER = beneath(
    "roformer",
    model_type="roformer",
    hf_class="RoFormerForCausalLM",
    pos_embed=None,
    embed_map="roformer.embeddings_project",
    block=replace(
        POST_NORM,
        rotary=True,
        softmax=Softmax(call=None, queries="apply_rotary_position_embeddings", keys="key_layer_transpose"),
    ),
    refused={**BERT.refused, "rotary_value": "its values are rotated after TransformerLens' points"},
    optional=("embed_map",),
)

ROBERTA = beneath(
    "roberta",
    model_type="roberta",
    hf_class="RobertaForCausalLM",
    pos_after_padding=True,
    head="lm_head",
    unembed="lm_head.decoder",
)
CAMEMBERT = replace(ROBERTA, model_type="camembert", hf_class="CamembertForCausalLM")
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta", hf_class="XLMRobertaForCausalLM")
DATA2VEC_TEXT = beneath(
    "data2vec_text",
    model_type="data2vec-text",
    hf_class="Data2VecTextForCausalLM",
    pos_after_padding=True,
    head="lm_head",
    unembed="lm_head.decoder",
)

#: Else the stream before the adapter is normed, too.
BEHIND_ADAPTER = Refusal(
    ("hook_resid_post", "ln2.hook_scale", "ln2.hook_normalized"),
    "an adapter of the language changes the stream between the MLP and the norm behind it, and nothing reads it before",
)
XMOD = replace(
    ROBERTA,
    model_type="xmod",
    hf_class="XmodForCausalLM",
    block=replace(POST_NORM, extra="what an adapter of the language makes of it"),
    variants={
        "adapter_reuse_layer_norm=False": {"refusals": (BEHIND_ADAPTER,)},
        "adapter_layer_norm": {"ln2": "output.adapter_layer_norm", "refusals": ()},
        "pre_norm": {
            "post_norm": False,
            "ln_final": "roberta.encoder.LayerNorm",
            "ln2": POST_NORM.ln2,
            "refusals": (),
        },
    },
)

MEGATRON_BERT = replace(
    BERT,
    model_type="megatron-bert",
    hf_class="MegatronBertForCausalLM",
    embed_norm=None,
    embed_norm_of_sum=False,
    ln_final="bert.encoder.ln",
    block=replace(POST_NORM, ln1="attention.ln", ln2="ln", post_norm=False, softmax=WITHIN),
)
ROBERTA_PRELAYERNORM = beneath(
    "roberta_prelayernorm",
    model_type="roberta-prelayernorm",
    hf_class="RobertaPreLayerNormForCausalLM",
    pos_after_padding=True,
    ln_final="roberta_prelayernorm.LayerNorm",
    head="lm_head",
    unembed="lm_head.decoder",
    block=replace(POST_NORM, ln1="attention.LayerNorm", ln2="intermediate.LayerNorm", post_norm=False),
)
XLM_ROBERTA_XL = replace(
    ROBERTA,
    model_type="xlm-roberta-xl",
    hf_class="XLMRobertaXLForCausalLM",
    embed_norm=None,
    embed_norm_of_sum=False,
    ln_final="roberta.encoder.LayerNorm",
    block=replace(POST_NORM, ln1="attention.self_attn_layer_norm", ln2="LayerNorm", post_norm=False),
)
