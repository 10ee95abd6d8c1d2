"""What cannot be derived from a class, each entry with its reason.

Components' entries: pipeline class -> component -> configuration entries.  The entry
``class`` (``package:Name``) names what to build where the hint is abstract or None; in
a text encoder, ``layers`` is its depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEFT_OUT = frozenset(
    {"feature_extractor", "image_encoder", "prompt_enhancer_head", "safety_checker"}
)
"""Components that text to image runs do without, unless a stand-in is known: they
condition on pictures, judge them, or rewrite the prompt."""

STAND_INS = {
    # Needs a package of its own, and pipelines that take it refuse to run without one.
    "CosmosSafetyChecker": "porter.shrink.stand_ins:NoSafetyChecker",
}
"""What is built instead of a hinted class, by the class's name."""

_MOTIF = {
    # The library's encoder reads an entry that its configuration lacks.
    "text_encoder": {"text_config": {"dropout_rate": 0.0}},
    # Hinted by the abstract bases.
    "guider": {"class": "diffusers:ClassifierFreeGuidance"},
    "scheduler": {"class": "diffusers:FlowMatchEulerDiscreteScheduler"},
}

_NO_MICRO_CONDITIONS = {"transformer": {"use_additional_conditions": False}}

_NO_CONTEXT: dict[str, Any] = {"img_context_dim_in": None}
_MASKED_FRAMES = {**_NO_CONTEXT, "in_channels": 17}
"""The latents and a mask of the frames that are given."""

_ROTARY = {"use_rotary_positional_embeddings": True, "attention_head_dim": 16}
_EASY = {"out_channels": 16, "patch_size": 2, "attention_head_dim": 16}
"""An eighth and three eighths of a head are the axes' widths, each even."""

_PIPELINES: dict[str, dict[str, dict[str, Any]]] = {
    # Share their backbone class, whose default sample size switches micro-conditions on,
    # with a pipeline that passes them; these two pass None.
    "PixArtSigmaPipeline": _NO_MICRO_CONDITIONS,
    "PixArtSigmaPAGPipeline": _NO_MICRO_CONDITIONS,
    # The VAE class has no defaults at all: the released compression with one channel
    # group a level, latents as wide as the backbone's default.
    "HunyuanImagePipeline": {
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": (64, 64, 64, 64, 64, 128),
            "layers_per_block": 1,
            "spatial_compression_ratio": 32,
            "sample_size": 64,
        },
        # None by default: the glyph encoder's stream, which the pipeline always feeds.
        "transformer": {"text_embed_2_dim": 32},
        # Optional, but released checkpoints have it, and without it nothing is guided.
        "guider": {"class": "diffusers:AdaptiveProjectedMixGuidance"},
    },
    # A solver for noise prediction by default, on a model that predicts the flow.
    "SanaPipeline": {
        "scheduler": {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
    },
    # Declares a solver whose `step` the body does not call in the right way; the class
    # in released checkpoints is this one.
    "SanaSprintPipeline": {
        "scheduler": {"class": "diffusers:SCMScheduler"},
        # The body always passes a guidance scale.
        "transformer": {"guidance_embeds": True},
    },
    # None by default: widths of the two long texts, and which decoder layer feeds which
    # block (one of the decoder's two, in turn).
    "HiDreamImagePipeline": {
        "transformer": {
            "caption_channels": [32, 32],
            "llama_layers": [0, 1, 0, 1, 1, 0],
            # Two axes by default, for positions that have three.
            "axes_dims_rope": [8, 8, 8],
            # The body scales every size to 1024 x 1024: large patches keep tokens few.
            "patch_size": 8,
            "in_channels": 16,
        }
    },
    # None by default: stretching factors, one for each pair of a head's width.
    "OmniGenPipeline": {
        "transformer": {
            "rope_scaling": {"short_factor": [1.0] * 12, "long_factor": [1.0] * 12},
        }
    },
    # Hinted by the abstract base; the body reads `language_model` of this one.
    "Ideogram4Pipeline": {"text_encoder": {"class": "transformers:Qwen3VLModel"}},
    # The hinted half of an encoder-decoder is built from an inner configuration that the
    # stock loader does not find again; a decoder of the same family stands in.
    "PRXPipeline": {"text_encoder": {"class": "transformers:Gemma2Model"}},
    # None by default; the body halves it: half is the mean, half the variance.
    "DiTPipeline": {"transformer": {"out_channels": 8}},
    # Rotary embeddings are off by default and on in all released checkpoints but the
    # smallest; without them the text must be as long as the table of positions.
    **dict.fromkeys(
        ("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline"),
        {"transformer": _ROTARY},
    ),
    # Latents and as many channels of a picture or of control.
    **dict.fromkeys(
        (
            "CogVideoXImageToVideoPipeline",
            "CogVideoXFunControlPipeline",
            "ConsisIDPipeline",
        ),
        {"transformer": {**_ROTARY, "in_channels": 32}},
    ),
    # Blocks that get control, by number; in released checkpoints every fifth.
    "WanVACEPipeline": {"transformer": {"vace_layers": [0, 2]}},
    # The widths of the face's encoder have defaults of their own.
    "WanAnimatePipeline": {
        "transformer": {
            "image_dim": 32,
            "added_kv_proj_dim": 96,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 32,
            "inject_face_latents_blocks": 2,
        }
    },
    # The picture's encoder is optional and feeds the blocks in released checkpoints.
    "WanImageToVideoPipeline": {
        "image_encoder": {},
        "image_processor": {},
        "transformer": {"image_dim": 32, "added_kv_proj_dim": 96, "in_channels": 36},
    },
    "ChronoEditPipeline": {
        "transformer": {"image_dim": 32, "added_kv_proj_dim": 96, "in_channels": 36},
    },
    # Off by default, on in the released checkpoint: the body feeds both.
    "HunyuanVideoFramepackPipeline": {
        "transformer": {
            "has_image_proj": True,
            "image_proj_dim": 32,
            "has_clean_x_embedder": True,
        }
    },
    # None by default: how the picture enters; the body knows two ways.
    "HunyuanVideoImageToVideoPipeline": {
        "transformer": {"image_condition_type": "latent_concat", "in_channels": 33},
        "text_encoder": {"pad_token_id": 0},
        # As in the released checkpoint: the body counts the template's tokens.
        "tokenizer": {"padding_side": "right"},
    },
    # Channels of a backbone that is named after its first pipeline.
    "Kandinsky5I2VPipeline": {
        "transformer": {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "visual_cond": True,
        }
    },
    # None by default.
    "EasyAnimatePipeline": {
        "transformer": {**_EASY, "in_channels": 16},
    },
    "EasyAnimateControlPipeline": {
        "transformer": {**_EASY, "in_channels": 32},
    },
    "EasyAnimateInpaintPipeline": {
        # The other way asks the VAE for an entry that its class does not have.
        "transformer": {
            **_EASY,
            "in_channels": 48,
            "resize_inpaint_mask_directly": False,
        },
    },
    # A default for three stages of growing size, for a body of one.
    "HeliosPipeline": {
        "scheduler": {"stages": 1, "stage_range": [0, 1]},
        "transformer": {"rope_dim": (8, 8, 8)},
    },
    "HeliosPyramidPipeline": {
        "transformer": {"rope_dim": (8, 8, 8)},
        # At a third, the default, the covariance of the noise is singular but for a term
        # that single precision loses.
        "scheduler": {"gamma": 0.3},
    },
    # Channels of the VAE, and their number in a patch.
    "Cosmos3OmniPipeline": {
        "transformer": {"latent_channel": 16, "patch_latent_dim": 64}
    },
    # None by default: context of pictures, which the bodies do not pass.
    "CosmosTextToWorldPipeline": {"transformer": _NO_CONTEXT},
    # The first of the bodies' own noise levels is zero, which they divide by.
    "Cosmos2TextToImagePipeline": {
        "transformer": _NO_CONTEXT,
        "scheduler": {"use_karras_sigmas": True},
    },
    "Cosmos2VideoToWorldPipeline": {
        "transformer": _MASKED_FRAMES,
        "scheduler": {"use_karras_sigmas": True},
    },
    **dict.fromkeys(
        (
            "CosmosVideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        {"transformer": _MASKED_FRAMES},
    ),
    # The hinted half of an encoder-decoder.
    **dict.fromkeys(
        (
            "StableAudio3Pipeline",
            "StableAudio3AudioToAudioPipeline",
            "StableAudio3InpaintPipeline",
        ),
        {"text_encoder": {"is_encoder_decoder": False}},
    ),
    # The backbone's table of frames has one length; half of its channels are variance.
    "LattePipeline": {"transformer": {"video_length": 5, "out_channels": 8}},
    # The first VAE of the hint has no temporal compression, which the body reads.
    **dict.fromkeys(
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        {"vae": {"class": "diffusers:AutoencoderKLWan"}},
    ),
    # Widths of the connectors between the text encoder and the backbone: three layers of
    # the encoder go in, learnable registers fill the text up to a multiple of them.
    **dict.fromkeys(
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2HDRPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
        ),
        {
            "connectors": {
                "caption_channels": 32,
                "text_proj_in_factor": 3,
                "video_connector_num_attention_heads": 4,
                "video_connector_attention_head_dim": 8,
                "video_connector_num_learnable_registers": 8,
                "audio_connector_num_attention_heads": 4,
                "audio_connector_attention_head_dim": 8,
                "audio_connector_num_learnable_registers": 8,
            },
            "transformer": {
                "audio_num_attention_heads": 4,
                "audio_attention_head_dim": 16,
                "audio_cross_attention_dim": 64,
                "audio_in_channels": 32,
                "audio_out_channels": 32,
            },
            # Its first width is that of a frame of sound: bins by channels.
            "audio_vae": {"base_channels": 32, "num_res_blocks": 1, "mel_bins": 16},
            "vocoder": {"hidden_channels": 64},
            # As released; the class counts a level that compresses time alone twice.
            "vae": {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
        },
    ),
    # The latents and a picture beside them; twice the released VAE's channels.
    "HunyuanSkyreelsImageToVideoPipeline": {"transformer": {"in_channels": 32}},
    # None by default: the width of the picture's tokens.
    "MotifVideoImage2VideoPipeline": {
        **_MOTIF,
        "transformer": {"image_embed_dim": 32},
    },
    # Two tasks: one sees the picture's tokens, the other is told that there is none.
    "HunyuanVideo15Pipeline": {"transformer": {"image_embed_dim": 32}},
    "HunyuanVideo15ImageToVideoPipeline": {
        # The body scales every picture to the area of this side's square.
        "transformer": {"image_embed_dim": 32, "target_size": 128},
        # The last level averages groups of channels into twice the latents'.
        "vae": {"block_out_channels": (8, 16, 32, 64, 64)},
    },
    # Norms of the VAE cut every width into 32 groups.
    "MochiPipeline": {
        "vae": {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
        }
    },
    # Hinted by the class that joins a processor of pictures and a tokenizer; the body
    # uses the former.
    "SkyReelsV2ImageToVideoPipeline": {
        "image_processor": {"class": "transformers:CLIPImageProcessorPil"},
        "transformer": {"image_dim": 32, "added_kv_proj_dim": 96, "in_channels": 36},
    },
    "MotifVideoPipeline": _MOTIF,
    # None by default, meaning unpatched; the latents have a quarter of the packed width.
    # The first three blocks and the last one are dense whatever the depth; of 128 experts
    # each would take one token of a small image.
    "NucleusMoEImagePipeline": {
        "transformer": {
            "out_channels": 16,
            "num_layers": 6,
            "num_experts": 8,
            "capacity_factors": 2.0,
        }
    },
}

CALLS: dict[str, Any] = {
    # Rewrites the prompt with hundreds of generated tokens first.
    "enable_prompt_rewrite": False,
    # A default that is legal for two steps alone.
    "intermediate_timesteps": None,
    # A default made for one number of steps; a constant scale is passed instead.
    "guidance_schedule": None,
    # Perturbed attention is a third branch, with attention processors that the pipeline sets
    # while it runs; ports refuse those by name and run the two others.
    "pag_scale": 0.0,
    # Maps the size to a bucket of its own list, far larger than a test's.
    "use_resolution_binning": False,
    # The default names one of forty-eight blocks.
    "spatio_temporal_guidance_blocks": [1],
}
"""Arguments of ``__call__`` whose defaults do not fit a small run, by name."""

_ROLE = "<|start_header_id|><|end_header_id|>"
_WHOLE_TEXT = {"max_sequence_length": 512}
"""The blocks tell pictures from text by counting 512 tokens of text from the end."""

CALLS_OF: dict[str, dict[str, Any]] = {
    "WanImageToVideoPipeline": _WHOLE_TEXT,
    "ChronoEditPipeline": _WHOLE_TEXT,
    "SkyReelsV2ImageToVideoPipeline": _WHOLE_TEXT,
    # Two segments of a video.
    "WanAnimatePipeline": {**_WHOLE_TEXT, "segment_frame_length": 9},
    # Four patches of the picture instead of 576, and no sentences around the prompt.
    "HunyuanVideoImageToVideoPipeline": {
        "prompt_template": {
            "template": f"{_ROLE}<image><|eot_id|>{_ROLE}{{}}<|eot_id|>{_ROLE}",
            "crop_start": 6,
            "image_emb_start": 2,
            "image_emb_end": 6,
            "image_emb_len": 4,
        }
    },
    # Two sections of a video.
    "HunyuanVideoFramepackPipeline": {"latent_window_size": 3},
    "LattePipeline": {"video_length": 5},
    # Chunks of latent frames, which sum up to all of them.
    "AnyFlowFARPipeline": {"chunk_partition": [1, 2, 2], "num_frames": 17},
    # Two passes along a video, or more.  (From a picture, upstream's second pass fails.)
    **dict.fromkeys(
        (
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        {"base_num_frames": 13, "overlap_history": 5},
    ),
    # Compression of the picture by a codec that is no dependency.
    "LTX2ImageToVideoPipeline": {"image_crf": 0},
}
"""Arguments of ``__call__`` that do not fit a small run, by pipeline."""

ONE_PROMPT = frozenset(
    {
        "LTXI2VLongMultiPromptPipeline",
        "WanVACEPipeline",
        # Its second branch sees one black picture, whatever the number of prompts.
        "HunyuanVideoImageToVideoPipeline",
    }
)
"""Pipelines that run with one prompt alone, which they take as a string."""

ONE_PICTURE = frozenset({"MotifVideoImage2VideoPipeline"})
"""Pipelines that take one picture for all prompts, and say so in no `check_inputs`."""

GIVEN: dict[str, frozenset[str]] = {
    # Their task needs one, their signature calls it optional beside latents or pictures.
    **dict.fromkeys(
        (
            "CogVideoXVideoToVideoPipeline",
            "Cosmos2VideoToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "WanVideoToVideoPipeline",
        ),
        frozenset({"video"}),
    ),
    "CogVideoXFunControlPipeline": frozenset({"control_video"}),
    "EasyAnimateControlPipeline": frozenset({"control_video"}),
    "EasyAnimateInpaintPipeline": frozenset({"video", "mask_video"}),
    "WanVACEPipeline": frozenset({"video"}),
    "LTXImageToVideoPipeline": frozenset({"image"}),
    "LTXConditionPipeline": frozenset({"image"}),
    "LTX2ImageToVideoPipeline": frozenset({"image"}),
}
"""Optional media that a call gets, by pipeline."""

CELLS = {
    # A code of its language model stands for two by two image tokens.
    "GlmImagePipeline": 2,
    # The body asks for multiples of 32 pixels, two tokens.
    "SanaVideoPipeline": 2,
    "SanaImageToVideoPipeline": 2,
}
"""Image tokens along one side of the smallest legal square, where it is not one."""


def for_pipeline(pipeline_class: type) -> Mapping[str, Mapping[str, Any]]:
    """The entries of one class; empty for most."""
    return _PIPELINES.get(pipeline_class.__name__, {})
