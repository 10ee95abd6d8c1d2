class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()

    @torch.no_grad()
    def __call__(self, prompt: str, height=512, width=512, num_inference_steps=8, output_type="pil"):
        poses = self.trajectory(height, width)

        # one text
        prompt_embeds = self.encode_prompt(prompt)
        latents = self.prepare_latents(poses)
        for i, t in enumerate(self.scheduler.timesteps):
            noise_pred = self.transformer(latents, timestep=t, prompt_embeds=prompt_embeds)[0]
            latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

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
    def __call__(self, prompt: str, height=512, width=512, num_inference_steps=8, output_type="pil"):
        poses = self.trajectory(height, width)

        # the runtime derives shapes and the order of passes from these
        get_runtime_state().set_input_parameters(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
        )

        # one text
        prompt_embeds = self.encode_prompt(prompt)
        latents = self.prepare_latents(poses)
        for i, t in enumerate(self.scheduler.timesteps):
            noise_pred = self.transformer(latents, timestep=t, prompt_embeds=prompt_embeds)[0]
            latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

        if output_type == "latent":
            return latents

        # back to pixels
        image = self.vae.decode(latents)
        self.maybe_free_model_hooks()
        return image
