"""Toy pipeline (c): two encoders used part by part, and a scheduler that is no component.

Annotations are evaluated, as in diffusers: `from_pretrained` reads the classes in them.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.toys.batched_pipeline import ToyBatchedPipeline
from tests.toys.batched_transformer import ToyBatchedTransformer2DModel


class ToyPairPipeline(ToyBatchedPipeline):
    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        tokenizer_2: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKL,
        transformer: ToyBatchedTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> None:
        # An argument with a default is left out of `components`; `from_pretrained` passes
        # what the index says of it.
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            scheduler = FlowMatchEulerDiscreteScheduler()
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2)

    def encode_prompt(self, prompt: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """As toy (b), each row scaled by what parts of both encoders make of its prompt."""
        embeds, negative = super().encode_prompt(prompt, *args, **kwargs)
        encoder = self.text_encoder_2
        ids = self.tokenizer_2(
            [prompt] if isinstance(prompt, str) else prompt,
            padding="max_length",
            max_length=16,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(encoder.device)
        output = encoder(ids, output_hidden_states=True)
        skipped = encoder.text_model.final_layer_norm(output.hidden_states[-2])
        words = self.text_encoder.get_input_embeddings()(ids.clamp(max=3))
        rows = skipped.std((1, 2)) + output.text_embeds.std(1) + words.std((1, 2))
        scale = (1 + torch.tanh(rows)).repeat_interleave(len(embeds) // len(rows))
        return embeds * scale[:, None, None].to(encoder.dtype), negative

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 5.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int = 77,
    ) -> ImagePipelineOutput | tuple[Any]:
        """
        Function invoked when calling the pipeline for generation.

        Args:
            prompt: what to draw, one text or one a picture.
            negative_prompt: what not to draw; ignored without guidance.
            guidance_scale: guidance is on above 1.
            height, width: pixels.
        """
        height = height or self.transformer.config.sample_size * self.vae_scale_factor
        width = width or self.transformer.config.sample_size * self.vae_scale_factor
        self._guidance_scale = guidance_scale
        batch_size = 1 if isinstance(prompt, str) else len(prompt)
        device = self._execution_device

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            max_sequence_length=max_sequence_length,
        )
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds], dim=0)

        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device
        )
        num_warmup_steps = max(
            len(timesteps) - num_inference_steps * self.scheduler.order, 0
        )
        latents = self.prepare_latents(
            batch_size * num_images_per_prompt,
            self.transformer.config.in_channels,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                latent_model_input = (
                    torch.cat([latents] * 2)
                    if self.do_classifier_free_guidance
                    else latents
                )
                timestep = t.expand(latent_model_input.shape[0])

                noise_pred = self.transformer(
                    hidden_states=latent_model_input,
                    encoder_hidden_states=prompt_embeds,
                    timestep=timestep,
                    return_dict=False,
                )[0]

                if self.do_classifier_free_guidance:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (
                        noise_pred_text - noise_pred_uncond
                    )

                latents = self.scheduler.step(
                    noise_pred, t, latents, return_dict=False
                )[0]

                if i == len(timesteps) - 1 or (
                    (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()

        if output_type == "latent":
            image = latents
        else:
            image = self.vae.decode(
                latents / self.vae.config.scaling_factor, return_dict=False
            )[0]
            image = self.image_processor.postprocess(image, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (image,)

        return ImagePipelineOutput(images=image)
