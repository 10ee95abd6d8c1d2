"""What cannot be derived from pipelines of video and of sound: see :mod:`.table`."""

from __future__ import annotations

from typing import Any

from . import table_video_sound

_MOTIF: dict[str, dict[str, Any]] = {
    # The library's encoder reads an entry that its configuration lacks.
    "text_encoder": {"text_config": {"dropout_rate": 0.0}},
    # Hinted by the abstract bases.
    "guider": {"class": "diffusers:ClassifierFreeGuidance"},
    "scheduler": {"class": "diffusers:FlowMatchEulerDiscreteScheduler"},
}


_NO_CONTEXT: dict[str, Any] = {"img_context_dim_in": None}
_MASKED_FRAMES = {**_NO_CONTEXT, "in_channels": 17}
"""The latents and a mask of the frames that are given."""

_ROTARY = {"use_rotary_positional_embeddings": True, "attention_head_dim": 16}
_EASY = {"out_channels": 16, "patch_size": 2, "attention_head_dim": 16}
"""An eighth and three eighths of a head are the axes' widths, each even."""


COMPONENTS: dict[str, dict[str, dict[str, Any]]] = {
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
    "SanaWMPipeline": {
        # The width of a head has another name.
        "transformer": {"linear_head_dim": 24},
        # As released; the class counts a level that compresses time alone twice.
        "vae": {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
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
        "transformer": {
            "latent_channel": 16,
            "patch_latent_dim": 64,
            "head_dim": 24,
            "rope_axes_dim": [4, 4, 4],
        }
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
        ("CosmosVideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline"),
        {"transformer": _MASKED_FRAMES},
    ),
    # As released: a context of pictures, and control for every other block.  The
    # network's own latents carry the mask of the frames and that of the padding, its
    # control may be wider than the latents.
    "Cosmos2_5_TransferPipeline": {
        "transformer": {
            "in_channels": 17,
            "img_context_dim_in": 40,
            "img_context_num_tokens": 6,
            "img_context_dim_out": 96,
            "extra_pos_embed_type": None,
            "controlnet_block_every_n": 2,
        },
        "controlnet": {
            "n_controlnet_blocks": 2,
            "in_channels": 20,
            "latent_channels": 18,
            "model_channels": 96,
            "text_embed_dim": 64,
            "img_context_dim_in": 40,
            "img_context_dim_out": 96,
        },
    },
    **dict.fromkeys(
        (
            "StableAudio3Pipeline",
            "StableAudio3AudioToAudioPipeline",
            "StableAudio3InpaintPipeline",
        ),
        {
            # The hinted half of an encoder-decoder.
            "text_encoder": {"is_encoder_decoder": False},
            # Names of widths that no other backbone has.
            "transformer": {
                "embed_dim": 96,
                "io_channels": 16,
                "local_add_cond_dim": 17,
                "cond_token_dim": 32,
                "global_cond_dim": 32,
                "num_memory_tokens": 4,
            },
            "duration_embedder": {"output_dim": 32, "fourier_dim": 16},
            "vae": {
                "encoder_channels": 16,
                "encoder_c_mults": (2,),
                "encoder_transformer_depths": (1,),
                "latent_dim": 16,
                "dim_heads": 8,
            },
        },
    ),
    "StableAudioPipeline": {
        # No defaults.
        "projection_model": {
            "text_encoder_dim": 32,
            "conditioning_dim": 32,
            "min_value": 0,
            "max_value": 512,
        },
        # The number of tokens, always the same.
        "transformer": {
            "sample_size": 64,
            "cross_attention_dim": 96,
            "cross_attention_input_dim": 32,
            "global_states_input_dim": 64,
            "in_channels": 16,
            "out_channels": 16,
        },
        "vae": {
            "encoder_hidden_size": 16,
            "decoder_channels": 8,
            "decoder_input_channels": 16,
        },
    },
    # Names of widths that no other backbone has.
    "LongCatAudioDiTPipeline": {
        "transformer": {
            "dit_dim": 96,
            "dit_depth": 4,
            "dit_heads": 4,
            "dit_text_dim": 32,
            "latent_dim": 8,
        },
        "vae": {
            "channels": 8,
            "c_mults": [1, 2],
            "strides": [2],
            "latent_dim": 8,
            "encoder_latent_dim": 16,
        },
    },
    "AceStepPipeline": {
        "condition_encoder": {
            "hidden_size": 96,
            "intermediate_size": 112,
            "text_hidden_dim": 32,
            "num_lyric_encoder_hidden_layers": 2,
            "num_timbre_encoder_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
        },
        "transformer": {"encoder_hidden_size": 96, "head_dim": 24},
        # As in released checkpoints: the body guides at times between 0 and 1.
        "scheduler": {"num_train_timesteps": 1, "shift": 1.0},
        "vae": {"encoder_hidden_size": 64, "decoder_channels": 8},
    },
    # The backbone's table of frames has one length; half of its channels are variance.  By
    # default it has one pair of blocks, which no stages share.
    "LattePipeline": {
        "transformer": {"video_length": 5, "out_channels": 8, "num_layers": 4}
    },
    # The first VAE of the hint has no temporal compression, which the body reads.
    **dict.fromkeys(
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        {"vae": {"class": "diffusers:AutoencoderKLWan"}},
    ),
    **table_video_sound.COMPONENTS,
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
        "transformer": {"image_embed_dim": 32, "target_size": 80},
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
}
"""Configuration entries: pipeline class -> component -> entry."""

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
    # Chunks of a video, two or more.
    "Cosmos2_5_TransferPipeline": {"num_frames_per_chunk": 9},
    # Where the camera goes and what it sees of a picture.
    "SanaWMPipeline": {
        "action": "w-80",
        "intrinsics": [50.0, 50.0, 32.0, 32.0],
    },
    # Two sections of a video, or more.
    "HunyuanVideoFramepackPipeline": {"latent_window_size": 3},
    "HeliosPipeline": {"num_latent_frames_per_chunk": 3},
    "HeliosPyramidPipeline": {
        "num_latent_frames_per_chunk": 3,
        "pyramid_num_inference_steps_list": [3, 3, 2],
    },
    "LattePipeline": {"video_length": 5},
    # Any length makes as many tokens; this one is shorter than the model's.
    "StableAudioPipeline": {"audio_end_in_s": 2.0},
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
    # Two windows along a video, or more.
    "LTXI2VLongMultiPromptPipeline": {"temporal_tile_size": 24, "temporal_overlap": 8},
    **table_video_sound.CALLS_OF,
}
"""Arguments of ``__call__`` that do not fit a small run, by pipeline."""

ONE_PROMPT = frozenset(
    {
        "LTXI2VLongMultiPromptPipeline",
        "SanaWMPipeline",
        "WanVACEPipeline",
        # Takes one picture, and one alone.
        "MotifVideoImage2VideoPipeline",
        # Its second branch sees one black picture, whatever the number of prompts.
        "HunyuanVideoImageToVideoPipeline",
    }
)
"""Pipelines that run with one prompt alone, which they take as a string."""

GIVEN: dict[str, frozenset[str]] = {
    # Their task needs one, their signature calls it optional beside latents or pictures.
    **dict.fromkeys(
        (
            "CogVideoXVideoToVideoPipeline",
            "WanVideoToVideoPipeline",
        ),
        frozenset({"video"}),
    ),
    "CogVideoXFunControlPipeline": frozenset({"control_video"}),
    "EasyAnimateControlPipeline": frozenset({"control_video"}),
    "EasyAnimateInpaintPipeline": frozenset({"video", "mask_video"}),
    "WanVACEPipeline": frozenset({"video"}),
    **dict.fromkeys(
        ("StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline"),
        frozenset({"audio"}),
    ),
    # A video of all frames leaves nothing to be made; a picture is the first frame.
    **dict.fromkeys(
        (
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "CosmosVideoToWorldPipeline",
        ),
        frozenset({"image"}),
    ),
    "LTXImageToVideoPipeline": frozenset({"image"}),
    "LTXConditionPipeline": frozenset({"image"}),
    "LTXI2VLongMultiPromptPipeline": frozenset({"cond_image"}),
    **table_video_sound.GIVEN,
}
"""Optional media that a call gets, by pipeline."""

ONE_PICTURE = frozenset({"Cosmos2_5_PredictBasePipeline", "SanaWMPipeline"})
"""Pipelines whose body makes a tensor of one picture, whatever the number of prompts."""
