class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt=None, image=None, num_inference_steps=8, output_type="pil"):
        batch_size = len(prompt)
        audio = self.prepare_audio()
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if image is not None:
                    latents[:, -1] = image
                noise_pred, sound = self.transformer(latents, audio)
                latents = self.scheduler.step(noise_pred, t, latents)[0]
                audio = self.audio_scheduler.step(sound, t, audio)[0]

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
    def __call__(self, prompt=None, image=None, num_inference_steps=8, output_type="pil"):
        batch_size = len(prompt)
        audio = self.prepare_audio()
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        num_pipeline_warmup_steps = get_runtime_state().runtime_config.warmup_steps
        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in chain(
                self._sync_pipeline(enumerate(timesteps), num_pipeline_warmup_steps), self._async_pipeline()
            ):
                latents, audio = self._receive_patch(latents, audio)
                latents_before_pass = latents.clone(), audio

                if image is not None:
                    latents[:, -1] = image
                noise_pred, sound = self.transformer(latents, audio)
                latents = self.scheduler.step(noise_pred, t, latents)[0]
                audio = self.audio_scheduler.step(sound, t, audio)[0]

                latents, audio = self._commit_patch(latents_before_pass, latents, audio)
                if not self._step_is_complete():
                    continue

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
