# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [[2, 1], [3, 2], [4, 2]], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        height, width = (
            hidden_states.shape[-2] // self.config.patch_size,
            hidden_states.shape[-1] // self.config.patch_size,
        )
        # to tokens
        hidden_states = self.embed(hidden_states)

        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, context)
            else:
                # one block
                hidden_states = block(hidden_states, context)

        # to pixels
        hidden_states = self.norm_out(hidden_states)
        output = self.proj_out(hidden_states).reshape(height, width)

        if not return_dict:
            return (output,)
        return Output(sample=output)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        height, width = (
            hidden_states.shape[-2] // self.config.patch_size,
            hidden_states.shape[-1] // self.config.patch_size,
        )
        # to tokens
        hidden_states = self.embed(hidden_states)

        region = self._begin_region(
            "blocks", {"hidden_states": hidden_states.shape[1]}, latents="hidden_states", rows={2: 1, 3: 2, 4: 2}
        )
        hidden_states = region.shard(hidden_states, 1, "hidden_states")
        for block in self.blocks:
            hidden_states = region.hand_over(hidden_states)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, context)
            else:
                # one block
                hidden_states = block(hidden_states, context)
        hidden_states = region.gather(hidden_states, 1, "hidden_states")

        # to pixels
        hidden_states = self.norm_out(hidden_states)
        output = self.proj_out(hidden_states).reshape(height, width)

        if not return_dict:
            return (output,)
        return Output(sample=output)
