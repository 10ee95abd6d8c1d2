"""What cannot be derived from a class, each entry with its reason.

Components' entries: pipeline class -> component -> configuration entries.  The entry
``class`` (``package:Name``) names what to build where the hint is abstract or None; in
a text encoder, ``layers`` is its depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import table_moving

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

_LEVELS = 7
"""Of a VAE for bodies that bring every picture to about 1024 x 1024 pixels, whatever the
caller asks: 64 pixels a latent and 128 a token keep tokens few."""

_COARSE_CAUSAL_VAE = {
    "base_dim": 2,
    "num_res_blocks": 0,
    "dim_mult": [1] * _LEVELS,
    "temperal_downsample": [False] * (_LEVELS - 1),
}


def _coarse_vae(levels: int) -> dict[str, Any]:
    return {
        "block_out_channels": (4,) * levels,
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


_PLACES = {
    "control_layers_places": [0, 2],
    "control_refiner_layers_places": [0, 1],
    "add_control_noise_refiner": "control_noise_refiner",
}

_NO_MICRO_CONDITIONS = {"transformer": {"use_additional_conditions": False}}


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
    **dict.fromkeys(
        ("SanaPipeline", "SanaControlNetPipeline"),
        {
            "scheduler": {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
            }
        },
    ),
    # Declares a solver whose `step` the body does not call in the right way; the class
    # in released checkpoints is this one.
    **dict.fromkeys(
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        {
            "scheduler": {"class": "diffusers:SCMScheduler"},
            # The body always passes a guidance scale.
            "transformer": {"guidance_embeds": True},
        },
    ),
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
            # Other shapes than squares are padded to this many tokens: not as many as a
            # square has, so that sizes differ.
            "max_resolution": (136, 136),
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
    **table_moving.COMPONENTS,
    # Beside the latents the body passes a masked picture and a mask of 64 values a latent.
    "FluxFillPipeline": {
        "transformer": {"in_channels": 384, "out_channels": 64},
        "vae": {"latent_channels": 16},
    },
    # None by default: the channels of a mask, which the body always passes.
    "QwenImageControlNetInpaintPipeline": {
        "controlnet": {"extra_condition_channels": 4}
    },
    # The bodies bring pictures to a size of their own.
    "QwenImageEditPipeline": {"vae": _COARSE_CAUSAL_VAE},
    "QwenImageEditInpaintPipeline": {"vae": _COARSE_CAUSAL_VAE},
    "QwenImageEditPlusPipeline": {"vae": _COARSE_CAUSAL_VAE},
    "QwenImageLayeredPipeline": {
        "vae": {**_COARSE_CAUSAL_VAE, "input_channels": 4},
        # The body passes a condition for the layers beside the timestep.
        "transformer": {"use_additional_t_cond": True},
    },
    # Rotary axes are a list of their own, which adds up to the width of a head.
    "JoyImageEditPipeline": {
        "vae": {**_COARSE_CAUSAL_VAE, "scale_factor_spatial": 64},
        "transformer": {"rope_dim_list": [8, 8, 8]},
    },
    "JoyImageEditPlusPipeline": {
        "vae": {**_COARSE_CAUSAL_VAE, "scale_factor_spatial": 64},
        "transformer": {"rope_dim_list": [8, 8, 8]},
    },
    "Kandinsky5T2IPipeline": {"vae": _coarse_vae(_LEVELS)},
    # None by default; half of the blocks get a residual, pictures have the latents' width.
    "ZImageControlNetPipeline": {"controlnet": {**_PLACES, "control_in_dim": 16}},
    # Latents of the control picture and of the masked one, and the mask.
    "ZImageControlNetInpaintPipeline": {
        "controlnet": {**_PLACES, "control_in_dim": 33}
    },
    # None by default: the channel of a mask, which the body always passes.
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "controlnet": {"extra_conditioning_channels": 1}
    },
    # A key of released configurations that the class itself does not know.
    "ChromaInpaintPipeline": {"transformer": {"guidance_embeds": False}},
    # As for a fill; few pixels in each picture of the grid.
    **dict.fromkeys(
        ("VisualClozePipeline", "VisualClozeGenerationPipeline"),
        {
            "transformer": {"in_channels": 384, "out_channels": 64},
            "vae": {"latent_channels": 16},
            "pipeline": {"resolution": 128},
        },
    ),
    # Levels at whose ends channels are gathered: widths that the latents' divide.  The
    # backbone gets two frames at once, and as much of the picture; as it was released.
    "HunyuanImageRefinerPipeline": {
        "vae": {"block_out_channels": (8, 16, 32, 64, 64)},
        "transformer": {
            "in_channels": 128,
            "out_channels": 64,
            "patch_size": (1, 1, 1),
            "rope_axes_dim": (8, 8, 8),
            "guidance_embeds": True,
        },
    },
    # False by default: the picture and a mask beside the latents.
    "Kandinsky5I2IPipeline": {
        "transformer": {"visual_cond": True},
        # Latents of a picture of about 1024 x 1024 pixels, for attention of the VAE's own.
        "vae": {"mid_block_add_attention": False},
    },
    # Rounds sizes up to multiples of 16: with coarser latents they would not fit.
    "LongCatImageEditPipeline": {"vae": _coarse_vae(_LEVELS - 1)},
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
    # while it runs: in calls of their own.
    "pag_scale": 0.0,
    # Maps the size to a bucket of its own list, far larger than a test's.
    "use_resolution_binning": False,
    # The default names one of forty-eight blocks.
    "spatio_temporal_guidance_blocks": [1],
}
"""Arguments of ``__call__`` whose defaults do not fit a small run, by name."""

PROCESSOR_CALLS: dict[str, Any] = {
    "pag_scale": 3.0,
}
"""Arguments of ``__call__``, by name, that make a pipeline set other attention processors."""

CELLS = {
    # A code of its language model stands for two by two image tokens.
    "GlmImagePipeline": 2,
    # The body asks for multiples of 32 pixels, two tokens.
    "SanaVideoPipeline": 2,
    "SanaImageToVideoPipeline": 2,
}
"""Image tokens along one side of the smallest legal square, where it is not one."""

TOKEN_ROWS = {
    # Of about 1024 x 1024 pixels, rounded by the body to multiples of 32.
    "QwenImageEditPipeline": ((8, 8), (5, 13), (7, 9)),
    "QwenImageEditInpaintPipeline": ((8, 8), (5, 13), (7, 9)),
    "QwenImageEditPlusPipeline": ((8, 8), (5, 13), (7, 9)),
    # The sides of these belong to the body's own list of sizes.
    "JoyImageEditPipeline": ((8, 8), (6, 10), (7, 9)),
    "JoyImageEditPlusPipeline": ((8, 8), (6, 10), (7, 9)),
    # Area of 640 x 640 or 1024 x 1024 pixels, rounded as above.
    "QwenImageLayeredPipeline": ((5, 5), (8, 8), (7, 9)),
    # Multiples of a token after the body's scaling to 1024 x 1024 pixels.
    "HiDreamImagePipeline": ((16, 16), (14, 18), (8, 32)),
    # Halved twice, by the body.
    "HeliosPyramidPipeline": ((4, 8), (8, 8), (4, 12)),
    # The body's own negative prompt has 362 tokens: pictures of more, so that a cut in two
    # goes through the picture.
    "OmniGenPipeline": ((20, 20), (19, 23), (18, 26)),
    # Of about 1024 x 1024 pixels, rounded up by the body to multiples of 16.
    "LongCatImageEditPipeline": ((16, 16), (13, 20), (20, 13)),
}
"""Token rows and columns of the picture sizes, where a body takes few sizes."""

PICTURES_OF_ONE_PROMPT = {
    "BriaFiboEditPipeline": 1,
    "QwenImageEditPlusPipeline": 2,
}
"""Number of pictures in a list that belongs to one prompt, not one picture a prompt."""

ONE_PROMPT = frozenset({"LongCatImageEditPipeline", "QwenImageEditPlusPipeline"})
"""Bodies that refuse several prompts, or read the first of them alone."""

EDITED = {"JoyImageEditPlusPipeline": "images"}
"""Pictures that a body may do without, though the class is there to edit them."""


CALLS_OF: dict[str, dict[str, Any]] = {
    # Pictures of bytes stand between its two loops: one bit more or less is no rounding.
    # Without the second loop it returns what the first one made.
    "VisualClozePipeline": {"upsampling_strength": 0.0, "output_type": "latent"},
    # Returns no latents; three frames of layers instead of five.
    "QwenImageLayeredPipeline": {"output_type": "pt", "layers": 2},
    # Its own words stand in the same length as the prompt, and the picture after both.
    "Kandinsky5I2IPipeline": {"max_sequence_length": 512},
}
"""Arguments of one class, over the general ones."""

PROMPT_FORMS = {"BriaFiboEditPipeline": '{"edit_instruction": %s}'}
"""What a prompt is put into, as a string of JSON, where a body reads no plain text."""

GRIDS = frozenset({"VisualClozePipeline", "VisualClozeGenerationPipeline"})
"""Bodies whose picture is a grid: a row of an example, and a row with one to be made."""


def for_pipeline(pipeline_class: type) -> Mapping[str, Mapping[str, Any]]:
    """The entries of one class; empty for most."""
    return _PIPELINES.get(pipeline_class.__name__, {})
