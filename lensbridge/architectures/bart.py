"""Decoders with two projections in the layer itself: BART's (Lewis et al. 2020) and its relatives', alone.

Without an encoder's states there is no cross-attention, and a layer is self-attention and MLP.

- BART, PLBART (Ahmad et al. 2021), MVP (Tang et al. 2023), TrOCR (Li et al. 2023): norms behind attention and MLP, one
  behind the sum of the embeddings, none at the end; MVP and TrOCR make one axis of batch and head
- BlenderBot-small (Roller et al. 2021): the norm of the embedding comes before positions are added
- Marian (Junczys-Dowmunt et al. 2018): no norm of the embeddings
- mBART (Liu et al. 2020): BART with norms before attention and MLP, and one at the end
- BlenderBot (Roller et al. 2021), Pegasus (Zhang et al. 2020), BigBird-Pegasus (Zaheer et al. 2020), Whisper (Radford
  et al. 2023): the same without a norm of the embeddings
- MusicGen (Copet et al. 2023): likewise, with sines for positions; its rows of tokens are codebooks, several of which
  make one text, and whose embeddings and heads are those of the first
- BioGPT (Luo et al. 2022), XGLM (Lin et al. 2022): made without encoder; XGLM makes one axis of batch and head
"""

from dataclasses import replace

from .forms import Softmax
from .record import Architecture, Block

PRE_NORM = Block(
    ln1="self_attn_layer_norm",
    o="self_attn.out_proj",
    ln2="final_layer_norm",
    mlp="",
    gate=None,
    mlp_in="fc1",
    mlp_out="fc2",
    mlp_branch="fc2",
    rotary=False,
)
POST_NORM = replace(PRE_NORM, post_norm=True)
#: Batch and head are one axis in scores and pattern, which are made in the attention's forward itself.
PRE_NORM_FLAT = replace(PRE_NORM, flat_heads=True, softmax=Softmax(call=None))
POST_NORM_FLAT = replace(PRE_NORM_FLAT, post_norm=True)

BART = Architecture(
    model_type="bart",
    hf_class="BartForCausalLM",
    embed="model.decoder.embed_tokens",
    embed_scale="embed_scale",
    pos_embed="model.decoder.embed_positions",
    pos_offset=2,
    embed_norm="model.decoder.layernorm_embedding",
    embed_norm_of_sum=True,
    layers="model.decoder.layers",
    ln_final=None,
    block=POST_NORM,
    norm="LN",
)
PLBART = replace(BART, model_type="plbart", hf_class="PLBartForCausalLM")
MVP = replace(
    BART,
    model_type="mvp",
    hf_class="MvpForCausalLM",
    embed_scale=None,
    embed_factor="model.decoder.embed_scale",
    block=POST_NORM_FLAT,
)
TROCR = replace(
    BART,
    model_type="trocr",
    hf_class="TrOCRForCausalLM",
    block=POST_NORM_FLAT,
    unembed="output_projection",
    optional=("embed_norm",),
)
BLENDERBOT_SMALL = replace(
    BART,
    model_type="blenderbot-small",
    hf_class="BlenderbotSmallForCausalLM",
    embed_scale=None,
    pos_offset=0,
    embed_norm_of_sum=False,
)
MARIAN = replace(
    BART,
    model_type="marian",
    hf_class="MarianForCausalLM",
    embed_scale=None,
    embed_factor="model.decoder.embed_scale",
    pos_offset=0,
    embed_norm=None,
    embed_norm_of_sum=False,
)

MBART = replace(
    BART, model_type="mbart", hf_class="MBartForCausalLM", ln_final="model.decoder.layer_norm", block=PRE_NORM
)
BLENDERBOT = replace(
    MBART,
    model_type="blenderbot",
    hf_class="BlenderbotForCausalLM",
    pos_offset=0,
    embed_norm=None,
    embed_norm_of_sum=False,
)
BIGBIRD_PEGASUS = replace(
    BLENDERBOT,
    model_type="bigbird_pegasus",
    hf_class="BigBirdPegasusForCausalLM",
    ln_final="model.decoder.layernorm_embedding",
)
PEGASUS = replace(
    BLENDERBOT,
    model_type="pegasus",
    hf_class="PegasusForCausalLM",
    embed_scale=None,
    embed_factor="model.decoder.embed_scale",
)
WHISPER = replace(BLENDERBOT, model_type="whisper", hf_class="WhisperForCausalLM", embed_scale=None, unembed="proj_out")
BIOGPT = replace(
    BLENDERBOT,
    model_type="biogpt",
    hf_class="BioGptForCausalLM",
    embed="biogpt.embed_tokens",
    pos_embed="biogpt.embed_positions",
    pos_offset=2,
    layers="biogpt.layers",
    ln_final="biogpt.layer_norm",
    unembed="output_projection",
)
MUSICGEN = replace(
    BLENDERBOT,
    model_type="musicgen",
    hf_class="MusicgenForCausalLM",
    also=("musicgen_decoder",),
    embed="model.decoder.embed_tokens.0",
    embed_scale=None,
    pos_embed=None,
    embed_extra="the embeddings of the other codebooks are added, and sines and cosines of the position",
    unembed="lm_heads.0",
    after_unembed="stack",
    rows="num_codebooks",
    no_text="its codebooks are written with a delay from one to the next",
)
MUSICGEN_MELODY = replace(
    MUSICGEN,
    model_type="musicgen_melody",
    hf_class="MusicgenMelodyForCausalLM",
    also=("musicgen_melody_decoder",),
)
XGLM = replace(
    BLENDERBOT,
    model_type="xglm",
    hf_class="XGLMForCausalLM",
    embed="model.embed_tokens",
    pos_embed="model.embed_positions",
    pos_offset=2,
    layers="model.layers",
    ln_final="model.layer_norm",
    block=PRE_NORM_FLAT,
)
