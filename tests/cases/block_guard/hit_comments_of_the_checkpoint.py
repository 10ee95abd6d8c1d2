# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
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
                hidden_states = self._gradient_checkpointing_func(
                    block,
                    hidden_states,
                    context,  # the text
                    None,  # no mask here
                )
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

        for block in self.blocks:
            # the text
            # no mask here
            if region.owns(block):
                # one block
                hidden_states = block(hidden_states, context)

        # to pixels
        hidden_states = self.norm_out(hidden_states)
        output = self.proj_out(hidden_states).reshape(height, width)

        if not return_dict:
            return (output,)
        return Output(sample=output)
