class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=8, output_type="pil"):
        batch_size = len(prompt)
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        # the loop
        history = []
        for chunk in chunks:
            latents = self.prepare_latents(batch_size, history)
            for i, t in enumerate(timesteps):
                noise_pred = self.transformer(latents, timestep=t, prompt_embeds=prompt_embeds)[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

            history.append(noise_pred.mean())

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
