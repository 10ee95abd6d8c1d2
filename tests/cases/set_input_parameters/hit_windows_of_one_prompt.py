class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt, height=512, num_inference_steps=8, output_type="pil"):
        width = self.width_of(height)
        out = []

        # one window after the other
        for start in self.windows(height):
            latents = self.prepare_latents(start, height, width)
            for i, t in enumerate(self.scheduler.timesteps):
                noise_pred = self.transformer(latents, timestep=t, prompt_embeds=prompt)[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
            out.append(latents)

        if output_type == "latent":
            return out

        # back to pixels
        image = self.vae.decode(out)
        self.maybe_free_model_hooks()
        return image
# output
class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt, height=512, num_inference_steps=8, output_type="pil"):
        width = self.width_of(height)
        out = []

        # the runtime derives shapes and the order of passes from these
        get_runtime_state().set_input_parameters(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
        )

        # one window after the other
        for start in self.windows(height):
            latents = self.prepare_latents(start, height, width)
            for i, t in enumerate(self.scheduler.timesteps):
                noise_pred = self.transformer(latents, timestep=t, prompt_embeds=prompt)[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
            out.append(latents)

        if output_type == "latent":
            return out

        # back to pixels
        image = self.vae.decode(out)
        self.maybe_free_model_hooks()
        return image
