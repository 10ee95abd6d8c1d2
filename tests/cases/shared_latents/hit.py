# facts: {"cfg_style": "batched", "cfg_axes": {}, "helpers": ["controlnet"]}
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
                residuals = self.controlnet(latents, timestep=t)
                noise_pred = self.transformer(latents, residuals, timestep=t)[0]
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

        self._share_latents("steps")
        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                residuals = self.controlnet(latents, timestep=t)
                noise_pred = self.transformer(latents, residuals, timestep=t)[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
