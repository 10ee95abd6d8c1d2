# facts: {"cfg_style": "batched", "cfg_axes": {"x": "items", "control": 0}, "helpers": ["controlnet"], "cfg_helper_axes": {"controlnet": {"x": "items", "t": 0}}}
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
                control = self.controlnet(both, t.repeat(2))
                out = self.transformer(both, t.repeat(2), control=control)[0]
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
