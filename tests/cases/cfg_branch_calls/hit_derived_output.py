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
                out = self.transformer(torch.cat([text, latents], dim=1))[0]
                pos = out[:, text.shape[1] :].float()
                neg = self.transformer(latents)[0]
                noise_pred = neg + self.guidance_scale * (pos - neg)
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
                out = self._cfg_branch_call(self.transformer, 0, True)(torch.cat([text, latents], dim=1))[0]
                pos = out[:, text.shape[1] :].float()
                neg = self._cfg_branch_call(self.transformer, 1, True)(latents)[0]
                pos, neg = self._cfg_exchange_branches(pos, neg)
                noise_pred = neg + self.guidance_scale * (pos - neg)
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
