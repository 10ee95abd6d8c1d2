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
                following = self.scheduler.sigmas[i + 1]
                if t == following:
                    progress_bar.update()
                    continue
                noise_pred = self.transformer(latents, timestep=t)[0]
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

        num_pipeline_warmup_steps = get_runtime_state().runtime_config.warmup_steps
        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in chain(
                self._sync_pipeline(enumerate(timesteps), num_pipeline_warmup_steps), self._async_pipeline()
            ):
                latents_before_pass = latents = self._receive_patch(latents)

                following = self.scheduler.sigmas[i + 1]
                if t == following:
                    latents = self._skip_patch(latents)
                    if not self._step_is_complete():
                        continue
                    progress_bar.update()
                    continue
                noise_pred = self.transformer(latents, timestep=t)[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                latents = self._commit_patch(latents_before_pass, latents)
                if not self._step_is_complete():
                    continue

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
