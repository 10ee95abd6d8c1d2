"""Tiny checkpoints: stock loads and runs them, and nothing in them is dull."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F

from porter.shrink import (
    ShrinkError,
    call_kwargs,
    component_hints,
    image_sizes,
    make_checkpoint,
    make_pipeline,
)
from tests.toys.batched_pipeline import ToyBatchedPipeline
from tests.toys.joint_pipeline import ToyJointPipeline

LIVELY = 3e-3
"""Least relative change of the latents when a prompt or half the keys change."""

STRANGERS = [
    "AuraFlowPipeline",
    "ChromaPipeline",
    "CogView4Pipeline",
    "Flux2KleinPipeline",
    "FluxPipeline",
    "Lumina2Pipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "StableDiffusion3Pipeline",
    "ZImagePipeline",
]
"""One pipeline of each kind: joint, concatenated, cross, linear attention, lists, ids."""


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PixArtAlpha from its folder, through the stock loader."""
    folder = tmp_path_factory.mktemp("alpha")
    make_checkpoint(diffusers.PixArtAlphaPipeline, folder)
    return quiet(diffusers.PixArtAlphaPipeline.from_pretrained(folder))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, **options: Any) -> torch.Tensor:
    """The result of one stock call as one tensor."""
    images = pipeline(**call_kwargs(pipeline, **options), return_dict=False)[0]
    return torch.stack(list(images)).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def half_of_the_keys(pipeline: Any) -> Iterator[None]:
    """Attention of the backbone, self and cross, sees the first half of its keys."""
    stock_attention = F.scaled_dot_product_attention
    stock_forward = pipeline.transformer.forward

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, **rest: Any
    ) -> Any:
        kept = key.shape[-2] // 2
        mask = None if attn_mask is None else attn_mask[..., :kept]
        return stock_attention(
            query, key[..., :kept, :], value[..., :kept, :], attn_mask=mask, **rest
        )

    def forward(*args: Any, **kwargs: Any) -> Any:
        F.scaled_dot_product_attention = attention
        try:
            return stock_forward(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = stock_attention

    pipeline.transformer.forward = forward
    try:
        yield
    finally:
        del pipeline.transformer.forward


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [
        make_checkpoint(diffusers.PixArtSigmaPipeline, tmp_path / name, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    files = [
        {p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()}
        for f in folders
    ]
    assert files[0] == files[1]
    weights = Path("transformer/diffusion_pytorch_model.safetensors")
    assert files[0][weights] != files[2][weights]


def test_making_a_checkpoint_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_pipeline(diffusers.PixArtSigmaPipeline)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("guidance", [True, False])
def test_stock_runs_are_finite_and_repeat(
    alpha: Any, batch_size: int, guidance: bool
) -> None:
    for height, width in image_sizes(alpha):
        options = {"height": height, "width": width, "num_inference_steps": 2}
        options |= {"batch_size": batch_size, "guidance": guidance}
        first = latents(alpha, **options)
        assert first.shape == (batch_size, 4, height // 8, width // 8)
        assert first.isfinite().all()
        assert torch.equal(first, latents(alpha, **options))


def test_one_size_has_an_odd_number_of_token_rows(alpha: Any) -> None:
    cell = 8 * alpha.transformer.config.patch_size
    assert any((height // cell) % 2 for height, _ in image_sizes(alpha))


def test_prompts_guidance_and_seed_matter(alpha: Any) -> None:
    plain = latents(alpha)
    assert distance(latents(alpha, text=1), plain) > LIVELY
    assert distance(latents(alpha, guidance=False), plain) > LIVELY
    assert distance(latents(alpha, seed=1), plain) > LIVELY


def test_the_two_texts_differ_in_length(alpha: Any) -> None:
    lengths = [
        alpha.encode_prompt(
            call_kwargs(alpha, text=text)["prompt"],
            max_sequence_length=call_kwargs(alpha, text=text)["max_sequence_length"],
        )[0].shape[1]
        for text in (0, 1)
    ]
    assert lengths[0] != lengths[1]


def test_the_padding_mask_matters(alpha: Any) -> None:
    stock = alpha.transformer.forward

    def without_mask(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.pop("encoder_attention_mask")
        assert (mask == 0).any(), "no prompt is padded"
        return stock(*args, **kwargs)

    plain = latents(alpha)
    alpha.transformer.forward = without_mask
    try:
        assert distance(latents(alpha), plain) > LIVELY
    finally:
        del alpha.transformer.forward


def test_half_of_the_keys_matters(alpha: Any) -> None:
    plain = latents(alpha)
    with half_of_the_keys(alpha):
        assert distance(latents(alpha), plain) > LIVELY


def test_zeroed_projections_are_found_dull() -> None:
    """The twin of the test above: gates at zero, as classes draw them, hide the keys."""
    pipeline = quiet(make_pipeline(diffusers.PixArtSigmaPipeline))
    for name, parameter in pipeline.transformer.named_parameters():
        if ".to_out." in name:
            torch.nn.init.zeros_(parameter)
    plain = latents(pipeline)
    with half_of_the_keys(pipeline):
        assert distance(latents(pipeline), plain) < LIVELY


def test_micro_conditions_follow_the_sample_size() -> None:
    on = make_pipeline(diffusers.PixArtAlphaPipeline)
    off = quiet(
        make_pipeline(
            diffusers.PixArtAlphaPipeline,
            overrides={"transformer": {"sample_size": 64}},
        )
    )
    assert on.transformer.use_additional_conditions
    assert not off.transformer.use_additional_conditions
    assert latents(off, num_inference_steps=2).isfinite().all()


@pytest.mark.parametrize("toy", [ToyJointPipeline, ToyBatchedPipeline])
def test_a_pipeline_outside_of_diffusers(toy: Any, tmp_path: Path) -> None:
    make_checkpoint(toy, tmp_path)
    pipeline = quiet(toy.from_pretrained(tmp_path))
    plain = latents(pipeline)
    assert distance(latents(pipeline, text=1), plain) > LIVELY
    with half_of_the_keys(pipeline):
        assert distance(latents(pipeline), plain) > LIVELY


@pytest.mark.parametrize("name", STRANGERS)
def test_other_text_to_image_pipelines(name: str, tmp_path: Path) -> None:
    pipeline_class = getattr(diffusers, name)
    make_checkpoint(pipeline_class, tmp_path)
    pipeline = quiet(pipeline_class.from_pretrained(tmp_path))
    options = {"num_inference_steps": 2}
    plain = latents(pipeline, **options)
    assert plain.isfinite().all()
    assert torch.equal(latents(pipeline, **options), plain)
    assert distance(latents(pipeline, text=1, **options), plain) > LIVELY


def test_every_loop_can_be_cut_inside() -> None:
    pipeline = make_pipeline(diffusers.FluxPipeline)
    first = len(pipeline.transformer.transformer_blocks)
    second = len(pipeline.transformer.single_transformer_blocks)
    assert first >= 4
    assert (first + second) // 2 < first


class _Untyped(diffusers.DiffusionPipeline):
    def __init__(self, transformer) -> None:  # type: ignore[no-untyped-def]
        super().__init__()


def test_a_missing_hint_is_refused() -> None:
    with pytest.raises(ShrinkError, match="no type hint for 'transformer'"):
        component_hints(_Untyped)


def test_a_second_transformer_has_the_channels_of_the_first() -> None:
    pipeline = make_pipeline(diffusers.Ideogram4Pipeline)
    first, second = pipeline.transformer, pipeline.unconditional_transformer
    assert first.config.in_channels == second.config.in_channels


def test_channels_agree_with_the_vae_that_is_built_not_with_its_hint() -> None:
    pipeline = make_pipeline(diffusers.SanaImageToVideoPipeline)
    assert pipeline.transformer.config.in_channels == pipeline.vae.config.z_dim
