# facts: {"cfg_style": "batched", "cfg_axes": {"hidden_states": 0, "prompt_embeds": 0}}
class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=8, output_type="pil"):
        batch_size = len(prompt)
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                doubled = torch.cat([latents] * 2)
                # one call
                noise_pred = self.transformer(
                    doubled,
                    prompt_embeds=prompt_embeds,  # both
                )[0]
                if self.do_classifier_free_guidance:
                    uncond, text = noise_pred.chunk(2)
                    noise_pred = uncond + scale * (text - uncond)
                    skips = i > first_skipped
                    if skip_layers is not None and skips:
                        # one branch alone: every rank makes this call
                        skipped = self.transformer(latents, prompt_embeds=original_embeds)[0]
                        noise_pred = noise_pred + (text - skipped) * skip_scale
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
# output
class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=8, output_type="pil"):
        batch_size = len(prompt)
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                doubled = torch.cat([latents] * 2)
                cfg_transformer = self._cfg_batched_call(self.transformer, {"hidden_states": 0, "prompt_embeds": 0})
                # one call
                noise_pred = cfg_transformer(
                    doubled,
                    prompt_embeds=prompt_embeds,  # both
                )[0]
                if self.do_classifier_free_guidance:
                    uncond, text = noise_pred.chunk(2)
                    noise_pred = uncond + scale * (text - uncond)
                    skips = i > first_skipped
                    if skip_layers is not None and skips:
                        # one branch alone: every rank makes this call
                        skipped = self.transformer(latents, prompt_embeds=original_embeds)[0]
                        noise_pred = noise_pred + (text - skipped) * skip_scale
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
