# facts: {"cfg_style": "batched", "cfg_axes": {"cap_feats": "items", "t": 0, "x": "items"}}
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
                both = list(latents.repeat(2, 1, 1, 1).unbind(dim=0))
                out = self.transformer(both, t.repeat(2), prompt_embeds + negative_prompt_embeds)[0]
                noise_pred = []
                for j in range(batch_size):
                    noise_pred.append(out[j] + self.guidance_scale * (out[j] - out[j + batch_size]))
                latents = self.scheduler.step(torch.stack(noise_pred), t, latents, return_dict=False)[0]

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
                both = list(latents.repeat(2, 1, 1, 1).unbind(dim=0))
                cfg_transformer = self._cfg_batched_call(
                    self.transformer, {"cap_feats": "items", "t": 0, "x": "items"}
                )
                out = cfg_transformer(both, t.repeat(2), prompt_embeds + negative_prompt_embeds)[0]
                noise_pred = []
                for j in range(batch_size):
                    noise_pred.append(out[j] + self.guidance_scale * (out[j] - out[j + batch_size]))
                latents = self.scheduler.step(torch.stack(noise_pred), t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
