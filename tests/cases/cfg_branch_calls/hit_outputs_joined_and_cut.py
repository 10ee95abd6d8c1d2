# facts: {"cfg_style": "sequential", "cfg_axes": {}}
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
                noise_pred = self.transformer(latents, prompt_embeds)[0]
                if self.do_classifier_free_guidance:
                    uncond = self.transformer(latents, negative_prompt_embeds)[0]
                    noise_pred = torch.cat([uncond, noise_pred])
                noise_pred = self.scheduler.convert(noise_pred)
                if self.do_classifier_free_guidance:
                    uncond, noise_pred = noise_pred.chunk(2)
                    noise_pred = uncond + self.guidance_scale * (noise_pred - uncond)
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
                noise_pred = self._cfg_branch_call(self.transformer, 0, self.do_classifier_free_guidance)(
                    latents, prompt_embeds
                )[0]
                if self.do_classifier_free_guidance:
                    uncond = self._cfg_branch_call(self.transformer, 1, True)(latents, negative_prompt_embeds)[0]
                    noise_pred, uncond = self._cfg_exchange_branches(noise_pred, uncond)
                    noise_pred = torch.cat([uncond, noise_pred])
                noise_pred = self.scheduler.convert(noise_pred)
                if self.do_classifier_free_guidance:
                    uncond, noise_pred = noise_pred.chunk(2)
                    noise_pred = uncond + self.guidance_scale * (noise_pred - uncond)
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
