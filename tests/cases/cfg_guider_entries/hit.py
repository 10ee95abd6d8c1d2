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
                entries = self.guider.prepare_inputs({"prompt_embeds": (prompt_embeds, negative_prompt_embeds)})
                # one call each
                for entry in entries:
                    self.guider.prepare_models(self.transformer)
                    given = {"prompt_embeds": entry.prompt_embeds}
                    entry.noise_pred = self.transformer(latents, **given)[0]
                noise_pred = self.guider(entries)[0]
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
                entries = self.guider.prepare_inputs({"prompt_embeds": (prompt_embeds, negative_prompt_embeds)})
                # one call each
                for entry in self._cfg_entries(entries, "noise_pred"):
                    self.guider.prepare_models(self.transformer)
                    given = {"prompt_embeds": entry.prompt_embeds}
                    entry.noise_pred = self._cfg_entry_call(self.transformer)(latents, **given)[0]
                self._check_guider(self.guider)
                noise_pred = self.guider(entries)[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
