# facts: {"cfg_style": "sequential", "cfg_axes": {}}
class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=8, output_type="pil"):
        batch_size = len(prompt)
        model = self.transformer
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                with model.cache_context("cond"):
                    cond = model(torch.cat([latents, picture], dim=1), prompt_embeds)[0]
                    cond = cond[:, : latents.size(1)]
                if self.do_classifier_free_guidance and t > 0:
                    with model.cache_context("uncond"):
                        uncond = model(torch.cat([latents, picture], dim=1), negative_prompt_embeds)[0]
                    uncond = uncond[:, : latents.size(1)]
                    cond = uncond + scale * (cond - uncond)
                noise_pred = cond
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
        model = self.transformer
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(batch_size)

        # the loop
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                with model.cache_context("cond"):
                    cond = self._cfg_branch_call(model, 0, self.do_classifier_free_guidance and t > 0)(
                        torch.cat([latents, picture], dim=1), prompt_embeds
                    )[0]
                    cond = cond[:, : latents.size(1)]
                if self.do_classifier_free_guidance and t > 0:
                    with model.cache_context("uncond"):
                        uncond = self._cfg_branch_call(model, 1, True)(
                            torch.cat([latents, picture], dim=1), negative_prompt_embeds
                        )[0]
                    uncond = uncond[:, : latents.size(1)]
                    cond, uncond = self._cfg_exchange_branches(cond, uncond)
                    cond = uncond + scale * (cond - uncond)
                noise_pred = cond
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                progress_bar.update()

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
