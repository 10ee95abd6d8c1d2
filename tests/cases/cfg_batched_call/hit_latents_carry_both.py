# facts: {"cfg_style": "carried", "cfg_axes": {"labels": 0, "t": 0, "x": 0}}
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
                half = latents[: len(latents) // 2]
                latents = torch.cat([half, half], dim=0)
                out = self.transformer(latents, t.expand(len(latents)), labels)[0]
                cond, uncond = torch.split(out, len(out) // 2, dim=0)
                half = uncond + self.guidance_scale * (cond - uncond)
                latents = self.scheduler.step(torch.cat([half, half]), t, latents, return_dict=False)[0]

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
                half = latents[: len(latents) // 2]
                latents = torch.cat([half, half], dim=0)
                cfg_transformer = self._cfg_batched_call(
                    self.transformer, {"labels": 0, "t": 0, "x": 0}, latents.shape[0] // 2
                )
                out = cfg_transformer(latents, t.expand(len(latents)), labels)[0]
                cond, uncond = torch.split(out, len(out) // 2, dim=0)
                half = uncond + self.guidance_scale * (cond - uncond)
                latents = self.scheduler.step(torch.cat([half, half]), t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
