"""What cannot be derived from pipelines of video with its sound: see :mod:`.table`."""

from __future__ import annotations

from typing import Any

_SOUND: dict[str, Any] = {
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
    "audio_in_channels": 32,
    "audio_out_channels": 32,
}

_CONNECTORS: dict[str, Any] = {
    "caption_channels": 32,
    "text_proj_in_factor": 3,
    "video_connector_num_attention_heads": 4,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_learnable_registers": 8,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_learnable_registers": 8,
}

#: Of a picture: as wide as these are the first and widest layers of its encoder.
_LATENTS = 16

_LTX2: dict[str, dict[str, Any]] = {
    # Widths of the connectors between the text encoder and the backbone: three layers of
    # the encoder go in, learnable registers fill the text up to a multiple of them.
    "connectors": _CONNECTORS,
    "transformer": {
        **_SOUND,
        **dict.fromkeys(("in_channels", "out_channels"), _LATENTS),
        "rope_type": "split",
    },
    # Its first width is that of a frame of sound: bins by channels.
    "audio_vae": {"base_channels": 32, "num_res_blocks": 1, "mel_bins": 16},
    "vocoder": {"hidden_channels": 64},
    # As released; the class counts a level that compresses time alone twice.
    "vae": {
        "latent_channels": _LATENTS,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}

_LTX2_3: dict[str, dict[str, Any]] = {
    # The later release: only there has every guidance call something to change.
    **_LTX2,
    "connectors": {
        **_CONNECTORS,
        "video_connector_attention_head_dim": 24,
        "audio_connector_attention_head_dim": 16,
        "per_modality_projections": True,
        "video_hidden_dim": 96,
        "audio_hidden_dim": 64,
    },
    "transformer": {
        **_LTX2["transformer"],
        "perturbed_attn": True,
        "use_prompt_embeddings": False,
        **dict.fromkeys(("gated_attn", "audio_gated_attn"), True),
        **dict.fromkeys(("cross_attn_mod", "audio_cross_attn_mod"), True),
    },
}

COMPONENTS: dict[str, dict[str, dict[str, Any]]] = {
    # Both releases use the same classes, each has a processor of its own: one pipeline is
    # measured as the first.
    "LTX2InContextPipeline": _LTX2,
    **dict.fromkeys(
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2HDRPipeline",
        ),
        _LTX2_3,
    ),
    **dict.fromkeys(
        ("LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline"),
        {
            **_LTX2_3,
            # Of later releases; each slot for a generated keyframe is told by it.
            "transformer": {
                **_LTX2_3["transformer"],
                "use_keyframes_abs_pos_embedding": True,
            },
        },
    ),
    "Kandinsky6TI2VAPipeline": {
        # Optional, but sound is made by default.
        "audio_vae": {"latent_channels": 20, "hidden_channels": 32, "mel_bins": 16},
        "vocoder": {"num_mels": 16, "upsample_initial_channel": 64},
        # Off by default and on in every released checkpoint.
        "transformer": dict.fromkeys(
            ("text_token_padding", "ca_rope", "cross_gates", "fix_modulation"), True
        ),
    },
}
"""Configuration entries: pipeline class -> component -> entry."""

CALLS_OF: dict[str, dict[str, Any]] = {
    # Compression of the picture by a codec that is no dependency.
    "LTX2ImageToVideoPipeline": {"image_crf": 0},
    # Below 1 attention between the video and its references has a mask.
    "LTX2InContextPipeline": {"conditioning_attention_strength": 0.5},
}
"""Arguments of ``__call__`` that do not fit a small run, by pipeline."""

GIVEN: dict[str, frozenset[str]] = {
    # What their task conditions a video on, which their signature calls optional.
    "LTX2ImageToVideoPipeline": frozenset({"image"}),
    **dict.fromkeys(
        ("LTX2ConditionPipeline", "LTX2DFRPipeline"), frozenset({"conditions"})
    ),
    "LTX2InContextPipeline": frozenset({"conditions", "reference_conditions"}),
    "LTX2HDRPipeline": frozenset({"reference_conditions"}),
}
"""Optional media that a call gets, by pipeline."""
