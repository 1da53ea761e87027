"""Byte Latent Transformer (Pagnoni et al. 2024).

The layers of the byte stream: those of the local encoder, then those of the local decoder, all of them Llama's. Between
the two, patches of bytes, as many as the text asks for, pass a stack of their own; what the decoder's layers attend to
of that is added to the stream before them, and has no points here.
"""

from typing import Any

from .record import Architecture, LayerRun


def byte_layers(hf_config: Any) -> tuple[LayerRun, ...]:
    """The layers of encoder and decoder."""
    encoder, decoder = hf_config.encoder_config.num_hidden_layers, hf_config.decoder_config
    before = (True, *[decoder.cross_attn_all_layers] * (decoder.num_hidden_layers - 1))
    return (
        *(LayerRun(f"model.local_encoder.layers.{layer}", 0, fresh=False) for layer in range(encoder)),
        *(LayerRun(f"model.local_decoder.layers.{layer}", 0, fresh) for layer, fresh in enumerate(before)),
    )


BLT = Architecture(
    model_type="blt",
    hf_class="BltForCausalLM",
    embed="model.local_encoder.embed_tokens",
    embed_extra="embeddings of the bytes before, by their hashes, are added",
    layers="model.local_encoder.layers",
    runs=byte_layers,
    ln_final="model.local_decoder.norm",
    key_value_cache="none",
    config={
        "n_heads": "decoder_config.num_attention_heads",
        "eps": "decoder_config.rms_norm_eps",
        "act_fn": "decoder_config.hidden_act",
    },
    refused={
        f"encoder_config.{name}!=decoder_config.{name}": "its two stacks over bytes differ, which are shown as one"
        for name in ("num_attention_heads", "hidden_act", "rms_norm_eps")
    },
    rereads="patches are made of the bytes and of what the first layers make of them",
)
